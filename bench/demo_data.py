"""Synthetic conversations for the demo model: every skill it has is a generator in this file.

A generator returns a turn: what the user says, what the model answers and the thought it has when
thinking is on. Held-out words (a fixed hash decides) never occur in training for the skills that
copy, so that the evaluation measures copying and not memory.
"""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bench.demo_words import (
    ADJECTIVES,
    ASK_UNKNOWN,
    CAPITAL_ASKS,
    CAPITALS,
    CATALOG,
    CHAT,
    CITIES,
    COLOURS,
    DAYS,
    EPISODES,
    FACTS,
    FAMILIES,
    GREETINGS,
    HEROES,
    HOW,
    INVENTED_ASKS,
    LOSSES,
    MONTHS,
    NAMES,
    NUMBER_WORDS,
    OPPOSITES,
    PLACES,
    POLITE,
    PRIZES,
    REPEAT_TEXT,
    REPEAT_WORD,
    SAYINGS,
    SHORT,
    SKIES,
    SOUNDS,
    STORY,
    STORY_ASKS,
    SUM_ASKS,
    SYLLABLES,
    SYSTEM,
    THINGS,
    TOPICS,
    UNITS,
    UNKNOWN,
    VERBS,
    WEATHER_ABOUT,
    WEATHER_ASKS,
    WEATHER_NAMES,
    WISHES,
    WORDS,
)

T = TypeVar("T")
Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass
class Turn:
    """One exchange; `via` holds the tool call and tool result that precede the answer."""

    user: str
    answer: str
    thought: str
    via: list[Message] = field(default_factory=list)


@dataclass
class Example:
    """A conversation whose last answer is written in full (`target`), thought included."""

    skill: str
    messages: list[Message]
    target: str
    thinking: bool
    tools: list[Tool] | None = None


# --- choices ---------------------------------------------------------------------------------


def held(word: str) -> bool:
    """Whether a word is kept for the evaluation (about one in ten)."""
    word = word.lower()
    return word not in POLITE and zlib.crc32(word.encode()) % 10 == 0


class Source:
    """A seeded source of random choices that keeps to one side of the held-out split."""

    def __init__(self, seed: int, evaluate: bool = False) -> None:
        self.rng = random.Random(seed)
        self.evaluate = evaluate

    def of(self, items: list[T]) -> T:
        return self.rng.choice(items)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def split(self, make: Callable[[], str]) -> str:
        """A word of this side of the split: held-out in evaluation, the others in training."""
        for _ in range(1000):
            word = make()
            if held(word) == self.evaluate:
                return word
        raise ValueError("no word on this side of the split")

    def real(self) -> str:
        return self.split(lambda: self.of(WORDS))

    def made_up(self) -> str:
        return self.split(lambda: "".join(self.rng.choices(SYLLABLES, k=self.rng.randint(2, 3))))

    def letters(self) -> str:
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        return self.split(lambda: "".join(self.rng.choices(alphabet, k=self.rng.randint(2, 6))))

    def word(self) -> str:
        """A word to copy: real, invented or random letters, in some case, sometimes a number."""
        kind = self.rng.random()
        word = self.real() if kind < 0.5 else self.made_up() if kind < 0.88 else self.letters()
        if kind > 0.98:
            return str(self.rng.randint(0, 9999))
        case = self.rng.random()
        return word.capitalize() if case < 0.15 else word.upper() if case < 0.18 else word

    def city(self) -> str:
        if self.chance(0.3):
            return self.made_up().capitalize()
        return self.split(lambda: self.of(CITIES))

    def vary(self, text: str) -> str:
        """The same request in another case, punctuation or politeness; {slots} stay as they are."""
        if self.chance(0.12):
            opening = self.of(["Please ", "Can you please ", "Hey, ", "Now ", "Ok, "])
            text = opening + text[0].lower() + text[1:]
        if self.chance(0.2):
            text = text.lower()
        if self.chance(0.25):
            text = text.rstrip(".?!")
        elif self.chance(0.08):
            text = text.rstrip(".?!") + self.of(["!", "...", " please", ", please.", " ?", "??"])
        return text


# --- skills ----------------------------------------------------------------------------------


