"""Chat templates with tools: the parts about tools of the real ones."""

LLAMA3 = r"""
{%- if tools is defined and tools is not none %}<|start_header_id|>system<|end_header_id|>

Respond with a JSON for a function call. {% for t in tools %}{{ t | tojson(indent=4) }}
{% endfor %}<|eot_id|>{% endif %}
{%- for message in messages %}{%- if 'tool_calls' in message %}
{%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call only") }}{% endif %}
{%- set tool_call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
{{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
PYTHON_TAG = LLAMA3.replace("""{{- '{"name": "'""", """{{- '<|python_tag|>{"name": "'""")
PYTHONIC = r"""
{%- if tools %}Functions: {{ tools | tojson }}
{% endif %}
{%- for message in messages %}<|header_start|>{{ message.role }}<|header_end|>

{% if message.tool_calls %}[{% for call in message.tool_calls %}{{ call.function.name }}(
{%- for key, value in call.function.arguments.items() %}{{ key }}={{ value | tojson }}
{%- if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]
{%- else %}{{ message.content }}{% endif %}<|eot|>{% endfor %}"""


def chatml(call: str, shown: str = "{{ tools | tojson }}") -> str:
    return (
        "{%- if tools %}<|im_start|>system\nTools: " + shown + "<|im_end|>\n{% endif %}"
        "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{%- for call in message.tool_calls or [] %}" + call + "{% endfor %}<|im_end|>\n"
        "{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


CALL_FUNCTION = "{{ call.function | tojson }}"
CALL_PARTS = (
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
)
