"""Access control: which requests may enter, by their Host, key, origin and media type."""

import re

from mlxlite.config.options import Config
from mlxlite.http.parser import Head, Headers


def is_json(headers: Headers) -> bool:
    """Whether a body may be taken for JSON.

    curl's -d says x-www-form-urlencoded, and some clients say nothing; so may any web page, without
    asking first, but a page names its origin.
    """
    media_type = headers.get("content-type").partition(";")[0].strip().lower()
    if media_type in ("", "application/x-www-form-urlencoded"):
        return "origin" not in headers
    return media_type == "application/json" or media_type.endswith("+json")


_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\\]+)(?::[0-9]{0,5})?")  # a name, a port


def _is_local(head: Head, config: Config) -> bool:
    """Whether the Host header names this machine; HTTP/1.0 may leave it out."""
    if "host" not in head.headers:
        return True
    if (match := _HOST.fullmatch(head.headers.get("host"))) is None:
        return False
    name = match[1].strip("[]").lower()
    return name in ("localhost", "127.0.0.1", "::1", config.host.lower()) or name.endswith(
        ".localhost"
    )
