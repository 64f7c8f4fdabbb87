"""Puts runs' figures into the README, between two markers: never by hand.

The block is a function of their JSON (tested against the README itself), so that what is shown is
what was measured.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from bench.compare import MARK, NOISE, Comparison, markdown

OPEN, CLOSE = "<!-- bench -->", "<!-- /bench -->"
_FIELDS = (
    "command",
    "date",
    "machine",
    "versions",
    "BLAS",
    "pairs",
    "quiet machine",
    "what was noisy",
    "took",
)
_PLOTS = ("throughput", "gaps")


def block(result: Mapping[str, Any], folder: str) -> str:
    """The figures as Markdown; `folder` is where the plots lie, seen from the README."""
    header = result["header"]
    parts = ["\n".join(f"- {key}: {header[key]}" for key in _FIELDS if key in header)]
    for model, sections in result["models"].items():
        found = [
            Comparison.from_json(value) for section in sections for value in section["comparisons"]
        ]
        parts += [
            f"### Against other servers: {model}",
            markdown([comparison for comparison in found if comparison.asked is not None]),
            "<details><summary>What was compared beside that</summary>",
            markdown([comparison for comparison in found if comparison.asked is None]),
            "</details>",
        ]
        names = {section["section"] for section in sections if section["figures"]}
        kinds = [
            kind for kind in _PLOTS if kind in names or (kind == "gaps" and "longprompt" in names)
        ]
        parts += [f"![{model}: {kind}]({folder}/{model}-{kind}.svg)" for kind in kinds]
    return "\n\n".join(parts)


LEGEND = (
    f"A ratio is the median of the pairs' (and their range). {MARK}: the pairs are more than "
    f"{NOISE:.0%} of it apart."
)


def rewritten(readme: str, text: str) -> str:
    """Raises ValueError where the markers are missing."""
    before, opened, rest = readme.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not opened or not closed:
        raise ValueError(f"the README has no {OPEN} … {CLOSE}")
    return f"{before}{OPEN}\n{text}\n{CLOSE}{after}"


def text_of(runs: Sequence[Path], root: Path) -> str:
    """What stands between the markers; the plots are taken to lie beside each run's JSON."""
    blocks = [
        block(orjson.loads(run.read_bytes()), run.parent.resolve().relative_to(root).as_posix())
        for run in runs
    ]
    return "\n\n".join((*blocks, LEGEND))


def put(readme: Path, runs: Sequence[Path]) -> None:
    """Rewrite the file."""
    text = text_of(runs, readme.resolve().parent)
    readme.write_text(rewritten(readme.read_text(encoding="utf-8"), text), encoding="utf-8")
