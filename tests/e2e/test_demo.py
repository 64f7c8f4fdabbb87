"""The packaged demo model: small, a llama like any other, and good for trying the API with.

Its answers are greedy and come through the scheduler and the runner, all in one batch, once; the
tests then read them. They hold for any fully trained model, whatever its exact words.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlxlite.config.options import DEMO_ID, Config
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import Prompt, Sequence
from mlxlite.engine.step import Add, Token
from mlxlite.models.load import LoadedModel, load
from mlxlite.models.locate import DEMO_PATH
from mlxlite.runner.model_runner import ModelRunner

MAX_BYTES = 8_000_000
MAX_TOKENS = 256  # a story takes about 160
MAX_TOGETHER = 48  # so that one of eight ends by count and the others by themselves
GREEDY = SamplingParams(temperature=0.0)
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
RESULT = {"city": "Paris", "temperature": 17, "condition": "sunny"}

Conversation = tuple[list[dict[str, Any]], dict[str, Any]]


def ask(text: str, **kwargs: Any) -> Conversation:
    """One question and the template's arguments."""
    return [{"role": "user", "content": text}], kwargs


CONVERSATIONS: dict[str, Conversation] = {
    text: ask(text)
    for text in (
        "Hello!",
        "Hello, how are you?",
        "Tell me a story.",
        "Repeat the word banana.",
        "Repeat the word window.",
        "Repeat the word river.",
        "Repeat the word python.",
        "Count to 5.",
        "Count to 3.",
        "What is 2 + 2?",
        "What is 3 + 4?",
        "What is the capital of France?",
    )
} | {
    "weather": ask("What is the weather in Paris?", tools=[WEATHER_TOOL]),
    "weather elsewhere": ask("What is the weather in London?", tools=[WEATHER_TOOL]),
    "no need of the tool": ask("Hello!", tools=[WEATHER_TOOL]),
    "weather known": (
        [
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": json.dumps(RESULT)},
        ],
        {"tools": [WEATHER_TOOL]},
    ),
    "thinking": ask("What is 2 + 2?", enable_thinking=True),
    "not thinking": ask("What is 2 + 2?", enable_thinking=False),
}
EIGHT = list(CONVERSATIONS)[:8]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, LoadedModel]:
    return load(Config())


@pytest.fixture(scope="module")
def network(demo: tuple[Any, LoadedModel]) -> Any:
    return demo[0]


@pytest.fixture(scope="module")
def model(demo: tuple[Any, LoadedModel]) -> LoadedModel:
    return demo[1]


