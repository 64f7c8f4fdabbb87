"""Finding, downloading and loading a model, and turning messages into prompts.

The models are tiny random checkpoints, the hub is a local one under the real huggingface_hub, and
everything that a checkpoint can have wrong must end in a LoadError that says what to do.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest
from checkpoints import CHAT_TEMPLATE, save_checkpoint, save_tokenizer
from fakehub import BAD_TOKEN, BUSY, GATED, Hub, Refusal
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Prompt
from mlxlite.models.interface import LoadError, PromptError
from mlxlite.models.load import Model, load
from mlxlite.models.locate import DEMO_PATH, locate
from mlxlite.output.detokenizer import TextStream
from mlxlite.output.grammar import Constraint, ConstraintError, Kind
from mlxlite.output.markers import PARSE_ERRORS, Markers

SECRET = "hf_aVerySecretTokenThatNobodyMaySee"
HELLO = [{"role": "user", "content": "Hello"}]
IM_END = 322  # of the tiny checkpoint's tokenizer, like every id here
NUM_TOKENS = 323


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test's own, to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load(Config(model=str(checkpoint)))


def edit(path: Path, **changes: Any) -> Path:
    """Change settings of a JSON file, made if need be; None drops one. Gives its directory."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    path.write_text(json.dumps(settings))
    return path.parent


def loaded(path: Path | str, **flags: Any) -> Model:
    return load(Config(model=str(path), **flags))


def complaint(name: Path | str, **flags: Any) -> str:
    """What a model cannot be loaded for: one line of bounded length, for a person."""
    with pytest.raises(LoadError) as caught:
        loaded(name, **flags)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert SECRET not in text
    assert len(text) < 1000
    return text


def prompt_text(model: Model, prompt: Prompt) -> str:
    """What a prompt says, special tokens included."""
    return str(model.tokenizer.decode(list(prompt.tokens)))


def rendered(model: Model, *messages: tuple[str, Any], **kwargs: Any) -> str:
    dicts = [{"role": role, "content": content} for role, content in messages]
    return prompt_text(model, model.render(dicts, kwargs, is_continuation=False))


def continued(model: Model, *messages: tuple[str, Any]) -> str:
    dicts = [{"role": role, "content": content} for role, content in messages]
    return prompt_text(model, model.render(dicts, {}, is_continuation=True))


# --- where a model is -------------------------------------------------------------------------


def test_without_a_name_it_is_the_demo() -> None:
    assert locate(None) == DEMO_PATH


def test_a_directory_is_a_model(checkpoint: Path) -> None:
    model = loaded(checkpoint)
    assert model.path == checkpoint
    assert model.id == "tiny-qwen3"


def test_a_file_inside_a_directory_names_the_directory(checkpoint: Path) -> None:
    model = loaded(checkpoint / "model.safetensors")
    assert model.path == checkpoint
    assert model.id == "tiny-qwen3"


def test_a_tilde_is_the_home_directory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert locate(f"~/{checkpoint.name}") == checkpoint


def test_a_relative_path_is_a_path_even_if_it_could_be_an_id(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent.parent)
    assert locate(f"{checkpoint.parent.name}/{checkpoint.name}").resolve() == checkpoint.resolve()


def test_the_operator_names_the_model(checkpoint: Path) -> None:
    assert loaded(checkpoint, model_id="my-model").id == "my-model"


def test_shards_are_found_by_their_names_whatever_the_index_says(copy: Path, model: Model) -> None:
    """The app saves the first shard as model.safetensors; the index names a file that is not there.

    The fingerprint covers every weight, so an equal one means that none is missing.
    """
    weights = list(mx.load(str(copy / "model.safetensors")).items())
    half = len(weights) // 2
    mx.save_safetensors(str(copy / "model-00002-of-00002.safetensors"), dict(weights[half:]))
    first = copy / "model.safetensors"
    mx.save_safetensors(str(copy / "other.safetensors"), dict(weights[:half]))
    (copy / "other.safetensors").rename(first)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = {name: shards[number >= half] for number, (name, _) in enumerate(weights)}
    edit(copy / "model.safetensors.index.json", metadata={}, weight_map=names)
    assert loaded(first).fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/no/such/directory", "no such file or directory"),
        ("/no/such/model.safetensors", "no such file or directory"),
        ("./model", "no such file or directory"),
        ("model.safetensors", "no such file or directory"),
        ("owner/name/more", "no such file or directory"),
        ("https://huggingface.co/owner/name", "no such file or directory"),
        ("my model", "Hugging Face id (owner/name)"),
        ("-name", "Hugging Face id (owner/name)"),
        ("owner/na..me", "Hugging Face id (owner/name)"),
        ("nul\0byte", "Hugging Face id (owner/name)"),
        ("~no-such-user/model", "cannot be read"),
        ("a" * 5000, "cannot be read"),
    ],
)
def test_a_name_that_is_no_path_and_no_id_is_refused(name: str, why: str) -> None:
    with pytest.raises(LoadError) as caught:
        locate(name)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(checkpoint: Path) -> dict[str, bytes]:
    """A repository: a model, and what nobody should fetch."""
    wanted = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}
    more = {"chat_template.jinja": CHAT_TEMPLATE.encode()}
    more |= {name: name.encode() for name in ("merges.txt", "tiktoken.model")}
    names = ("model.py", "pytorch_model.bin", "model.gguf", "README.md", "x.pkl", "x.safetensors")
    return wanted | more | {name: f"{name} is not for us".encode() for name in names}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The real huggingface_hub, in this process, on an empty cache and without a network."""
    from huggingface_hub import close_session, constants

    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    path = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    point_to(nowhere, monkeypatch)
    close_session()
    yield path
    close_session()


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        point_to(hub.url, monkeypatch)
        yield hub


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def save_in_cache(cache: Path, repo: str, checkpoint: Path) -> Path:
    """Lay a checkpoint out as the hub's cache does: blobs, and links in a snapshot of a ref."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / "abc"
    for directory in (root / "refs", root / "blobs", snapshot):
        directory.mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_hugging_face_id_is_downloaded(
    hub: Hub, cache: Path, files: dict[str, bytes], model: Model
) -> None:
    hub.repos["owner/tiny-4.5"] = files
    downloaded = loaded("owner/tiny-4.5")
    assert downloaded.id == "owner/tiny-4.5"
    assert downloaded.path.is_relative_to(cache)
    assert downloaded.fingerprint == model.fingerprint


