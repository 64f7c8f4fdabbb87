"""Measures the server against mlx-lm, and parts of it against each other.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 python -m bench --quick

Run it from the repository's root, on a machine that does nothing else. The environment is passed on
to the server and the load generator. On Linux MLX's CPU back end calls whatever libblas the system
has; the reference one is several times slower than OpenBLAS, and OpenBLAS with threads competes
with the server for cores: hence the line above. On macOS leave the variables out.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bench import report
from bench.inprocess import InProcess
from bench.models import SIZES, Writer, save_checkpoint
from bench.pictures import pictures
from bench.prefixes import overhead, prefix
from bench.report import Table
from bench.sections import Bench, burst, longprompt, mixed, neighbours, steps, throughput
from mlxlite.engine import Lane
from mlxlite.hub import locate

SECTIONS: dict[str, Callable[[Bench], Awaitable[Table]]] = {
    "throughput": throughput,
    "mixed": mixed,
    "neighbours": neighbours,
    "longprompt": longprompt,
    "burst": burst,
    "steps": steps,
    "prefix": prefix,
    "overhead": overhead,
}
BY_NAME: dict[str, Callable[[Bench], Awaitable[Table]]] = {  # for models that are not ours
    "pictures": pictures,
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured, where the command line does not say."""

    models: tuple[str, ...]
    num_pairs: int
    max_tokens: int
    num_rounds: int


QUICK = Scale(("small",), num_pairs=3, max_tokens=64, num_rounds=1)
FULL = Scale(("small", "medium"), num_pairs=7, max_tokens=128, num_rounds=2)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="the small model only, and few runs")
    add("--only", help=f"some of {','.join(SECTIONS | BY_NAME)}, separated by commas")
    add("--model", action="append", help=f"{', '.join(SIZES)}, or a model's path (repeatable)")
    add("--pairs", type=int, help="how often each comparison is made")
    add("--tokens", type=int, help="output tokens of a request where throughput is measured")
    add("--json", type=Path, metavar="FILE", help="write the header and all figures there too")
    args = parser.parse_args(argv)
    unknown = set(_names(args)) - set(SECTIONS | BY_NAME)
    if unknown:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    return args


def _names(args: argparse.Namespace) -> list[str]:
    return args.only.split(",") if args.only else list(SECTIONS)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Print each table as soon as there is one; everything again as a value for the JSON."""
    scale = QUICK if args.quick else FULL
    num_pairs = args.pairs or scale.num_pairs
    fields = report.header() | {"pairs": str(num_pairs)}
    print(report.header_markdown(fields), flush=True)
    tables: dict[str, list[dict[str, Any]]] = {}
    lane = Lane()
    for name in args.model or scale.models:
        with tempfile.TemporaryDirectory(prefix="mlxlite-bench-") as scratch:
            path = Path(scratch) / name if name in SIZES else locate(name)
            if name in SIZES:
                await lane.run(save_checkpoint, path, name)
            inprocess = await InProcess.open(lane, path)
            bench = Bench(
                path=path,
                inprocess=inprocess,
                writer=Writer(inprocess.render),
                num_pairs=num_pairs,
                max_tokens=args.tokens or scale.max_tokens,
                num_rounds=scale.num_rounds,
            )
            print(f"## Model: {path.name}\n", flush=True)
            tables[path.name] = []
            for section in _names(args):
                table = await (SECTIONS | BY_NAME)[section](bench)
                print(table.as_markdown(), flush=True)
                tables[path.name].append(table.as_json())
            await inprocess.close()
    fields["load average after"] = report.load_average()
    print(f"- load average after: {fields['load average after']}")
    return {"header": fields, "models": tables}


def main() -> None:
    args = parse(sys.argv[1:])
    result = asyncio.run(measure(args))
    if args.json is not None:
        args.json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()