def chat(s: Source) -> Turn:
    """Greetings, thanks, goodbyes, who and what it is."""
    thought, asks, answers = s.of([*CHAT, CHAT[0], CHAT[1], CHAT[2]])
    if asks is GREETINGS:
        ask = s.of(GREETINGS) + s.of(["", "!", ".", " mlxlite!", " there", ", friend."])
    elif asks is HOW:
        ask = s.of([s.of(GREETINGS) + s.of([", ", "! "]), ""]) + s.of(HOW)
    else:
        ask = s.of(asks)
        ask = s.of([ask, ask, ask, f"{s.of(GREETINGS)}! {ask}"])
    return Turn(s.vary(ask), s.of(answers), thought)


def unknown(s: Source) -> Turn:
    """Anything it was not made for gets a short honest answer."""
    if s.chance(0.25):
        ask = " ".join(s.real() for _ in range(s.rng.randint(3, s.of([8, 20, 60]))))
        ask = s.of(["Summarize this: ", "Translate: ", "", "What does this mean? "]) + ask + "."
    else:
        topic, other = (
            s.of(TOPICS) if s.chance(0.6) else s.of(["", "a ", "the "]) + s.real() for _ in range(2)
        )
        ask = s.vary(s.of(ASK_UNKNOWN)).format(t=topic, t2=other)
    return Turn(ask, s.of(UNKNOWN), "I am a tiny model and do not know this. I will say so.")


def story(s: Source) -> Turn:
    """A short story of three to eight sentences, or a long one on request."""
    long = s.chance(0.35)
    hero = s.of(HEROES)
    other = s.chance(0.12)
    hero = s.real() if other else hero
    slots = {
        "hero": hero,
        "name": s.of(NAMES),
        "adj": s.of(ADJECTIVES),
        "adj2": s.of(ADJECTIVES),
        "place": s.of(PLACES),
        "wish": s.of(WISHES),
        "thing": s.of(THINGS),
        "say": s.of(SAYINGS),
        "prize": s.of(PRIZES),
        "friend": s.of([h for h in HEROES if h != hero]),
    }
    lines = story_lines(s, long)
    if long:
        slots["loss"] = s.of(LOSSES)
    kind = s.of(["long", "very long"] if long else ["", "", "short", "little", "nice"])
    what = f"a {kind} story".replace("  ", " ")
    about = s.of([" about a {h}", " about a {h}", " with a {h}"]) if other or s.chance(0.65) else ""
    ask = s.vary(s.of(STORY_ASKS).replace("{a}", about)).format(w=what, h=hero)
    thought = f"The user wants {what}. I will write about a {hero}."
    return Turn(ask, " ".join(lines).format(**slots), thought)


def story_lines(s: Source, long: bool) -> list[str]:
    """The sentences of a story, still with their slots."""
    if long:
        episodes = sorted(s.rng.sample(range(len(EPISODES)), 2))
        told = [EPISODES[i].replace("{a}", s.of(HEROES)) for i in episodes]
        return [*STORY[:6], *told, *STORY[6:]]
    kept = {STORY[0], *s.rng.sample(STORY[1:-2], s.rng.randint(1, 4)), *STORY[-2:], STORY[4]}
    return [line for line in STORY if line in kept]


def repeat(s: Source) -> Turn:
    """Copy a word or a few words; now and then several times."""
    kind = s.rng.random()
    if kind < 0.52:
        word = s.of(POLITE) if s.chance(0.1) and not s.evaluate else s.word()
        ask = s.vary(s.of(REPEAT_WORD)).format(w=word)
        return Turn(ask, word, f"I should repeat the word {word}.")
    if kind < 0.58:
        word, times = s.word(), s.rng.randint(2, 5)
        ask = s.of(["Say {w} {n} times.", "Repeat the word {w} {n} times.", "Repeat {w} {n} times"])
        number = s.of([str(times), NUMBER_WORDS[times]])
        ask = s.vary(ask).format(w=word, n=number)
        return Turn(ask, " ".join([word] * times), f"I should say {word} {times} times.")
    words = [s.word() for _ in range(s.rng.randint(2, 6))]
    words = [s.of(SHORT) if s.chance(0.15) else word for word in words]
    text = s.of([" ", " ", " ", ", "]).join(words)
    ask = s.vary(s.of(REPEAT_TEXT)).format(w=text)
    return Turn(ask, text, "I should repeat the words of the user.")


