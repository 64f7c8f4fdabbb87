"""API keys: their characters, and the file that holds them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mlxlite.config.flags import ConfigError

# Characters that a header can hold, hmac.compare_digest can compare and a comma can separate.
KEY: Final = re.compile(r"[!-+\--~]+")
KEY_TEXT: Final = "visible ASCII characters without a comma"
_LINE: Final = re.compile(rf"({KEY.pattern})(?:[ \t]+(-?[0-9]{{1,10}}))?")


def read_key_file(path: str) -> Iterator[tuple[str, int | None]]:
    """The keys of a file, one a line, each with its limit of priority.

    Raises `ConfigError` if it cannot be read or holds no key: an empty file must not turn access
    control off.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"--api-key-file {path}: {reason}") from None
    lines = {n: line.strip() for n, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise ConfigError(f"--api-key-file {path}: holds no key")
    for n, line in lines.items():
        if (match := _LINE.fullmatch(line)) is None:
            raise ConfigError(f"--api-key-file {path}: line {n} must be {KEY_TEXT}")
        key, limit = match.groups()
        yield key, None if limit is None else int(limit)
