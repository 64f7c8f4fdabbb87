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
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mlxlite.engine.sequence import Matcher
from mlxlite.output.call_syntax import CallSyntax
from mlxlite.output.constraint import (
    CallConstraint,
    Constraint,
    ConstraintError,
    Kind,
    TextConstraint,
)
from mlxlite.output.lark import JSON_OPTIONS, Lark
from mlxlite.output.schemas import relaxed

MAX_GRAMMAR_CHARS = 256 << 10
MAX_TOOLS_CHARS = 1 << 20  # of all tools: some 800 of them, which compile within seconds
MAX_COMPILED = 64  # grammars; each takes from a few KB to some MB
# A mask may cost this much work, in llguidance's units.
_FUEL = 150_000
_TOOLS_PER_FUEL = 64  # tools for whose schemas as much again may be spent at the start
_ROW_ITEMS = 2_000  # llguidance's default; each tool's name is a few
_TRIAL_TOKENS = 4
MISSING = "structured output needs llguidance: pip install 'mlxlite[grammar]'"


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A matcher at its start, and what was left out: the place of the schema and the keyword."""

    matcher: Any
    left_out: tuple[tuple[int, str], ...] = ()

    def names(self, constraint: Constraint) -> tuple[str, ...]:
        paths = [path for _, path in constraint.schemas()]
        return tuple(dict.fromkeys(f"{paths[i]}:{keyword}" for i, keyword in self.left_out))


class Grammars:
    """Compiles constraints for one tokenizer. Made and used off the event loop; has a lock.

    `tokenizer` is transformers' fast one. `think` are the tokens around a block of reasoning;
    `syntax` is how calls are written, None where that is not known.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_vocab: int,
        eos_tokens: frozenset[int],
        think: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
        syntax: CallSyntax | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_vocab = num_vocab
        self._num_words = (num_vocab + 31) // 32
        self._eos_tokens = eos_tokens
        self._think = think
        self._syntax = syntax
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()

    def compile(
        self, constraint: Constraint | None, *, is_thinking: bool, budget: int | None = None
    ) -> "Grammar":
        """The grammar of an answer, after at most `budget` tokens of reasoning.

        Raises ConstraintError: what is wrong with the constraint, for the client.
        """
        found, left_out = None, tuple[str, ...]()
        if constraint is not None:
            compiled = self._find(constraint)
            found, left_out = compiled.matcher, compiled.names(constraint)
        thought = None
        if is_thinking or budget is not None:
            if not all(self._think):
                raise ConstraintError("this model has no marks around its reasoning")
            thought = Thought(*self._think, is_thinking, budget)
        ends = _bits(self._num_words, self._eos_tokens)
        return Grammar(found, self._num_words, ends, thought, left_out)

    def is_compiled(self, constraint: Constraint) -> bool:
        return constraint in self._compiled

    def _find(self, constraint: Constraint) -> _Compiled:
        """The compiled constraint, of the latest ones or new. No lock is held over a compile."""
        with self._lock:
            found = self._compiled.pop(constraint, None)
        found = found or self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = found
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, constraint: Constraint) -> _Compiled:
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise ConstraintError(MISSING) from None
        most = MAX_TOOLS_CHARS if isinstance(constraint, CallConstraint) else MAX_GRAMMAR_CHARS
        if constraint.num_chars > most:
            raise ConstraintError(f"it is longer than {most} characters")
        matcher, left_out, error = self._try(constraint)
        if error is None and not matcher.get_grammar_warnings():
            return _Compiled(matcher, left_out)
        schemas = [relaxed(schema, self._check) for schema, _ in constraint.schemas()]
        if error is not None:
            constraint = constraint.with_schemas(text for text, _ in schemas)
            matcher, left_out, error = self._try(constraint)
        if error is not None:
            raise ConstraintError(error)
        names = tuple((i, name) for i, (_, found) in enumerate(schemas) for name in found)
        return _Compiled(matcher, (*names, *left_out))

    def _try(self, constraint: Constraint) -> tuple[Any, tuple[tuple[int, str], ...], str | None]:
        """A matcher, what the way of writing left out, and the error in use, if any.

        Raises ConstraintError for a constraint that cannot be written as a grammar.
        """
        source, left_out = self._source(constraint)
        num_tools = len(constraint.tools) if isinstance(constraint, CallConstraint) else 0
        matcher = self._matcher(source, 1 + num_tools // _TOOLS_PER_FUEL)
        return matcher, left_out, _error_in_use(matcher)

    def _matcher(self, source: str, fuels: int = 1) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=fuels * _FUEL,
            step_lexer_fuel=_FUEL,
            max_items_in_row=fuels * _ROW_ITEMS,
        )
        return LLMatcher(self._words, source, log_level=0, limits=limits)

    def _check(self, schema: str) -> tuple[str | None, list[str]]:
        """The error of a schema, if any, and its warnings."""
        matcher = self._matcher(_text_source(TextConstraint(Kind.JSON, schema)))
        return _error_in_use(matcher), matcher.get_grammar_warnings()

    @cached_property
    def _words(self) -> Any:
        """llguidance's tokenizer, which takes up to a second to make. Raises ConstraintError."""
        from llguidance import hf

        ends = sorted(self._eos_tokens) or None
        try:
            return hf.from_tokenizer(self._tokenizer, self._num_vocab, ends)
        except ValueError as error:
            raise ConstraintError(f"this model's tokenizer cannot be used: {error}") from None

    @cached_property
    def _special(self) -> Mapping[str, int]:
        """The added tokens that llguidance takes for no text, as it does for all `<…>`."""
        words, added = self._words, self._tokenizer.added_tokens_decoder.items()
        return {token.content: id for id, token in added if words.is_special_token(id)}

    def _source(self, constraint: Constraint) -> tuple[str, tuple[tuple[int, str], ...]]:
        """The grammar as llguidance reads it, and what writing it left out.

        Raises ConstraintError.
        """
        try:
            if isinstance(constraint, TextConstraint):
                return _text_source(constraint), ()
            return self._calls(constraint)
        except (ValueError, RecursionError) as error:
            raise ConstraintError(" ".join(str(error).split())[:300]) from None

    def _calls(self, wanted: CallConstraint) -> tuple[str, tuple[tuple[int, str], ...]]:
        """The Lark grammar of calls, and what it left out. Raises ConstraintError, Unwritable."""
        if (syntax := self._syntax) is None:
            raise ConstraintError("the format of this model's tool calls cannot be enforced")
        lark = Lark(self._special)
        is_optional = not wanted.is_forced and wanted.answer is None
        several = syntax.calls(
            wanted.tools, lark, is_single=wanted.is_single, is_each_needed=is_optional
        )
        calls = lark.rule(several)
        gap = "" if syntax.before_text else "gap"  # where a message has a header, it is text
        first = f"{gap} {lark.literal(syntax.begin)} {calls}"
        start, answer = first, None
        before_text = lark.literal(syntax.before_text)
        if wanted.answer is not None:
            answer = _named_grammar("answer", _text_source(wanted.answer))
            start = f"{first} | {before_text} @answer"
        elif not wanted.is_forced:
            if not syntax.can_follow_text and not syntax.before_text:
                raise ConstraintError("calls that this model writes in its text cannot be strict")
            text = f"{before_text} {lark.words(syntax.begin)}" if syntax.begin else before_text
            start = f"{first} | {before_text} ANY"
            if syntax.begin:
                start = f"{text} | {lark.up_to(syntax.begin)} {calls}"
        if syntax.lead is not None:
            begin, end = map(lark.literal, syntax.lead)
            start = f"({begin} ANY {end})? {lark.rule(start)}"
        grammars: list[dict[str, Any]] = [{"lark_grammar": lark.source(start)}]
        return json.dumps({"grammars": grammars + ([answer] if answer else [])}), tuple(
            lark.left_out
        )


def _text_source(constraint: TextConstraint) -> str:
    """A grammar as llguidance reads it, in JSON or Lark. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    match constraint:
        case TextConstraint(Kind.JSON, text):
            options = cast("Any", dict(JSON_OPTIONS))
            return str(LLMatcher.grammar_from_json_schema(text, overrides=options))
        case TextConstraint(Kind.REGEX, text):
            return str(LLMatcher.grammar_from_regex(text))
        case TextConstraint(Kind.CHOICE, text):
            return str(grammar_from("choice", text))
        case TextConstraint(_, text):  # Kind.GRAMMAR
            return str(grammar_from("gbnf", text))


def _named_grammar(name: str, source: str) -> dict[str, Any]:
    """A grammar, in JSON or Lark, as one that another refers to."""
    if source.startswith("{"):
        return {**json.loads(source)["grammars"][0], "name": name}
    return {"name": name, "lark_grammar": source}


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
    left_out: tuple[str, ...] = ()  # what is not enforced: a schema's path and its keyword

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
    if error.startswith("panic"):
        return "it has too many rules"
    return " ".join(error.partition("<state>")[0].split())[:300]