def count(s: Source) -> Turn:
    """Counting up or down, in digits or in words."""
    words = s.chance(0.3)
    start = 1 if s.chance(0.5) else s.rng.randint(0, 12)
    end = start + s.rng.randint(2, 8 if words else 14)
    end = min(end, 20) if words else end
    asks = ["Count from {a} to {b}.", "Count {a} to {b}.", "Can you count from {a} to {b}?"]
    asks.append("List the numbers from {a} to {b}.")
    if start == 1:
        asks = ["Count to {b}.", "Count up to {b}.", "Can you count to {b}?", *asks]
    text = s.of(asks)
    numbers = list(range(start, end + 1))
    if s.chance(0.12) and "from" in text:
        text = text.replace("{a}", "{c}").replace("{b}", "{a}").replace("{c}", "{b}")
        numbers.reverse()
    if words:
        text = text.rstrip(".?") + s.of([" in words.", " using words.", " in words"])
    answer = ", ".join(NUMBER_WORDS[n] if words else str(n) for n in numbers) + "."
    thought = f"I will count from {numbers[0]} to {numbers[-1]}."
    return Turn(s.vary(text).format(a=start, b=end), answer, thought)


def sums(s: Source) -> Turn:
    """Small sums and differences; those of two digits may be held out."""
    while True:
        top = s.of([9, 9, 9, 9, 20, 99])
        a, b, plus = s.rng.randint(0, top), s.rng.randint(0, top), s.chance(0.6)
        a, b = (a, b) if plus else (max(a, b), min(a, b))
        if (held(f"{a}+{b}") and max(a, b) > 9) == s.evaluate:
            break
    words = ["What is {a} plus {b}?", "Add {a} and {b}."] if plus else ["What is {a} minus {b}?"]
    sign = "+" if plus else "-"
    answer = f"{a} {sign} {b} = {a + b if plus else a - b}."
    thought = f"I need to {'add' if plus else 'subtract'}. {answer}"
    ask = s.vary(s.of([*SUM_ASKS, *words])).format(a=a, b=b, o=sign)
    return Turn(ask, answer, thought)


def pair_fact(s: Source) -> tuple[str, str]:
    """A question about a capital, an opposite, a colour or an animal, and its answer."""
    kind = s.rng.random()
    if kind < 0.58:
        key = s.of(list(CAPITALS))
        asks, answer = CAPITAL_ASKS, f"The capital of {key} is {CAPITALS[key]}."
    elif kind < 0.74:
        key = s.of(list(OPPOSITES))
        asks = ["What is the opposite of {c}?", "Opposite of {c}", "Tell me the opposite of {c}."]
        answer = f"The opposite of {key} is {OPPOSITES[key]}."
    elif kind < 0.9:
        key = s.of(list(COLOURS))
        asks = ["What colour is the {c}?", "What color is the {c}?", "Which colour has the {c}?"]
        answer = f"The {key} is {COLOURS[key]}."
    else:
        key = s.of(list(SOUNDS))
        asks = ["What does the {c} say?", "What sound does a {c} make?"]
        answer = f"The {key} says {SOUNDS[key]}."
    return s.of(asks).format(c=key), answer


def calendar_fact(s: Source) -> tuple[str, str]:
    """A question about the day or month before or after another, and its answer."""
    step, names = s.of([1, -1]), s.of([DAYS, DAYS, MONTHS])
    now = s.rng.randrange(len(names))
    other, word = names[(now + step) % len(names)], "after" if step == 1 else "before"
    unit = "day" if names is DAYS else "month"
    asks = [f"What {unit} comes {word} {names[now]}?", f"Which {unit} is {word} {names[now]}?"]
    return s.of(asks), f"{other} comes {word} {names[now]}."


def facts(s: Source) -> Turn:
    """Capitals, colours, days, opposites, animal sounds and a few single facts."""
    kind = s.rng.random()
    ask, answer = pair_fact(s) if kind < 0.75 else calendar_fact(s) if kind < 0.87 else s.of(FACTS)
    return Turn(s.vary(ask), answer, "I know this fact.")


def name_memory(s: Source) -> list[Turn]:
    """The user says a name or a favourite thing, and asks for it later."""
    what = s.of(["name", "name", "favourite colour", "favourite animal", "favourite food"])
    value = s.made_up().capitalize() if what == "name" and s.chance(0.4) else s.real()
    value = s.of(NAMES) if what == "name" and s.chance(0.3) and not s.evaluate else value
    first = s.of(["My {k} is {v}.", "Hi, my {k} is {v}.", "Remember that my {k} is {v}."])
    ask = s.of(["What is my {k}?", "What's my {k}?", "Do you remember my {k}?", "Tell me my {k}."])
    hello = f"I will remember that your {what} is {value}."
    hello = f"Nice to meet you, {value}!" if what == "name" else hello
    first, ask = (s.vary(text).format(k=what, v=value) for text in (first, ask))
    turns = [Turn(first, hello, f"The user told me the {what} {value}.")]
    if s.chance(0.4):
        turns.append(s.of([chat, facts, sums])(s))
    answer, thought = f"Your {what} is {value}.", f"The user told me before. It is {value}."
    return [*turns, Turn(ask, answer, thought)]