def test_only_what_mlx_lm_reads_is_fetched_and_no_code(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos["owner/tiny"] = files
    locate("owner/tiny")
    assert hub.fetched == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_hub_gets_the_token(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos["owner/tiny"] = files
    locate("owner/tiny")
    assert {call.authorization for call in hub.calls} == {f"Bearer {SECRET}"}


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos["owner/tiny"] = files
    path = locate("owner/tiny")
    hub.calls.clear()
    assert locate("owner/tiny") == path
    assert hub.fetched == []


def test_a_download_that_breaks_off_is_resumed_where_it_broke(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB
    hub.repos["owner/tiny"] = files
    hub.cuts["model.safetensors"] = [100_000, 50_000]
    path = locate("owner/tiny")
    ranges = [call.range for call in hub.calls if call.file == "model.safetensors"]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_download_that_fails_for_good_keeps_its_complete_files(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    hub.repos["owner/tiny"] = files
    hub.cuts["model.safetensors"] = [0] * 6
    text = complaint("owner/tiny")
    assert "the download failed" in text
    assert "try again" in text
    hub.calls.clear()
    locate("owner/tiny")
    assert hub.fetched == ["model.safetensors"]


def test_without_a_network_the_cache_is_enough(cache: Path, checkpoint: Path, model: Model) -> None:
    snapshot = save_in_cache(cache, "owner/tiny", checkpoint)
    cached = loaded("owner/tiny")
    assert cached.path == snapshot
    assert cached.fingerprint == model.fingerprint


def test_offline_nobody_is_asked(
    hub: Hub, cache: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_in_cache(cache, "owner/tiny", checkpoint)
    assert loaded("owner/tiny").id == "owner/tiny"
    assert hub.calls == []


def test_offline_and_not_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = complaint("owner/tiny")
    assert "cache" in text
    assert "HF_HUB_OFFLINE is set: unset it" in text


def test_no_network_and_not_in_the_cache(cache: Path) -> None:
    text = complaint("owner/tiny")
    assert "cache" in text
    assert "check the network" in text


def test_a_cache_with_a_file_missing_is_not_taken_for_the_model(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["owner/tiny"] = files
    (locate("owner/tiny") / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not all of it" in complaint("owner/tiny")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (GATED, ("gated", "accept its terms", "HF_TOKEN")),
        (None, ("no such path and no such repository", "HF_TOKEN")),
        (BAD_TOKEN, ("401", "check HF_TOKEN")),
        (BUSY, ("503", "check the network")),
    ],
    ids=["gated", "not found", "bad token", "busy"],
)
def test_a_refusal_of_the_hub_is_explained(
    hub: Hub, refusal: Refusal | None, words: tuple[str, ...]
) -> None:
    if refusal is not None:
        hub.repos["owner/tiny"] = refusal
    text = complaint("owner/tiny")
    for word in ("owner/tiny", *words):
        assert word in text


def test_a_repository_of_ggufs_is_no_mlx_model(hub: Hub) -> None:
    hub.repos["owner/tiny"] = {"model.gguf": b"GGUF", "README.md": b""}
    assert "no config.json" in complaint("owner/tiny")
    assert hub.fetched == []


def test_the_environment_says_where_the_hub_is_and_stderr_shows_the_progress(
    tmp_path: Path, files: dict[str, bytes], model: Model
) -> None:
    code = (
        "from mlxlite import Config; from mlxlite.models.load import load;"
        "print(load(Config(model='owner/tiny')).fingerprint)"
    )
    environ = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": SECRET}
    with Hub({"owner/tiny": files}) as hub:
        process = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | environ | {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"},
            cwd=DEMO_PATH.parent.parent,
            timeout=100,
        )
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{model.fingerprint}\n"
    assert "100%" in process.stderr
    assert SECRET not in process.stderr
    assert (tmp_path / "hub" / "models--owner--tiny").is_dir()


# --- what is no model -------------------------------------------------------------------------


def spoil_nothing_but(*names: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return spoil


def only_a_gguf(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / "model.gguf").write_bytes(b"GGUF")


def setting(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        edit(path / name, **changes)

    return spoil


def content(name: str, body: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).write_bytes(body)

    return spoil


def broken_merges(path: Path) -> None:
    """What the Rust tokenizers refuse with a bare Exception."""
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["no", "such"]]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (spoil_nothing_but("config.json"), r"no config\.json; give .*mlx_lm\.convert"),
    "only a gguf": (only_a_gguf, r"no config\.json \(GGUF files are not MLX models\); give "),
    "no model_type": (setting("config.json", model_type=None), "no model_type; give"),
    "odd model_type": (setting("config.json", model_type=["qwen3"]), "no model_type; give"),
    "no weights": (spoil_nothing_but("model.safetensors"), r"no model\*\.safetensors; give"),
    "no tokenizer": (spoil_nothing_but("tokenizer.json"), "no tokenizer .*; give"),
    "remote code": (setting("config.json", model_file="evil.py"), "never done: choose"),
    "unknown architecture": (
        setting("config.json", model_type="nonesuch"),
        r"nonesuch not supported; check .* mlx-lm \d",
    ),
    "no architecture at all": (setting("config.json", model_type="cache"), "check .* mlx-lm"),
    "a setting missing": (setting("config.json", hidden_size=None), "hidden_size.*; check"),
    "a setting absurd": (setting("config.json", num_attention_heads=0), "; check"),
    "config not JSON": (content("config.json", b"{"), r"config\.json cannot be read .* repair"),
    "config not UTF-8": (content("config.json", b'"\xff"'), r"config\.json cannot be read"),
    "config a list": (content("config.json", b"[]"), r"config\.json does not hold a JSON object"),
    "generation config not JSON": (
        content("generation_config.json", b"{"),
        r"generation_config\.json cannot be read .* repair",
    ),
    "generation config a list": (
        content("generation_config.json", b"[]"),
        r"generation_config\.json does not hold a JSON object",
    ),
    "weights cut off": (cut_weights, "corrupt file.*; check that the download is complete"),
    "weights empty": (content("model.safetensors", b""), "check that the download is complete"),
    "weights not safetensors": (content("model.safetensors", b"\xff" * 99), "check that"),
    "weights missing": (setting("config.json", num_hidden_layers=3), r"Missing 11 .*layers\.2\."),
    "weights superfluous": (setting("config.json", num_hidden_layers=1), r"not in model.*; check"),
    "weights of another shape": (setting("config.json", intermediate_size=64), "shape.*; check"),
    "tokenizer not JSON": (content("tokenizer.json", b"{"), r"tokenizer\.json.*; check"),
    "tokenizer of no kind": (content("tokenizer.json", b"{}"), "; check"),
    "tokenizer inconsistent": (broken_merges, "out of vocabulary.*; check"),
    "tokenizer settings not JSON": (content("tokenizer_config.json", b"{"), "; check"),
}


@pytest.mark.parametrize(("spoil", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_model_is_refused_with_what_to_do(
    copy: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(copy)
    text = complaint(copy)
    assert str(copy) in text
    assert re.search(words, text), text


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[malloc] Unable to allocate 9 bytes.")]
)
def test_too_little_memory_is_said_in_words_that_the_app_knows(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_model(path: Path) -> None:
        raise error

    monkeypatch.setattr("mlxlite.models.load.load_model", load_model)
    assert "insufficient memory" in complaint(checkpoint)


def test_code_in_a_checkpoint_is_not_run_and_nobody_is_asked(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str = "") -> str:
        raise AssertionError(f"transformers asks: {question}")

    monkeypatch.setattr("builtins.input", ask)
    (copy / "code.py").write_text("raise SystemExit('this is never run')")
    (copy / "configuration.py").write_text("raise SystemExit('this is never run')")
    auto = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "configuration.Config"}
    edit(copy / "config.json", auto_map=auto)
    edit(copy / "tokenizer_config.json", auto_map=auto, tokenizer_class="Tokenizer")
    with contextlib.suppress(LoadError):  # to refuse it and to load without it are both right
        loaded(copy)


# --- what a model says of itself --------------------------------------------------------------


def save_llama(path: Path, **changes: Any) -> Path:
    """A random llama of 1 layer, whose configuration need not name a context size."""
    path.mkdir()
    settings = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": save_tokenizer(path),
    } | changes
    edit(path / "config.json", **settings)
    network = llama.Model(llama.ModelArgs.from_dict(settings))
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def test_the_context_is_as_long_as_the_model_was_made_for(model: Model) -> None:
    assert model.context_size == 512


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"max_position_embeddings": 777}, 777),
        ({"n_ctx": 333}, 333),
        ({"text_config": {"max_position_embeddings": 555}}, 555),
        ({"max_position_embeddings": 777, "text_config": {"n_ctx": 5}}, 777),
        ({"max_position_embeddings": -1, "text_config": {"max_seq_len": 444}}, 444),
        ({"n_positions": "many", "text_config": ["n_ctx"]}, 32_768),
        ({"text_config": "n_ctx"}, 32_768),
        ({}, 32_768),
    ],
    ids=repr,
)
def test_the_context_size_is_found_wherever_it_is_written(
    tmp_path: Path, settings: dict[str, Any], size: int
) -> None:
    assert loaded(save_llama(tmp_path / "llama", **settings)).context_size == size


def test_the_operator_may_shorten_the_context(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded(checkpoint, ctx_size=100).context_size == 100
    assert caplog.messages == []


def test_the_operator_may_stretch_the_context_and_is_warned(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded(checkpoint, ctx_size=4096).context_size == 4096
    assert caplog.messages == ["--ctx-size 4096 is more than the model was made for (512)"]


@pytest.mark.parametrize(
    ("generation", "config", "eos"),
    [
        (None, None, {IM_END}),
        (7, None, {7, IM_END}),
        ([7, 8], None, {7, 8, IM_END}),
        (None, 9, {9, IM_END}),
        (7, 9, {7, IM_END}),  # the publisher's later word
        (0, 9, {0, IM_END}),
    ],
)
def test_an_answer_ends_at_any_end_token_of_configuration_and_tokenizer(
    copy: Path, generation: Any, config: Any, eos: set[int]
) -> None:
    edit(copy / "generation_config.json", eos_token_id=generation)
    edit(copy / "config.json", eos_token_id=config)
    assert loaded(copy).eos_tokens == eos


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        ({}, SamplingParams()),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "do_sample": True},
            SamplingParams(0.6, 0.95, 20, 0.05),
        ),
        ({"temperature": 0.6, "do_sample": False}, SamplingParams(0.0)),
        ({"temperature": 0}, SamplingParams(0.0)),
        ({"temperature": None, "top_k": None}, SamplingParams()),
    ],
    ids=repr,
)
def test_the_publishers_sampling_is_the_default(
    copy: Path, settings: dict[str, Any], defaults: SamplingParams, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "generation_config.json", **settings)
    assert loaded(copy).defaults == defaults
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 101),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", "0.7"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2**31),
        ("min_p", 2),
        ("min_p", [0.1]),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_a_publishers_setting_that_is_out_of_range_is_ignored_with_one_warning(
    copy: Path, name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "generation_config.json", **{name: value})
    assert loaded(copy).defaults == SamplingParams()
    assert len(caplog.messages) == 1
    assert name in caplog.messages[0]
    assert len(caplog.messages[0]) < 200


