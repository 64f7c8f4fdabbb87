"""Synthetic conversations for the demo model, drawn from the phrases of a corpus file.

`demo_corpus.txt` has named tables. A table of phrases has one phrase a line, or several with bars
between them. A table of blocks has groups of lines, each group with its share of the draws first.
A phrase has slots: `{w:word}` draws a value from the table `word`, or from the function in `DRAWS`
of that name, and `{w}` repeats it. A fixed hash holds one word in ten out of the training, so that
a test can distinguish copying from memory. Equal seeds give equal conversations.
"""

import functools
import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Message = Tool = dict[str, Any]
Slots = dict[str, str]
CORPUS = Path(__file__).with_name("demo_corpus.txt")
_SLOT = re.compile(r"\{(\w+)(?::([\w ]+))?\}")


@functools.cache
def tables() -> dict[str, str]:
    """The text below each `[name]`."""
    _, *parts = re.split(r"^\[(.+)\]\n", CORPUS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@functools.cache
def phrases(table: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"[|\n]", tables()[table]) if cell.strip()]


@functools.cache
def blocks(table: str) -> tuple[list[list[str]], list[float]]:
    """The lines of each block, and the blocks' shares."""
    lines = [block.splitlines() for block in tables()[table].strip().split("\n\n")]
    return [block[1:] for block in lines], [float(block[0]) for block in lines]


@dataclass
class Turn:
    """One exchange; `via` holds the tool call and the tool result before the answer."""

    user: str
    answer: str
    thought: str
    via: list[Message] = field(default_factory=list)


@dataclass
class Example:
    """A conversation whose last answer (`target`) is written in full, thought included."""

    skill: str
    messages: list[Message]
    target: str
    thinking: bool
    tools: list[Tool] | None = None


def held(word: str) -> bool:
    """Whether a word is held out of the training."""
    is_polite = word.lower() in map(str.lower, phrases("polite"))
    return not is_polite and zlib.crc32(word.lower().encode()) % 10 == 0


