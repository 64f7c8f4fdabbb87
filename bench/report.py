"""The machine and the versions of a run, and a section's figures as Markdown and JSON."""

import ctypes
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from bench.compare import MARK, NOISE, Comparison, markdown, table
from mlxlite import __version__

_PACKAGES = ("mlx", "mlx-lm", "h11", "orjson")
BUSY = 0.5  # runnable processes before the run; with more the machine was not quiet
OURS_WAITING = 1.5  # runnable processes of the run itself, beyond the cores
_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE")
_FALLBACKS = ("Prescott", "Core2", "Generic")  # OpenBLAS's kernels for an unknown processor


@dataclass(frozen=True, slots=True)
class Table:
    """A section's result. `figures` are the raw numbers, for the JSON."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    comparisons: Sequence[Comparison] = ()

    def as_markdown(self) -> str:
        parts = [f"### {self.title}"]
        parts += [markdown(self.comparisons)] if self.comparisons else []
        parts += [table(self.columns, self.rows)] if self.rows else []
        return "\n\n".join([*parts, *self.notes, ""])

    def as_json(self) -> dict[str, Any]:
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return asdict(self) | {"rows": rows}


def ms(values: Sequence[float], digits: int = 1) -> str:
    """The median of seconds, in milliseconds."""
    return f"{median(values) * 1000:.{digits}f}"


def header() -> dict[str, str]:
    """The machine and the versions; the BLAS is known after MLX is loaded."""
    versions = {"python": platform.python_version(), "mlxlite": __version__}
    versions |= {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "BLAS": _blas(),
        "load average before": load_average(),
    }


def load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def quiet(before: float, after: float, num_cores: int) -> str:
    """Whether the load averages before and after the run show no other work.

    The run keeps the cores busy, with one or two more processes that wait for them.
    """
    if before > BUSY:
        return f"no: {before:.1f} processes wanted to run before the first measurement"
    if after > num_cores + OURS_WAITING:
        return f"no: {after:.1f} processes wanted to run at the end, on {num_cores} cores"
    return "yes"


def noisy(comparisons: Sequence[Comparison]) -> str:
    """The number of comparisons whose pairs disagree."""
    num = sum(comparison.is_noisy for comparison in comparisons)
    bound = f"the pairs' ratios are more than {NOISE:.0%} of their median apart"
    return f"{num} of {len(comparisons)} comparisons, marked {MARK}: {bound}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return name.strip() or platform.processor()


def _blas() -> str:
    preloaded = Path(os.environ.get("LD_PRELOAD", "")).name or "nothing"
    own = ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in _VARIABLES)
    try:
        mapped = Path("/proc/self/maps").read_text().split()
        paths = [Path(word).name for word in mapped if "/" in word]
        names = sorted({name for name in paths if "blas" in name.lower()})
    except OSError:
        names = []
    loaded = ", ".join(names) or "unknown"
    return f"preloaded {preloaded}; loaded {loaded}; {kernels(blas_core())}; {own}"


def blas_core() -> str | None:
    """The processor that a preloaded OpenBLAS takes this one for; None with another BLAS."""
    name = getattr(ctypes.CDLL(None), "openblas_get_corename", None)
    if name is None:
        return None
    name.restype = ctypes.c_char_p
    return str(name().decode())


def kernels(core_name: str | None) -> str:
    """OpenBLAS's kernels, and a hint if they are its oldest."""
    hint = "it may not know this processor, and an OPENBLAS_CORETYPE of its vectors be faster"
    known = "kernels unknown" if core_name is None else f"kernels for {core_name}"
    return f"{known} ({hint})" if core_name in _FALLBACKS else known
