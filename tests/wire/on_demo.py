"""The demo model without any flag: what a model that can a little of everything answers."""

from typing import Any

from wire.at_edges import BYTES, METERS, PLACES, REFUSED
from wire.cases import (
    MESSAGES,
    PICTURE,
    PICTURE_URL,
    RESPONSES,
    TEXT,
    Step,
    both,
    chat,
    completion,
    flat,
    function,
    get,
    message,
    post,
    response,
    said,
    without,
)

FRANCE = "What is the capital of France?"
PARIS = "What is the weather in Paris?"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The city"}},
    "required": ["city"],
}
WEATHER = function("get_weather", description="Get the current weather in a city", parameters=CITY)
CLOCK = function("clock", parameters={"properties": {"zone": {"enum": ["UTC", "CET"]}}})
WEATHER_FLAT = flat("get_weather", description="The weather in a city", parameters=CITY)
WEATHER_USE = {"name": "get_weather", "description": "The weather", "input_schema": CITY}
ARGUMENTS = '{"city": "Paris"}'
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": ARGUMENTS},
}
RESULT = '{"city": "Paris", "temperature": 17, "condition": "sunny"}'
HISTORY = [
    said(PARIS),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
]
AGE = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["age"],
    "additionalProperties": False,
}
DRAWN = {"temperature": 1, "seed": 11, "max_tokens": 10}

