"""Answers in a form that is the same at each run, can be read, and can be compared.

Left out or renamed is only what differs from run to run: ids (the same id has the same new name
within a case), points in time, durations and speeds, fingerprints, sizes of memory. Floats are
compared with a tolerance, which is wider than what two kernels of one precision differ by. The
order of keys counts: it is part of the bytes.

Of a stream every frame is kept, in order. Where frames differ in nothing but their piece of text,
they are one entry with the list of their pieces.
"""

import base64
import difflib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import mlxlite
from wire.client import Raw

RECORDS = Path(__file__).parent / "records"
TOLERANCE = 1e-3
_WIDTH = 110  # of a line that is not broken up
_MAX_DIFF_LINES = 60
_MAX_LINE = 1000

# --- what differs from run to run -------------------------------------------------------------

_HEX_ID = re.compile(r"(?<=_|-)[0-9a-f]{24}(?![0-9a-f])")
_FINGERPRINT = re.compile(r"^fp_[0-9a-f]{16}$")
_DROPPED_HEADERS = ("date", "content-length")  # the length is that of times and ids
_TIMES = ("created", "created_at")
_SIZES = ("bytes", "max_bytes")
_DURATIONS = (
    *("prompt_ms", "predicted_ms", "time_ms", "avg_latency_ms"),
    *("prompt_per_second", "predicted_per_second"),
)
_STEPS = ("steps", "total_batches_processed", "avg_batch_size")  # a step's size is one of time


class _Names:
    """New names of ids, in order of their first appearance in a case."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def renamed(self, text: str) -> str:
        def name(match: re.Match[str]) -> str:
            return self._known.setdefault(match[0], f"<id{len(self._known) + 1}>")

        return _HEX_ID.sub(name, _FINGERPRINT.sub("fp_<fingerprint>", text))

    def plain(self, value: Any, key: str = "") -> Any:
        """A JSON value without what differs."""
        match value:
            case dict():
                return {self.renamed(k): self.plain(item, k) for k, item in value.items()}
            case list():
                return [self.plain(item, key) for item in value]
            case str() if key == "embedding":
                return ["base64", *_shortened(_floats(value))]
            case str() if key in ("version", "mlxlite") and value == mlxlite.__version__:
                return "<version>"
            case str():
                return self.renamed(value)
            case int() | float() if not isinstance(value, bool):
                return _number(value, key)
        return value


def _number(value: float, key: str) -> Any:
    if key in _TIMES and value > 1_600_000_000:
        return "<time>"
    if key in _DURATIONS and value >= 0:
        return "<duration>"
    if key in _SIZES and value:
        return "<bytes>"
    if key in _STEPS and value:
        return "<number>"
    return round(value, 4) + 0.0 if isinstance(value, float) else value


def _floats(text: str) -> list[float]:
    data = base64.b64decode(text)
    return [round(value, 4) + 0.0 for value in struct.unpack(f"<{len(data) // 4}f", data)]


def _shortened(vector: list[float]) -> list[Any]:
    """A vector's first numbers, how many there are, and its length."""
    norm = round(sum(value * value for value in vector) ** 0.5, 3)
    return [*vector[:8], f"{len(vector)} numbers", norm]


def _short_vectors(body: Any) -> Any:
    if isinstance(body, dict) and isinstance(body.get("data"), list):
        for item in body["data"]:
            if isinstance(vector := item.get("embedding"), list) and len(vector) > 8:
                item["embedding"] = vector if vector[0] == "base64" else _shortened(vector)
    return body


# --- one answer -------------------------------------------------------------------------------


def entry_of(raw: Raw) -> dict[str, Any]:
    """An answer as it is recorded."""
    names = _Names()
    headers = {k: names.renamed(v) for k, v in raw.headers if k not in _DROPPED_HEADERS}
    entry: dict[str, Any] = {"status": raw.status, "headers": headers}
    text = raw.body.decode()
    kind = headers.get("content-type", "").partition(";")[0]
    if kind == "text/event-stream":
        return entry | {"frames": _merged([names.plain(frame) for frame in frames_of(text)])}
    if kind == "application/json" and text:
        return entry | {"body": _short_vectors(names.plain(json.loads(text)))}
    return entry | {"text": _metrics(text) if kind == "text/plain" else text}


def _metrics(text: str) -> list[Any]:
    """Prometheus' names, types and label sets, without values, help and bounds of buckets."""
    shown = []
    for line in text.splitlines():
        if line.startswith("# HELP"):
            continue
        name = line if line.startswith("#") else line.rpartition(" ")[0]
        name = re.sub(r'le="[^"]*"', 'le="…"', name).replace(mlxlite.__version__, "<version>")
        if not shown or shown[-1] != name:
            shown.append(name)
    return shown


