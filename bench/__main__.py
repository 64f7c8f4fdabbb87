"""Measures the server against mlx-lm and its server, and parts of it against each other.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 python -m bench

Run it from the repository's root, on a machine that does nothing else. The environment is passed on
to the servers and the load generator. On Linux MLX's CPU back end calls whatever libblas the system
has; the reference one is several times slower than OpenBLAS, and OpenBLAS with threads competes
with the server for cores: hence the line above. On macOS leave the variables out.

Without flags: the built-in demo model, few pairs, the sections of which something is asked; less
than five minutes, for which there is one pair on a Linux CPU without OpenBLAS. `--full`: a random
model, more pairs, all sections.
"""

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson

from bench import plots, readme, report
from bench.arrivals import burst, openloop, seedcases, turns
from bench.compare import Comparison
from bench.costs import lost, startup
from bench.inprocess import InProcess
from bench.models import SIZES, Writer, save_checkpoint, save_endless
from bench.peers import MLX_LM, PEERS, Peer, usable
from bench.pictures import pictures
from bench.prefixes import overhead, prefix
from bench.report import Table
from bench.sections import Bench, context, longprompt, mixed, neighbours, steps, throughput
from mlxlite.engine.device_thread import Lane
from mlxlite.models.locate import locate
from mlxlite.runner.cpu import blas_core, is_cpu

SECTIONS: Mapping[str, Callable[[Bench], Awaitable[Table]]] = {
    "throughput": throughput,
    "seedcases": seedcases,
    "openloop": openloop,
    "mixed": mixed,
    "longprompt": longprompt,
    "context": context,
    "burst": burst,
    "lost": lost,
    "prefix": prefix,
    "turns": turns,
    "startup": startup,
    "neighbours": neighbours,
    "steps": steps,
    "overhead": overhead,
    "pictures": pictures,
}
# Without --full, if no others are named: those of which something is asked.
ASKED = ("throughput", "mixed", "longprompt", "burst", "lost", "prefix", "startup")
SEEING = ("pictures",)  # by name only: for a model that sees
DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured, where the command line does not say."""

    models: tuple[str, ...]
    sections: tuple[str, ...]
    num_pairs: int
    max_tokens: int
    num_rounds: int


SHORT = Scale((DEMO,), ASKED, num_pairs=2, max_tokens=32, num_rounds=1)
FULL = Scale(
    ("small",),
    tuple(s for s in SECTIONS if s not in SEEING),
    num_pairs=5,
    max_tokens=128,
    num_rounds=2,
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--full", action="store_true", help="all sections on a random model, with more pairs")
    add("--only", help=f"some of {','.join(SECTIONS)}, separated by commas")
    add("--model", action="append", help=f"{DEMO}, {', '.join(SIZES)}, or a model's path or id")
    add("--peers", help="which to compare with, by commas (default: all that are installed)")
    add("--pairs", type=int, help="how often each comparison is made")
    add("--tokens", type=int, help="output tokens of a request where throughput is measured")
    add("--json", type=Path, metavar="FILE", help="write the header and all figures there too")
    add("--out", type=Path, metavar="DIR", help="write bench.json, bench.md and plots there")
    add("--readme", type=Path, nargs="+", metavar="JSON", help="only put runs into README.md")
    args = parser.parse_args(argv)
    unknown = (set((args.only or "").split(",")) - set(SECTIONS)) - {""}
    unknown |= set((args.peers or "").split(",")) - {peer.name for peer in PEERS} - {""}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    return args


def _short() -> Scale:
    """One pair on a CPU without OpenBLAS: all that is measured takes several times as long."""
    is_slow = sys.platform == "linux" and is_cpu() and blas_core() is None
    return replace(SHORT, num_pairs=1) if is_slow else SHORT


def _names(args: argparse.Namespace) -> Sequence[str]:
    if args.only:
        return str(args.only).split(",")
    return FULL.sections if args.full else SHORT.sections


def _chosen(args: argparse.Namespace) -> list[Peer]:
    """mlx_lm.server always: all ratios are to it."""
    if args.peers is None:
        return [peer for peer in PEERS if peer.is_installed]
    return [peer for peer in PEERS if peer.name == MLX_LM or peer.name in args.peers.split(",")]


class Output:
    """What is printed as it comes, and kept for the files."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.has_failed = False

    def say(self, text: str) -> None:
        self.parts.append(text)
        print(text, flush=True)


