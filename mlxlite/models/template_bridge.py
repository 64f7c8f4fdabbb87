"""Conversations in the form that a chat template takes. Pure.

The API takes any order of roles; templates refuse some by an exception, and leave others out of the
text. A `Bridge` has the `Step`s that a template needs (`template_probe` finds them) and applies
these to the messages of a request, and no others: what a template takes as it is stays as it is,
byte for byte, but for arguments that are no object.

A step depends on the messages before it and the one after, so that the text of a conversation's
beginning stays that of the longer one. It must never change the order of texts or pictures, nor the
messages given, nor insert a word. Tested.
"""

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = SequenceOf[Message]

_ID_CHARS: Final = string.digits + string.ascii_letters
_SHORT_ID: Final = re.compile(r"[0-9A-Za-z]{9}")
_PLAIN_TEXT: Final = "input"  # the argument that holds what is no object


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a conversation; its `note` is for the log."""

    note: str
    apply: Callable[[Messages], Messages]


@dataclass(frozen=True, slots=True)
class Bridge:
    """The steps that one template needs, applied in the order of `STEPS`.

    `losses` are those without which it leaves something out in silence. The others are only for
    conversations that it refuses.
    """

    steps: tuple[Step, ...] = ()
    losses: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return ", ".join(step.note for step in STEPS if step in self.steps)

    def forms(self, messages: Messages) -> Iterator[list[Message]]:
        """The messages in all forms, to be rendered in the first that the template takes.

        As they are; in the template's grammar; questions and answers in turn, all of them text.
        Messages that need no change are the same dicts.
        """
        messages = [_with_objects(message) for message in messages]
        last: list[Message] = []
        for steps in (self.losses, self.steps, (*self.steps, *_PLAIN)):
            if (form := _applied(steps, messages)) != last:
                yield (last := form)

    def one_turn(self, messages: Messages) -> list[Message]:
        """For templates of single questions: all texts and pictures as one turn of the user's."""
        *_, plain = self.forms(messages)
        return list(_join_users([{**message, "role": "user"} for message in plain]))

    def apply(self, messages: Messages) -> list[Message]:
        """The messages in the template's grammar."""
        return _applied(self.steps, [_with_objects(message) for message in messages])


def _applied(steps: tuple[Step, ...], messages: Messages) -> list[Message]:
    for step in STEPS:
        if step in steps:
            messages = step.apply(messages)
    return list(messages)


def without_blank_end(messages: Messages) -> Messages:
    """The messages without a last one of the assistant that holds nothing to continue."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    is_blank = last.get("role") == "assistant" and not (
        last.get("tool_calls") or last.get("reasoning_content")
    )
    if is_blank and (content is None or (isinstance(content, str) and not content.strip())):
        return messages[:-1] or [user_turn()]
    return messages


# --- calls and their results ------------------------------------------------------------------


def _with_objects(message: Message) -> Message:
    """A call's arguments as an object: text is parsed, twice if need be, and else a member."""
    calls = message.get("tool_calls")
    if not calls or all(isinstance(call["function"]["arguments"], Mapping) for call in calls):
        return message
    return _with_arguments(message, _object)


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = {**call["function"], "arguments": change(call["function"]["arguments"])}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _object(arguments: Any) -> Any:
    value = arguments
    for _ in range(2):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                break
    if isinstance(value, Mapping):
        return value
    return {_PLAIN_TEXT: arguments} if arguments else {}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _one_call_each(messages: Messages) -> Messages:
    """A turn with one call and its results for each call of a turn."""
    done: list[Message] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        if len(calls := message.get("tool_calls") or ()) < 2:
            done.append(message)
            continue
        end = at
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        done += _single_calls(message, calls, list(messages[at:end]))
        at = end
    return done


def _single_calls(message: Message, calls: Any, results: list[Message]) -> list[Message]:
    """Each call before its result, in the results' order; one of no known id is the next call's."""
    done: list[Message] = []
    left = list(calls)
    answered = {result.get("tool_call_id") for result in results}

    def add(call: Any) -> None:
        left.remove(call)
        turn = {"role": "assistant", "content": ""} if done else message
        done.append({**turn, "tool_calls": [call]})

    for result in results:
        id = result.get("tool_call_id")
        found = [call for call in left if call.get("id") == id]
        if not found and all(call.get("id") != id for call in calls):
            found = [call for call in left if call.get("id") not in answered]
        for call in (found or ([] if done else left))[:1]:
            add(call)
        done.append(result)
    for call in tuple(left):
        add(call)
    return done


def _calls_as_text(messages: Messages) -> Messages:
    """Calls as lines of JSON at the end of their turn's text."""

    def written(message: Message) -> Message:
        if not (calls := message.get("tool_calls")):
            return message
        functions = [call["function"] for call in calls]
        lines = [_json({"name": f["name"], "arguments": f["arguments"]}) for f in functions]
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**rest, "content": _joined(message.get("content"), "\n".join(lines))}

    return [written(message) for message in messages]


