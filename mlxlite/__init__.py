"""mlxlite: serves MLX language models over HTTP in one small process.

To embed it: ``from mlxlite import Config, Server``. Both names resolve on first use, so that
importing the package costs nothing: neither ``--help`` nor the way to the listening socket may wait
for MLX (tested). The version lives here and nowhere else; the build reads it from the source text.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxlite.config.options import Config
    from mlxlite.server import Server as _Server

    class Server(_Server):
        def __init__(self, config: Config) -> None: ...


__all__ = ["Config", "Server", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    match name:
        case "Config":
            from mlxlite.config.options import Config

            return Config
        case "Server":
            from mlxlite.__main__ import server_class

            return server_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
