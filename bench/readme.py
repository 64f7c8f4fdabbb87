"""Puts runs' figures into the README, between markers: never by hand.

Each block is a function of their JSON (tested against the README itself), so that what is shown is
what was measured.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from bench.compare import MARK, NOISE, Comparison, markdown
from bench.peers import MLX_LM, OURS

FIGURES, GROWTH = "bench", "growth"  # the blocks
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
    parts = [_header(result)]
    for model, sections in result["models"].items():
        found = _comparisons(sections)
        parts += [
            f"### Against other servers: {model}",
            markdown([comparison for comparison in found if comparison.asked is not None]),
        ]
        if beside := [comparison for comparison in found if comparison.asked is None]:
            parts += [
                "<details><summary>What was compared beside that</summary>",
                markdown(beside),
                "</details>",
            ]
        names = {section["section"] for section in sections if section["figures"]}
        kinds = [
            kind for kind in _PLOTS if kind in names or (kind == "gaps" and "longprompt" in names)
        ]
        parts += [f"![{model}: {kind}]({folder}/{model}-{kind}.svg)" for kind in kinds]
    return "\n\n".join(parts)


def _header(result: Mapping[str, Any]) -> str:
    header = result["header"]
    return "\n".join(f"- {key}: {header[key]}" for key in _FIELDS if key in header)


def _comparisons(sections: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    return [Comparison.from_json(value) for section in sections for value in section["comparisons"]]


def agreement(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """A run beside the same one made before: every ratio twice, and whether they agree.

    They do where the ranges of their pairs meet, or their medians are no further apart than the
    noise that the tables mark.
    """
    parts = [_header(second)]
    for model, sections in second["models"].items():
        before = {(c.what, c.peer): c for c in _comparisons(first["models"][model])}
        twice = [(before[c.what, c.peer], c) for c in _comparisons(sections)]
        usual = twice[0][0].peer if twice else ""
        rows = [
            (
                now.what if now.peer == usual else f"{now.what} ÷ {now.peer}",
                then.row()[3],
                now.row()[3],
                f"{now.ratio / then.ratio - 1:+.0%}",
                "yes" if _agree(then, now) else "no",
            )
            for then, now in twice
        ]
        num = sum(row[-1] == "yes" for row in rows)
        parts += [
            f"### The same again: {model}",
            f"{num} of {len(rows)} ratios agree: the ranges meet, or the medians are at most "
            f"{NOISE:.0%} apart.",
            _table(("what", "first run", "second run", "apart", "agree"), *rows),
        ]
    return "\n\n".join(parts)


def _agree(then: Comparison, now: Comparison) -> bool:
    meet = min(then.ratios) <= max(now.ratios) and min(now.ratios) <= max(then.ratios)
    return meet or abs(now.ratio / then.ratio - 1) <= NOISE


def _is_again(first: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a run has nothing that the first one has not."""

    def names(result: Mapping[str, Any]) -> set[tuple[str, str, str]]:
        return {
            (model, comparison.what, comparison.peer)
            for model, sections in result["models"].items()
            for comparison in _comparisons(sections)
        }

    return names(other) <= names(first)


LEGEND = (
    f"A ratio is the median of the pairs' (and their range). {MARK}: the pairs are more than "
    f"{NOISE:.0%} of it apart."
)


def growth(result: Mapping[str, Any]) -> str:
    """How the first model's times grow with clients, context and what its prompts share."""
    _, sections = next(iter(result["models"].items()))
    figures = {section["section"]: section["figures"] for section in sections}
    tables = (
        _clients(figures["throughput"]),
        _contexts(figures["context"]),
        _shared(figures["prefix"]),
    )
    return "\n\n".join(tables)


def _clients(throughput: Mapping[str, Any]) -> str:
    names = [name.removeprefix("C=") for name in throughput]
    rates = [median(arms["whole"][OURS]) for arms in throughput.values()]
    times = [rate / rates[0] for rate in rates]
    each = [more / int(name) for name, more in zip(names, times, strict=True)]
    return _table(
        ("clients", *names),
        ("tokens a second, all together", *(f"{rate:,.0f}" for rate in rates)),
        ("times one client's", *(f"{more:.1f}" for more in times)),
        ("for each of them", *(f"{share:.2f}" for share in each)),
    )


def _contexts(context: Mapping[str, Any]) -> str:
    first = [1000 * median(times["ttft_s"][OURS]) for times in context.values()]
    gaps = [1000 * median(times["gap_s"][OURS]) for times in context.values()]
    nums = list(map(int, context))
    return _table(
        ("prompt tokens, one client", *context),
        ("time to the first token, ms", *(f"{time:,.0f}" for time in first)),
        ("times as many tokens", *(f"{num / nums[0]:.0f}" for num in nums)),
        ("times as long", *(f"{time / first[0]:.1f}" for time in first)),
        ("median gap after it, ms", *(f"{gap:.1f}" for gap in gaps)),
    )


def _shared(prefix: Mapping[str, Any]) -> str:
    names = {
        "cold": "the first one",
        "warm": "another one after it",
        "8": "eight new ones at once, the median of them",
    }
    servers = [name for name in (OURS, MLX_LM) if name in prefix]
    return _table(
        ("1,500 tokens that many prompts share", *("ours" if s == OURS else s for s in servers)),
        *(
            (name, *(f"{1000 * median(prefix[server][kind]):,.0f} ms" for server in servers))
            for kind, name in names.items()
        ),
    )


def _table(*rows: Sequence[str]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join((lines[0], f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *lines[1:]))


def rewritten(readme: str, name: str, text: str) -> str:
    """Raises ValueError where the block's markers are missing."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = readme.partition(opening)
    _, closed, after = rest.partition(closing)
    if not opened or not closed:
        raise ValueError(f"the README has no {opening} … {closing}")
    return f"{before}{opening}\n{text}\n{closing}{after}"


def texts_of(runs: Sequence[Path], root: Path) -> dict[str, str]:
    """What stands in each block; the plots are taken to lie beside each run's JSON."""
    results = [orjson.loads(run.read_bytes()) for run in runs]
    folders = [run.parent.resolve().relative_to(root).as_posix() for run in runs]
    first, *others = results
    blocks = [block(first, folders[0])]
    for other, folder in zip(others, folders[1:], strict=True):
        blocks.append(agreement(first, other) if _is_again(first, other) else block(other, folder))
    return {FIGURES: "\n\n".join((*blocks, LEGEND)), GROWTH: growth(first)}


def put(readme: Path, runs: Sequence[Path]) -> None:
    """Rewrite the file."""
    shown = readme.read_text(encoding="utf-8")
    for name, text in texts_of(runs, readme.resolve().parent).items():
        shown = rewritten(shown, name, text)
    readme.write_text(shown, encoding="utf-8")
