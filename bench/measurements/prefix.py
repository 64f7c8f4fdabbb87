"""The prefix cache: shared beginnings, conversations, images seen before, and its cost."""

import base64
import random
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from statistics import median
from typing import Any

from bench import scenarios
from bench.compare import Comparison, at_most
from bench.measurements.pairs import NUM_ROWS, Bench, Figure, each, runs
from bench.peers import OURS, US
from bench.plan import Plan, Request, Stream, Trace
from bench.report import Table
from bench.scenarios import family

US_OFF = replace(US, name=f"{OURS}, cache off", line=f"{US.line} --no-enable-prefix-caching")
SHARED_TOKENS, NUM_TAILS = 1500, 8
NUM_AT_ONCE = (4, 8)
WARM_ASKED = 0.8
NUM_TURNS, TURN_TOKENS = 4, 400
SIDE = 1200  # pixels


async def prefix(bench: Bench) -> Table:
    """TTFT: one prompt cold, its siblings warm, and several new ones at once."""
    nums = NUM_AT_ONCE if bench.scale.has_parts else NUM_AT_ONCE[:1]

    def plans(_: int) -> dict[str, Plan]:
        """One after the other, and some at once, with a beginning of their own each."""
        tails = {"tails": Plan([family(bench.writer, SHARED_TOKENS, NUM_TAILS)])}
        return tails | {
            str(n): Plan([[request] for request in family(bench.writer, SHARED_TOKENS, n)])
            for n in nums
        }

    others = [US_OFF] if bench.scale.has_parts else []
    async with bench.servers(NUM_ROWS, *others) as servers:
        await bench.one_pair(runs(servers), Plan([family(bench.writer, 64, 2)]))
        traces = await bench.rounds(runs(servers), plans, has_warm_up=False)
    figures = [
        Figure("TTFT, cold prefix", "ms", lambda trace: trace.ttfts[0], "tails"),
        Figure("TTFT, warm prefix", "ms", lambda trace: median(trace.ttfts[1:]), "tails",
               at_most(WARM_ASKED)),
        *(Figure(f"TTFT, {n} new at once, their median", "ms", lambda t: median(t.ttfts), str(n))
          for n in nums),
    ]  # fmt: skip
    note = (
        f"A shared beginning of about {SHARED_TOKENS} tokens, one ending after the other; warm is "
        f"the median of all {NUM_TAILS} but the first. At once: of a beginning that is new."
    )
    table = bench.table("Shared beginnings", traces, figures, note)
    cold = table.figures["TTFT, cold prefix"]
    own = [
        Comparison(f"{name}: {what}", "ms", values, cold[name], "its own cold TTFT")
        for what, by_name in table.figures.items()
        for name, values in by_name.items()
        if by_name is not cold
    ]
    return replace(table, comparisons=[*table.comparisons, *own])


async def turns(bench: Bench) -> Table:
    """TTFT of conversations, each turn of which sends the whole conversation."""
    async with bench.servers(NUM_ROWS) as servers:
        traces = await bench.paired(
            runs(servers),
            lambda: scenarios.conversations(bench.writer, 2, NUM_TURNS, TURN_TOKENS, 32),
        )
    figures = [
        Figure(f"TTFT of turn {turn + 1}", "ms",
               lambda trace, turn=turn: median(s.ttft_s for s in _of_turn(trace, turn)))
        for turn in range(NUM_TURNS)
    ]  # fmt: skip
    cached = each(traces, lambda t: median(s.num_cached for s in _of_turn(t, NUM_TURNS - 1)))
    rows = [[name, f"{median(own):.0f}"] for name, own in cached.items()]
    columns = ["server", "prompt tokens of the last turn that were cached"]
    note = f"Two clients; a first message of {TURN_TOKENS} tokens, then 32 and answers of 32."
    more = {"columns": columns, "rows": rows}
    return bench.table("Conversations", {"": traces}, figures, note, **more)


def _of_turn(trace: Trace, turn: int) -> list[Stream]:
    by_client: dict[int, list[Stream]] = {}
    for stream in trace.streams:
        by_client.setdefault(stream.client, []).append(stream)
    return [streams[turn] for streams in by_client.values()]


async def overhead(bench: Bench) -> Table:
    """Throughput of prompts that share nothing, with the cache and without."""

    def make() -> Plan:
        lengths = [100 * (1 + i % 4) for i in range(8)]
        ask = bench.writer.request
        return Plan([[ask(length, bench.scale.max_tokens) for _ in range(3)] for length in lengths])

    async with US.start(bench.path, 8) as on, US_OFF.start(bench.path, 8) as off:
        traces = await bench.paired({OURS: on.run, "cache off": off.run}, make)
    note = "8 clients, 3 requests each, prompts of 100 to 400 tokens, no two alike."
    figure = Figure("throughput without hits", "tok/s", lambda trace: trace.whole_rate)
    return bench.table("Cost of the cache when nothing hits", {"": traces}, [figure], note)


async def pictures(bench: Bench) -> Table:
    """TTFT of a question about an image, and of a second question about it.

    Each pair has an image of its own, random and about as large as the server accepts: decoding it,
    the processor, the vision tower and the prompt count the first time, and none in the next turn.
    """
    if find_spec("mlx_vlm") is None or find_spec("PIL") is None:
        return Table("Images", notes=["mlx-vlm is not installed"])
    choose = random.Random(len(bench.path.name))

    def plans(_: int) -> dict[str, Plan]:
        asked = [_image(choose), {"type": "text", "text": "What is in the picture?"}]
        first = [{"role": "user", "content": asked}]
        more = [{"role": "assistant", "content": "A thing."}]
        more += [{"role": "user", "content": "And what else?"}]
        return {"first": _chat(first), "next": _chat(first + more)}

    async with US.start(bench.path, NUM_ROWS) as served:
        traces = await bench.rounds({OURS: served.run}, plans)
    first, after = ([t.ttfts[0] for t in traces[kind][OURS]] for kind in ("first", "next"))
    what = f"TTFT of the next question, a JPEG of {SIDE} × {SIDE}"
    comparisons = [Comparison(what, "ms", after, first, "the first question")]
    return Table("Images", figures={"first_s": first, "second_s": after}, comparisons=comparisons)


def _chat(messages: list[dict[str, Any]]) -> Plan:
    return Plan([[Request("", (), 4, {"temperature": 0, "messages": messages})]])


def _image(choose: random.Random) -> dict[str, Any]:
    from PIL import Image

    small = Image.frombytes("RGB", (16, 16), choose.randbytes(3 * 16 * 16))
    out = BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(out, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