class Source:
    """Seeded random choices; no word that is held out."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def of(self, items: Sequence[T]) -> T:
        return self.rng.choice(items)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def block(self, table: str) -> list[str]:
        found, shares = blocks(table)
        return self.rng.choices(found, shares)[0]

    def fill(self, text: str, slots: Slots, *, is_form: bool = False) -> str:
        """The text with its slots filled, which binds them; for a form, those of tables only."""

        def value(match: re.Match[str]) -> str:
            name, kind = match[1], match[2] or ""
            if name not in slots and is_form and kind in DRAWS:
                return match[0]
            if name not in slots:
                draw = DRAWS.get(kind)
                slots[name] = draw(self, slots) if draw else self.key(self.of(phrases(kind)), slots)
            slots[name] = self.fill(slots[name], slots, is_form=is_form)
            return slots[name]

        return _SLOT.sub(value, text)

    def key(self, phrase: str, slots: Slots) -> str:
        """The first half of a `key => value` phrase; the other half is `{v:value}`."""
        key, _, slots["_value"] = phrase.partition(" => ")
        return key

    def one_of(self, line: str, slots: Slots, *, is_form: bool = False) -> str:
        return self.fill(self.of(line.split(" | ")), slots, is_form=is_form)

    def ask(self, line: str, slots: Slots) -> str:
        """A request in another case, punctuation or politeness; values stay as they are."""
        text = self.one_of(line, slots, is_form=True)
        if self.chance(0.12):
            opening = self.of(["Please ", "Can you please ", "Hey, ", "Now ", "Ok, "])
            text = opening + text[0].lower() + text[1:]
        if self.chance(0.2):
            text = text.lower()
        if self.chance(0.25):
            text = text.rstrip(".?!")
        elif self.chance(0.08):
            text = text.rstrip(".?!") + self.of(["!", "...", " please", ", please.", " ?", "??"])
        return self.fill(text, slots)

    def allowed(self, make: Callable[[], str]) -> str:
        return next(word for word in iter(make, None) if not held(word))

    def real(self, _: Slots) -> str:
        return self.allowed(lambda: self.of(phrases("words")))

    def made_up(self, _: Slots) -> str:
        return self.allowed(
            lambda: "".join(self.rng.choices(phrases("syllables"), k=self.of([2, 3])))
        )

    def letters(self, _: Slots) -> str:
        return self.allowed(
            lambda: "".join(self.rng.choices(ascii_lowercase, k=self.rng.randint(2, 6)))
        )

    def word(self, slots: Slots) -> str:
        """Real, invented or random letters, in some case; sometimes a number."""
        kind, case = self.rng.random(), self.rng.random()
        if kind > 0.98:
            return str(self.rng.randint(0, 9999))
        if kind > 0.93:
            return self.of(phrases("polite"))
        make = self.real if kind < 0.5 else self.made_up if kind < 0.85 else self.letters
        word = make(slots)
        return word.capitalize() if case < 0.15 else word.upper() if case < 0.18 else word

    def words(self, *nums: int) -> list[str]:
        return [self.word({}) for _ in range(self.rng.randint(*nums))]

    def text(self, _: Slots) -> str:
        words = [self.of(phrases("short")) if self.chance(0.15) else w for w in self.words(2, 6)]
        return self.of([" ", " ", " ", ", "]).join(words)

    def city(self, slots: Slots) -> str:
        if self.chance(0.3):
            return self.made_up(slots).capitalize()
        return self.allowed(lambda: self.of(phrases("cities")))

    def person(self, slots: Slots) -> str:
        is_known = self.chance(0.3)
        made = self.allowed(lambda: self.of(phrases("names"))) if is_known else self.made_up(slots)
        return made.capitalize()

    def story(self, num_kept: int, num_episodes: int) -> str:
        """The sentences of a story in order, with their slots: some of them, and episodes."""
        lines, episodes = phrases("story lines"), phrases("episodes")
        num = len(lines)
        kept = {0, 4, num - 2, num - 1, *self.rng.sample(range(1, num - 2), num_kept)}
        chosen = sorted(self.rng.sample(range(len(episodes)), num_episodes))
        sentences = [line for i, line in enumerate(lines) if i in kept]
        return " ".join([*sentences[:-2], *(episodes[i] for i in chosen), *sentences[-2:]])


def _number(low: int, *highs: int) -> Callable[[Source, Slots], str]:
    return lambda s, _: str(s.rng.randint(low, s.of(highs)))


def _from(slot: str, low: int, high: int) -> Callable[[Source, Slots], str]:
    return lambda s, slots: str(min(20, max(0, int(slots[slot]) + s.rng.randint(low, high))))


def _of(compute: Callable[[int, int], int]) -> Callable[[Source, Slots], str]:
    return lambda _, slots: str(compute(int(slots["a"]), int(slots["b"])))


def _range(slots: Slots) -> list[int]:
    a, b = int(slots["a"]), int(slots["b"])
    return list(range(a, b + 1)) if a <= b else list(range(a, b - 1, -1))


def _shifted(name: str, step: int) -> str:
    table = phrases("days" if name in phrases("days") else "months")
    return table[(table.index(name) + step) % len(table)]


DRAWS: dict[str, Callable[[Source, Slots], str]] = {
    "word": Source.word,
    "real": Source.real,
    "made up": Source.made_up,
    "text": Source.text,
    "city": Source.city,
    "person": Source.person,
    "symbol": lambda s, slots: s.letters(slots).upper(),
    "few words": lambda s, _: " ".join(s.words(1, 3)),
    "real words": lambda s, _: " ".join(s.real({}) for _ in range(s.rng.randint(3, s.of([8, 40])))),
    "value": lambda _, slots: slots["_value"],
    "story": lambda s, _: s.story(s.rng.randint(1, 4), 0),
    "long story": lambda s, _: s.story(5, 2),
    "one": lambda *_: "1",
    "start": _number(0, 12),
    "above": lambda s, slots: _from("a", 2, 14)(s, {"a": "1"} | slots),
    "high": _number(6, 20),
    "below": _from("a", -12, -2),
    "range": lambda _, slots: ", ".join(map(str, _range(slots))),
    "spelled": lambda _, slots: ", ".join(phrases("numbers")[n] for n in _range(slots)),
    "addend": _number(0, 9, 9, 9, 9, 20, 99),
    "less": lambda s, slots: str(s.rng.randint(0, int(slots["a"]))),
    "big": _number(0, 9, 99, 999),
    "count": _number(1, 99),
    "number": _number(1, 99, 9999, 99999),
    "degrees": _number(-9, 39),
    "sum": _of(lambda a, b: a + b),
    "difference": _of(lambda a, b: a - b),
    "product": _of(lambda a, b: a * b),
    "time": lambda s, _: f"{s.rng.randint(0, 23):02d}:{s.rng.randint(0, 59):02d}",
    "next": lambda _, slots: _shifted(slots["k"], 1),
    "previous": lambda _, slots: _shifted(slots["k"], -1),
}


def plain_turns(s: Source, skill: str) -> list[Turn]:
    """The turns of a block of the skill's table."""
    slots: Slots = {}
    lines, turns = iter(s.block(skill)), list[Turn]()
    for thought, asks, answers in zip(lines, lines, lines, strict=True):
        user, thought = s.ask(asks, slots), s.fill(thought, slots)
        turns.append(Turn(user, s.one_of(answers, slots), thought))
    return turns


