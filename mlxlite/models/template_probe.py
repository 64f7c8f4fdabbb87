"""What a chat template's grammar lacks: its bridge, found by tiny conversations. Pure.

They consist of words that no template contains. A step is chosen only where without it the template
raises, or leaves a word out, and the outcome with it is better. Raises what the renderer raises.
"""

import string
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import chain, combinations, takewhile
from typing import Any, Final, TypeAlias

from mlxlite.models import template_bridge as bridge
from mlxlite.models.template_bridge import Bridge, Message, Messages, Step, user_turn

Steps: TypeAlias = tuple[Step, ...]
Render: TypeAlias = Callable[[Messages], str | None]
"""A template: the text of messages; None where it refuses them."""

_CALL_FORMS: Final = (
    *((bridge.IDS,), (bridge.NAMES,), (bridge.TEXT_ARGUMENTS,), (bridge.NO_CONTENT,)),
    *combinations((bridge.IDS, bridge.NAMES, bridge.TEXT_ARGUMENTS, bridge.NO_CONTENT), 2),
    (bridge.IDS, bridge.NAMES, bridge.TEXT_ARGUMENTS, bridge.NO_CONTENT),
    *((bridge.TEXT_CALLS,), (bridge.TEXT_CALLS, bridge.USER_RESULTS)),
)
# Conversations, and the steps of which one may be needed for them. A letter is a message: of the
# (s)ystem, the (u)ser, the (a)ssistant, its (c)all, two calls (C), reasoning, text and call (r), or
# a (t)ool's result.
_PROBES: Final[tuple[tuple[str, tuple[Steps, ...]], ...]] = (
    ("su", ((bridge.SYSTEMS,),)),
    ("uu uauuau", ((bridge.ONE_USER,),)),
    ("uaau", ((bridge.ONE_ASSISTANT,),)),
    ("ssu", ((bridge.ONE_SYSTEM,),)),
    ("suasu uasu us usau", ((bridge.LATE_SYSTEMS,),)),
    ("s", ((bridge.NOT_ALONE,),)),
    ("au sau", ((bridge.USER_FIRST,),)),
    ("a", ((bridge.ANY_USER,),)),
    ("uct uctau uc", _CALL_FORMS),
    ("ut tu uat", ((bridge.ORPHANS,),)),
    ("uCtt", ((bridge.ONE_CALL,),)),
    ("uctu ucu", ((bridge.CLOSED,),)),
    ("uactau", ((bridge.ONE_ASSISTANT,),)),
    ("urt", ((bridge.THOUGHTS,),)),
    ("ct", ((bridge.ANY_USER,),)),
)
_REFUSED: Final = 1000  # more words than any talk has


def probe(render: Render, *, has_pictures: bool = False) -> Bridge:
    """The bridge of a template, by some fifty renderings of a few words each.

    Without any step for one that cannot render a single message of the user's.
    """
    missing = _Missing(render)
    steps: Steps = ()
    if missing("u", steps):
        steps = (bridge.PARTS,)
        if missing("u", steps):
            return Bridge()
    for talks, forms in _PROBES:
        steps = _extended(missing, talks.split(), steps, forms)
    found = Bridge(steps, _losses(missing, steps))
    return _with_pictures(render, found) if has_pictures else found


def _with_pictures(render: Render, found: Bridge) -> Bridge:
    """For the results of tools, in which templates may leave out what they show in questions."""
    talk, _ = _conversation("uct")
    picture = [{"type": "image"}, {"type": "text", "text": "mlxlite"}]

    def shown(known: Bridge, *messages: Message) -> str | None:
        return render(known.apply(messages))

    mark = _inserted(shown(found, user_turn(picture[1:])), shown(found, user_turn(picture)))
    more = Bridge((*found.steps, bridge.PICTURES), (*found.losses, bridge.PICTURES))
    results = [shown(known, *talk[:2], {**talk[2], "content": picture}) for known in (found, more)]
    was_lost, is_lost = (text is None or mark not in text for text in results)
    return more if mark and was_lost and not is_lost else found


def _inserted(short: str | None, long: str | None) -> str:
    """What a text has in one place more than another."""
    if short is None or long is None:
        return ""
    start = _num_equal(short, long)
    end = _num_equal(short[start:][::-1], long[start:][::-1])
    return long[start : len(long) - end]


def _num_equal(one: str, other: str) -> int:
    """The length of what two texts begin with."""
    return len(list(takewhile(bool, map(str.__eq__, one, other))))


class _Missing:
    """The number of words that a template leaves out; _REFUSED where it takes none."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._found: dict[tuple[str, frozenset[Step]], int] = {}

    def __call__(self, talk: str, steps: Steps) -> int:
        key = (talk, frozenset(steps))
        if key not in self._found:
            messages, words = _conversation(talk)
            text = self._render(Bridge(steps).apply(messages))
            missing = _REFUSED if text is None else sum(word not in text for word in words)
            self._found[key] = missing
        return self._found[key]


def _extended(missing: _Missing, talks: list[str], steps: Steps, forms: SequenceOf[Steps]) -> Steps:
    """The steps with the first of the forms that has the best outcome, if they need one."""
    outcomes = {talk: missing(talk, steps) for talk in talks}
    best, least = steps, sum(outcomes.values())
    telling = next((talk for talk in talks if outcomes[talk]), "")
    for form in forms if telling else ():
        more = (*steps, *form)
        if missing(telling, more) < outcomes[telling]:
            num = sum(missing(talk, more) for talk in talks)
            if num < least:
                best, least = more, num
            if not num:
                break
    return best


def _losses(missing: _Missing, steps: Steps) -> Steps:
    """Those of the steps without which something is left out, and not refused."""
    losses = tuple(step for step in steps if step is bridge.PARTS)
    for talk in chain.from_iterable(talks.split() for talks, _ in _PROBES):
        num = missing(talk, losses)
        while 0 < num < _REFUSED and missing(talk, steps) < num:
            tried = {step: missing(talk, (*losses, step)) for step in steps}
            best = min(tried, key=lambda step: tried[step] % _REFUSED)
            if tried[best] == num:
                break
            losses, num = (*losses, best), tried[best]
    return losses


def _conversation(talk: str) -> tuple[list[Message], list[str]]:
    """Messages of one word each, and the words that a template has to show."""
    messages: list[Message] = []
    words: list[str] = []
    ids: list[str] = []
    message: Message
    for letter in talk:
        word = f"mlxlite{string.ascii_lowercase[len(messages)]}"
        match letter:
            case "s":
                message = {"role": "system", "content": word}
            case "u":
                message = user_turn(word)
            case "a":
                message = {"role": "assistant", "content": word}
            case "t":
                id = ids.pop(0) if ids else _probe_id("t")
                message = {"role": "tool", "content": word, "tool_call_id": id}
            case _:
                names = [f"{word}one", f"{word}two"][: 2 if letter == "C" else 1]
                ids = [_probe_id(name) for name in names]
                text = word if letter == "r" else ""
                calls = [_probe_call(id, name) for id, name in zip(ids, names, strict=True)]
                message = {"role": "assistant", "content": text, "tool_calls": calls}
                if letter == "r":
                    message["reasoning_content"] = "mlxlite"
                words += [*names, *(f"{name}value" for name in names)]
        messages.append(message)
        words += [word] if message["content"] else []
    return messages, words


def _probe_id(word: str) -> str:
    return f"call_{word:0>24}"


def _probe_call(id: str, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": {f"{name}key": f"{name}value"}}
    return {"id": id, "type": "function", "function": function}
