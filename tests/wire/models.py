"""The parrots of the record: what each one recites, and the template that puts the cue last."""

from collections.abc import Sequence
from pathlib import Path

from wire.parrot import save_parrot

_CHATML = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}"
    "{# their format: <tool_call> with tool_call.name #}<|im_end|>\n{% endif -%}"
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}"
    "{{- message.content -}}"
    "{%- for tool_call in message.tool_calls or [] %}<tool_call>{{ tool_call | tojson }}"
    "</tool_call>{% endfor -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{{ messages[-1].content }}"
    "{%- if enable_thinking %}<think>{% endif -%}{%- endif -%}"
)
_HARMONY = (
    "{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif -%}"
    "{%- for message in messages -%}<|start|>{{ message.role }}<|message|>"
    "{{- message.thinking or '' }}{{ message.content }}<|end|>{% endfor -%}"
    "{%- if add_generation_prompt %}<|start|>assistant{{ messages[-1].content }}{% endif -%}"
)
_CALL = "<tool_call>\n"
_CLOSE = "\n</tool_call>"

CHATML: dict[str, Sequence[str]] = {
    "plain": ("Good", " morning", ", said", " the", " parrot."),
    "stop": ("one ", "two ", "ST", "OP ", "three ", "four "),
    "think": ("<think>\n", "Let ", "me ", "see.", "\n</think>", "\n\nIt is ", "four."),
    "long thought": ("<think>", "on ", "and ", "upon ", "</think>", "Done."),
    "call": (
        *("I will ", "look.\n", _CALL, '{"name": "weather", ', '"arguments": {"city": "Pa'),
        *('ris", "days"', ': "2"}}', _CLOSE),
    ),
    "two calls": (
        *("<tool_call>", '{"name": "weather", "arguments"', ': {"city": "Oslo"}}'),
        *("</tool_call>\n", '<tool_call>{"name": "clock", "argu', 'ments": {}}</tool_call>'),
        *(" That", " is all."),
    ),
    "broken call": (
        *("Now ", '<tool_call>{"name": "weather", "arguments": {"ci', 'ty": oops}'),
        *("}</tool_call> and", " on it goes."),
    ),
    "unknown call": ('<tool_call>{"name": "nothing", ', '"arguments": {}}</tool_call> ', "So."),
    "open call": ('<tool_call>{"name": "weather", "arguments": ', '{"city": "Ro', "me"),
    "thoughtful call": (
        *("<think> ", "A clock.", "</think> ", '<tool_call> {"name": "clock", '),
        *('"arguments": {"zone": null}}', " </tool_call>"),
    ),
    "emoji": ("Look: ", "ð", "Ł", "Ļ", "Ĥ", " and half: ", "Ã"),
    "loop": ("la ", "li ", "lu "),
    "nothing": ("\n",),
}
HARMONY: dict[str, Sequence[str]] = {
    "think": (
        *("<|channel|>analysis<|message|>Let ", "me see.", "<|end|><|start|>assistant<|chan"),
        *("nel|>final<|message|>", "It is ", "four."),
    ),
    "call": (
        *("<|channel|>analysis<|mess", "age|>I look.<|end|>", "<|start|>assistant<|channel|>comm"),
        *("entary to=functions.weather <|constrain|>json<|message|>", '{"city": "Pa', 'ris", '),
        *('"days": "2"}', "<|call|>"),
    ),
    "preamble": (
        *("<|channel|>commentary<|message|>One moment.<|end|>", "<|start|>assistant"),
        *("<|channel|>commentary to=functions.clock<|message|>", "{}<|call|>\n"),
    ),
    "broken call": ("<|channel|>commentary to=functions.weather<|message|>{oops", "<|call|> ", "!"),
    "headless": ("No head ", "at all."),
}
BARE: dict[str, Sequence[str]] = {
    "plain": ("just ", "text ", "here"),
    "loop": ("la ", "li ", "lu "),
}
_MARKS = ("start", "channel", "message", "end", "return", "call", "constrain")


def save_models(path: Path) -> dict[str, Path]:
    """All parrots, by the name of the server that serves each."""
    harmony = [f"<|{mark}|>" for mark in _MARKS]
    return {
        "parrot": save_parrot(
            path / "parrot",
            CHATML,
            specials=["<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"],
            template=_CHATML,
            loops=["loop"],
        ),
        "harmony": save_parrot(path / "harmony", HARMONY, specials=harmony, template=_HARMONY),
        "bare": save_parrot(
            path / "bare", BARE, template=None, loops=["loop"], max_position_embeddings=1 << 20
        ),
    }
