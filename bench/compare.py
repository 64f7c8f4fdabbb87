"""Ours beside another arm, as ratios: what was measured, the bound, and what was noisy.

A `Comparison` has the figures of the pairs and nothing else; the ratio is the median of the pairs'
ratios, never a ratio of medians: both sides of a pair were measured within seconds. A verdict is
open when the pairs disagree about the bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from statistics import median
from typing import Any, Self

NOISE = 0.2  # of the median: pairs whose ratios are further apart are marked
MARK = "~"
COLUMNS = ("what", "ours", "theirs", "ours ÷ theirs (range)", "asked", "kept")
# On a CPU a server of ours can run without the forms that its layers get there.
EQUAL = "On equal kernels, mlx-lm's own: the ratios that hold on a GPU."
FITTED = "As installed:"


class Verdict(StrEnum):
    YES = "yes"
    NO = "no"
    OPEN = "not certain"
    NOT_ASKED = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A bound for a ratio."""

    bound: float
    is_least: bool

    def __str__(self) -> str:
        return f"{'≥' if self.is_least else '≤'} {self.bound:g}"

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value <= self.bound


def at_least(bound: float) -> Asked:
    return Asked(bound, is_least=True)


def at_most(bound: float) -> Asked:
    return Asked(bound, is_least=False)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of one thing; both sides have a pair's at the same place."""

    what: str
    unit: str  # "tok/s", "ms" (of seconds) or "MiB" (of bytes)
    ours: Sequence[float]
    theirs: Sequence[float]
    peer: str
    asked: Asked | None = None
    is_equal: bool = False  # on equal kernels

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def is_noisy(self) -> bool:
        spread = max(self.ratios) - min(self.ratios)
        return len(self.ours) < 2 or spread > NOISE * self.ratio

    @property
    def verdict(self) -> Verdict:
        if self.asked is None:
            return Verdict.NOT_ASKED
        kept = {self.asked.holds(value) for value in self.ratios}
        if len(kept) == 2 or len(self.ours) < 2:
            return Verdict.OPEN
        return Verdict.YES if kept == {True} else Verdict.NO

    def row(self) -> list[str]:
        apart = f"{self.ratio:.2f} ({min(self.ratios):.2f}–{max(self.ratios):.2f})"
        return [
            self.what,
            shown(self.ours, self.unit),
            shown(self.theirs, self.unit),
            f"{apart} {MARK}" if self.is_noisy else apart,
            str(self.asked or ""),
            self.verdict,
        ]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        asked = value["asked"]
        return cls(**{**value, "asked": None if asked is None else Asked(**asked)})


def shown(values: Sequence[float], unit: str) -> str:
    """The median with its unit."""
    middle = median(values)
    match unit:
        case "ms":
            return f"{1000 * middle:.1f} ms" if middle < 1 else f"{middle:.2f} s"
        case "MiB":
            return f"{middle / 2**20:.0f} MiB"
        case _:
            return f"{middle:.0f} {unit}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table for each peer; those on equal kernels first, with a heading if there are both."""
    parts: list[str] = []
    has_equal = any(comparison.is_equal for comparison in comparisons)
    ordered = sorted(comparisons, key=lambda c: not c.is_equal)
    for is_equal, group in groupby(ordered, lambda c: c.is_equal):
        parts += [EQUAL if is_equal else FITTED] if has_equal else []
        by_peer: dict[str, list[Comparison]] = {}
        for comparison in group:
            by_peer.setdefault(comparison.peer, []).append(comparison)
        for peer, own in by_peer.items():
            columns = [name.replace("theirs", peer) for name in COLUMNS]
            parts.append(table(columns, [comparison.row() for comparison in own]))
    return "\n\n".join(parts)