CHATS: list[Step] = [
    *both(chat("a chat", "Hello!")),
    *both(chat("a chat with a system prompt", [said("You are a poet.", "system"), said(FRANCE)])),
    chat("a developer is a system", [said("Be brief.", "developer"), said("Hello!")]),
    chat("the same chat again finds its prefix", FRANCE, max_tokens=20),
    chat("the same chat again finds its prefix, the second time", FRANCE, max_tokens=20),
    chat("cache_prompt false computes anew", FRANCE, max_tokens=20, cache_prompt=False),
    chat("a salt shares no prefix", FRANCE, max_tokens=20, cache_salt="pepper"),
    chat(
        "content in parts",
        [said([{"type": "text", "text": "Count"}, {"type": "text", "text": "to 3."}])],
    ),
    chat(
        "a conversation of several turns",
        [said("My name is Ada."), said("Hello, Ada!", "assistant"), said("What is my name?")],
    ),
    *both(chat("a prefill is continued", [said(FRANCE), said("The capital of", "assistant")])),
    chat(
        "a prefill that is closed instead",
        [said(FRANCE), said("Paris.", "assistant")],
        add_generation_prompt=True,
    ),
    chat(
        "a prefill that is continued by name",
        [said(FRANCE), said("The", "assistant")],
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    *both(
        chat(
            "thinking",
            "What is 2 + 2?",
            chat_template_kwargs={"enable_thinking": True},
            max_tokens=40,
        )
    ),
    chat("an effort is thinking", "What is 2 + 2?", reasoning_effort="low", max_tokens=40),
    chat("no effort is none", "What is 2 + 2?", reasoning_effort="none"),
    chat(
        "reasoning that stays in the content",
        "What is 2 + 2?",
        reasoning_effort="high",
        reasoning_format="none",
        max_tokens=40,
    ),
    *both(
        chat(
            "a thinking budget",
            "What is 2 + 2?",
            reasoning_effort="high",
            thinking_budget=3,
            max_tokens=24,
        )
    ),
]
TOOLS: list[Step] = [
    *both(chat("a tool is called", PARIS, tools=[WEATHER], max_tokens=40)),
    chat("a tool history", HISTORY, tools=[WEATHER], max_tokens=24),
    chat(
        "an old function_call in the history",
        [
            said(PARIS),
            {"role": "assistant", "function_call": {"name": "get_weather", "arguments": "{}"}},
            {"role": "function", "name": "get_weather", "content": RESULT},
        ],
        functions=[WEATHER["function"]],
        max_tokens=16,
    ),
    *both(
        chat(
            "a tool is required",
            "Hello!",
            tools=[WEATHER, CLOCK],
            tool_choice="required",
            max_tokens=40,
        )
    ),
    *both(
        chat(
            "one tool is forced",
            "Hello!",
            tools=[WEATHER, CLOCK],
            tool_choice={"type": "function", "function": {"name": "clock"}},
            max_tokens=40,
        )
    ),
    chat("tool_choice none hides them", PARIS, tools=[WEATHER], tool_choice="none"),
    chat(
        "a strict tool",
        PARIS,
        tools=[function("get_weather", strict=True, parameters=CITY)],
        max_tokens=40,
    ),
    chat(
        "no parallel calls",
        PARIS,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=40,
    ),
    chat(
        "an old function_call is forced",
        "Hello!",
        functions=[WEATHER["function"]],
        function_call={"name": "get_weather"},
        max_tokens=40,
    ),
    chat(
        "a forced call is cut by its limit",
        PARIS,
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=6,
    ),
    chat("a tool of another kind is left out", PARIS, tools=[{"type": "web_search"}]),
    chat("a choice without tools is refused", PARIS, tool_choice="required"),
    chat("two tools of one name are refused", PARIS, tools=[WEATHER, WEATHER]),
]
MATCHED: list[Step] = [
    *both(
        chat(
            "a json_schema",
            "How old are you?",
            response_format={"type": "json_schema", "json_schema": {"name": "age", "schema": AGE}},
            max_tokens=24,
        )
    ),
    chat("a json_object", "Hello!", response_format={"type": "json_object"}, max_tokens=8),
    chat("a format of text", "Hello!", response_format={"type": "text"}),
    chat("llama-server's json_schema", "Hello!", json_schema=AGE, max_tokens=24),
    chat("a regex", "Hello!", structured_outputs={"regex": "[0-9]{3}-[0-9]{3}"}),
    chat("a choice", FRANCE, structured_outputs={"choice": ["Paris", "Rome"]}),
    chat("a guided choice", FRANCE, guided_choice=["Rome", "Paris"]),
    chat("a GBNF grammar", "Hello!", grammar='root ::= "yes" | "no"'),
    chat("a Lark grammar", "Hello!", guided_grammar='start: "a" /[bc]{2}/'),
    chat(
        "guided_json after thoughts",
        "What is 2 + 2?",
        guided_json=AGE,
        reasoning_effort="low",
        max_tokens=40,
    ),
    chat("two constraints are refused", "Hello!", guided_regex="a+", grammar='root ::= "a"'),
    chat("a broken grammar is refused", "Hello!", grammar="root ::= ("),
    chat("a broken regex is refused", "Hello!", guided_regex="(a"),
    chat("a constraint without an end is refused", "Hello!", guided_regex="a+", ignore_eos=True),
]
SAMPLED: list[Step] = [
    *both(chat("two choices", "Tell me a story.", n=2, **DRAWN)),
    chat("two choices of a greedy draw", "Hello!", n=2, max_tokens=4),
    *both(chat("logprobs", "Hello!", logprobs=True, top_logprobs=2, max_tokens=4)),
    chat("logprobs without rivals", "Hello!", logprobs=True, max_tokens=3),
    chat("a seed", "Tell me a story.", **DRAWN),
    chat("another seed", "Tell me a story.", **DRAWN | {"seed": 12}),
    chat(
        "penalties",
        "Repeat the word river.",
        presence_penalty=1,
        frequency_penalty=1,
        repetition_penalty=1.2,
    ),
    chat("a penalty over a window", "Count to 5.", repeat_penalty=1.5, repeat_last_n=4),
    chat("logit_bias forbids", FRANCE, logit_bias={"56": -100, "1143": -100}),
    chat("min_p", "Tell me a story.", min_p=0.2, **DRAWN),
    chat("top_k and top_p", "Tell me a story.", top_k=5, top_p=0.8, **DRAWN),
    chat("xtc", "Tell me a story.", xtc_probability=1, xtc_threshold=0.05, **DRAWN),
    chat("min_tokens", "Hello!", min_tokens=24, max_tokens=26),
    chat("ignore_eos", "Hello!", ignore_eos=True, max_tokens=24),
    *both(chat("a stop string", "Count to 5.", stop=["3"])),
    chat("stop ids", "Count to 5.", stop_token_ids=[14], max_tokens=10),
    chat("a limit under OpenAI's name", "Count to 5.", max_tokens=None, max_completion_tokens=3),
    chat("the model's own sampling", "Hello!", temperature=None, seed=3),
]
STREAMED: list[Step] = [
    chat(
        "usage in a chunk of its own",
        "Hello!",
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=4,
    ),
    chat(
        "usage in every chunk",
        "Hello!",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        max_tokens=4,
    ),
    chat(
        "progress of the prompt",
        "Hello, how are you?",
        stream=True,
        return_progress=True,
        max_tokens=4,
        cache_prompt=False,
    ),
    chat("timings in every chunk", "Hello!", stream=True, timings_per_token=True, max_tokens=4),
    chat(
        "stream_options without a stream are left out",
        "Hello!",
        stream_options={"include_usage": True},
    ),
]
TEXTS: list[Step] = [
    *both(
        completion("a completion", "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")
    ),
    *both(completion("an echo", "The capital of", echo=True)),
    *both(completion("several prompts", ["One, two,", "The capital of"], max_tokens=4)),
    completion(
        "several choices of several prompts",
        ["One,", "Two,"],
        n=2,
        max_tokens=3,
        temperature=1,
        seed=5,
    ),
    completion("token ids", [10, 11, 12], max_tokens=4),
    completion("echoed token ids", [[50, 51], [52]], echo=True, max_tokens=2),
    *both(completion("a completion's logprobs", "The capital of", logprobs=2, max_tokens=3)),
    completion("a completion that stops", "One, two, three,", stop=" five", max_tokens=12),
    completion(
        "a completion's own usage chunk",
        "One,",
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=2,
    ),
    completion(
        "a completion's progress",
        "One, two, three",
        stream=True,
        return_progress=True,
        max_tokens=2,
    ),
    completion("a completion that must match", "Say:", guided_regex="[ab]{4}"),
    completion("echo excludes logprobs", "One,", echo=True, logprobs=1),
    completion("best_of is refused", "One,", best_of=3),
    completion("a token that is none is refused", [5000]),
    completion("an empty prompt is refused", ""),
    post("a completion needs a prompt", TEXT, {}),
]
VECTORS: list[Step] = [
    post("an embedding", "/v1/embeddings", {"input": "Hello!"}),
    post(
        "embeddings of several texts", "/v1/embeddings", {"input": ["One", "Two"], "dimensions": 4}
    ),
    post(
        "an embedding in base64", "/v1/embeddings", {"input": "Hello!", "encoding_format": "base64"}
    ),
    post(
        "a mean embedding",
        "/v1/embeddings",
        {"input": [[1, 2, 3]], "pooling": "mean", "dimensions": 6},
    ),
    post(
        "too many dimensions are refused", "/v1/embeddings", {"input": "Hello!", "dimensions": 4096}
    ),
    post("an embedding needs an input", "/v1/embeddings", {"model": "m"}),
    post("a pooling that is none is refused", "/v1/embeddings", {"input": "x", "pooling": "max"}),
    post("llama-server's tokenize", "/tokenize", {"content": "Hello, wörld!", "with_pieces": True}),
    post("vLLM's tokenize", "/tokenize", {"prompt": "Hello!", "return_token_strs": True}),
    post(
        "tokenize with special tokens",
        "/v1/tokenize",
        {"content": "<|im_start|>user", "add_special": True},
    ),
    post("tokenize a chat", "/tokenize", {"messages": [said("Hello!")]}),
    post(
        "tokenize an open chat",
        "/tokenize",
        {"messages": [said("Hi", "assistant")], "add_generation_prompt": False},
    ),
    post("tokenize needs a text", "/tokenize", {}),
    post("detokenize", "/detokenize", {"tokens": [40, 41, 42, 300]}),
    post("detokenize half a character", "/detokenize", {"tokens": [128]}),
    post("detokenize what is no token", "/detokenize", {"tokens": [9999]}),
    post("detokenize needs tokens", "/detokenize", {}),
]
ANTHROPIC: list[Step] = [
    *both(message("a message", "Hello!", model="claude")),
    message(
        "a message with a system prompt", FRANCE, system=[{"type": "text", "text": "Be brief."}]
    ),
    *both(
        message(
            "a thinking message",
            "What is 2 + 2?",
            thinking={"type": "enabled", "budget_tokens": 1024},
            max_tokens=1100,
        )
    ),
    *both(message("a tool is used", PARIS, tools=[WEATHER_USE], max_tokens=40)),
    message(
        "any tool must be used",
        "Hello!",
        tools=[WEATHER_USE],
        tool_choice={"type": "any"},
        max_tokens=40,
    ),
    message(
        "a tool's result",
        [
            said(PARIS),
            said(
                [
                    {
                        "type": "tool_use",
                        "id": "toolu_1",
                        "name": "get_weather",
                        "input": {"city": "Paris"},
                    }
                ],
                "assistant",
            ),
            said([{"type": "tool_result", "tool_use_id": "toolu_1", "content": RESULT}]),
        ],
        tools=[WEATHER_USE],
        max_tokens=24,
    ),
    *both(message("a stop sequence", "Count to 5.", stop_sequences=["3"])),
    message("a message's prefill", [said(FRANCE), said("The capital", "assistant")]),
    message(
        "a message of a schema",
        "How old are you?",
        output_config={"format": {"type": "json_schema", "schema": AGE}},
    ),
    message("count_tokens", "Hello!", f"{MESSAGES}/count_tokens", system="Be brief."),
    message(
        "count_tokens with tools", PARIS, f"{MESSAGES}/count_tokens", tools=[WEATHER_USE], unknown=1
    ),
    message(
        "a picture is refused in Anthropic's form",
        [
            said(
                [
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": PICTURE},
                    }
                ]
            )
        ],
    ),
    without(message("a message needs max_tokens", "Hello!"), "max_tokens"),
    message("a bad field in Anthropic's form", "Hello!", temperature=2),
    message("an unsupported field in Anthropic's form", "Hello!", speed="fast"),
    message(
        "a server tool is left out",
        "Hello!",
        tools=[{"type": "web_search_20250305", "name": "web_search"}],
    ),
    message(
        "a small thinking budget is refused",
        "Hello!",
        thinking={"type": "enabled", "budget_tokens": 8},
    ),
    message("an ignored field of a message", "Hello!", max_tokens=1, betas=["x"], container=None),
    post("broken JSON in Anthropic's form", MESSAGES, b'{"messages": ['),
    get("a wrong method in Anthropic's form", MESSAGES),
    post("a wrong media type in Anthropic's form", MESSAGES, b"<x/>", content_type="text/xml"),
]
OPENAI: list[Step] = [
    *both(response("a response", "Hello!", instructions="Be brief.", metadata={"a": "b"})),
    response("a response goes on", "What is 2 + 2?", previous_response_id="${a response}"),
    get("a stored response", f"{RESPONSES}/${{a response}}"),
    response("a response that is not stored", "Hello!", store=False, user="u", max_output_tokens=4),
    get("a response that was not stored", f"{RESPONSES}/${{a response that is not stored}}"),
    get("a stored response is deleted", f"{RESPONSES}/${{a response}}", "DELETE"),
    get("a deleted response", f"{RESPONSES}/${{a response}}"),
    get("a deleted response cannot be deleted", f"{RESPONSES}/${{a response}}", "DELETE"),
    response("a deleted response cannot go on", "Hi", previous_response_id="${a response}"),
    *both(
        response(
            "a response of logprobs",
            "Hello!",
            include=["message.output_text.logprobs"],
            top_logprobs=1,
            max_output_tokens=2,
        )
    ),
    *both(
        response(
            "a response that calls",
            PARIS,
            tools=[WEATHER_FLAT],
            tool_choice="required",
            max_output_tokens=40,
        )
    ),
    response(
        "a response to a call's output",
        [
            said(PARIS),
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "get_weather",
                "arguments": ARGUMENTS,
            },
            {"type": "function_call_output", "call_id": "call_1", "output": RESULT},
        ],
        tools=[WEATHER_FLAT],
        max_output_tokens=24,
    ),
    *both(
        response(
            "a response that thinks",
            "What is 2 + 2?",
            reasoning={"effort": "low"},
            max_output_tokens=40,
        )
    ),
    response(
        "a response of a schema",
        "How old are you?",
        text={"format": {"type": "json_schema", "name": "age", "schema": AGE}},
        top_p=0.9,
        parallel_tool_calls=False,
    ),
    response("a response ignores fields", "Hello!", max_output_tokens=1, nothing={"a": 1}),
    response("a response needs a good input", [{"type": "item_reference", "id": "x"}]),
    response("a background is refused", "Hello!", background=True),
    response(
        "a picture is refused in a response",
        [said([{"type": "input_image", "image_url": PICTURE_URL}])],
    ),
    post("broken JSON in a response", RESPONSES, b"{]"),
]
CASES: list[Step] = [
    *(*CHATS, *TOOLS, *MATCHED, *SAMPLED, *STREAMED, *TEXTS, *VECTORS, *ANTHROPIC, *OPENAI),
    *(*PLACES, *REFUSED, *BYTES, *METERS),
]