def frames_of(text: str) -> Iterator[Any]:
    """The events of a stream, without comments: an object, `[event, object]`, or a bare text."""
    assert text.endswith("\n\n"), f"the stream breaks off: {text[-200:]!r}"
    for block in text[:-2].split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if not line.startswith(":")]
        fields = [name for name, _, _ in lines]
        values = [json.loads(value) if value.startswith("{") else value for _, _, value in lines]
        if fields == ["data"]:
            yield values[0]
        elif fields == ["event", "data"]:
            yield values
        elif fields:
            yield {"lines": [[name, value] for name, value in zip(fields, values, strict=True)]}


# --- runs of text -----------------------------------------------------------------------------

_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint")
_PLACES: tuple[tuple[str | int, ...], ...] = (  # where a piece of text is
    ("choices", 0, "delta", "content"),
    ("choices", 0, "delta", "reasoning_content"),
    ("choices", 0, "delta", "reasoning"),
    ("choices", 0, "delta", "tool_calls", 0, "function", "arguments"),
    ("choices", 0, "text"),
    (1, "delta"),
    (1, "delta", "text"),
    (1, "delta", "thinking"),
    (1, "delta", "partial_json"),
)


def _merged(frames: list[Any]) -> list[Any]:
    """The frames, with runs of text as one, and what all of them repeat in the first one only."""
    entries: list[Any] = []
    runs: list[tuple[str, dict[int, list[str]]]] = []
    for frame in _numbered(_unrepeated(frames)):
        shape, pieces = _parted(frame)
        if runs and pieces and runs[-1][0] == shape:
            for place, piece in pieces.items():
                runs[-1][1][place].append(piece)
        else:
            entries.append(frame)
            runs.append((shape, {place: [piece] for place, piece in pieces.items()}))
    for entry, (_, found) in zip(entries, runs, strict=True):
        for place, texts in found.items():
            if len(texts) > 1:
                _put(entry, _PLACES[place], texts)
    return entries


def _unrepeated(frames: list[Any]) -> Iterator[Any]:
    """OpenAI's chunks begin with the same five members: after the first, `…` stands for them."""
    head: dict[str, Any] | None = None
    for frame in frames:
        if isinstance(frame, dict) and tuple(frame)[: len(_ENVELOPE)] == _ENVELOPE:
            own = {name: frame[name] for name in _ENVELOPE}
            if own == head:
                frame = {"…": "…"} | {k: v for k, v in frame.items() if k not in _ENVELOPE}
            head = head or own
        yield frame


def _numbered(frames: Iterator[Any]) -> Iterator[Any]:
    """Events of a response count up: where they do, a `+` stands for the number."""
    expected = 0
    for frame in frames:
        event = frame[1] if isinstance(frame, list) else None
        if isinstance(event, dict) and event.get("sequence_number") == expected:
            event["sequence_number"] = "+"
            expected += 1
        yield frame


def _parted(frame: Any) -> tuple[str, dict[int, str]]:
    """A frame without its pieces of text, as JSON, and these by their places."""
    copy = json.loads(json.dumps(frame))
    pieces: dict[int, str] = {}
    for i, path in enumerate(_PLACES):
        if isinstance(piece := _at(copy, path), str) and piece:
            pieces[i] = piece
            _put(copy, path, "")
    return json.dumps([*pieces, copy]), pieces


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _put(value: Any, path: tuple[str | int, ...], new: Any) -> None:
    _at(value, path[:-1])[path[-1]] = new


# --- files ------------------------------------------------------------------------------------


def dumped(value: Any, indent: int = 0) -> str:
    """JSON with each object or array on one line if it fits."""
    short = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or indent + len(short) <= _WIDTH:
        return short
    pad, end = " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict):
        named = (f"{json.dumps(k, ensure_ascii=False)}: {dumped(v, indent + 1)}"
                 for k, v in value.items())  # fmt: skip
        return "{\n" + ",\n".join(pad + item for item in named) + end + "}"
    return "[\n" + ",\n".join(pad + dumped(item, indent + 1) for item in value) + end + "]"


def load(server: str) -> dict[str, Any]:
    """What is recorded of a server, by case."""
    try:
        found: dict[str, Any] = json.loads((RECORDS / f"{server}.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def save(server: str, entries: Mapping[str, Any]) -> None:
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{server}.json").write_text(dumped(entries) + "\n")


def difference(recorded: Any, found: Any) -> str:
    """A small diff of two entries; empty where they are the same."""
    old, new = dumped(recorded), dumped(_settled(found, recorded))
    if old == new:
        return ""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "recorded", "now", lineterm="", n=2
    )
    return "\n".join(line[:_MAX_LINE] for line in islice(lines, _MAX_DIFF_LINES))


def _settled(found: Any, recorded: Any) -> Any:
    """What was found, with the recorded number wherever the difference is within tolerance."""
    match found, recorded:
        case float(), float() if abs(found - recorded) <= TOLERANCE:
            return recorded
        case dict(), dict():
            return {key: _settled(item, recorded.get(key)) for key, item in found.items()}
        case list(), list() if len(found) == len(recorded):
            return [_settled(*pair) for pair in zip(found, recorded, strict=True)]
    return found
