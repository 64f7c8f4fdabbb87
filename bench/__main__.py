"""Measures the server against mlx-lm and its server, and parts of it against each other.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 python -m bench

Run it from the repository's root, on an idle machine; bench/README.md explains the variables, which
macOS does not need. Without flags: the demo model, few pairs, the sections with bounds, in less
than five minutes. `--full`: a random model, more pairs, all sections.
"""

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson

from bench import plots, report
from bench.compare import Comparison
from bench.inprocess import InProcess
from bench.measurements.latency import burst, context, longprompt, openloop
from bench.measurements.lost import lost
from bench.measurements.pairs import Bench, Scale, is_cpu
from bench.measurements.prefix import overhead, pictures, prefix, turns
from bench.measurements.startup import startup
from bench.measurements.throughput import mixed, neighbours, seedcases, steps, throughput
from bench.models import SIZES, Writer, save_checkpoint, save_endless
from bench.peers import MLX_LM, PEERS, usable
from bench.report import Table
from mlxlite.engine.device_thread import DeviceThread
from mlxlite.models.locate import locate

_ALL: Sequence[Callable[[Bench], Awaitable[Table]]] = (
    *(throughput, seedcases, openloop, mixed, longprompt, context, burst, lost),
    *(prefix, turns, startup, neighbours, steps, overhead, pictures),
)
SECTIONS = {section.__name__: section for section in _ALL}
BOUNDED = ("throughput", "mixed", "longprompt", "burst", "lost", "prefix", "startup")
DEMO, FAILED = "demo", " failed"


SHORT = Scale((DEMO,), BOUNDED, num_pairs=2, max_tokens=32, num_rounds=1, has_parts=False)
_TEXT_SECTIONS = tuple(name for name in SECTIONS if name != "pictures")  # that needs a VLM
FULL = Scale(("small",), _TEXT_SECTIONS, 5, max_tokens=128, num_rounds=2, has_parts=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--full", action="store_true", help="all sections on a random model, with more pairs")
    add("--only", help=f"some of {','.join(SECTIONS)}, separated by commas")
    add("--model", action="append", help=f"{DEMO}, {', '.join(SIZES)}, or a model's path or id")
    add("--peers", help="servers to compare with, separated by commas (default: all installed)")
    add("--pairs", type=int, help="number of pairs of each comparison")
    add("--tokens", type=int, help="output tokens of a request where throughput is measured")
    add("--out", type=Path, metavar="DIR", help="write bench.json, bench.md and plots there")
    args = parser.parse_args(argv)
    unknown = (set((args.only or "").split(",")) - set(SECTIONS)) - {""}
    unknown |= set((args.peers or "").split(",")) - {peer.name for peer in PEERS} - {""}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    return args


def scale_of(args: argparse.Namespace) -> Scale:
    """One pair on a Linux CPU without OpenBLAS, where everything takes several times as long."""
    is_slow = sys.platform == "linux" and is_cpu() and report.blas_core() is None
    short = replace(SHORT, num_pairs=1) if is_slow else SHORT
    scale = FULL if args.full else short
    return replace(
        scale,
        models=args.model or scale.models,
        sections=args.only.split(",") if args.only else scale.sections,
        num_pairs=args.pairs or scale.num_pairs,
        max_tokens=args.tokens or scale.max_tokens,
    )


class Output:
    """Prints, and keeps everything printed for the files."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def say(self, text: str) -> None:
        self.parts.append(text)
        print(text, flush=True)


async def measure(args: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Print each section when it is complete; return all figures for the JSON."""
    scale = scale_of(args)
    begun_at, load_before = perf_counter(), os.getloadavg()[0]
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    fields = {"command": f"`{command}`"} | report.header() | {"pairs": str(scale.num_pairs)}
    output.say("## mlxlite bench\n\n" + _list(fields))
    models: dict[str, list[dict[str, Any]]] = {}
    device_thread = DeviceThread()
    for name in scale.models:
        with tempfile.TemporaryDirectory(prefix="mlxlite-bench-") as scratch:
            path = await _model(device_thread, name, Path(scratch))
            output.say(f"## Model: {path.name}\n")
            inprocess = await InProcess.open(device_thread, path)
            bench = await _bench(args, scale, path, inprocess, output)
            models[path.name] = [await _section(bench, s, output) for s in scale.sections]
            await inprocess.close()
    every = [c for sections in models.values() for s in sections for c in s["comparisons"]]
    ending = {
        "load average after": report.load_average(),
        "quiet machine": report.quiet(load_before, os.getloadavg()[0], os.cpu_count() or 1),
        "what was noisy": report.noisy([Comparison.from_json(value) for value in every]),
        "took": f"{(perf_counter() - begun_at) / 60:.1f} minutes",
    }
    output.say(_list(ending))
    return {"header": fields | ending, "models": models}


def _list(fields: Mapping[str, str]) -> str:
    return "".join(f"- {key}: {value}\n" for key, value in fields.items())


async def _model(device_thread: DeviceThread, name: str, scratch: Path) -> Path:
    """A checkpoint that any server can load: random, or an endless copy of a real one."""
    if name in SIZES:
        await device_thread.run(save_checkpoint, scratch / name, name)
        return scratch / name
    found = locate(None if name == DEMO else name)
    save_endless(found, scratch / found.name)
    return scratch / found.name


async def _bench(
    args: argparse.Namespace, scale: Scale, path: Path, inprocess: InProcess, output: Output
) -> Bench:
    """With mlx_lm.server always: all bounds are for ratios to it."""
    first, *others = [
        peer
        for peer in PEERS
        if peer.program and (args.peers is None or peer.name in (MLX_LM, *args.peers.split(",")))
    ]
    able, reasons = await usable(others, path)
    for peer, reason in reasons.items():
        output.say(f"{peer} is installed and left out: {reason}\n")
    is_small = path.name in ("small", DEMO)
    return Bench(path, inprocess, Writer(inprocess.render), [first, *able], scale, is_small)


async def _section(bench: Bench, name: str, output: Output) -> dict[str, Any]:
    """A section that fails is reported in its place, and the others continue."""
    begun_at = perf_counter()
    try:
        table = await SECTIONS[name](bench)
        table.as_markdown()  # figures that make no ratio are the section's fault as well
    except (RuntimeError, ValueError, ArithmeticError) as error:
        table = Table(f"{name}{FAILED}", notes=[f"{type(error).__name__}: {error}"])
    output.say(table.as_markdown())
    for peer, error_text in bench.failures.items():
        output.say(f"{peer} failed and is left out from here on: {error_text.splitlines()[-1]}\n")
    took = {"section": name, "took_s": round(perf_counter() - begun_at, 1)}
    return took | table.as_json()


def write(result: Mapping[str, Any], output: Output, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data = orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    (out / "bench.json").write_bytes(data)
    (out / "bench.md").write_text("\n".join(output.parts), encoding="utf-8")
    for file, svg in plots.draw(orjson.loads(data)).items():
        (out / file).write_text(svg, encoding="utf-8")


def main() -> None:
    args, output = parse(sys.argv[1:]), Output()
    result = asyncio.run(measure(args, output))
    if args.out is not None:
        write(result, output, args.out)
    every = [section for sections in result["models"].values() for section in sections]
    sys.exit(1 if any(section["title"].endswith(FAILED) for section in every) else 0)


if __name__ == "__main__":
    main()