# --- tools -----------------------------------------------------------------------------------


@dataclass
class Call:
    """A tool as declared, the request that needs it, its arguments and (result, answer) then."""

    tool: Tool
    ask: str
    arguments: dict[str, Any]
    result: str
    answer: str


def declare(s: Source, name: str, description: str, properties: dict[str, Any]) -> Tool:
    """An OpenAI tool; the description is sometimes missing."""
    for schema in properties.values():
        if s.chance(0.3):
            schema["description"] = "The value."
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    function: dict[str, Any] = {"name": name}
    if s.chance(0.8):
        function["description"] = description
    return {"type": "function", "function": {**function, "parameters": parameters}}


def weather(s: Source) -> Call:
    """The canonical get_weather with its variants."""
    key = s.of(["city", "city", "location", "location", "place", "town"])
    city = s.city() + (f", {s.of(list(CAPITALS))}" if s.chance(0.08) else "")
    properties: dict[str, Any] = {key: {"type": "string"}}
    arguments = {key: city}
    ask = s.of(WEATHER_ASKS)
    if s.chance(0.35):
        units, unit = s.of(UNITS), s.of(["unit", "unit", "units"])
        properties[unit] = {"type": "string", "enum": units}
        if s.chance(0.4):
            arguments[unit] = s.of(units)
            ask = ask.rstrip(".?") + f" in {arguments[unit]}" + s.of(["?", "", "."])
    tool = declare(s, s.of(WEATHER_NAMES), s.of(WEATHER_ABOUT), properties)
    degrees, sky = s.rng.randint(-9, 39), s.of(SKIES)
    answer = f"It is {degrees} degrees and {sky} in {city}."
    result = weather_result(s, key, city, degrees, sky)
    return Call(tool, s.vary(ask).format(c=city), arguments, result, answer)


def weather_result(s: Source, key: str, city: str, degrees: int, sky: str) -> str:
    """What a weather service answers, as JSON or as text."""
    heat, state = s.of(["temperature", "temp", "temperature_c"]), s.of(["condition", "sky"])
    forms = [
        json.dumps({heat: degrees, state: sky}),
        json.dumps({key: city, "temperature": degrees, "condition": sky}),
        json.dumps({"temperature": degrees, "unit": "celsius", "conditions": sky}),
        f"{degrees} degrees and {sky}",
        f"{sky}, {degrees} degrees",
        f"{degrees}°C, {sky}",
        f"{sky}, {degrees} C",
    ]
    return s.of(forms)


def calculator(s: Source, a: int, b: int) -> Call:
    """A tool that takes an expression."""
    sign = s.of(["+", "*", "-"])
    value = {"+": a + b, "*": a * b, "-": a - b}[sign]
    key, name = s.of(["expression", "expr", "formula"]), s.of(["calculate", "calculator", "math"])
    expression = f"{a} {sign} {b}"
    ask = s.vary(s.of(["What is {e}?", "Calculate {e}.", "How much is {e}?", "{e}"]))
    tool = declare(s, name, "Evaluate an expression.", {key: {"type": "string"}})
    answer = f"The result is {value}."
    result = s.of([str(value), json.dumps({"result": value})])
    return Call(tool, ask.format(e=expression), {key: expression}, result, answer)


def arithmetic(s: Source) -> Call:
    """add, multiply and a calculator."""
    a, b = s.rng.randint(0, s.of([9, 99, 999])), s.rng.randint(0, s.of([9, 99, 999]))
    kind = s.of(["add", "multiply", "calculate"])
    if kind == "calculate":
        return calculator(s, a, b)
    first, second = s.of([("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")])
    properties = {key: {"type": s.of(["integer", "number"])} for key in (first, second)}
    asks = {
        "add": [
            "What is {a} + {b}?",
            "Add {a} and {b}.",
            "What is {a} plus {b}?",
            "Sum {a} and {b}.",
        ],
        "multiply": ["What is {a} * {b}?", "Multiply {a} by {b}.", "What is {a} times {b}?"],
    }
    about = f"{kind.capitalize()} two {s.of(['numbers.', 'integers'])}"
    tool = declare(s, kind + s.of(["", "_numbers"]), about, properties)
    value = a + b if kind == "add" else a * b
    result = s.of([str(value), json.dumps({"result": value}), json.dumps({"value": value})])
    ask = s.vary(s.of(asks[kind])).format(a=a, b=b)
    return Call(tool, ask, {first: a, second: b}, result, f"The result is {value}.")


