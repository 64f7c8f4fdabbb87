"""`mlxlite.config`: sources of a value, refusals, and secrets that are never shown."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tables import flag_table

import mlxlite
from mlxlite.config.flags import ConfigError
from mlxlite.config.options import NO_PRIORITY_LIMIT, Config, parse_args
from mlxlite.vision.fetch import Limits
from mlxlite.vision.images import MAX_BYTES, MAX_IMAGES

ROOT = Path(__file__).parents[2]
HEAVY = {"mlx", "mlx_lm", "transformers", "numpy", "h11", "orjson", "huggingface_hub", "asyncio"}

# The command line of the launching app, for the first server and for this one.
LAUNCH = [
    *("--model", "/models/qwen/model.safetensors", "--port", "3417", "--model-id", "qwen"),
    *("--ctx-size", "8192", "--api-key", "s3cret"),
    *("--max-batch-size", "4", "--batch-timeout-ms", "50", "--kv-block-size", "32"),
    *("--enable-continuous-batching", "--enable-prefix-caching", "--embedding"),
]

BAD_VALUES = [
    ("port", "65536", "must be between 0 and 65535"),
    ("port", "-1", "must be between 0 and 65535"),
    ("port", "http", "must be a whole number"),
    ("port", "", "must be a whole number"),
    ("host", "", "must be text, not empty"),
    ("ctx-size", "-4", "must be at least 0"),
    ("ctx-size", "4.5", "must be a whole number"),
    ("max-tokens", "-1", "must be at least 0"),
    ("max-batch-size", "-1", "must be at least 0"),
    ("batch-timeout-ms", "-1", "must be at least 0"),
    ("max-queue", "0", "must be at least 1"),
    ("prefill-chunk-size", "0", "must be at least 1"),
    ("kv-block-size", "0", "must be at least 1"),
    ("prefix-cache-scope", "user", "must be one of shared, key"),
    ("enable-prefix-caching", "maybe", "must be true or false"),
    ("max-body-mb", "0", "must be at least 1"),
    ("max-connections", "0", "must be at least 1"),
    ("allow-remote-images", "maybe", "must be true or false"),
    ("max-images", "0", "must be between 1 and 64"),
    ("max-images", "65", "must be between 1 and 64"),
    ("max-image-pixels", "0", "must be at least 1"),
    ("max-image-mb", "0", "must be between 1 and 32"),
    ("max-image-mb", "33", "must be between 1 and 32"),
    ("kv-block-size", "0", "must be at least 1"),
    ("kv-bits", "3", "must be one of 0, 4, 8"),
    ("kv-bits", "eight", "must be a whole number"),
    ("kv-group-size", "48", "must be one of 32, 64, 128"),
    ("memory-limit", "lots", "must be a size such as 12GB"),
    ("memory-limit", "-1GB", "must be a size such as 12GB"),
    ("memory-limit", "1.GB", "must be a size such as 12GB"),
    ("memory-limit", "12 G B", "must be a size such as 12GB"),
    ("memory-limit", "12PB", "must be a size such as 12GB"),
    ("repetition-guard", "-1", "must be at least 0"),
    ("repetition-guard", "1.5", "must be a whole number"),
    ("request-timeout-s", "-1", "must be at least 0"),
    ("request-timeout-s", "nan", "must be a finite number"),
    ("shutdown-grace-s", "-0.5", "must be at least 0"),
    ("shutdown-grace-s", "inf", "must be a finite number"),
    ("shutdown-grace-s", "nan", "must be a finite number"),
    ("shutdown-grace-s", "soon", "must be a finite number"),
    ("log-level", "verbose", "must be one of debug, info, warning, error"),
    ("cors-origins", "localhost", "must be an origin such as http://localhost"),
    ("cors-origins", "http://a,http://b/path", "must be an origin such as http://localhost"),
    ("embedding", "maybe", "must be true or false"),
]


def from_args(*argv: str, **environ: str) -> Config:
    return Config.from_args(argv, environ)


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MLXLITE_", "MLX_API"))}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )


def help_command() -> list[str]:
    if find_spec("mlxlite.__main__") is not None:
        return ["-m", "mlxlite", "--help"]
    return ["-c", "from mlxlite.config import parse_args; parse_args(['--help'], {})"]


# --- the source of a value ---


def test_without_flags_and_environment_everything_is_the_default() -> None:
    config = from_args()
    assert config == Config()
    assert (config.model, config.host, config.port) == (None, "127.0.0.1", 8080)
    assert (config.max_batch_size, config.enable_continuous_batching) == (8, True)
    assert config.api_keys() == ()
    assert (config.strict_model_id, config.embedding) == (False, False)


def test_image_limits_are_those_of_the_image_loader_and_no_url_is_fetched() -> None:
    config, limits = from_args(), Limits()
    assert (config.max_images, config.max_image_pixels) == (limits.max_images, limits.max_pixels)
    assert (config.max_image_mb << 20, config.allow_remote_images) == (limits.max_bytes, False)
    assert not limits.allow_remote
    most = from_args("--max-images", str(MAX_IMAGES), "--max-image-mb", str(MAX_BYTES >> 20))
    assert (most.max_images, most.max_image_mb << 20) == (MAX_IMAGES, MAX_BYTES)


def test_a_flag_beats_the_environment_which_beats_the_default() -> None:
    assert from_args(MLXLITE_PORT="81").port == 81
    assert from_args("--port", "82", MLXLITE_PORT="81").port == 82
    assert from_args("--port=82", MLXLITE_PORT="not even a number").port == 82


def test_of_a_repeated_flag_the_last_one_counts() -> None:
    assert from_args("--port", "1", "--port", "2").port == 2


def test_every_field_can_be_set_by_its_flag_and_by_its_variable() -> None:
    of_type: dict[Any, tuple[str, object]] = {
        bool: ("true", True),
        int: ("7", 7),
        float: ("0.5", 0.5),
        str | None: ("x", "x"),
        tuple[str, ...]: ("http://a,http://b", ("http://a", "http://b")),
    }
    of_name: dict[str, tuple[str, object]] = {
        "host": ("::1", "::1"),
        "log_level": ("error", "error"),
        "kv_bits": ("8", 8),
        "kv_group_size": ("32", 32),
        "memory_limit": ("12GB", "12GB"),
        "wired_limit": ("6GB", "6GB"),
        "prefix_cache_bytes": ("2GB", "2GB"),
        "prefix_cache_disk_bytes": ("3GB", "3GB"),
        "prefix_cache_scope": ("key", "key"),
        "uds_mode": ("660", "660"),
        "allowed_hosts": ("a.local,*", ("a.local", "*")),
    }
    for f in dataclasses.fields(Config):
        raw, value = of_name.get(f.name) or of_type[f.type]
        beside = ["--tls-cert=x"] if f.name == "tls_key" else []  # which it needs
        by_flag = from_args(*beside, f"--{f.name.replace('_', '-')}={raw}")
        by_variable = Config.from_args(beside, {f"MLXLITE_{f.name.upper()}": raw})
        assert by_flag == by_variable
        assert getattr(by_flag, f.name) == value


def test_an_empty_variable_counts_as_unset() -> None:
    assert from_args(MLXLITE_PORT="", MLXLITE_EMBEDDING="", MLX_API_KEY="") == Config()


def test_variables_of_other_programs_are_ignored() -> None:
    assert from_args(PORT="1", MLXLITE_SERVICE_HOST="10.0.0.1", MLX_PORT="2") == Config()


def test_the_launching_apps_command_line_is_understood() -> None:
    config = from_args(*LAUNCH)
    assert config.model == "/models/qwen/model.safetensors"
    assert (config.port, config.model_id, config.ctx_size) == (3417, "qwen", 8192)
    assert config.api_keys() == ("s3cret",)
    assert (config.max_batch_size, config.batch_timeout_ms) == (4, 50)
    assert config.enable_continuous_batching
    assert (config.enable_prefix_caching, config.kv_block_size) == (True, 32)


def test_the_empty_strings_that_are_the_seeds_defaults_mean_none() -> None:
    assert from_args("--api-key", "", "--chat-template", "").chat_template is None
    assert from_args("--api-key", "").api_key == ()


@pytest.mark.parametrize(
    ("raw", "num_bytes"),
    [
        ("12GB", 12_000_000_000),
        ("12gb", 12_000_000_000),
        ("12 G", 12_000_000_000),
        ("1.5 TB", 1_500_000_000_000),
        ("500m", 500_000_000),
        ("0.5K", 500),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_a_size_is_a_number_with_a_unit_of_powers_of_1000(raw: str, num_bytes: int) -> None:
    assert from_args("--memory-limit", raw).memory_limit_bytes() == num_bytes
    assert from_args(MLXLITE_MEMORY_LIMIT=raw).memory_limit_bytes() == num_bytes


def test_without_a_size_the_device_decides() -> None:
    assert from_args().memory_limit_bytes() is None


@pytest.mark.parametrize("raw", ["12GiB", "12Gi", "1 KiB", "5MiB"])
def test_a_binary_unit_means_powers_of_1024_or_is_refused(raw: str) -> None:
    powers = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = re.fullmatch(r"(\d+) ?([KMG])iB?", raw).groups()  # type: ignore[union-attr]
    try:
        num_bytes = from_args("--memory-limit", raw).memory_limit_bytes()
    except ConfigError:
        return
    assert num_bytes == int(number) * powers[unit]


@pytest.mark.parametrize("raw", ["12i", "12iB", "9" * 400, "٣GB"])
def test_an_odd_size_is_refused_by_its_flag(raw: str) -> None:
    with pytest.raises(ConfigError, match=r"^--memory-limit: must be "):
        from_args("--memory-limit", raw)


def test_a_memory_limit_of_nothing_is_no_silent_default() -> None:
    """To the loader, a limit of 0 bytes means none."""
    with pytest.raises(ConfigError, match=r"^--memory-limit: must be "):
        from_args("--memory-limit", "0")


# The flags of sizes, and the methods that return their bytes.
SIZES: dict[str, Callable[[Config], int | None]] = {
    "--memory-limit": Config.memory_limit_bytes,
    "--prefix-cache-bytes": Config.prefix_bytes,
    "--prefix-cache-disk-bytes": Config.prefix_disk_bytes,
}


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_the_same_units_and_refusals(name: str) -> None:
    config = from_args(name, "1.5 GB", "--prefix-cache-dir", "/a/dir")
    assert SIZES[name](config) == 1_500_000_000
    for raw in ("12 apples", "0", "-1", "9" * 400):
        with pytest.raises(ConfigError, match=rf"^{name}: must be a size such as 12GB"):
            from_args(name, raw)


def test_by_default_prefixes_are_cached_in_memory_and_shared() -> None:
    config = from_args()
    assert (config.enable_prefix_caching, config.kv_block_size) == (True, 16)
    assert (config.prefix_cache_bytes, config.prefix_bytes()) == (None, None)
    assert (config.prefix_cache_dir, config.prefix_cache_disk_bytes) == (None, "10GB")
    assert config.prefix_cache_scope == "shared"
    assert from_args("--no-enable-prefix-caching").enable_prefix_caching is False
    assert from_args("--prefix-cache-bytes", "2GB").prefix_bytes() == 2_000_000_000
    assert from_args("--prefix-cache-scope", "key").prefix_cache_scope == "key"


def test_nothing_is_kept_on_disk_without_a_directory_or_without_a_cache() -> None:
    assert from_args("--prefix-cache-disk-bytes", "5GB").prefix_disk_bytes() == 0
    assert from_args("--prefix-cache-dir", "/a/dir").prefix_disk_bytes() == 10_000_000_000
    off = from_args("--prefix-cache-dir", "/a/dir", "--no-enable-prefix-caching")
    assert off.prefix_disk_bytes() == 0


def test_optional_features_are_off_by_default() -> None:
    config = from_args()
    assert (config.kv_bits, config.kv_group_size) == (0, 64)
    assert (config.adapter_path, config.memory_limit) == (None, None)
    assert config.request_timeout_s == 0
    config = from_args("--kv-bits", "4", "--kv-group-size", "32", "--request-timeout-s", "1.5")
    assert (config.kv_bits, config.kv_group_size, config.request_timeout_s) == (4, 32, 1.5)
    assert from_args("--adapter-path", "/a/lora").adapter_path == "/a/lora"


def test_the_model_has_a_short_flag() -> None:
    assert from_args("-m", "org/name").model == "org/name"
    assert from_args("-morg/name").model == "org/name"


# --- booleans ---


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--enable-continuous-batching"], True),
        (["--no-enable-continuous-batching"], False),
        (["--enable-continuous-batching", "true"], True),
        (["--enable-continuous-batching", "false"], False),
        (["--enable-continuous-batching", "1"], True),
        (["--enable-continuous-batching", "0"], False),
        (["--enable-continuous-batching=true"], True),
        (["--enable-continuous-batching=FALSE"], False),
        (["--enable-continuous-batching", "--port", "1"], True),
        (["--enable-continuous-batching", "--no-enable-continuous-batching"], False),
        (["--no-enable-continuous-batching", "--enable-continuous-batching"], True),
    ],
)
def test_a_boolean_is_bare_or_negated_or_has_a_value(argv: list[str], expected: bool) -> None:
    assert from_args(*argv).enable_continuous_batching is expected


@pytest.mark.parametrize(
    ("raw", "expected"), [("true", True), ("1", True), ("False", False), ("0", False)]
)
def test_a_boolean_variable_has_the_same_values(raw: str, expected: bool) -> None:
    config = from_args(MLXLITE_ENABLE_CONTINUOUS_BATCHING=raw)
    assert config.enable_continuous_batching is expected


def test_a_negation_beats_the_environment() -> None:
    assert not from_args("--no-embedding", MLXLITE_EMBEDDING="1").embedding


def test_a_negation_takes_no_value() -> None:
    with pytest.raises(ConfigError, match="unexpected argument 'true'"):
        from_args("--no-embedding", "true")
    with pytest.raises(ConfigError, match="--no-embedding"):
        from_args("--no-embedding=true")


# --- refusals ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--max-batchsize", "8"],
            "unknown flag --max-batchsize; did you mean --max-batch-size?",
        ),
        (["--max-batchsize=8"], "unknown flag --max-batchsize; did you mean --max-batch-size?"),
        (["--no-embeding"], "unknown flag --no-embeding; did you mean --no-embedding?"),
        (["--zzz"], "unknown flag --zzz"),
        (["-q"], "unknown flag -q"),
        (["model"], "unexpected argument 'model'"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_args(*argv)
    assert str(caught.value) == message


@pytest.mark.parametrize("abbreviation", ["--max-batch", "--por", "--enable-prefix"])
def test_abbreviations_are_unknown_flags(abbreviation: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown flag {abbreviation}"):
        from_args(abbreviation, "1")


@pytest.mark.parametrize("flag", ["--port", "--model", "--api-key"])
def test_a_flag_without_its_value_is_refused_by_name(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}.*expected one argument"):
        from_args(flag)
    with pytest.raises(ConfigError, match=f"{flag}.*expected one argument"):
        from_args(flag, "--embedding")


@pytest.mark.parametrize(("name", "raw", "complaint"), BAD_VALUES)
def test_a_bad_flag_is_named_with_its_value(name: str, raw: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_args(f"--{name}", raw)
    assert str(caught.value).startswith(f"--{name}: {complaint}, not ")


@pytest.mark.parametrize(("name", "raw", "complaint"), [bad for bad in BAD_VALUES if bad[1]])
def test_a_bad_variable_is_named_with_its_value(name: str, raw: str, complaint: str) -> None:
    variable = f"MLXLITE_{name.upper().replace('-', '_')}"
    with pytest.raises(ConfigError) as caught:
        Config.from_args([], {variable: raw})
    assert str(caught.value).startswith(f"{variable}: {complaint}, not ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 65536),
        ("port", "8080"),
        ("port", True),
        ("port", 8080.0),
        ("host", ""),
        ("model", ""),
        ("model", Path("model")),
        ("embedding", 1),
        ("max_queue", 0),
        ("shutdown_grace_s", float("nan")),
        ("shutdown_grace_s", True),
        ("log_level", "verbose"),
        ("kv_bits", 3),
        ("kv_bits", True),
        ("kv_group_size", 0),
        ("memory_limit", "12 apples"),
        ("memory_limit", 12),
        ("kv_block_size", 0),
        ("prefix_cache_bytes", "12 apples"),
        ("prefix_cache_disk_bytes", None),
        ("prefix_cache_dir", ""),
        ("prefix_cache_scope", "tenant"),
        ("uds_mode", "rw-------"),
        ("uds_mode", "6600"),
        ("tls_cert", ""),
        ("request_timeout_s", -1),
        ("adapter_path", ""),
        ("api_key", "a plain string would be one key a character"),
        ("api_key", ["k"]),
        ("cors_origins", ("localhost",)),
    ],
)
def test_a_config_made_directly_is_validated_too(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: must be "):
        Config(**{field: value})  # type: ignore[arg-type]


def test_a_config_can_be_made_directly_and_not_changed() -> None:
    config = Config(model="org/name", port=0, shutdown_grace_s=2)
    assert (config.model, config.port) == ("org/name", 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from(LAUNCH), max_size=6))
def test_any_command_line_gives_a_config_or_a_config_error(argv: list[str]) -> None:
    assume(not any(arg.startswith("-h") for arg in argv))
    try:
        config = Config.from_args(argv, {})
    except ConfigError:
        return
    assert dataclasses.replace(config) == config


# --- hosts ---


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "0", "127.0.0.1.nip.io"]
)
def test_a_public_host_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {re.escape(host)} can be reached.*--api-key"):
        from_args("--host", host)
    with pytest.raises(ConfigError, match="no API key"):
        Config(host=host)
    with pytest.raises(ConfigError, match="no API key"):
        from_args("--host", host, "--api-key", "", MLX_API_KEY="k")


def test_a_public_host_with_a_key_is_accepted(tmp_path: Path) -> None:
    assert not from_args("--host", "0.0.0.0", "--api-key", "k").is_loopback
    assert not from_args("--host", "0.0.0.0", MLX_API_KEY="k").is_loopback
    assert not from_args("--host", "0.0.0.0", "--api-key-file", str(tmp_path)).is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LocalHost"])
def test_a_loopback_host_needs_no_key(host: str) -> None:
    assert from_args("--host", host).is_loopback


# --- keys ---


def test_keys_are_repeated_or_separated_by_commas() -> None:
    assert from_args("--api-key", "a, b,,", "--api-key=c").api_key == ("a", "b", "c")
    assert from_args(MLXLITE_API_KEY="a,b").api_key == ("a", "b")


def test_keys_are_read_from_mlx_api_key_unless_mlxlite_api_key_is_set() -> None:
    assert from_args(MLX_API_KEY="seed").api_keys() == ("seed",)
    assert from_args(MLX_API_KEY="seed", MLXLITE_API_KEY="ours").api_keys() == ("ours",)
    assert from_args("--api-key", "flag", MLX_API_KEY="seed").api_keys() == ("flag",)


def test_a_key_may_begin_with_a_dash() -> None:
    assert from_args("--api-key", "-Zm9v", "--port", "1").api_key == ("-Zm9v",)


def test_the_key_file_adds_one_key_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("\ufeffone\r\n\n  two\none\n".encode())
    config = from_args("--api-key", "zero,two", "--api-key-file", str(file))
    assert config.api_key == ("zero", "two")
    assert config.api_keys() == ("zero", "two", "one")


def test_several_keys_have_a_limit_of_priority_and_one_key_has_none(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("admin  -10\nguest 5\nplain\ntwo\n")
    named = ("--api-key", "one,two", "--api-key-file", str(file))
    limits = {"one": 0, "two": 0, "admin": -10, "guest": 5, "plain": 0}
    assert from_args(*named).priority_limits() == limits
    assert from_args(*named, "--max-priority", "-3").priority_limits()["plain"] == -3
    assert from_args(*named, "--max-priority", "-3").priority_limits()["admin"] == -10
    assert from_args(*named).api_keys() == tuple(limits)
    assert from_args("--api-key", "one").priority_limits() == {"one": NO_PRIORITY_LIMIT}
    assert from_args("--max-priority", "-3").priority_limits() == {"": NO_PRIORITY_LIMIT}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"good\nkey -\n", "line 2 must be visible ASCII"),
        (b"good 1.5\n", "line 1 must be visible ASCII"),
        (b"good 1 2\n", "line 1 must be visible ASCII"),
        (b"", "holds no key"),
        (b"\n \n", "holds no key"),
        (b"good\ntwo words\n", "line 2 must be visible ASCII"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_a_key_file_without_usable_keys_is_an_error_and_not_no_keys(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    config = from_args("--api-key", "k", "--api-key-file", str(file))
    with pytest.raises(ConfigError, match=f"--api-key-file .*keys: {reason}") as caught:
        config.api_keys()
    assert "words" not in str(caught.value)


def test_a_repr_hides_the_keys() -> None:
    config = from_args("--api-key", "s3cret", "--api-key-file", "/etc/keys")
    assert "s3cret" not in repr(config)
    assert "/etc/keys" in repr(config)


def test_no_message_repeats_a_key() -> None:
    for argv in (["--api-key", "s3cret ключ"], ["--apikey=s3cret"], ["--api-keys", "s3cret"]):
        with pytest.raises(ConfigError) as caught:
            from_args(*argv)
        assert "s3cret" not in str(caught.value)
        assert "--api" in str(caught.value)


# --- flags without an effect ---


def test_the_embedding_flag_is_accepted_and_documented_as_without_effect() -> None:
    assert from_args(*LAUNCH).embedding
    (row,) = [row for row in flag_table().splitlines() if "`--embedding`" in row]
    assert "no effect" in row
    assert "/v1/embeddings is always served" in row


# --- help and errors ---


def test_help_and_version_exit_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, expected in (("--help", "--max-batch-size ROWS"), ("-h", "MLXLITE_PORT")):
        with pytest.raises(SystemExit) as left:
            from_args("--unknown", flag)
        assert left.value.code == 0
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        from_args("--version")
    assert left.value.code == 0
    assert capsys.readouterr().out == f"mlxlite {mlxlite.__version__}\n"


def test_help_and_the_table_show_every_flag_its_default_and_its_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        from_args("--help")
    help_text = " ".join(capsys.readouterr().out.split())
    table = flag_table()
    for f in dataclasses.fields(Config):
        flag = f.metadata["flag"]
        name, variable = f"--{f.name.replace('_', '-')}", f"MLXLITE_{f.name.upper()}"
        assert f" {name} " in help_text
        assert flag.help in help_text
        assert f"env: {variable}" in help_text
        assert flag.heading is None or f"{flag.heading}:" in help_text
        assert re.search(rf"^\| .*`{name}` \| .+ \| .*`{variable}`.* \| .+ \|$", table, re.M)


def test_every_row_of_the_table_has_four_cells() -> None:
    for row in flag_table().splitlines():
        assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_a_program_ends_with_status_2_and_the_reason_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        parse_args(["--max-batchsize", "8"], {})
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "mlxlite: error: unknown flag --max-batchsize; did you mean --max-batch-size?\n"
    )


def test_help_imports_nothing_heavy() -> None:
    result = run_python("-X", "importtime", *help_command())
    assert result.returncode == 0, result.stderr
    assert "--max-batch-size" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "mlxlite.config" in imported
    assert HEAVY.isdisjoint(name.partition(".")[0] for name in imported)


def test_the_package_imports_its_public_names_on_first_use() -> None:
    code = (
        "import sys, mlxlite; "
        "assert 'mlxlite.config' not in sys.modules; "
        "from mlxlite import Config; "
        "assert Config.__module__ == 'mlxlite.config.options'; "
        "assert 'mlxlite.server' not in sys.modules and 'mlx' not in sys.modules"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="no attribute 'Sever'"):
        mlxlite.Sever  # noqa: B018
