"""The settings of a server: one frozen `Config`, whose fields are the flags.

A field is written once; `flags` makes a flag, a variable and a line of help of it.

Must never: import anything but the standard library and this room, touch a file (except in
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

from mlxlite.config.flags import ConfigError, complaint_of, flag, num_bytes, size, switch, values_of
from mlxlite.config.key_file import KEY, KEY_TEXT, read_key_file

DEMO_ID = "mlxlite-demo"
USAGE_STATUS = 2  # the exit status argparse and getopt use for a bad command line
NO_PRIORITY_LIMIT = -(2**31)
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
_MODE = re.compile(r"0?[0-7]{3}")
_LEVELS = ("debug", "info", "warning", "error")
_ORIGIN = re.compile(r"null|[A-Za-z][A-Za-z0-9+.-]*://[^/\s,]+")
_HOST = re.compile(r"\*|[^\s,/:]+|\[?[0-9A-Fa-f:.]+\]?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a server. Raises `ConfigError` for values that cannot work."""

    model: str | None = flag(
        None,
        "PATH|ID",
        "a model directory, a file inside it, or a Hugging Face id",
        heading="Model",
        short="-m",
        default_text="the built-in demo model",
    )
    model_id: str | None = flag(
        None, "NAME", "the model's name in the API", default_text="derived from --model"
    )
    strict_model_id: bool = switch(False, "404 for generation requests that name another model")
    strict_fields: bool = switch(
        False, "400 for what a request asks for and would be served without"
    )
    embedding: bool = switch(
        False, "no effect, for launchers that pass it: /v1/embeddings is always served"
    )
    adapter_path: str | None = flag(None, "PATH", "directory of a LoRA adapter, applied at start")
    chat_template: str | None = flag(
        None, "PATH|TEXT", "Jinja chat template: path or text", default_text="the model's own"
    )
    ctx_size: int = flag(0, "TOKENS", "limit of prompt and output together; 0 = the model's own")
    max_tokens: int = flag(0, "TOKENS", "a request's default output limit; 0 = the context left")

    host: str = flag(
        "127.0.0.1", "HOST", "address to listen on; public ones need an API key", heading="Network"
    )
    port: int = flag(8080, "PORT", "port to listen on; 0 = any free one", maximum=65535)
    uds: str | None = flag(None, "PATH", "listen on this Unix socket instead of host and port")
    uds_mode: str = flag(
        "600",
        "MODE",
        "permissions of --uds, in chmod's digits: 660 adds the group",
        pattern=_MODE,
        pattern_text="three octal digits",
    )
    tls_cert: str | None = flag(None, "PATH", "serve HTTPS with this certificate chain (PEM)")
    tls_key: str | None = flag(
        None, "PATH", "private key of --tls-cert (PEM), no password", default_text="in --tls-cert"
    )

    api_key: tuple[str, ...] = flag(
        (),
        "KEY,...",
        "accept this key (repeatable, or several separated by commas)",
        heading="Security",
        env_aliases=("MLX_API_KEY",),
        pattern=KEY,
        pattern_text=KEY_TEXT,
        is_secret=True,
    )
    api_key_file: str | None = flag(
        None,
        "PATH",
        "accept the keys in this file too, one per line; a number behind it is its --max-priority",
    )
    cors_origins: tuple[str, ...] = flag(
        ("http://localhost", "http://127.0.0.1", "tauri://localhost"),
        "ORIGIN,...",
        "origins of web pages that may call, by scheme and host, whatever the port; extensions' "
        "ids may be *, as in chrome-extension://*; null is that of files and sandboxed pages",
        pattern=_ORIGIN,
        pattern_text="an origin such as http://localhost",
    )
    allowed_hosts: tuple[str, ...] = flag(
        (),
        "HOST,...",
        "names in the Host header to accept on loopback besides localhost; * is any",
        pattern=_HOST,
        pattern_text="a host's name without a port",
    )

    max_batch_size: int = flag(
        8, "ROWS", "sequences decoded together; 0 = one at a time", heading="Scheduling"
    )
    enable_continuous_batching: bool = switch(
        True, "sequences join and leave a running batch; off: one is gathered and run to its end"
    )
    batch_timeout_ms: int = flag(100, "MS", "time to gather a batch without continuous batching")
    prefill_chunk_size: int = flag(
        2048, "TOKENS", "prompt tokens computed in a step while no sequence decodes", minimum=1
    )
    prefill_budget_ms: int = flag(
        100, "MS", "longest prefill in a step that decodes: the delay of running streams", minimum=1
    )

    kv_bits: int = flag(
        0,
        "BITS",
        "4 or 8 for keys and values; 0 = as computed",
        heading="Memory",
        choices=(0, 4, 8),
    )
    kv_group_size: int = flag(
        64, "CHANNELS", "channels that share a scale with --kv-bits", choices=(32, 64, 128)
    )
    memory_limit: str | None = size(
        None,
        "most memory for weights, caches and work, such as 12GB",
        default_text="what the device recommends; on a CPU 70% of the RAM",
    )

    wired_limit: str | None = size(
        None, "on macOS: memory that is never swapped out; 0 is none", default_text="the weights"
    )

    enable_prefix_caching: bool = switch(
        True, "keep computed prompts and reuse their beginnings", heading="Prefix cache"
    )
    kv_block_size: int = flag(
        16, "TOKENS", "size of the blocks that prompts are kept in", minimum=1
    )
    prefix_cache_bytes: str | None = size(
        None,
        "most memory for prefixes, such as 2GB; running sequences have priority",
        default_text="90% of what sequences may hold",
    )
    prefix_cache_dir: str | None = flag(None, "PATH", "keep prefixes in files too, across restarts")
    prefix_cache_disk_bytes: str = size("10GB", "most bytes kept in --prefix-cache-dir")
    prefix_cache_scope: str = flag(
        "shared", "SCOPE", "shared, or key: each API key has its own", choices=("shared", "key")
    )

    request_timeout_s: float = flag(
        0, "S", "longest time from a request's arrival to its end; 0 = none", heading="Limits"
    )
    repetition_guard: int = flag(
        0, "TOKENS", "end an answer whose last N tokens repeat one piece; 0 = off"
    )
    max_queue: int = flag(256, "N", "waiting sequences; beyond that the answer is 429", minimum=1)
    max_priority: int = flag(
        0,
        "N",
        "with several API keys: best priority of a request, lower is better; see --api-key-file",
        minimum=NO_PRIORITY_LIMIT,
        maximum=-NO_PRIORITY_LIMIT - 1,
    )
    max_body_mb: int = flag(
        64, "MB", "largest request body; beyond it the answer is 413", minimum=1
    )
    max_connections: int = flag(1024, "N", "connections open at a time", minimum=1)

    allow_remote_images: bool = switch(
        False, "fetch pictures by URL, from public addresses only", heading="Pictures"
    )
    max_images: int = flag(16, "N", "pictures in a request and its history", minimum=1, maximum=64)
    max_image_pixels: int = flag(1_600_000, "PIXELS", "larger pictures are scaled down", minimum=1)
    max_image_mb: int = flag(20, "MB", "largest picture, as encoded", minimum=1, maximum=32)

    shutdown_grace_s: float = flag(
        1.2, "S", "how long running requests may go on after SIGTERM", heading="Process"
    )
    log_level: str = flag("info", "LEVEL", "debug, info, warning or error", choices=_LEVELS)

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
        """The settings of a command line (without the program's name) and an environment.

        Raises `ConfigError` for bad values and unknown flags, and `SystemExit(0)` after ``--help``
        or ``--version``.
        """
        return cls(**values_of(cls, argv, environ))

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach `host`; any name but localhost counts as public."""
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
            return self.model  # no path, so a Hugging Face id; the loader refuses other text
        for part in reversed(path.parts):  # a repository in Hugging Face's cache
            if (match := _CACHED.fullmatch(part)) is not None:
                return "/".join(match.groups())
        return path.name if path.is_dir() else path.parent.name

    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes."""
        return num_bytes(self.memory_limit)

    def wired_limit_bytes(self) -> int | None:
        """`wired_limit` in bytes."""
        return num_bytes(self.wired_limit)

    def prefix_bytes(self) -> int | None:
        """`prefix_cache_bytes` in bytes."""
        return num_bytes(self.prefix_cache_bytes)

    def prefix_disk_bytes(self) -> int:
        """`prefix_cache_disk_bytes` in bytes; 0 without a directory or without prefix caching."""
        wanted = num_bytes(self.prefix_cache_disk_bytes) or 0
        return wanted if self.prefix_cache_dir and self.enable_prefix_caching else 0

    def api_keys(self) -> tuple[str, ...]:
        """All accepted keys, each once: those of flag or environment, then the file's.

        Reads the file at each call. Raises `ConfigError` if it cannot be read or holds no key: an
        empty file must not turn access control off.
        """
        return tuple(self._keys())

    def priority_limits(self) -> dict[str, int]:
        """By API key, the best priority that its requests may have; by "" where there is none.

        Reads the key file, as `api_keys` does.
        """
        keys = self._keys()
        usual = self.max_priority if len(keys) > 1 else NO_PRIORITY_LIMIT
        return {key: usual if own is None else own for key, own in (keys or {"": None}).items()}

    def _keys(self) -> dict[str, int | None]:
        """The keys, in order, with their own limits of priority."""
        keys: dict[str, int | None] = dict.fromkeys(self.api_key)
        if self.api_key_file is not None:
            for key, limit in read_key_file(self.api_key_file):
                keys[key] = keys.get(key) if limit is None else limit
        return keys


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """`Config.from_args` for a program: prints a `ConfigError` on stderr, with exit status 2."""
    try:
        return Config.from_args(argv, environ)
    except ConfigError as error:
        print(f"mlxlite: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_STATUS) from None