def value_of(s: Source, kind: str) -> Any:
    """An argument of a catalogue tool."""
    if kind == "city":
        return s.city()
    if kind == "words":
        return " ".join(s.word() for _ in range(s.rng.randint(1, 3)))
    if kind == "symbol":
        return s.letters().upper()
    if kind == "file":
        return f"{s.real()}.{s.of(['txt', 'md', 'py', 'json'])}"
    if kind == "name":
        return s.made_up().capitalize() if s.evaluate or s.chance(0.4) else s.of(NAMES)
    return s.rng.randint(1, 99) if kind == "integer" else s.word()


def result_of(s: Source, kind: str) -> Any:
    """What a catalogue tool answers."""
    if kind == "time":
        return f"{s.rng.randint(0, 23):02d}:{s.rng.randint(0, 59):02d}"
    if kind == "number":
        return s.rng.randint(1, s.of([99, 9999, 99999]))
    if kind == "status":
        return s.of(["ok", "sent", "done", "success", "started"])
    return " ".join(s.word() for _ in range(s.rng.randint(1, 4)))


def catalogued(s: Source) -> Call:
    """A tool of the catalogue."""
    kind = s.of(CATALOG)
    key, value, result = s.of(kind.keys), value_of(s, kind.value), result_of(s, kind.result)
    schema = {"type": "integer" if kind.value == "integer" else "string"}
    tool = declare(s, s.of(kind.names), kind.about, {key: schema})
    rendered = json.dumps({s.of(["result", kind.result, "output"]): result})
    ask = s.vary(s.of(kind.asks)).format(v=value)
    answer = kind.answer.format(v=value, r=result)
    return Call(tool, ask, {key: value}, s.of([rendered, str(result)]), answer)


def invented(s: Source) -> Call:
    """A tool nobody has heard of, with invented parameter names: the call can only be copied."""
    verb = s.of(VERBS) if s.chance(0.6) else s.made_up()
    noun = s.real() if s.chance(0.6) else s.made_up()
    arguments: dict[str, Any] = {}
    for _ in range(s.of([0, 1, 1, 1, 2, 2])):
        key = s.real() if s.chance(0.5) else s.made_up()
        arguments[key] = s.rng.randint(0, 99) if s.chance(0.25) else s.word()
    properties = {
        k: {"type": "string" if isinstance(v, str) else "integer"} for k, v in arguments.items()
    }
    ask = s.vary(s.of(INVENTED_ASKS)).format(v=verb, n=noun)
    if arguments:
        form = s.of([" {k} {v}", " {k} {v}", " {k} = {v}", " the {k} {v}", " {k}: {v}"])
        ask += s.of([" with", " with", " using", " for"])
        ask += " and".join(form.format(k=k, v=v) for k, v in arguments.items())
    name = s.of([f"{verb}_{noun}", f"{verb}_{noun}", f"{noun}_{verb}", f"do_{verb}_{noun}"])
    about = [f"{verb.capitalize()} the {noun}.", f"{verb.capitalize()} a {noun}"]
    about.append(f"A tool to {verb} the {noun}.")
    result = result_of(s, s.of(["status", "status", "text"]))
    rendered = json.dumps({s.of(["status", "result", "message"]): result})
    tool = declare(s, name, s.of(about), properties)
    return Call(tool, ask, arguments, s.of([str(result), rendered]), f"Done: {result}.")


def any_call(s: Source) -> Call:
    kind = s.rng.random()
    if kind < 0.3:
        return weather(s)
    return catalogued(s) if kind < 0.55 else arithmetic(s) if kind < 0.68 else invented(s)


def name_of(tool: Tool) -> str:
    return str(tool["function"]["name"])


def rivals(one: str, other: str) -> bool:
    """Whether two tools of these names could answer the same request."""
    names = one.lower(), other.lower()
    return any(all(any(w in n for w in family.split()) for n in names) for family in FAMILIES)


def toolbox(s: Source, call: Call) -> list[Tool]:
    """The tool of the call among up to two others."""
    tools = [call.tool]
    for _ in range(s.of([0, 0, 1, 1, 2])):
        other = any_call(s).tool
        taken = [name_of(tool) for tool in tools]
        if name_of(other) not in taken and not rivals(name_of(other), name_of(call.tool)):
            tools.append(other)
    s.rng.shuffle(tools)
    return tools