def answer_tokens(
    network: Any, model: LoadedModel, prompts: Iterable[Prompt], max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """The greedy answers to prompts that all decode together, end token left out."""
    sequences = [
        Sequence(id, prompt, GREEDY, max_tokens, model.eos_tokens)
        for id, prompt in enumerate(prompts)
    ]
    scheduler = Scheduler(Policy(max_rows=len(sequences)))
    runner = ModelRunner(network)
    for sequence in sequences:
        scheduler.apply(Add(sequence))
    answers: list[list[int]] = [[] for _ in sequences]
    in_flight = None
    while (step := scheduler.schedule()) or in_flight:
        launched, outcome = runner.advance(step, in_flight)
        if in_flight and outcome:
            for event in scheduler.complete(in_flight.step, outcome):
                if isinstance(event, Token) and not event.is_eos:
                    answers[event.id].append(event.token)
        in_flight = launched
    return answers


def prompt(model: LoadedModel, name: str) -> Prompt:
    messages, kwargs = CONVERSATIONS[name]
    return model.render(messages, kwargs, is_continuation=False)


@pytest.fixture(scope="module")
def answers(network: Any, model: LoadedModel) -> dict[str, str]:
    """The demo's answer in each conversation."""
    tokens = answer_tokens(network, model, [prompt(model, name) for name in CONVERSATIONS])
    return dict(zip(CONVERSATIONS, map(model.detokenize, tokens), strict=True))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|\d+", text.lower())


# --- the files --------------------------------------------------------------------------------


def test_the_demo_is_small_enough_to_be_shipped() -> None:
    assert sum(path.stat().st_size for path in DEMO_PATH.iterdir()) <= MAX_BYTES


def test_the_demo_is_a_llama_in_single_precision(network: Any) -> None:
    assert json.loads((DEMO_PATH / "config.json").read_text())["model_type"] == "llama"
    weights: dict[str, mx.array] = {}
    tree_flatten(network.parameters(), destination=weights)
    assert {array.dtype for array in weights.values()} == {mx.float32}


def test_the_demo_loads_without_a_network_or_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    _, model = load(Config())
    assert model.path == DEMO_PATH
    assert model.id == DEMO_ID
    assert model.context_size >= 2048
    assert caplog.messages == []


def test_mlx_lm_sees_a_template_thinking_and_tools(model: LoadedModel) -> None:
    tokenizer = model.tokenizer.wrapper
    assert tokenizer.has_chat_template
    assert (tokenizer.think_start, tokenizer.think_end) == ("<think>", "</think>")
    assert (tokenizer.tool_call_start, tokenizer.tool_call_end) == ("<tool_call>", "</tool_call>")
    assert tokenizer.has_tool_calling
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert tokenizer.tool_parser(call, None)["name"] == "get_weather"


def test_the_demo_has_an_end_token_and_settings_of_its_own(model: LoadedModel) -> None:
    assert model.tokenizer.wrapper.convert_tokens_to_ids("<|im_end|>") in model.eos_tokens
    assert 0 < model.defaults.temperature <= 1


def test_every_id_of_the_network_has_text_or_none(network: Any, model: LoadedModel) -> None:
    num_ids = network.args.vocab_size
    assert len(model.tokenizer.wrapper) <= num_ids
    assert all(isinstance(model.detokenize([id]), str) for id in range(num_ids))


# --- its answers ------------------------------------------------------------------------------


def test_every_answer_ends_by_itself(model: LoadedModel, answers: dict[str, str]) -> None:
    lengths = {
        name: len(model.tokenizer.wrapper.encode(text, add_special_tokens=False))
        for name, text in answers.items()
    }
    assert max(lengths.values()) < MAX_TOKENS, lengths


def test_a_greeting_is_answered(answers: dict[str, str]) -> None:
    assert {"hello", "hi", "hey"} & set(words(answers["Hello!"])), answers["Hello!"]


def test_how_are_you_is_answered_in_the_first_person(answers: dict[str, str]) -> None:
    text = answers["Hello, how are you?"]
    assert len(words(text)) >= 3, text
    assert {"i", "i'm"} & set(words(text)), text


def test_a_story_is_several_sentences(answers: dict[str, str]) -> None:
    sentences = [part for part in re.split(r"[.!?]+", answers["Tell me a story."]) if words(part)]
    assert len(sentences) >= 3, sentences
    assert all(len(words(sentence)) >= 2 for sentence in sentences), sentences


@pytest.mark.parametrize("word", ["banana", "window", "river", "python"])
def test_the_demo_repeats_a_word(answers: dict[str, str], word: str) -> None:
    text = answers[f"Repeat the word {word}."]
    assert word in words(text), text


@pytest.mark.parametrize("last", [3, 5])
def test_the_demo_counts(answers: dict[str, str], last: int) -> None:
    text = answers[f"Count to {last}."]
    names = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    numbers = [names.get(word, word) for word in words(text)]
    counted = [int(number) for number in numbers if str(number).isdigit()]
    assert counted == list(range(1, last + 1)), text


@pytest.mark.parametrize(("sum", "result"), [("2 + 2", "4"), ("3 + 4", "7")])
def test_the_demo_adds_numbers(answers: dict[str, str], sum: str, result: str) -> None:
    text = answers[f"What is {sum}?"]
    assert result in words(text), text


def test_the_capital_of_france_is_answered(answers: dict[str, str]) -> None:
    assert "Paris" in answers["What is the capital of France?"]


# --- tools ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "city"), [("weather", "Paris"), ("weather elsewhere", "London")])
def test_the_demo_calls_a_tool(
    model: LoadedModel, answers: dict[str, str], name: str, city: str
) -> None:
    text = answers[name]
    found = re.search(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL)
    assert found, text
    call = json.loads(found[1])
    assert call == {"name": "get_weather", "arguments": {"city": city}}
    assert model.tokenizer.wrapper.tool_parser(found[1], None) == call


def test_the_demo_uses_a_tools_result(answers: dict[str, str]) -> None:
    text = answers["weather known"]
    assert "17" in words(text), text
    assert "<tool_call>" not in text


def test_a_greeting_is_answered_without_a_tool_call(answers: dict[str, str]) -> None:
    text = answers["no need of the tool"]
    assert "<tool_call>" not in text
    assert words(text), text


def test_the_demos_prompt_is_the_same_through_transformers(model: LoadedModel) -> None:
    """`Model.render` adds nothing of its own to what the template makes of tools."""
    messages, kwargs = CONVERSATIONS["weather"]
    tokens = model.tokenizer.wrapper.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, **kwargs
    )
    assert prompt(model, "weather").tokens == tuple(tokens)


# --- thinking ---------------------------------------------------------------------------------


def test_reasoning_is_generated_when_enabled(answers: dict[str, str]) -> None:
    thought, closed, answer = answers["thinking"].partition("</think>")
    assert closed, thought
    assert words(thought), answers["thinking"]
    assert "4" in words(answer), answers["thinking"]


def test_there_is_no_reasoning_by_default(model: LoadedModel, answers: dict[str, str]) -> None:
    assert not [name for name, text in answers.items() if "think>" in text and name != "thinking"]
    assert prompt(model, "not thinking") == prompt(model, "What is 2 + 2?")


# --- company ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(network: Any, model: LoadedModel) -> list[list[int]]:
    return answer_tokens(network, model, [prompt(model, name) for name in EIGHT], MAX_TOGETHER)


def test_a_batch_answers_as_each_sequence_alone(
    network: Any, model: LoadedModel, together: list[list[int]]
) -> None:
    prompts = [prompt(model, name) for name in EIGHT]
    assert together == [
        answer_tokens(network, model, [alone], MAX_TOGETHER)[0] for alone in prompts
    ]


def test_the_demo_answers_as_mlx_lm_does(
    network: Any, model: LoadedModel, together: list[list[int]]
) -> None:
    def generate(prompt: Prompt) -> str:
        tokens = list(prompt.tokens)
        return str(
            mlx_lm.generate(network, model.tokenizer.wrapper, tokens, max_tokens=MAX_TOGETHER)
        )

    expected = [generate(prompt(model, name)) for name in EIGHT]
    assert [model.detokenize(tokens) for tokens in together] == expected
