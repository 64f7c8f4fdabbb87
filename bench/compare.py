"""Ours against another server, as ratios: what was measured, what is asked of it, what was noisy.

A `Comparison` holds the figures of the pairs and nothing else; the ratio is the median of the
pairs' ratios. It never says that a bound is kept when the pairs disagree about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any, Self

NOISE = 0.2  # of the median: pairs whose ratios are further apart than this are marked
MARK = "~"
COLUMNS = ("what", "ours", "theirs", "ours ÷ theirs (range)", "asked", "kept")


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
    """Figures of one thing, a pair's at the same place in both; `unit` says how they are shown."""

    what: str
    unit: str  # "tok/s", "ms" (of seconds) or "MiB" (of bytes)
    ours: Sequence[float]
    theirs: Sequence[float]
    peer: str
    asked: Asked | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours through theirs, pair by pair."""
        return ratios(self.ours, self.theirs)

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def spread(self) -> float:
        """How far the pairs' ratios are apart, as a share of their median."""
        return (max(self.ratios) - min(self.ratios)) / self.ratio

    @property
    def is_noisy(self) -> bool:
        """A lone pair has nothing to agree with."""
        return len(self.ours) < 2 or self.spread > NOISE

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

    def as_json(self) -> dict[str, Any]:
        asked = (
            None
            if self.asked is None
            else {
                "bound": self.asked.bound,
                "is_least": self.asked.is_least,
            }
        )
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": list(self.ours),
            "theirs": list(self.theirs),
            "peer": self.peer,
            "asked": asked,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        asked = value["asked"]
        return cls(**{**value, "asked": None if asked is None else Asked(**asked)})


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


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


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table for each peer."""
    parts = []
    for peer in dict.fromkeys(comparison.peer for comparison in comparisons):
        columns = [name.replace("theirs", peer) for name in COLUMNS]
        lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | ---: | ---: | --- |"]
        own = [comparison for comparison in comparisons if comparison.peer == peer]
        lines += [f"| {' | '.join(comparison.row())} |" for comparison in own]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