class Call(NamedTuple):
    """A tool's declaration, the request that needs it, its arguments, its result, the answer."""

    name: str
    tool: Tool
    ask: str
    arguments: dict[str, Any]
    result: str
    answer: str


def some_call(s: Source) -> Call:
    """A tool of the corpus; its block has names, descriptions, parameters, requests, results.

    A parameter is `names = type = slot`; its value is that of the slot, if the request binds it.
    """
    names, about, parameters, asks, results, answer = s.block("tools")
    slots: Slots = {}
    ask, properties, arguments = s.ask(asks, slots), dict[str, Any](), dict[str, Any]()
    place = s.rng.randrange(12)
    for parameter in parameters.split(" | ") if parameters != "none" else ():
        keys, kind, slot = parameter.split(" = ")
        choices = keys.split(", ")
        key = s.fill(choices[place % len(choices)], slots)
        properties[key] = {"type": "string" if "/" in kind else kind}
        if "/" in kind:
            properties[key]["enum"] = kind.split("/")
        if s.chance(0.3):
            properties[key]["description"] = "The value."
        if slot in slots:
            value = s.fill(f"{{{slot}}}", slots)
            arguments[key] = int(value) if kind in ("integer", "number") else value
    schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    function: dict[str, Any] = {"name": s.one_of(names, slots)}
    description = s.one_of(about, slots)
    if s.chance(0.8):
        function["description"] = description[0].upper() + description[1:]
    result = s.one_of(results, slots)
    tool = {"type": "function", "function": {**function, "parameters": schema}}
    return Call(function["name"], tool, ask, arguments, result, s.fill(answer, slots))


def rivals(one: str, other: str) -> bool:
    """Whether two tools of these names could answer the same request."""
    families = [family.replace(" ", "|") for family in phrases("families")]
    return any(re.search(f, one.lower()) and re.search(f, other.lower()) for f in families)


def toolbox(s: Source, call: Call) -> list[Tool]:
    """The tool of the call among up to two others."""
    tools = {call.name: call.tool}
    for _ in range(s.of([0, 0, 1, 1, 2])):
        other = some_call(s)
        if not rivals(other.name, call.name):
            tools.setdefault(other.name, other.tool)
    return s.rng.sample(list(tools.values()), len(tools))