# --- the fingerprint --------------------------------------------------------------------------


def change_weights(path: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    weights = dict(mx.load(str(path / "model.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path / "new.safetensors"), weights)
    (path / "new.safetensors").rename(path / "model.safetensors")


def test_a_fingerprint_is_16_hexadecimal_digits(model: Model) -> None:
    assert re.fullmatch("[0-9a-f]{16}", model.fingerprint)


def test_the_fingerprint_is_the_same_wherever_the_model_lies(copy: Path, model: Model) -> None:
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert loaded(copy / "config.json").fingerprint == model.fingerprint


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "other.json"])
def test_the_fingerprint_is_not_of_what_leaves_the_network_alone(
    copy: Path, model: Model, name: str
) -> None:
    edit(copy / name, unrelated="value")
    assert loaded(copy).fingerprint == model.fingerprint


def test_the_fingerprint_is_of_the_configuration(copy: Path, model: Model) -> None:
    edit(copy / "config.json", rope_theta=10001.0)
    assert loaded(copy).fingerprint != model.fingerprint


def test_another_model_of_the_same_shape_has_another_fingerprint(
    tmp_path: Path, model: Model
) -> None:
    assert loaded(save_checkpoint(tmp_path / "other", seed=1)).fingerprint != model.fingerprint


def two_rows_swapped(weights: dict[str, mx.array]) -> None:
    rows = mx.arange(NUM_TOKENS)
    rows[5], rows[6] = 6, 5
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][rows]


def two_layers_swapped(weights: dict[str, mx.array]) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]


