"""Decides what the operator asked for: one frozen `Config`, whose fields are the flags.

A field is written once: how it becomes a flag, a variable and a line of help is `flags`.

It must never import anything but the standard library and `flags`, touch a file (except in
`Config.api_keys`), or put an API key into a message or a repr. Invariants, tested: a `Config` that
exists is valid, however it was made; a host that other machines can reach has a key; every
`ConfigError` names the flag, variable or field at fault.
"""

import ipaddress
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from mlxlite.config.flags import ConfigError, complaint_of, flag, num_bytes, size, values_of

DEMO_ID = "mlxlite-demo"
USAGE_STATUS = 2  # the exit status argparse and getopt use for a bad command line
# What a client can put into a header, hmac.compare_digest can compare, and a comma can separate.
_API_KEY = re.compile(r"[!-+\--~]+")
_API_KEY_TEXT = "visible ASCII characters without a comma"
_MODE = re.compile(r"0?[0-7]{3}")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s,]+")
_MODEL = "Model"
_NETWORK = "Network"
_SECURITY = "Security"
_SCHEDULING = "Scheduling"
_MEMORY = "Memory"
_PREFIXES = "Prefix cache"
_LIMITS = "Limits"
_PICTURES = "Pictures"
_PROCESS = "Process"
_BOOL = "true|false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything an operator can decide. Raises `ConfigError` for values that cannot work."""

    model: str | None = flag(
        None,
        _MODEL,
        "PATH|ID",
        "a model directory, a file inside it, or a Hugging Face id",
        short="-m",
        default_text="the built-in demo model",
    )
    model_id: str | None = flag(
        None,
        _MODEL,
        "NAME",
        "the model's name in /v1/models and in answers",
        default_text="derived from --model",
    )
    strict_model_id: bool = flag(
        False, _MODEL, _BOOL, "requests to generate that name another model get a 404"
    )
    embedding: bool = flag(
        False,
        _MODEL,
        _BOOL,
        "no effect, for the app that sends it: /v1/embeddings is always served",
    )
    adapter_path: str | None = flag(
        None, _MODEL, "PATH", "a LoRA adapter's directory, applied at start"
    )
    chat_template: str | None = flag(
        None,
        _MODEL,
        "PATH|TEXT",
        "a Jinja chat template, as a path or as the text itself",
        default_text="the model's own",
    )
    ctx_size: int = flag(
        0,
        _MODEL,
        "TOKENS",
        "most tokens in prompt and output together; 0 = the model's own maximum",
    )
    max_tokens: int = flag(
        0,
        _MODEL,
        "TOKENS",
        "output limit of a request that names none; 0 = whatever context is left",
    )

    host: str = flag(
        "127.0.0.1",
        _NETWORK,
        "HOST",
        "address to listen on; one that other machines can reach needs an API key",
    )
    port: int = flag(8080, _NETWORK, "PORT", "port to listen on; 0 = any free one", maximum=65535)
    uds: str | None = flag(
        None, _NETWORK, "PATH", "listen on this Unix socket instead of host and port"
    )
    uds_mode: str = flag(
        "600",
        _NETWORK,
        "MODE",
        "who may connect to --uds, in chmod's digits: 660 adds its group",
        item=_MODE,
        item_text="three octal digits",
    )
    tls_cert: str | None = flag(
        None, _NETWORK, "PATH", "serve HTTPS with this certificate chain (PEM)"
    )
    tls_key: str | None = flag(
        None,
        _NETWORK,
        "PATH",
        "the certificate's private key (PEM), without a password",
        default_text="in --tls-cert",
    )

    api_key: tuple[str, ...] = flag(
        (),
        _SECURITY,
        "KEY,...",
        "accept this key (repeatable, or several separated by commas)",
        env_aliases=("MLX_API_KEY",),
        item=_API_KEY,
        item_text=_API_KEY_TEXT,
        is_secret=True,
    )
    api_key_file: str | None = flag(
        None, _SECURITY, "PATH", "accept the keys in this file too, one per line"
    )
    cors_origins: tuple[str, ...] = flag(
        ("http://localhost", "http://127.0.0.1", "tauri://localhost"),
        _SECURITY,
        "ORIGIN,...",
        "web pages that may call, compared by scheme and host, whatever the port",
        item=_ORIGIN,
        item_text="an origin such as http://localhost",
    )

    max_batch_size: int = flag(
        8, _SCHEDULING, "ROWS", "sequences decoded together; 0 = one sequence at a time"
    )
    enable_continuous_batching: bool = flag(
        True,
        _SCHEDULING,
        _BOOL,
        "sequences join and leave a running batch; off, a batch is gathered and run to its end",
    )
    batch_timeout_ms: int = flag(
        100, _SCHEDULING, "MS", "how long a batch is gathered when continuous batching is off"
    )
    prefill_chunk_size: int = flag(
        2048,
        _SCHEDULING,
        "TOKENS",
        "prompt tokens computed at a time while nobody decodes",
        minimum=1,
    )
    prefill_budget_ms: int = flag(
        100,
        _SCHEDULING,
        "MS",
        "longest time a step that decodes may spend on prompts: what a running stream may wait",
        minimum=1,
    )

    kv_bits: int = flag(
        0,
        _MEMORY,
        "BITS",
        "keep keys and values in 4 or 8 bits; 0 = as the model computes them",
        choices=(0, 4, 8),
    )
    kv_group_size: int = flag(
        64,
        _MEMORY,
        "CHANNELS",
        "channels that share a scale where --kv-bits is on",
        choices=(32, 64, 128),
    )
    memory_limit: str | None = size(
        None,
        _MEMORY,
        "most memory for weights, caches and work, such as 12GB",
        default_text="what the device recommends; on a CPU 70% of the RAM",
    )

    enable_prefix_caching: bool = flag(
        True, _PREFIXES, _BOOL, "keep computed prompts, and never compute their beginnings twice"
    )
    kv_block_size: int = flag(
        16, _PREFIXES, "TOKENS", "prompts are kept in blocks of so many tokens", minimum=1
    )
    prefix_cache_bytes: str | None = size(
        None,
        _PREFIXES,
        "most memory for prefixes, such as 2GB; what runs comes first",
        default_text="30% of what sequences may hold",
    )
    prefix_cache_dir: str | None = flag(
        None, _PREFIXES, "PATH", "keep prefixes in files here too, over a restart"
    )
    prefix_cache_disk_bytes: str = size(
        "10GB", _PREFIXES, "most that is kept in --prefix-cache-dir"
    )
    prefix_cache_scope: str = flag(
        "shared",
        _PREFIXES,
        "SCOPE",
        "shared, or key: requests find only prefixes of their own API key",
        choices=("shared", "key"),
    )

    request_timeout_s: float = flag(
        0, _LIMITS, "S", "longest time from a request's arrival to its end; 0 = none"
    )
    repetition_guard: int = flag(
        0, _LIMITS, "TOKENS", "end an answer whose last so many tokens repeat one piece; 0 = off"
    )
    max_queue: int = flag(
        256, _LIMITS, "N", "sequences that may wait; beyond that the answer is 429", minimum=1
    )
    max_body_mb: int = flag(
        64, _LIMITS, "MB", "largest request body; beyond that the answer is 413", minimum=1
    )
    max_connections: int = flag(1024, _LIMITS, "N", "connections open at a time", minimum=1)

    allow_remote_images: bool = flag(
        False,
        _PICTURES,
        _BOOL,
        "fetch pictures that a request names by a URL, from public addresses alone",
    )
    max_images: int = flag(
        16, _PICTURES, "N", "pictures in a request, its history included", minimum=1, maximum=64
    )
    max_image_pixels: int = flag(
        1_600_000, _PICTURES, "PIXELS", "a picture of more is scaled down to so many", minimum=1
    )
    max_image_mb: int = flag(
        20, _PICTURES, "MB", "largest picture, as it is encoded", minimum=1, maximum=32
    )

    shutdown_grace_s: float = flag(
        1.2, _PROCESS, "S", "how long running requests may go on after SIGTERM"
    )
    log_level: str = flag(
        "info",
        _PROCESS,
        "LEVEL",
        "debug, info, warning or error",
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            complaint = complaint_of(f, getattr(self, f.name))
            if complaint is not None:
                raise ConfigError(f"{f.name}: {complaint}")
        if not self.is_loopback and not (self.api_key or self.api_key_file):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no API key: "
                "give --api-key or --api-key-file, or listen on 127.0.0.1"
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("--tls-key needs --tls-cert")

    @classmethod
    def from_args(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Self:
        """What a command line (without the program's name) and an environment ask for.

        Raises `ConfigError` for anything it cannot take, an unknown flag included, and
        `SystemExit(0)` after ``--help`` or ``--version``.
        """
        return cls(**values_of(cls, argv, environ))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach `host`; any name but localhost is taken as public."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def served_id(self) -> str:
        """The model's name: as given, or that of its directory or repository."""
        if self.model_id is not None:
            return self.model_id
        if self.model is None:
            return DEMO_ID
        try:
            path = Path(self.model).expanduser().resolve(strict=True)
        except (OSError, RuntimeError):
            return self.model  # no path, so a Hugging Face id; the loader says if it is neither
        return path.name if path.is_dir() else path.parent.name

    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes."""
        return num_bytes(self.memory_limit)

    def prefix_bytes(self) -> int | None:
        """`prefix_cache_bytes` in bytes."""
        return num_bytes(self.prefix_cache_bytes)

    def prefix_disk_bytes(self) -> int:
        """What may be kept on disk: nothing without a directory."""
        wanted = num_bytes(self.prefix_cache_disk_bytes) or 0
        return wanted if self.prefix_cache_dir and self.enable_prefix_caching else 0

    def api_keys(self) -> tuple[str, ...]:
        """Every accepted key, those of flag or environment first, then the file's; each one once.

        Reads the file at each call. Raises `ConfigError` if it cannot be read or holds no key: a
        server that was told to ask for keys must not run without any.
        """
        if self.api_key_file is None:
            return tuple(dict.fromkeys(self.api_key))
        try:
            text = Path(self.api_key_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"--api-key-file {self.api_key_file}: {reason}") from None
        keys = {n: line.strip() for n, line in enumerate(text.splitlines(), 1) if line.strip()}
        for n, key in keys.items():
            if not _API_KEY.fullmatch(key):
                raise ConfigError(
                    f"--api-key-file {self.api_key_file}: line {n} must be {_API_KEY_TEXT}"
                )
        if not keys:
            raise ConfigError(f"--api-key-file {self.api_key_file}: holds no key")
        return tuple(dict.fromkeys((*self.api_key, *keys.values())))


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """`Config.from_args` for a program: a `ConfigError` is a line on stderr and exit status 2."""
    try:
        return Config.from_args(argv, environ)
    except ConfigError as error:
        print(f"mlxlite: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_STATUS) from None
