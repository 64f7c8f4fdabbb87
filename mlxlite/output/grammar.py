"""Constrained output: a schema, regex, choice, grammar or tool call as masks over the tokens.

llguidance (the extra `grammar`) does the matching. A grammar is compiled once, off the event loop
and within llguidance's limits; each sequence matches with a copy. The runner drives a matcher: it
passes on every drawn token, and fills the next mask while the device computes. White space in JSON
is bounded, or a model could write it for ever. An answer ends only where the grammar accepts. After
a prompt that opens a block of reasoning, matching begins at the end of the block.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson

from mlxlite.engine.sequence import Matcher


class Kind(Enum):
    """How a constraint is written."""

    JSON = "json"  # a JSON Schema
    REGEX = "regex"
    CHOICE = "choice"  # a JSON array of strings
    GRAMMAR = "grammar"  # GBNF or Lark


@dataclass(frozen=True, slots=True)
class TextConstraint:
    """A schema, expression or grammar that an answer must match, as llguidance reads it."""

    kind: Kind
    text: str

    @property
    def num_chars(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A tool's name, and the JSON Schema of its arguments as text."""

    name: str
    parameters: str


@dataclass(frozen=True, slots=True)
class CallConstraint:
    """Calls of these tools: one or more, or after any text where they are not forced."""

    tools: tuple[ToolSchema, ...]
    is_single: bool = False
    is_forced: bool = True

    @property
    def num_chars(self) -> int:
        return sum(len(tool.name) + len(tool.parameters) for tool in self.tools)


Constraint = TextConstraint | CallConstraint


class ConstraintError(ValueError):
    """A constraint cannot be enforced; the message is for the client."""


MAX_GRAMMAR_CHARS = 256 << 10
MAX_COMPILED = 64  # grammars; each takes from a few KB to some MB
# Any JSON text's white space, but bounded: enough to indent.
_JSON_OPTIONS: Mapping[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\x20|\x0A[\x20\x09]{0,24})?",
}
# A mask may cost this much work, in llguidance's units.
_FUEL = 150_000
_TRIAL_TOKENS = 4
MISSING = "structured output needs llguidance: pip install 'mlxlite[grammar]'"


class Grammars:
    """Compiles constraints for one tokenizer. Made and used off the event loop; has a lock.

    `tokenizer` is transformers' fast one. `think` and `call_markers` are the tokens around a block
    of reasoning and a tool call.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_vocab: int,
        eos_tokens: frozenset[int],
        think: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
        call_markers: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    ) -> None:
        self._tokenizer = tokenizer
        self._num_vocab = num_vocab
        self._num_words = (num_vocab + 31) // 32
        self._eos_tokens = eos_tokens
        self._think = think
        self._call_markers = call_markers
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()

    def compile(
        self, constraint: Constraint | None, *, is_thinking: bool, budget: int | None = None
    ) -> "Grammar":
        """The grammar of an answer, after at most `budget` tokens of reasoning.

        Raises ConstraintError: what is wrong with the constraint, for the client.
        """
        found = self._find(constraint) if constraint is not None else None
        thought = None
        if is_thinking or budget is not None:
            if not all(self._think):
                raise ConstraintError("this model has no marks around its reasoning")
            thought = Thought(*self._think, is_thinking, budget)
        return Grammar(found, self._num_words, _bits(self._num_words, self._eos_tokens), thought)

    def is_compiled(self, constraint: Constraint) -> bool:
        return constraint in self._compiled

    def _find(self, constraint: Constraint) -> Any:
        """The compiled constraint, of the latest ones or new. No lock is held over a compile."""
        with self._lock:
            found = self._compiled.pop(constraint, None)
        found = found or self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = found
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, constraint: Constraint) -> Any:
        try:
            import llguidance
        except ImportError:
            raise ConstraintError(MISSING) from None
        if constraint.num_chars > MAX_GRAMMAR_CHARS:
            raise ConstraintError(f"it is longer than {MAX_GRAMMAR_CHARS} characters")
        limits = llguidance.LLParserLimits(initial_lexer_fuel=_FUEL, step_lexer_fuel=_FUEL)
        words, source = self._words, self._source(constraint)
        matcher = llguidance.LLMatcher(words, source, log_level=0, limits=limits)
        if (reason := _error_in_use(matcher)) is not None:
            raise ConstraintError(reason)
        return matcher

    @cached_property
    def _words(self) -> Any:
        """llguidance's tokenizer, which takes up to a second to make. Raises ConstraintError."""
        from llguidance import hf

        ends = sorted(self._eos_tokens) or None
        try:
            return hf.from_tokenizer(self._tokenizer, self._num_vocab, ends)
        except ValueError as error:
            raise ConstraintError(f"this model's tokenizer cannot be used: {error}") from None

    def _source(self, constraint: Constraint) -> str:
        """The grammar as llguidance reads it. Raises ConstraintError."""
        from llguidance import LLMatcher, grammar_from

        try:
            match constraint:
                case CallConstraint():
                    return str(LLMatcher.grammar_from_lark(self._calls(constraint)))
                case TextConstraint(Kind.JSON, text):
                    options = cast("Any", dict(_JSON_OPTIONS))
                    return str(LLMatcher.grammar_from_json_schema(text, overrides=options))
                case TextConstraint(Kind.REGEX, text):
                    return str(LLMatcher.grammar_from_regex(text))
                case TextConstraint(Kind.CHOICE, text):
                    return str(grammar_from("choice", text))
                case TextConstraint(_, text):  # Kind.GRAMMAR
                    return str(grammar_from("gbnf", text))
        except (ValueError, RecursionError) as error:
            raise ConstraintError(" ".join(str(error).split())[:300]) from None

    def _calls(self, calls: CallConstraint) -> str:
        """The Lark grammar of calls. Raises ConstraintError where a model's calls are no JSON."""
        begin, end = self._call_markers
        if not begin or not end:
            raise ConstraintError("the format of this model's tool calls cannot be enforced")
        bodies = " | ".join(f"c{i}" for i in range(len(calls.tools)))
        rules = [f"c{i}: %json {_call_schema(tool)}" for i, tool in enumerate(calls.tools)]
        first, last = ("".join(f" <[{id}]>" for id in ids) for ids in (begin, end))
        call = f"call:{first} gap ({bodies}) gap{last}"
        several = "call" if calls.is_single else "call (gap call)*"
        start = f"start: gap {several}"
        if not calls.is_forced:  # text first, and a call only where its marker comes
            mark = json.dumps(self._tokenizer.decode(list(begin)))  # not spelt out either
            words = f"WORDS: /(.|\\n)*/ & ~(/(.|\\n)*/ {mark} /(.|\\n)*/)"
            start = f"start: WORDS ({several})?\n{words}"
        return "\n".join([start, call, r"gap: /[ \n]{0,4}/", *rules])