def test_the_fingerprint_is_of_the_last_bit_of_the_weights(copy: Path, model: Model) -> None:
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the lowest of a little-endian float32
    path.write_bytes(content)
    assert loaded(copy).fingerprint != model.fingerprint


@pytest.mark.parametrize("change", [two_rows_swapped, two_layers_swapped])
def test_the_fingerprint_is_of_every_weight(
    copy: Path, model: Model, change: Callable[[dict[str, mx.array]], None]
) -> None:
    change_weights(copy, change)
    assert loaded(copy).fingerprint != model.fingerprint


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_weights_have_a_fingerprint(
    copy: Path, model: Model, dtype: mx.Dtype
) -> None:
    change_weights(copy, lambda w: w.update({name: a.astype(dtype) for name, a in w.items()}))
    fingerprints = {loaded(copy).fingerprint}
    change_weights(copy, lambda w: w.update({"model.norm.weight": w["model.norm.weight"] * 2}))
    fingerprints.add(loaded(copy).fingerprint)
    assert len(fingerprints | {model.fingerprint}) == 3


# --- messages to prompts ----------------------------------------------------------------------


def test_messages_become_a_prompt_that_is_open_for_the_answer(model: Model) -> None:
    assert rendered(model, ("system", "Be brief."), ("user", "Hello")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_continuation_leaves_the_last_turn_open(model: Model) -> None:
    text = continued(model, ("user", "Count"), ("assistant", "1, 2,"))
    assert text.endswith("<|im_start|>assistant\n1, 2,")


def test_a_continuation_may_begin_with_nothing(model: Model) -> None:
    text = continued(model, ("user", "Count"), ("assistant", ""))
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_continuation_keeps_the_space_at_its_end(model: Model) -> None:
    assert continued(model, ("user", "Count"), ("assistant", "1, ")).endswith("assistant\n1, ")


def test_a_continuation_may_say_what_was_said_before(model: Model) -> None:
    text = continued(model, ("user", "yes"), ("assistant", "yes"))
    assert text == "<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\nyes"


def test_text_parts_are_the_templates_business(checkpoint: Path, model: Model) -> None:
    template = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]
    assert rendered(loaded(checkpoint, chat_template=template), ("user", parts)) == "[Hello][you]"