def _results_as_users(messages: Messages) -> Messages:
    return [_as_user(m) if m["role"] == "tool" else m for m in messages]


def _pictures_in_users(messages: Messages) -> Messages:
    """Pictures of results as a user's turn after these, and the results' text as a string."""
    done: list[Message] = []
    held: list[Any] = []
    for message in messages:
        content = message.get("content")
        if message["role"] != "tool" and held:
            done.append(user_turn(held))
            held = []
        if message["role"] == "tool" and isinstance(content, list):
            texts = [part["text"] for part in content if "text" in part]
            held = held + [part for part in content if "text" not in part]
            message = {**message, "content": "\n".join(texts)}
        done.append(message)
    return [*done, user_turn(held)] if held else done


def _orphans_as_users(messages: Messages) -> Messages:
    """Results that no call precedes."""
    done: list[Message] = []
    has_call = False
    for message in messages:
        if message["role"] != "tool":
            has_call = bool(message.get("tool_calls"))
        is_orphan = message["role"] == "tool" and not has_call
        done.append(_as_user(message) if is_orphan else message)
    return done


def _short_ids(messages: Messages) -> Messages:
    """Ids of nine letters and digits, a function of the given ones; results without one get it."""
    done: list[Message] = []
    waiting: list[str] = []
    for i, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            ids = [_short_id(c.get("id") or f"{i}.{n}") for n, c in enumerate(calls)]
            waiting = list(ids)
            calls = [{**call, "id": id} for call, id in zip(calls, ids, strict=True)]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            id = _short_id(given) if given else waiting[0] if waiting else _short_id("")
            waiting = [one for one in waiting if one != id]
            message = {**message, "tool_call_id": id}
        done.append(message)
    return done


