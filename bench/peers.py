"""Other servers of MLX models: which there are, how one is started, which can be here.

`mlx_lm.server` is there wherever mlx-lm is. The others pin other versions of it and live in
environments of their own: one takes part where its command is on the PATH (or beside this Python)
and answers a first request, and is never required. Each is told as many rows as ours, so that
batches are equal, and otherwise left at its defaults; where one batches only when it is asked to,
it is asked to.
"""

import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.serving import HOST, Served, free_port, our_command, started

OURS = "server"  # the name of our own arm
MLX_LM = "mlx_lm.server"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server's name, and its command line for a model, a port and a number of rows."""

    name: str
    arguments: Callable[[Path, int, int], list[str]]
    needs_model: bool = True  # whether requests must name the model

    def command(self, path: Path, port: int, num_rows: int) -> list[str] | None:
        """None where it is not installed."""
        program, *rest = self.arguments(path, port, num_rows)
        beside = Path(sys.executable).parent / program
        found = shutil.which(program) or (str(beside) if beside.exists() else None)
        return None if found is None else [found, *rest]

    @property
    def is_installed(self) -> bool:
        return self.command(Path(), 0, 1) is not None

    @asynccontextmanager
    async def start(
        self, path: Path, num_rows: int, kernels: Path | None = None
    ) -> AsyncIterator[Served]:
        """Raises RuntimeError when it does not become ready."""
        port = free_port()
        command = self.command(path, port, num_rows)
        if command is None:
            raise RuntimeError(f"{self.name} is not installed")
        model = str(path) if self.needs_model else None
        async with started(command, port, model, kernels=kernels) as served:
            yield served


def _ours(path: Path, port: int, num_rows: int) -> list[str]:
    return our_command(path, port, num_rows)


def _mlx_lm(path: Path, port: int, num_rows: int) -> list[str]:
    own = [sys.executable, "-m", "mlx_lm", "server", "--model", str(path), "--port", str(port)]
    own += ["--decode-concurrency", str(num_rows), "--prompt-concurrency", str(num_rows)]
    return [*own, "--log-level", "WARNING"]


def _vllm_mlx(path: Path, port: int, num_rows: int) -> list[str]:
    own = ["vllm-mlx", "serve", str(path), "--host", HOST, "--port", str(port)]
    own += ["--continuous-batching", "--max-num-seqs", str(num_rows)]
    return [*own, "--prefill-batch-size", str(num_rows), "--completion-batch-size", str(num_rows)]


def _mlx_openai_server(path: Path, port: int, num_rows: int) -> list[str]:
    own = ["mlx-openai-server", "launch", "--model-path", str(path), "--model-type", "lm"]
    own += ["--host", HOST, "--port", str(port), "--no-log-file", "--log-level", "WARNING"]
    return [*own, "--decode-concurrency", str(num_rows), "--prompt-concurrency", str(num_rows)]


def _mlx_vlm(path: Path, port: int, num_rows: int) -> list[str]:
    own = ["mlx_vlm.server", "--model", str(path), "--host", HOST, "--port", str(port)]
    return [*own, "--max-num-seqs", str(num_rows)]


US = Peer(OURS, _ours, needs_model=False)
PEERS = (
    Peer(MLX_LM, _mlx_lm, needs_model=False),
    Peer("vllm-mlx", _vllm_mlx),
    Peer("mlx-openai-server", _mlx_openai_server),
    Peer("mlx-vlm", _mlx_vlm),
)


async def usable(peers: Iterable[Peer], path: Path) -> tuple[list[Peer], dict[str, str]]:
    """Those that answer for this model, and why the others that are installed do not."""
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
    peers: Iterable[Peer], path: Path, num_rows: int, kernels: Path | None = None
) -> AsyncIterator[dict[str, Served]]:
    """Ours and the others, ready and idle, by name; ours is the first."""
    async with AsyncExitStack() as stack:
        yield {
            peer.name: await stack.enter_async_context(peer.start(path, num_rows, kernels))
            for peer in (US, *peers)
        }
