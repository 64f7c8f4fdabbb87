"""Where it was measured, and a section's figures as Markdown and JSON.

A ratio is the median of the pairs' ratios with their range, never a ratio of medians: the two sides
of a pair were measured within seconds of each other, on the same machine in the same mood.
"""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from bench import compare
from bench.compare import Comparison, ratios
from mlxlite import __version__
from mlxlite.runner.cpu import blas_core

_PACKAGES = ("mlx", "mlx-lm", "h11", "orjson")
BUSY = 0.5  # runnable processes before the run, from which on the machine was not quiet
OURS_WAITING = 1.5  # of ours, beyond the cores
_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE")
# What OpenBLAS computes with where it does not know a processor, as of a later year than its own.
_FALLBACKS = ("Prescott", "Core2", "Generic")


@dataclass(frozen=True, slots=True)
class Table:
    """`figures` are the raw numbers behind the rows, by a name that says which; for the JSON."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    comparisons: Sequence[Comparison] = ()

    def as_markdown(self) -> str:
        parts = [f"### {self.title}"]
        if self.rows:
            lines = [_row(self.columns), _row(["---", *["---:"] * (len(self.columns) - 1)])]
            parts.append("\n".join([*lines, *map(_row, self.rows)]))
        if self.comparisons:
            parts.append(compare.markdown(self.comparisons))
        return "\n\n".join([*parts, *self.notes, ""])

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            "figures": dict(self.figures),
            "notes": list(self.notes),
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
        }


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rate(values: Sequence[float]) -> str:
    return f"{median(values):.0f}"


def ms(values: Sequence[float], digits: int = 1) -> str:
    """The median of seconds, in milliseconds."""
    return f"{median(values) * 1000:.{digits}f}"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median and range of the pairs' ratios."""
    pairs = ratios(ours, theirs)
    return f"{median(pairs):.2f} ({min(pairs):.2f}–{max(pairs):.2f})"


# --- the header -------------------------------------------------------------------------------


def header() -> dict[str, str]:
    """The machine and the versions; the BLAS is known only once MLX is loaded."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": ", ".join(
            f"{name} {number}"
            for name, number in {
                "python": platform.python_version(),
                "mlxlite": __version__,
                **versions,
            }.items()
        ),
        "BLAS": _blas(),
        "load average before": load_average(),
    }


def header_markdown(fields: Mapping[str, str]) -> str:
    return "\n".join(["## mlxlite bench", "", *(f"- {k}: {v}" for k, v in fields.items()), ""])


def load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def quiet(before: float, after: float, num_cores: int) -> str:
    """What the load averages say of the machine, before anything of ours ran and at the end.

    Ours keep the cores busy, with one or two more that wait for them: who else ran shows as more.
    """
    if before > BUSY:
        return f"no: {before:.1f} processes wanted to run before the first measurement"
    if after > num_cores + OURS_WAITING:
        return f"no: {after:.1f} processes wanted to run at the end, on {num_cores} cores"
    return "yes"


def noisy(comparisons: Sequence[Comparison]) -> str:
    """Which of them the pairs disagree about, by name."""
    names = [comparison.what for comparison in comparisons if comparison.is_noisy]
    bound = f"the pairs' ratios are more than {compare.NOISE:.0%} of their median apart"
    if not names:
        return f"nothing ({compare.MARK} would mark that {bound})"
    return f"{len(names)} of {len(comparisons)} comparisons, marked {compare.MARK}: {bound}"


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
    """What is preloaded, what is mapped into this process, its kernels, and what is set."""
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


def kernels(core_name: str | None) -> str:
    """What OpenBLAS computes with, and what to do where that is its oldest."""
    if core_name is None:
        return "kernels unknown"
    if core_name in _FALLBACKS:
        hint = "it may not know this processor, and an OPENBLAS_CORETYPE of its vectors be faster"
        return f"kernels for {core_name} ({hint})"
    return f"kernels for {core_name}"