def _short_id(id: str) -> str:
    if _SHORT_ID.fullmatch(id):
        return id
    number = int.from_bytes(hashlib.blake2b(id.encode("utf-8", "replace"), digest_size=8).digest())
    return "".join(_ID_CHARS[number // len(_ID_CHARS) ** n % len(_ID_CHARS)] for n in range(9))


def _named_results(messages: Messages) -> Messages:
    """Results with the names of the functions that were called."""
    done: list[Message] = []
    names: dict[Any, str] = {}
    last = "tool"
    for message in messages:
        for call in message.get("tool_calls") or ():
            last = names[call.get("id")] = call["function"]["name"]
        if message["role"] == "tool" and not message.get("name"):
            message = {**message, "name": names.get(message.get("tool_call_id"), last)}
        done.append(message)
    return done


def _arguments_as_text(messages: Messages) -> Messages:
    return [_with_arguments(m, _json) if m.get("tool_calls") else m for m in messages]


def _no_empty_content(messages: Messages) -> Messages:
    """A turn of calls alone has no `content` at all."""
    return [
        {name: value for name, value in m.items() if name != "content"}
        if m.get("tool_calls") and not m.get("content")
        else m
        for m in messages
    ]


def _reasoning_in_text(messages: Messages) -> Messages:
    """The reasoning of a turn with text and calls is part of its text."""

    def merged(message: Message) -> Message:
        thought = message.get("reasoning_content")
        if not (thought and message.get("tool_calls") and message.get("content")):
            return message
        rest = {n: v for n, v in message.items() if n not in ("reasoning_content", "thinking")}
        return {**rest, "content": _joined(thought, message["content"])}

    return [merged(message) for message in messages]


# --- turns ------------------------------------------------------------------------------------


def user_turn(content: Any = "") -> dict[str, Any]:
    return {"role": "user", "content": content}


def _as_user(message: Message) -> Message:
    return user_turn(message.get("content") or "")


def _joined(first: Any, second: Any) -> Any:
    """Two contents with a blank line between; parts stay parts, in order."""
    if not first or not second:
        return first or second or ""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    head, tail = _parts(first), _parts(second)
    if "text" in head[-1] and "text" in tail[0]:
        tail[0] = {**tail[0], "text": "\n\n" + tail[0]["text"]}
    return head + tail


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _merged(first: Message, second: Message) -> Message:
    """Two turns of one role as one."""
    message = {**second, **first, "content": _joined(first.get("content"), second.get("content"))}
    for name in ("reasoning_content", "thinking"):
        if thought := _joined(first.get(name), second.get(name)):
            message[name] = thought
    if calls := [*(first.get("tool_calls") or ()), *(second.get("tool_calls") or ())]:
        message["tool_calls"] = calls
    return message


def _join(messages: Messages, role: str) -> Messages:
    done: list[Message] = []
    for message in messages:
        both = (done[-1], message) if done else ()
        is_pair = bool(both) and all(one["role"] == role for one in both)
        if is_pair and not all(one.get("tool_calls") for one in both):
            done[-1] = _merged(*both)
        else:
            done.append(message)
    return done


def _join_users(messages: Messages) -> Messages:
    return _join(messages, "user")


def _join_assistants(messages: Messages) -> Messages:
    """But for two turns that both have calls: each is followed by its results."""
    return _join(messages, "assistant")


def _num_leading(messages: Messages) -> int:
    """The number of system messages at the beginning."""
    roles = (i for i, message in enumerate(messages) if message["role"] != "system")
    return next(roles, len(messages))


def _join_systems(messages: Messages) -> Messages:
    """Those at the beginning."""
    num = _num_leading(messages)
    return [*_join(messages[:num], "system"), *messages[num:]]


def _systems_in_users(messages: Messages) -> Messages:
    """A system message as the beginning of the user's turn after it, or a turn of its own.

    Between calls and their results there is no turn: it comes after the results.
    """
    done: list[Message] = []
    held: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            held.append(_as_user(message))
        elif message["role"] == "tool":
            done.append(message)
        else:
            if held and message["role"] == "user":
                held, message = [], _join_users([*held, message])[0]
            done += [*_join_users(held), message]
            held = []
    return [*done, *_join_users(held)]


def _late_systems_in_users(messages: Messages) -> Messages:
    num = _num_leading(messages)
    return [*messages[:num], *_systems_in_users(messages[num:])]


def _first_user(messages: Messages) -> Messages:
    """An empty turn of the user's before an answer that comes first."""
    num = _num_leading(messages)
    is_answer = num < len(messages) and messages[num]["role"] == "assistant"
    return [*messages[:num], user_turn(), *messages[num:]] if is_answer else messages


def _some_user(messages: Messages) -> Messages:
    """An empty turn of the user's where there is none."""
    if any(message["role"] == "user" for message in messages):
        return messages
    num = _num_leading(messages)
    return [*messages[:num], user_turn(), *messages[num:]]


def _not_alone(messages: Messages) -> Messages:
    """An empty turn of the user's after system messages alone."""
    return [*messages, user_turn()] if _num_leading(messages) == len(messages) else messages


def _closed_calls(messages: Messages) -> Messages:
    """An empty answer between calls or their results and the user's next turn."""
    done: list[Message] = list(messages[:1])
    for before, message in pairwise(messages):
        if message["role"] == "user" and (before["role"] == "tool" or before.get("tool_calls")):
            done.append({"role": "assistant", "content": ""})
        done.append(message)
    return done


def _in_parts(messages: Messages) -> Messages:
    """Content that is a string as an array of one part."""
    return [
        {**m, "content": _parts(m["content"])} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


ONE_CALL: Final = Step("one call a turn", _one_call_each)
TEXT_CALLS: Final = Step("calls as text", _calls_as_text)
PICTURES: Final = Step("pictures of tool results in user turns", _pictures_in_users)
ORPHANS: Final = Step("results without a call as user turns", _orphans_as_users)
USER_RESULTS: Final = Step("tool results as user turns", _results_as_users)
THOUGHTS: Final = Step("reasoning beside calls as text", _reasoning_in_text)
IDS: Final = Step("call ids of nine letters and digits", _short_ids)
NAMES: Final = Step("tool results named", _named_results)
TEXT_ARGUMENTS: Final = Step("arguments as text", _arguments_as_text)
NO_CONTENT: Final = Step("no empty content beside calls", _no_empty_content)
SYSTEMS: Final = Step("system messages in user turns", _systems_in_users)
LATE_SYSTEMS: Final = Step("late system messages in user turns", _late_systems_in_users)
ONE_SYSTEM: Final = Step("system messages joined", _join_systems)
ONE_USER: Final = Step("user turns joined", _join_users)
ONE_ASSISTANT: Final = Step("assistant turns joined", _join_assistants)
USER_FIRST: Final = Step("an empty user turn at the start", _first_user)
ANY_USER: Final = Step("an empty user turn where there is none", _some_user)
NOT_ALONE: Final = Step("an empty user turn after system messages alone", _not_alone)
CLOSED: Final = Step("an empty answer after tool results", _closed_calls)
PARTS: Final = Step("content in parts", _in_parts)
STEPS: Final = (
    *(ONE_CALL, TEXT_CALLS, PICTURES, ORPHANS, USER_RESULTS, THOUGHTS, IDS, NAMES),
    *(TEXT_ARGUMENTS, NO_CONTENT, SYSTEMS, LATE_SYSTEMS, ONE_SYSTEM),
    *(ONE_USER, ONE_ASSISTANT, USER_FIRST, ANY_USER, NOT_ALONE, CLOSED, PARTS),
)
_PLAIN: Final = (TEXT_CALLS, USER_RESULTS, SYSTEMS, ONE_USER, ONE_ASSISTANT, USER_FIRST)
