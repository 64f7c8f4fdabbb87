"""The servers of a comparison: their command lines, and which of them can run here.

`mlx_lm.server` is there wherever mlx-lm is. The others pin other versions of it and live in
environments of their own: one takes part if its command is on the PATH (or beside this Python) and
answers a first request, and is never required. Each gets as many rows as ours, so that batches are
equal, and otherwise its defaults; continuous batching is switched on where it is off by default.
"""

import shutil
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serving import HOST, Served, free_port, started

OURS, PLAIN = "server", "server, plain kernels"  # the names of our own arms
MLX_LM = "mlx_lm.server"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server's name, and its command line with places for the model, the port and the rows."""

    name: str
    line: str
    needs_model: bool = True  # whether requests must name the model

    def command(self, path: Path, port: int, num_rows: int) -> list[str]:
        values = {"model": path, "port": port, "rows": num_rows, "host": HOST}
        return [part.format(python=sys.executable, **values) for part in self.line.split()]

    @property
    def program(self) -> str | None:
        """Its path; None if it is not installed."""
        program = self.command(Path(), 0, 1)[0]
        beside = Path(sys.executable).parent / program
        return shutil.which(program) or (str(beside) if beside.exists() else None)

    @asynccontextmanager
    async def start(self, path: Path, num_rows: int, **more: Any) -> AsyncIterator[Served]:
        """Start it; `more` is `started`'s. Raises RuntimeError if it does not answer."""
        if self.program is None:
            raise RuntimeError(f"{self.name} is not installed")
        port = free_port()
        command = [self.program, *self.command(path, port, num_rows)[1:]]
        model = str(path) if self.needs_model else None
        async with started(command, port, model, **more) as served:
            yield served


_OWN = "{python} -m %s --model {model} --port {port} --max-batch-size {rows}"
US = Peer(OURS, _OWN % "mlxlite", needs_model=False)
US_PLAIN = Peer(PLAIN, _OWN % "bench.serve_plain", needs_model=False)
_LIMITS = " --decode-concurrency {rows} --prompt-concurrency {rows} --log-level WARNING"
_MLX_LM = "{python} -m mlx_lm server --model {model} --port {port}" + _LIMITS
_ON_HOST = "{model} --host {host} --port {port}"
_VLLM = f"vllm-mlx serve {_ON_HOST} --continuous-batching --max-num-seqs {{rows}}"
_VLLM += " --prefill-batch-size {rows} --completion-batch-size {rows}"
_OPENAI = f"mlx-openai-server launch --model-type lm --no-log-file --model-path {_ON_HOST}{_LIMITS}"
PEERS = (
    Peer(MLX_LM, _MLX_LM, needs_model=False),
    Peer("vllm-mlx", _VLLM),
    Peer("mlx-openai-server", _OPENAI),
    Peer("mlx-vlm", f"mlx_vlm.server --model {_ON_HOST} --max-num-seqs {{rows}}"),
)


async def usable(peers: Iterable[Peer], path: Path) -> tuple[list[Peer], dict[str, str]]:
    """Those that answer for this model, and the errors of the others."""
    able, reasons = [], {}
    for peer in peers:
        try:
            async with peer.start(path, 1):
                able.append(peer)
        except RuntimeError as error:
            reasons[peer.name] = str(error).strip().splitlines()[-1]
    return able, reasons


@asynccontextmanager
async def all_started(
    peers: Iterable[Peer], path: Path, num_rows: int, **more: Any
) -> AsyncIterator[dict[str, Served]]:
    """The servers, ready and idle, by name."""
    async with AsyncExitStack() as stack:
        yield {
            peer.name: await stack.enter_async_context(peer.start(path, num_rows, **more))
            for peer in peers
        }
