"""What a picture costs the first time and in the next turn, on a model that sees.

    python -m bench --only pictures --model tests/support/vlm_demo

Each pair has a picture of its own, random and about as large as the server takes: so decoding it,
the processor, the vision tower and the prompt all count the first time, and none of them should in
the second turn.
"""

import asyncio
import base64
import random
import re
from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from time import perf_counter
from typing import Any

import orjson

from bench.load import HOST
from bench.report import Table, ms, ratio
from bench.sections import Bench
from bench.serving import serve

SIDE = 1200  # pixels
_TEXT = re.compile(rb'"content": ?"[^"]')


async def pictures(bench: Bench) -> Table:
    """Time to first token of a question about a picture, and of a second one."""
    if find_spec("mlx_vlm") is None or find_spec("PIL") is None:
        return Table("Pictures", ["mlx-vlm is not installed"], [], {})
    choose = random.Random(len(bench.path.name))
    first: list[float] = []
    second: list[float] = []
    async with serve(bench.path, 8) as served:
        for pair in range(-1, bench.num_pairs):
            turns = [_user([_picture(choose), {"type": "text", "text": "What is in the picture?"}])]
            cold_s = await ttft(served.port, _body(bench, turns))
            turns += [{"role": "assistant", "content": "A thing."}, _user("And what else?")]
            warm_s = await ttft(served.port, _body(bench, turns))
            if pair >= 0:
                first.append(cold_s)
                second.append(warm_s)
    row = [f"{SIDE} × {SIDE}", ms(first), ms(second), ratio(second, first)]
    columns = ["a JPEG of", "TTFT, ms", "of the next question, ms", "÷ the first"]
    return Table("Pictures", columns, [row], {"first_s": first, "second_s": second})


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _body(bench: Bench, turns: list[dict[str, Any]]) -> Mapping[str, Any]:
    own = {"model": str(bench.path), "messages": turns, "max_tokens": 4}
    return own | {"stream": True, "temperature": 0, "ignore_eos": True}


def _picture(choose: random.Random) -> dict[str, Any]:
    """A part with a new picture: squares of random colours."""
    from PIL import Image

    small = Image.frombytes("RGB", (16, 16), choose.randbytes(3 * 16 * 16))
    out = BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(out, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


async def ttft(port: int, body: Mapping[str, Any]) -> float:
    """Seconds from sending a streamed request, on a connection of its own, to its first text.

    Raises RuntimeError when there is none.
    """
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 22)
    data = orjson.dumps(body)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}:{port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    begin = perf_counter()
    writer.write(head.encode() + data)
    first_s, seen = None, b""
    while chunk := await reader.read(1 << 16):
        seen += chunk
        if first_s is None and _TEXT.search(seen):
            first_s = perf_counter() - begin
    writer.close()
    if first_s is None:
        raise RuntimeError(f"no text: {seen[-300:].decode(errors='replace')}")
    return first_s