async def measure(args: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Print each table as soon as there is one; everything again as a value for the JSON."""
    scale = FULL if args.full else _short()
    begun_at, load_before = perf_counter(), os.getloadavg()[0]
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    fields = {"command": f"`{command}`"} | report.header()
    fields["pairs"] = str(args.pairs or scale.num_pairs)
    output.say(report.header_markdown(fields))
    models: dict[str, list[dict[str, Any]]] = {}
    lane = Lane()
    for name in args.model or scale.models:
        with tempfile.TemporaryDirectory(prefix="mlxlite-bench-") as scratch:
            path = await _model(lane, name, Path(scratch))
            output.say(f"## Model: {path.name}\n")
            inprocess = await InProcess.open(lane, path)
            bench = await _bench(args, scale, path, inprocess, output)
            models[path.name] = [await _section(bench, s, output) for s in _names(args)]
            await inprocess.close()
    every = [c for sections in models.values() for s in sections for c in s["comparisons"]]
    ending = {
        "load average after": report.load_average(),
        "quiet machine": report.quiet(load_before, os.getloadavg()[0], os.cpu_count() or 1),
        "what was noisy": report.noisy([Comparison.from_json(value) for value in every]),
        "took": f"{(perf_counter() - begun_at) / 60:.1f} minutes",
    }
    output.say("\n".join(f"- {key}: {value}" for key, value in ending.items()))
    return {"header": fields | ending, "models": models}


async def _model(lane: Lane, name: str, scratch: Path) -> Path:
    """A checkpoint that any server can be given: random, or an endless copy of a real one."""
    if name in SIZES:
        await lane.run(save_checkpoint, scratch / name, name)
        return scratch / name
    found = locate(None if name == DEMO else name)
    save_endless(found, scratch / found.name)
    return scratch / found.name


async def _bench(
    args: argparse.Namespace, scale: Scale, path: Path, inprocess: InProcess, output: Output
) -> Bench:
    first, *others = _chosen(args)
    able, reasons = await usable(others, path)
    for peer, reason in reasons.items():
        output.say(f"{peer} is installed and left out: {reason}\n")
    return Bench(
        path=path,
        inprocess=inprocess,
        writer=Writer(inprocess.render),
        peers=[first, *able],
        is_small=path.name in ("small", DEMO),
        num_pairs=args.pairs or scale.num_pairs,
        max_tokens=args.tokens or scale.max_tokens,
        num_rounds=scale.num_rounds,
        has_parts=args.full,
    )


async def _section(bench: Bench, name: str, output: Output) -> dict[str, Any]:
    """A section that fails says so in its place: an hour of others is not lost with it."""
    begun_at = perf_counter()
    try:
        table = await SECTIONS[name](bench)
        table.as_markdown()  # figures that make no ratio are the section's fault as well
    except (RuntimeError, ValueError, ArithmeticError) as error:
        table = Table(f"{name} failed", [], [], {}, [f"{type(error).__name__}: {error}"])
        output.has_failed = True
    output.say(table.as_markdown())
    for peer, error_text in bench.failures.items():
        output.say(f"{peer} failed and is left out from here on: {error_text.splitlines()[-1]}\n")
    return {"section": name, "took_s": round(perf_counter() - begun_at, 1), **table.as_json()}


def write(result: Mapping[str, Any], output: Output, json: Path | None, out: Path | None) -> None:
    data = orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    if json is not None:
        json.write_bytes(data)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_bytes(data)
        (out / "bench.md").write_text("\n".join(output.parts), encoding="utf-8")
        draw(result, out)


def draw(result: Mapping[str, Any], out: Path) -> None:
    for file, svg in plots.draw(result).items():
        (out / file).write_text(svg, encoding="utf-8")


def main() -> None:
    args = parse(sys.argv[1:])
    if args.readme is not None:  # the plots too, so that they are never older than their code
        for run in args.readme:
            draw(orjson.loads(run.read_bytes()), run.parent)
        readme.put(Path("README.md"), args.readme)
        return
    output = Output()
    result = asyncio.run(measure(args, output))
    write(result, output, args.json, args.out)
    sys.exit(1 if output.has_failed else 0)


if __name__ == "__main__":
    main()
