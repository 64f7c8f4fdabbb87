"""Which plots there are of a run: from its JSON alone, so that old figures can be drawn again.

A section that was not measured has no plot. Names of files begin with the model's.
"""

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from bench.peers import OURS, PEERS
from bench.svg import Kind, Plot, Series

_SERVERS = (OURS, *(peer.name for peer in PEERS))
_NAMES = {OURS: "mlxlite"}
_UPPER = "BatchGenerator"
_LEAST_MS = 0.1  # what is shorter is drawn so: tokens that come in one packet are no time apart


def draw(result: Mapping[str, Any]) -> dict[str, str]:
    """SVG by file name."""
    files = {}
    for model, sections in result["models"].items():
        figures = {s["section"]: s["figures"] for s in sections if s["figures"]}
        for name, plot in _plots(model, figures):
            files[f"{model}-{name}.svg"] = plot.as_svg()
    return files


def _plots(model: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, Plot]]:
    if "throughput" in figures:
        yield "throughput", _throughput(model, figures["throughput"])
    if "openloop" in figures:
        for key, what in (("ttft_s", "Time to first token"), ("itl_s", "Time between tokens")):
            yield key.removesuffix("_s"), _distribution(model, figures["openloop"], key, what)
    if "timeline" in figures.get("longprompt", {}):
        yield "gaps", _gaps(model, figures["longprompt"]["timeline"])
    if "prefix" in figures:
        yield "warm", _warm(model, figures["prefix"])


def _shown(name: str) -> str:
    return _NAMES.get(name, name)


def _throughput(model: str, figures: Mapping[str, Any]) -> Plot:
    by_c = {int(key.removeprefix("C=")): value["whole"] for key, value in figures.items()}
    series = [
        Series(_shown(name), [(c, median(own[name])) for c, own in by_c.items() if name in own])
        for name in (*_SERVERS, _UPPER)
        if any(name in own for own in by_c.values())
    ]
    title = f"Throughput, {model}: output tokens a second by clients"
    return Plot(title, "clients", "tok/s", series)


def _distribution(model: str, figures: Mapping[str, Any], key: str, what: str) -> Plot:
    """The share of requests, or gaps, that took no longer; over a logarithmic axis."""
    series = [
        Series(
            _shown(name),
            [(max(1000 * value, _LEAST_MS), n) for n, value in enumerate(figures[name][key])],
        )
        for name in _SERVERS
        if name in figures
    ]
    title = f"{what}, {model}: requests at random"
    return Plot(title, "ms, at most", "% of all", series, is_log_x=True)


def _gaps(model: str, timeline: Mapping[str, Any]) -> Plot:
    names = [name for name in _SERVERS if name in timeline]
    series = [
        Series(_shown(name), [(t, 1000 * gap) for t, gap in timeline[name]["points"]], Kind.DOTS)
        for name in names
    ]
    marks = [(0.0, "long prompt sent")]
    marks += [(timeline[name]["ttft_s"], f"its first token: {_shown(name)}") for name in names]
    title = f"Gaps of four streams beside a long prompt, {model}"
    return Plot(title, "seconds since it was sent", "ms since the last token", series, marks=marks)


def _warm(model: str, figures: Mapping[str, Any]) -> Plot:
    kinds = ("cold", "warm")
    series = [
        Series(
            _shown(name),
            [(i, 1000 * median(figures[name][kind])) for i, kind in enumerate(kinds)],
            Kind.BARS,
        )
        for name in _SERVERS
        if name in figures
    ]
    title = f"Time to first token, {model}: a prefix that is new, and one that is not"
    return Plot(title, "prefix", "ms", series, x_names=kinds)