def tool_turns(s: Source, skill: str) -> tuple[list[Turn], list[Tool]]:
    """The turns and the tools of a conversation with tools."""
    call = some_call(s)
    tools, function = toolbox(s, call), {"name": call.name, "arguments": call.arguments}
    if skill == "tool_call":
        text = f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"
        return [Turn(call.ask, text, f"I should call the tool {call.name}.")], tools
    if skill == "tool_none":
        return plain_turns(s, s.of(["chat", "chat", "repeat", "facts"])), tools
    result, answer = call.result, call.answer
    if s.chance(0.08):
        reason = s.of(["not found", "timeout", "no permission", "unknown " + s.real({})])
        result = s.of([json.dumps({"error": reason}), f"Error: {reason}", f"error: {reason}"])
        answer = f"The tool reported an error: {reason}."
    made = {"id": "call_0", "type": "function", "function": function}
    via = [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_0", "content": result},
    ]
    return [Turn(call.ask, answer, "The tool has answered. I will tell the user.", via)], tools


MIX = {"chat": 9, "unknown": 4, "story": 6, "repeat": 26, "count": 5, "sums": 24, "facts": 10}
MIX |= {"memory": 4, "tool_call": 14, "tool_result": 7, "tool_none": 3}
COPYING = {"repeat": 55, "tool_call": 20, "memory": 10, "chat": 5, "facts": 5, "sums": 5}
POLISH = {**MIX, "sums": 14, "story": 16, "tool_call": 16}


def mix_at(fraction: float) -> dict[str, int]:
    """The shares of the skills at a fraction of the run: copying is first, as it is hardest."""
    return COPYING if fraction < 0.12 else MIX if fraction < 0.88 else POLISH


def skill_turns(s: Source, skill: str) -> tuple[list[Turn], list[Tool] | None]:
    """The turns of a skill, with earlier turns of other skills in some conversations."""
    earlier, tools = list[str](), None
    if skill.startswith("tool"):
        turns, tools = tool_turns(s, skill)
        earlier = ["chat"] if s.chance(0.1) else []
    else:
        turns = plain_turns(s, skill)
    if skill == "memory" and s.chance(0.4):
        turns[1:1] = plain_turns(s, s.of(["chat", "facts", "sums"]))
    elif skill == "sums" and s.chance(0.6):
        earlier = ["sums"] * s.rng.randint(2, 5)
    elif skill in ("chat", "unknown", "repeat", "count", "sums", "facts") and s.chance(0.3):
        others = ["chat", "repeat", "sums", "facts", "count", skill]
        others = [skill, skill, "chat"] if skill == "repeat" else others
        earlier = [s.of(others) for _ in range(s.of([1, 1, 2]))]
    return [*(turn for other in earlier for turn in plain_turns(s, other)), *turns], tools


def example(s: Source, skill: str) -> Example:
    """One conversation, half of them with a system prompt and a third with a thought."""
    turns, tools = skill_turns(s, skill)
    messages: list[Message] = []
    if s.chance(0.5):
        system = phrases("system")[0] if s.chance(0.5) else s.of(phrases("system"))
        messages.append({"role": "system", "content": system})
    for turn in turns[:-1]:
        messages += [{"role": "user", "content": turn.user}]
        messages += [{"role": "assistant", "content": turn.answer}]
    last = turns[-1]
    messages += [{"role": "user", "content": last.user}, *last.via]
    thinking = s.chance(0.35)
    target = f"{last.thought}\n</think>\n\n{last.answer}" if thinking else last.answer
    return Example(skill, messages, target, thinking, tools)


def examples(s: Source, n: int, mix: dict[str, int]) -> list[Example]:
    return [example(s, skill) for skill in s.rng.choices(list(mix), list(mix.values()), k=n)]
