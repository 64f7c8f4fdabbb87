"""Plots of a run, as SVG by matplotlib, from its JSON alone.

A section that was not measured has no plot. Names of files begin with the model's.
"""

from collections.abc import Callable, Mapping
from io import StringIO
from statistics import median
from typing import Any

from bench.peers import OURS, PEERS, PLAIN

SERVERS = {OURS: "mlxlite", PLAIN: "mlxlite, plain kernels", **{p.name: p.name for p in PEERS}}
_LEAST_MS = 0.1  # tokens of one packet are no time apart, which a logarithmic axis cannot show
Figures = Mapping[str, Any]


def draw(result: Mapping[str, Any]) -> dict[str, str]:
    """SVG by file name."""
    return {
        f"{model}-{name}.svg": _svg(model, plot, section["figures"])
        for model, sections in result["models"].items()
        for section in sections
        if section["figures"]
        for name, plot in PLOTS.get(section["section"], {}).items()
    }


def _svg(model: str, plot: Callable[[Any, Figures], None], figures: Figures) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlxlite"}):
        figure, out = Figure(figsize=(6.4, 3.6), layout="tight"), StringIO()
        axes = figure.subplots()
        plot(axes, figures)
        axes.set_title(f"{axes.get_title()}, {model}", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def throughput(axes: Any, figures: Figures) -> None:
    by_c = {int(key.removeprefix("C=")): value["whole"] for key, value in figures.items()}
    for name, label in (SERVERS | {"BatchGenerator": "BatchGenerator"}).items():
        points = [(c, median(own[name])) for c, own in by_c.items() if name in own]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(title="Throughput", xlabel="clients", ylabel="tok/s")


def _distribution(key: str, title: str) -> Callable[[Any, Figures], None]:

    def plot(axes: Any, figures: Figures) -> None:
        for name, seconds in figures["percentiles"][key].items():
            times = [max(1000 * value, _LEAST_MS) for value in seconds]
            axes.plot(times, range(len(times)), label=SERVERS[name])
        axes.set(title=f"{title}, random arrivals", xlabel="ms, at most", ylabel="% of all")
        axes.set_xscale("log")

    return plot


def gaps(axes: Any, figures: Figures) -> None:
    for i, (name, own) in enumerate(figures["timeline"].items()):
        times, seconds = zip(*own["points"], strict=True)
        axes.plot(times, [1000 * gap for gap in seconds], ".", ms=3, label=SERVERS[name])
        axes.axvline(own["ttft_s"], color=f"C{i}", lw=0.7)
    axes.set(title="Gaps of four streams beside a long prompt, to its first tokens")
    axes.set(xlabel="seconds since it was sent", ylabel="ms since the last token")


def warm(axes: Any, figures: Figures) -> None:
    kinds = ("TTFT, cold prefix", "TTFT, warm prefix")
    names = [name for name in SERVERS if name in figures[kinds[0]]]
    width = 1 / (len(names) + 1)
    for i, name in enumerate(names):
        heights = [1000 * median(figures[kind][name]) for kind in kinds]
        axes.bar([i * width, 1 + i * width], heights, width, label=SERVERS[name])
    axes.set(title="Time to first token", ylabel="ms", xticks=range(2), xticklabels=kinds)


PLOTS: Mapping[str, Mapping[str, Callable[[Any, Figures], None]]] = {
    "throughput": {"throughput": throughput},
    "openloop": {
        "ttft": _distribution("TTFT", "Time to first token"),
        "itl": _distribution("ITL", "Time between tokens"),
    },
    "longprompt": {"gaps": gaps},
    "prefix": {"warm": warm},
}
