"""What models write that no demo writes on demand: every form of thoughts and calls, and loops."""

from collections.abc import Callable
from functools import partial

from wire.cases import (
    WEATHER,
    Case,
    Step,
    both,
    chat,
    completion,
    flat,
    function,
    get,
    message,
    post,
    recite,
    response,
    said,
)
from wire.parrot import cue

FLAGS = ("--max-batch-size", "2", "--repetition-guard", "24")
TOOLS = [
    function("weather", description="The weather", parameters=WEATHER),
    function("clock", description="The time"),
]
FLAT = [flat("weather", parameters=WEATHER), flat("clock")]
USES = [{"name": "weather", "input_schema": WEATHER}, {"name": "clock", "input_schema": {}}]
MOST = 40

_chat = partial(chat, tools=TOOLS, max_tokens=MOST)
_message = partial(message, tools=USES, max_tokens=MOST)
_response = partial(response, tools=FLAT, max_output_tokens=MOST)


def _each(make: Callable[..., Case], word: str, *scripts: str) -> list[Step]:
    cases = (recite(make, f"{script}, as {word}", script) for script in scripts)
    return [step for case in cases for step in both(case)]


_SCRIPTS = (
    *("plain", "think", "call", "two calls", "broken call", "unknown call", "open call"),
    *("thoughtful call", "emoji"),
)
PARROT: list[Step] = [
    *_each(_chat, "a chat", *_SCRIPTS),
    *_each(_message, "a message", *_SCRIPTS),
    *_each(_response, "a response", *_SCRIPTS),
    recite(chat, "a call without tools is text", "call", max_tokens=MOST),
    recite(
        _chat,
        "calls that are not parallel end after the first",
        "two calls",
        parallel_tool_calls=False,
    ),
    recite(_chat, "a call and logprobs", "two calls", logprobs=True, stream=True),
    recite(chat, "an answer of white space", "nothing"),
    *both(recite(chat, "a stop string across tokens", "stop", stop=["STOP"], max_tokens=MOST)),
    *both(
        recite(
            message,
            "a stop sequence across tokens",
            "stop",
            stop_sequences=["STOP"],
            max_tokens=MOST,
        )
    ),
    recite(chat, "the guard ends a loop", "loop", max_tokens=200),
    recite(
        chat,
        "a prompt that ends in thoughts",
        "plain",
        chat_template_kwargs={"enable_thinking": True},
    ),
    recite(chat, "thoughts that are cut", "think", max_tokens=2),
    recite(message, "thoughts that are cut, as a message", "think", max_tokens=2, stream=True),
    recite(response, "thoughts that are cut, as a response", "think", max_output_tokens=2),
    recite(chat, "thoughts in the content", "think", reasoning_format="none", max_tokens=MOST),
    recite(chat, "thoughts within a budget", "long thought", thinking_budget=2, max_tokens=MOST),
    recite(chat, "two choices with thoughts", "think", n=2, stream=True, max_tokens=MOST),
    chat("a prefill in mid-script", [said("x"), said("Good", "assistant")], max_tokens=MOST),
    chat(
        "a history with thoughts",
        [said("x"), said("y", "assistant") | {"reasoning_content": "z"}, said(cue("plain"))],
    ),
    completion("a bare cue", cue("plain")),
    post(
        "a parrot's pieces",
        "/tokenize",
        {"content": cue("plain") + "Good morning", "with_pieces": True},
    ),
    get("the health of a small batch", "/health"),
]
HARMONY_FLAGS = ("--max-batch-size", "0", "--enable-prefix-caching", "false")
_HARMONY = ("think", "call", "preamble", "broken call", "headless")
HARMONY: list[Step] = [
    *_each(_chat, "a chat", *_HARMONY),
    *_each(_message, "a message", "think", "call", "preamble"),
    *_each(_response, "a response", "think", "call", "preamble"),
    recite(chat, "a call without tools is text", "call", max_tokens=MOST),
    recite(_chat, "harmony's forced calls are enforced", "call", tool_choice="required"),
    recite(chat, "analysis in the content", "think", reasoning_format="none", max_tokens=MOST),
    chat(
        "a history with a call",
        [
            said("x"),
            {
                "role": "assistant",
                "reasoning_content": "r",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "clock", "arguments": "{}"},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": cue("headless")},
        ],
    ),
    get("the health without batches", "/health"),
    get("the cache that is off", "/v1/cache"),
]