def _call_schema(tool: ToolSchema) -> str:
    schema = {
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            "arguments": orjson.Fragment(tool.parameters),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": dict(_JSON_OPTIONS),
    }
    return orjson.dumps(schema).decode()


@dataclass(frozen=True, slots=True)
class Thought:
    """The tokens around a block of reasoning, and how long one may be."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    is_open: bool  # in the prompt
    budget: int | None  # tokens


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled constraint, of which each sequence has a matcher of its own."""

    compiled: Any  # llguidance's matcher at the start; None: reasoning is limited, nothing else
    num_words: int  # 32-bit, of a mask
    ends: npt.NDArray[np.uint32]  # the mask of the end-of-sequence tokens
    thought: Thought | None

    def matcher(self) -> Matcher:
        return _Matcher(self)


class _Matcher:
    """A `sequence.Matcher`: reasoning, free but for its length, then the grammar, if any."""

    def __init__(self, grammar: Grammar) -> None:
        compiled = grammar.compiled
        self._matcher = compiled.deep_copy() if compiled is not None else None
        self._num_words, self._ends = grammar.num_words, grammar.ends
        self._thought = grammar.thought
        self._is_thinking = self._thought is not None and self._thought.is_open
        self._num_thought = 0
        self._seen: tuple[int, ...] = ()  # the last tokens, as many as the mark to come has
        self._forced: list[int] = []  # the mark that closes a block at its budget

    @property
    def error(self) -> str | None:
        if self._matcher is None or not self._matcher.is_error():
            return None
        return _first_line(self._matcher.get_error())

    def accept(self, tokens: SequenceOf[int]) -> None:
        for token in tokens:
            if self._thought is not None and self._think(token, self._thought):
                continue
            if self._matcher is not None and not self._matcher.is_stopped():
                self._matcher.consume_token(token)

    def _think(self, token: int, thought: Thought) -> bool:
        """True for a token of reasoning. A grammar admits no reasoning after its start."""
        mark = thought.end if self._is_thinking else thought.start
        self._seen = (*self._seen, token)[-len(mark) :]
        if self._is_thinking:
            self._num_thought += 1
            self._forced = self._forced[1:]
            if self._seen == mark:
                self._is_thinking, self._thought, self._forced = False, None, []
            elif self._num_thought == thought.budget:
                self._forced = list(mark)
            return True
        if self._seen == mark and self._matcher is None:
            self._is_thinking, self._seen = True, ()
        return self._matcher is None

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        thought = self._thought
        if self._is_thinking and thought is not None and thought.budget == 0:
            self._forced = self._forced or list(thought.end)[len(self._seen) :]
        if self._forced:
            mask[:] = _bits(self._num_words, self._forced[:1])
        elif self._is_thinking or self._matcher is None:
            mask.fill(0xFFFFFFFF)
            if self._matcher is not None:  # nor may it end before it has matched
                mask &= ~self._ends
        elif self._matcher.is_stopped():  # nothing may follow but the end
            mask[:] = self._ends
        else:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)


def _bits(num_words: int, tokens: Iterable[int]) -> npt.NDArray[np.uint32]:
    """A mask of these tokens alone."""
    words = np.zeros(num_words, np.uint32)
    for token in tokens:
        if token // 32 < num_words:
            words[token // 32] |= np.uint32(1 << token % 32)
    return words


def _error_in_use(matcher: Any) -> str | None:
    """The error of a grammar; llguidance finds some only at the first tokens."""
    trial = matcher.deep_copy()
    for _ in range(_TRIAL_TOKENS):
        if trial.is_error():
            return _first_line(trial.get_error())
        if trial.is_stopped():
            break
        bits = np.frombuffer(trial.compute_bitmask(), np.uint8)
        tokens = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if not trial.is_error() and len(tokens):
            trial.consume_token(int(tokens[0]))
    return None


def _first_line(error: str) -> str:
    """The part of llguidance's report that a client can use."""
    if error.startswith("NoExtension"):  # the name of an internal state
        return "nothing can match it"
    return " ".join(error.partition("<state>")[0].split())[:300]
