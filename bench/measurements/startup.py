"""Start and memory: from nothing to the first answer, and resident memory above the weights."""

import asyncio
import compileall
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from time import perf_counter
from typing import Any

from bench.compare import Comparison, at_most
from bench.measurements.latency import BURST_TOKENS, NUM_BURST
from bench.measurements.pairs import NUM_ROWS, Bench
from bench.peers import MLX_LM, OURS, US
from bench.plan import Plan
from bench.report import Table
from bench.serving import Served, rss_bytes

IMPORTS = {OURS: "mlxlite.__main__", MLX_LM: "mlx_lm.server"}
# What is compared: its unit, and the bound of its ratio.
KINDS = {
    "listening_s": ("time to listening", "ms", 0.2),
    "ready_s": ("time to the first answer", "ms", 1.0),
    "rss": ("RSS above the weights", "MiB", 1.0),
    "rss_after": ("the same after a burst", "MiB", 1.0),
}


@dataclass(frozen=True, slots=True)
class Start:
    """One start, and the memory beyond the weights then and after a burst, in bytes."""

    listening_s: float
    ready_s: float
    rss: float
    rss_after: float


async def startup(bench: Bench) -> Table:
    """Each server is started from nothing, in turn with the others.

    Our modules and mlx-lm's are compiled before, as pip compiles them at installation: those of a
    checkout may not be (PYTHONDONTWRITEBYTECODE), and would be parsed at each start.
    """
    note = _compile()
    weights = sum(file.stat().st_size for file in bench.path.glob("*.safetensors"))
    starts: dict[str, list[Start]] = {}
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for pair in range(-1, bench.scale.num_pairs):
        for name, module in IMPORTS.items():
            seconds = await _import(module)
            imports[name] += [seconds] if pair >= 0 else []
        for peer in (US, *bench.peers):
            with bench.excused(peer.name):
                async with peer.start(bench.path, NUM_ROWS) as served:
                    begun = await _start(bench, served, weights)
                starts.setdefault(peer.name, []).extend([begun] if pair >= 0 else [])
    starts = {name: own for name, own in starts.items() if name not in bench.failures}
    comparisons: list[Comparison] = bench.against("import of the server", "ms", imports)
    for key, (what, unit, bound) in KINDS.items():
        own = {name: [getattr(start, key) for start in all_] for name, all_ in starts.items()}
        comparisons += bench.against(what, unit, own, at_most(bound))
    note += (
        f" The weights are {weights / 2**20:.1f} MiB. The first answer is the first 200 to a chat "
        f"of one token. Memory is read after it and after a burst of {NUM_BURST}, when the server "
        "is idle. Ours imports the model's libraries after it listens, so its import is the "
        "server's alone; the first answer includes all."
    )
    figures: dict[str, Any] = {"imports_s": imports, "weights": weights}
    figures |= {name: [asdict(begun) for begun in own] for name, own in starts.items()}
    return Table("Start and memory", figures=figures, notes=[note], comparisons=comparisons)


def _compile() -> str:
    packages = [module.partition(".")[0] for module in IMPORTS.values()]
    paths = [path for name in packages for path in import_module(name).__path__]
    if all(compileall.compile_dir(path, quiet=2) for path in paths):
        return f"The modules of {' and '.join(packages)} are compiled before, as by pip."
    return "Modules could not be compiled before: a server that parses them is slower to start."


async def _start(bench: Bench, served: Served, weights: int) -> Start:
    await served.settle()
    rss = rss_bytes(served.pid)
    (await served.run(Plan(bench.writer.clients(NUM_BURST, BURST_TOKENS)))).checked()
    await served.settle()
    after = rss_bytes(served.pid)
    return Start(served.listening_s, served.ready_s, rss - weights, after - weights)


async def _import(module: str) -> float:
    """Seconds for an interpreter to start, import it and end. Raises RuntimeError."""
    begun_at = perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", f"import {module}")
    if await process.wait() != 0:
        raise RuntimeError(f"{module} cannot be imported")
    return perf_counter() - begun_at