def test_messages_are_left_as_they_were(model: Model) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi"},
    ]
    before = json.dumps(messages)
    model.render(messages, {}, is_continuation=True)
    assert json.dumps(messages) == before


def test_what_a_message_lacks_is_undefined_to_the_template(checkpoint: Path) -> None:
    template = "{{ messages[0].content }}{{ messages[0].name is defined }}"
    model = loaded(checkpoint, chat_template=template)
    messages = [{"role": "user", "content": "x", "name": None}]
    assert prompt_text(model, model.render(messages, {}, is_continuation=False)) == "xFalse"


def test_a_literal_template_replaces_the_models_own(checkpoint: Path) -> None:
    model = loaded(checkpoint, chat_template="Q: {{ messages[0].content }} A:")
    assert rendered(model, ("user", "Hello")) == "Q: Hello A:"


def test_a_template_may_be_a_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("Frage: {{ messages[0].content }} – Antwort:", encoding="utf-8")
    model = loaded(checkpoint, chat_template=str(path))
    assert rendered(model, ("user", "Hallo")) == "Frage: Hallo – Antwort:"


def test_a_template_file_that_is_not_there_is_refused(checkpoint: Path) -> None:
    text = complaint(checkpoint, chat_template="no/such.jinja")
    assert "--chat-template no/such.jinja" in text
    assert "give a path or a template's text" in text


def test_a_template_that_can_never_work_is_refused_at_the_start(checkpoint: Path) -> None:
    text = complaint(checkpoint, chat_template="{{ messages }}\n{% if %}")
    assert "--chat-template is broken: line 2: " in text


def test_a_model_without_a_template_loads_with_a_warning_and_cannot_chat(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "tokenizer_config.json", chat_template=None)
    model = loaded(copy)
    assert not model.has_chat_template
    assert len(caplog.messages) == 1
    with pytest.raises(PromptError, match=r"no chat template; .*--chat-template"):
        model.render(HELLO, {}, is_continuation=False)


def test_a_model_without_a_template_can_be_given_one(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "tokenizer_config.json", chat_template=None)
    model = loaded(copy, chat_template=CHAT_TEMPLATE)
    assert model.has_chat_template
    assert rendered(model, ("user", "Hi")).startswith("<|im_start|>user\nHi")
    assert caplog.messages == []


def test_a_renderer_that_mlx_lm_has_beats_a_template(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", chat_template_type="deepseek_v32", chat_template="{{ 1 }}")
    text = rendered(loaded(copy), ("user", "Hello"))
    assert "Hello" in text
    assert text != "1"


def test_messages_that_come_to_nothing_are_refused(checkpoint: Path) -> None:
    model = loaded(checkpoint, chat_template="{{ '' }}")
    with pytest.raises(PromptError, match="empty prompt"):
        model.render(HELLO, {}, is_continuation=False)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate."),
        ("{{ nonesuch() }}", "'nonesuch' is undefined"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ messages[0].content.nonesuch.more }}", "no attribute 'nonesuch'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_raises_refuses_the_messages_with_its_reason(
    checkpoint: Path, template: str, why: str
) -> None:
    model = loaded(checkpoint, chat_template=template)
    with pytest.raises(PromptError, match=re.escape(why)) as caught:
        model.render(HELLO, {}, is_continuation=False)
    assert "the chat template refused the messages: " in str(caught.value)


def test_half_a_character_is_refused(model: Model) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        model.render([{"role": "user", "content": "a\ud800b"}], {}, is_continuation=False)


def test_no_messages_are_refused(model: Model) -> None:
    with pytest.raises(PromptError, match="at least one message"):
        model.render([], {}, is_continuation=False)


