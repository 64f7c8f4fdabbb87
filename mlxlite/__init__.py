"""mlxlite: serves MLX language models over HTTP in one small process.

To embed it: ``from mlxlite import Config, Server``. Names resolve on first use, so that importing
the package costs nothing: neither ``--help`` nor the way to the listening socket may wait for MLX
(tested). The version lives here and nowhere else; the build reads it from the source text.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxlite.config.flags import ConfigError
    from mlxlite.config.options import Config
    from mlxlite.server import LoadError, Server

__all__ = ["Config", "ConfigError", "LoadError", "Server", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "Config": "mlxlite.config.options",
    "ConfigError": "mlxlite.config.flags",
    "LoadError": "mlxlite.server",
    "Server": "mlxlite.server",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