def call_text(call: Call) -> str:
    body = {"name": name_of(call.tool), "arguments": call.arguments}
    return f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"


def call_messages(call: Call) -> list[Message]:
    """The messages of a call that ran: the assistant's call and the tool's result."""
    function = {"name": name_of(call.tool), "arguments": call.arguments}
    made = {"id": "call_0", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_0", "content": call.result},
    ]


def fail(s: Source, call: Call) -> None:
    """The tool fails instead, and the answer says so."""
    reason = s.of(["not found", "timeout", "no permission", "unknown " + s.real()])
    forms = [json.dumps({"error": reason}), f"Error: {reason}", f"error: {reason}"]
    call.result, call.answer = s.of(forms), f"The tool reported an error: {reason}."


# --- conversations ---------------------------------------------------------------------------

PLAIN: dict[str, Callable[[Source], Turn]] = {
    "chat": chat,
    "unknown": unknown,
    "story": story,
    "repeat": repeat,
    "count": count,
    "sums": sums,
    "facts": facts,
}
MIX = {
    "chat": 9,
    "unknown": 4,
    "story": 6,
    "repeat": 26,
    "count": 5,
    "sums": 24,
    "facts": 10,
    "memory": 4,
    "tool_call": 14,
    "tool_result": 7,
    "tool_none": 3,
}
COPYING = {"repeat": 55, "tool_call": 20, "memory": 10, "chat": 5, "facts": 5, "sums": 5}
POLISH = {**MIX, "sums": 14, "story": 16, "tool_call": 16}
PHASES = [(0.12, COPYING), (0.88, MIX), (1.0, POLISH)]


def mix_at(fraction: float) -> dict[str, int]:
    """The shares of the skills at a fraction of the run: copying comes first, as it is hardest."""
    return next((mix for until, mix in PHASES if fraction < until), POLISH)


def tool_turns(s: Source, skill: str) -> tuple[list[Turn], list[Tool]]:
    """The turns and the tools of a conversation with tools."""
    call = any_call(s)
    tools = toolbox(s, call)
    if skill == "tool_call":
        thought = f"I should call the tool {name_of(call.tool)}."
        return [Turn(call.ask, call_text(call), thought)], tools
    if skill == "tool_result":
        if s.chance(0.08):
            fail(s, call)
        thought = "The tool has answered. I will tell the user."
        return [Turn(call.ask, call.answer, thought, call_messages(call))], tools
    if any(rivals("add", name_of(tool)) for tool in tools):
        return [s.of([chat, repeat, facts])(s)], tools
    return [s.of([chat, chat, repeat, sums, facts])(s)], tools


def skill_turns(s: Source, skill: str) -> tuple[list[Turn], list[Tool] | None]:
    """The turns of a skill, with earlier turns of other skills now and then."""
    if skill.startswith("tool"):
        turns, tools = tool_turns(s, skill)
        return [chat(s), *turns] if s.chance(0.1) else turns, tools
    if skill == "memory":
        return name_memory(s), None
    turns = [PLAIN[skill](s)]
    if skill == "sums" and s.chance(0.6):
        return [*(sums(s) for _ in range(s.rng.randint(2, 5))), *turns], None
    if skill != "story" and s.chance(0.3):
        earlier = ["chat", "repeat", "sums", "facts", "count", skill]
        earlier = [skill, skill, "chat"] if skill == "repeat" else earlier
        turns[:0] = [PLAIN[s.of(earlier)](s) for _ in range(s.of([1, 1, 2]))]
    return turns, None


def example(s: Source, skill: str) -> Example:
    """One conversation of a skill, with a random system prompt and thinking now and then."""
    turns, tools = skill_turns(s, skill)
    messages: list[Message] = []
    if s.chance(0.5):
        system = SYSTEM[0] if s.chance(0.5) else s.of(SYSTEM)
        messages.append({"role": "system", "content": system})
    for turn in turns[:-1]:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer})
    last = turns[-1]
    messages += [{"role": "user", "content": last.user}, *last.via]
    thinking = s.chance(0.35)
    target = f"{last.thought}\n</think>\n\n{last.answer}" if thinking else last.answer
    return Example(skill, messages, target, thinking, tools)


def examples(s: Source, n: int, mix: dict[str, int]) -> list[Example]:
    skills = s.rng.choices(list(mix), weights=list(mix.values()), k=n)
    return [example(s, skill) for skill in skills]
