"""The demo model as an app launches it: keys, a strict name, a small context, no default alone."""

from typing import Any

from wire.cases import (
    CHAT,
    MESSAGES,
    RESPONSES,
    TEXT,
    Case,
    Step,
    both,
    chat,
    completion,
    get,
    message,
    post,
    response,
    said,
)

KEY = "secret-a"
FLAGS = (
    *("--model-id", "app-model", "--strict-model-id", "--api-key", f"{KEY},secret-b"),
    *("--ctx-size", "160", "--max-tokens", "6", "--max-batch-size", "4", "--batch-timeout-ms", "5"),
    *("--enable-continuous-batching", "false", "--prefix-cache-scope", "key"),
    *("--cors-origins", "https://example.com", "--max-body-mb", "1", "--embedding"),
)
# All that the app may put beside the messages.
BODY: dict[str, Any] = {
    "model": "app-model",
    "stream": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "repeat_penalty": 1.12,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "seed": 7,
    "logit_bias": {"65": 1},
    "max_output_tokens": 8,
    "n_predict": 8,
    "stop_sequences": ["never written"],
    "cache_prompt": True,
    "return_progress": True,
    "timings_per_token": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "max_context_tokens": 2048,
    "ctx_len": 2048,
    "auto_compact": True,
}
LONG = "word " * 400


def keyed(case: Case, key: str = KEY, name: str = "authorization") -> Case:
    given = f"Bearer {key}" if name == "authorization" else key
    return Case(case.name, case.method, case.path, case.body, {**case.headers, name: given})


_KEYED: list[Case] = [
    post("the app's body", CHAT, {"messages": [said("Hello!")], **BODY}),
    post(
        "the app's body without a stream",
        CHAT,
        {"messages": [said("Hello!")], **BODY, "stream": False},
    ),
    post(
        "the app's tool history and prefill",
        CHAT,
        {
            **{"model": "app-model", "max_tokens": 4, "temperature": 0},
            "messages": [
                said("What is the weather?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "sunny"},
                said("It is", "assistant"),
            ],
        },
    ),
    *both(chat("a prompt that is too long", LONG)),
    completion("a text that is too long", LONG),
    *both(message("a message that is too long", LONG)),
    response("a response's input that is too long", LONG),
    post("an embedding's input that is too long", "/v1/embeddings", {"input": LONG}),
    chat("the context ends the answer", "Tell me a story. " * 17, max_tokens=500, ignore_eos=True),
    chat("the server's own limit", "Count to 9.", max_tokens=None),
    chat("a model that is not here", "Hello!", model="gpt-4"),
    message("a model that is not here, for Anthropic", "Hello!", model="claude"),
    response("a model that is not here, for a response", "Hello!", model="gpt-4"),
    chat("the model by its name", "Hello!", model="app-model", max_tokens=1),
    get("the model of another name", "/v1/models/app-model"),
    get("the status of small limits", "/v1/status"),
    get("the cache of one key", "/v1/cache"),
    post("a body that is too large", CHAT, b" " * ((1 << 20) + 1)),
    post("a message that is too large", MESSAGES, b" " * ((1 << 20) + 1)),
    chat("a page of an allowed origin", "Hello!", max_tokens=1),
]
_OPEN: list[Step] = [
    get("models without a key", "/v1/models"),
    chat("a chat without a key", "Hello!"),
    message("a message without a key", "Hello!"),
    message("count_tokens without a key", "Hello!", f"{MESSAGES}/count_tokens"),
    post("a response without a key", RESPONSES, {"input": "Hello!"}),
    keyed(post("a wrong key", TEXT, {"prompt": "a"}), "secret-c"),
    keyed(get("x-api-key", "/v1/models"), "secret-b", "x-api-key"),
    keyed(message("a wrong x-api-key", "Hello!"), "no", "x-api-key"),
    keyed(
        get("basic authorization", "/v1/models", authorization="Basic c2VjcmV0LWE="),
        "",
        "x-api-key",
    ),
    get("health needs no key", "/health"),
    get("version needs no key", "/version"),
    get("nothing there needs no key", "/v1/nothing"),
    get("a preflight needs no key", CHAT, "OPTIONS", origin="https://example.com"),
    get("the app's page is not in the list", "/health", origin="tauri://localhost"),
]
CASES: list[Step] = [*_OPEN, *map(keyed, _KEYED)]
_FIRST = keyed(response("a response of the first key", "Hello!", max_output_tokens=2))
CASES += [
    _FIRST,
    keyed(get("another key cannot read it", f"{RESPONSES}/${{{_FIRST.name}}}"), "secret-b"),
    keyed(get("its own key can", f"{RESPONSES}/${{{_FIRST.name}}}")),
    keyed(get("metrics with a key", "/metrics", accept="application/json")),
]