@pytest.mark.parametrize("is_from_checkpoint", [True, False])
@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'].codecs.open('/etc/passwd').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for _ in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_hostile_template_gets_nowhere(copy: Path, escape: str, is_from_checkpoint: bool) -> None:
    if is_from_checkpoint:
        edit(copy / "tokenizer_config.json", chat_template=escape)
    model = loaded(copy, **({} if is_from_checkpoint else {"chat_template": escape}))
    with pytest.raises(PromptError):
        model.render(HELLO, {}, is_continuation=False)


# --- template arguments -----------------------------------------------------------------------

THINKING = (
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% else %}[silent]{% endif %}"
    "{{ messages[0].content }}"
)


@pytest.fixture
def thinker(copy: Path) -> Path:
    """A checkpoint for whose tokens mlx-lm would set `enable_thinking` unasked."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    for number, text in enumerate(("<think>", "</think>")):
        token = tokenizer["added_tokens"][-1] | {"id": NUM_TOKENS + number, "content": text}
        tokenizer["added_tokens"].append(token)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return edit(copy / "tokenizer_config.json", chat_template=THINKING)


@pytest.mark.parametrize("template", [None, THINKING])
def test_thinking_is_undefined_until_the_request_defines_it(
    thinker: Path, template: str | None
) -> None:
    model = loaded(thinker, chat_template=template)
    assert model.tokenizer.has_thinking
    assert rendered(model, ("user", "x")) == "[silent]x"
    assert rendered(model, ("user", "x"), enable_thinking=True) == "[True]x"
    assert rendered(model, ("user", "x"), enable_thinking=False) == "[False]x"


def test_the_marks_around_reasoning_are_part_of_the_text(thinker: Path, model: Model) -> None:
    """They are special tokens, which are left out of a text otherwise."""
    assert model.markers == Markers()
    assert model.shown == {}
    thinking = loaded(thinker)
    assert thinking.markers == Markers("<think>", "</think>")
    assert thinking.shown == {NUM_TOKENS: "<think>", NUM_TOKENS + 1: "</think>"}
    words = thinking.encode("a b", add_special=False)
    end = min(thinking.eos_tokens)
    assert thinking.detokenize([NUM_TOKENS, *words, NUM_TOKENS + 1, *words, end]) == (
        "<think>a b</think>a b"
    )


def test_a_prompt_that_ends_in_reasoning_says_so(thinker: Path) -> None:
    template = "{{ messages[0].content }}"
    model = loaded(thinker, chat_template=template)

    def is_thinking(content: str) -> bool:
        messages = [{"role": "user", "content": content}]
        return model.render(messages, {}, is_continuation=False).is_thinking

    assert is_thinking("x<think>")
    assert is_thinking("x<think>\n")
    assert not is_thinking("x")
    assert not is_thinking("x<think>y</think>")


def test_what_a_model_has_no_marks_for_cannot_be_had(model: Model, thinker: Path) -> None:
    with pytest.raises(ConstraintError, match="no marks around its reasoning"):
        model.compile(None, is_thinking=False, budget=5)
    assert loaded(thinker).compile(None, is_thinking=False, budget=5).matcher().error is None
    calls = Constraint(Kind.TOOLS, '{"tools":[],"is_single":true,"is_auto":false}')
    with pytest.raises(ConstraintError, match="tool calls cannot be enforced"):
        model.compile(calls, is_thinking=False)


def test_a_model_of_mlx_lms_calls_reads_them() -> None:
    demo = load(Config())
    assert demo.markers == Markers("<think>", "</think>", "<tool_call>", "</tool_call>", True)
    one = '{"name": "f", "arguments": {"a": 1}}'
    assert demo.parse_calls(one, []) == [("f", {"a": 1})]
    assert demo.parse_calls('{"name": "f", "arguments": "{\\"a\\": 1}"}', []) == [("f", {"a": 1})]
    for broken in ("", "{", '{"arguments": {}}', '{"name": "f", "arguments": [1]}'):
        with pytest.raises(PARSE_ERRORS):
            demo.parse_calls(broken, [])


def test_arguments_of_the_request_reach_the_template(checkpoint: Path) -> None:
    template = "{{ messages[0].content }} {{ mood.of }} {{ tools | length }}"
    model = loaded(checkpoint, chat_template=template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert rendered(model, ("user", "x"), mood={"of": "joy"}, tools=tools) == "x joy 1"


@pytest.mark.parametrize(
    "name",
    [
        "chat_template",
        "messages",
        "conversation",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "self",
    ],
)
def test_a_request_cannot_bring_a_template_or_steer_the_renderer(model: Model, name: str) -> None:
    with pytest.raises(PromptError, match=f"may not set the template argument '{name}'"):
        model.render(HELLO, {name: "{{ 7 * 6 }}", "mood": "joy"}, is_continuation=False)


# --- threads ----------------------------------------------------------------------------------


def test_eight_threads_may_render_at_once(copy: Path) -> None:
    """With a tokenizer that is saved with truncation and padding: transformers resets them in use.

    Both would spoil a prompt, and the reset is what other threads have been seen to trip over.
    """
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer["padding"] = {
        "strategy": {"Fixed": 999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = loaded(copy)
    barrier = threading.Barrier(8)
    results: list[set[Prompt] | BaseException] = []

    def render_often() -> None:
        prompts = set()
        barrier.wait()
        try:
            for _ in range(50):
                prompts.add(model.render(HELLO * 10, {}, is_continuation=False))
        except BaseException as error:
            results.append(error)
        else:
            results.append(prompts)

    threads = [threading.Thread(target=render_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{model.render(HELLO * 10, {}, is_continuation=False)}] * 8
    assert 8 < len(model.render(HELLO * 10, {}, is_continuation=False).tokens) < 999


# --- adapters ---------------------------------------------------------------------------------


def save_adapter(checkpoint: Path, path: Path, seed: int = 1, scale: float = 20.0) -> Path:
    """A LoRA of rank 4 over every layer, as `mlx_lm.lora` writes it, but with random weights."""
    lora = {"rank": 4, "scale": scale, "dropout": 0.5}
    network, _ = load_model(checkpoint)
    network.freeze()
    linear_to_lora_layers(network, 2, lora)
    mx.random.seed(seed)
    weights = {
        name: mx.random.normal(weight.shape)
        for name, weight in tree_flatten(network.trainable_parameters())
    }
    assert weights
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    edit(path / "adapter_config.json", fine_tune_type="lora", num_layers=2, lora_parameters=lora)
    return path


def logits(model: Model) -> list[list[float]]:
    """What the network thinks of each of some tokens."""
    values: Any = model.network(mx.array([list(range(8))]))[0].tolist()
    return list(values)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(checkpoint, tmp_path_factory.mktemp("adapters") / "lora")


def test_an_adapter_changes_the_answer_and_the_fingerprint(
    checkpoint: Path, model: Model, adapter: Path
) -> None:
    adapted = loaded(checkpoint, adapter_path=str(adapter))
    assert logits(adapted) != logits(model)
    assert adapted.fingerprint != model.fingerprint
    assert adapted.id == model.id
    assert logits(adapted) == logits(adapted), "its dropout is for training"
    again = loaded(checkpoint, adapter_path=str(adapter))
    assert again.fingerprint == adapted.fingerprint
    assert logits(again) == logits(adapted)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"scale": 0.01}])
def test_another_adapter_has_another_fingerprint(
    checkpoint: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = save_adapter(checkpoint, tmp_path / "other", **changes)
    one, two = (loaded(checkpoint, adapter_path=str(path)) for path in (adapter, other))
    assert logits(one) != logits(two)
    assert one.fingerprint != two.fingerprint


def test_an_adapter_may_lie_in_the_home_directory(
    checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(adapter.parent))
    assert loaded(checkpoint, adapter_path=f"~/{adapter.name}").fingerprint


@pytest.mark.parametrize(
    "spoil",
    [
        shutil.rmtree,
        lambda path: (path / "adapter_config.json").unlink(),
        lambda path: (path / "adapters.safetensors").unlink(),
        lambda path: (path / "adapter_config.json").write_text("{"),
        lambda path: (path / "adapter_config.json").write_text("[]"),
        lambda path: (path / "adapter_config.json").write_text("{}"),
        lambda path: (path / "adapters.safetensors").write_bytes(b"x" * 20),
        lambda path: edit(path / "adapter_config.json", lora_parameters={"rank": 4}),
        lambda path: edit(path / "adapter_config.json", num_layers="all"),
        lambda path: mx.save_safetensors(
            str(path / "adapters.safetensors"), {"nobody.lora_a": mx.zeros((4, 4))}
        ),
        lambda path: mx.save_safetensors(
            str(path / "adapters.safetensors"),
            {
                name: mx.zeros((3, 3))
                for name in cast("dict[str, mx.array]", mx.load(str(path / "adapters.safetensors")))
            },
        ),
    ],
    ids=[
        "nothing there",
        "no configuration",
        "no weights",
        "configuration not JSON",
        "configuration not an object",
        "configuration empty",
        "weights not safetensors",
        "no scale",
        "layers not a number",
        "weights of another model",
        "weights of another shape",
    ],
)
def test_an_unusable_adapter_is_refused_by_its_flag(
    checkpoint: Path, adapter: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    path = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    spoil(path)
    assert f"--adapter-path {path}: " in complaint(checkpoint, adapter_path=str(path))


# --- tokens to text ---------------------------------------------------------------------------

TEXTS = ["Hello, how are you?", " a  b ", "äöüß 日本語 🙂🙃", "it 's , fine .", "\n\n\tx\n", "▁ ☃"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_its_tokens(model: Model, text: str) -> None:
    assert model.detokenize(model.tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_and_unknown_ids_have_no_text(model: Model) -> None:
    tokens = model.tokenizer.encode("Hello", add_special_tokens=False)
    assert model.detokenize([IM_END, *tokens, IM_END, NUM_TOKENS + 1000]) == "Hello"
    assert model.detokenize([]) == ""


def test_any_sequence_of_ids_will_do(model: Model) -> None:
    assert model.detokenize((5, 6)) == model.detokenize([5, 6])


def save_metaspace_tokenizer(path: Path) -> None:
    """A tokenizer that decodes as Llama 2's does: "▁" for a space, bytes for what it lacks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = ["▁Hello", "▁there", "▁", "Hello", ",", "!", "▁a", "b", "."]
    vocab = {word: id for id, word in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256))])}
    vocab |= {word: len(vocab) + number for number, word in enumerate(words)}
    merges = [("▁", "Hello"), ("▁", "there"), ("▁", "a")]
    pieces = {piece for pair in merges for piece in pair} - set(vocab)
    vocab |= {piece: len(vocab) + number for number, piece in enumerate(sorted(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))


def test_a_sentencepiece_tokenizer_streams_with_the_right_spaces(copy: Path) -> None:
    save_metaspace_tokenizer(copy)
    model = loaded(copy)
    ids = model.tokenizer.convert_tokens_to_ids

    def streamed(tokens: list[str], prompt: list[str]) -> str:
        stream = TextStream(model.detokenize, prompt_tail=ids(prompt))
        return "".join([*(stream.push(id) for id in ids(tokens)), stream.flush()])

    tokens = ["▁Hello", ",", "▁there", "!", "▁", "▁a", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "b"]
    assert streamed(tokens, []) == "Hello, there!  a🙂b"  # a text begins without its space
    assert streamed(tokens, ["▁a", "."]) == " Hello, there!  a🙂b"  # within one it stays
    assert streamed(["▁there", "<|im_end|>", "▁a"], ["▁Hello"]) == " there a"


# --- tokens to bytes --------------------------------------------------------------------------


def bytes_of(model: Model, text: str) -> list[bytes]:
    return [model.token_bytes(id) for id in model.tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(model: Model, text: str) -> None:
    assert b"".join(bytes_of(model, text)).decode() == text


def test_a_token_may_be_half_a_character(model: Model) -> None:
    pieces = bytes_of(model, "\U0001f9ff")  # not in the corpus: it has no token of its own
    assert len(pieces) > 1
    assert b"".join(pieces) == "\U0001f9ff".encode()


def test_every_byte_is_some_token(model: Model) -> None:
    assert {bytes([byte]) for byte in range(256)} <= set(map(model.token_bytes, range(NUM_TOKENS)))


def test_a_special_token_is_its_name_and_an_id_beyond_the_tokenizer_nothing(model: Model) -> None:
    assert model.token_bytes(IM_END) == b"<|im_end|>"
    assert model.num_vocab == NUM_TOKENS
    assert model.token_bytes(NUM_TOKENS) == b""
    assert model.token_bytes(2**31 - 1) == b""


def test_an_output_layer_may_be_wider_than_the_tokenizer(tmp_path: Path) -> None:
    wide = loaded(save_checkpoint(tmp_path / "wide", vocab_size=NUM_TOKENS + 61))
    assert wide.num_vocab == NUM_TOKENS + 61
    assert wide.token_bytes(NUM_TOKENS + 60) == b""


def test_an_added_token_that_is_not_special_is_its_text(copy: Path) -> None:
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["日本 x"])
    tokenizer.save(str(copy / "tokenizer.json"))
    assert loaded(copy).token_bytes(NUM_TOKENS) == "日本 x".encode()


def test_a_piece_that_is_not_written_in_the_byte_alphabet_is_its_text(copy: Path) -> None:
    """A byte-level decoder lets such a piece through as it is."""
    settings = json.loads((copy / "tokenizer.json").read_text())
    id = len(settings["model"]["vocab"])
    settings["model"]["vocab"]["a ☃"] = id
    settings["added_tokens"] = [
        token | {"id": token["id"] + 1} for token in settings["added_tokens"]
    ]
    (copy / "tokenizer.json").write_text(json.dumps(settings))
    model = loaded(copy)
    assert model.detokenize([id]) == "a ☃"
    assert model.token_bytes(id) == "a ☃".encode()


def test_sentencepiece_tokens_are_words_with_their_spaces_and_single_bytes(copy: Path) -> None:
    save_metaspace_tokenizer(copy)
    model = loaded(copy)

    def said(*pieces: str) -> list[bytes]:
        return list(map(model.token_bytes, model.tokenizer.convert_tokens_to_ids(list(pieces))))

    assert said("▁Hello", "▁", "b", ".") == [b" Hello", b" ", b"b", b"."]
    assert b"".join(said("<0xF0>", "<0x9F>", "<0x99>", "<0x82>")).decode() == "🙂"
    assert said("<0x00>", "<0xFF>", "<|im_end|>") == [b"\0", b"\xff", b"<|im_end|>"]


def test_many_added_tokens_do_not_make_a_token_slow(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma adds 6,000; transformers makes a dict of them each time somebody looks."""
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<unused{number}>" for number in range(6000)])
    tokenizer.save(str(copy / "tokenizer.json"))
    model = loaded(copy)
    own = type(model.tokenizer.get_chat_template.__self__)
    looked = property(lambda _: pytest.fail("they are looked at once, when the model is loaded"))
    monkeypatch.setattr(own, "added_tokens_decoder", looked)
    assert model.token_bytes(5)
    assert model.detokenize([5])
