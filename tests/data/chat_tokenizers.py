"""Small tokenizers with the tokens and the templates of chat models, and conversations for them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from megagpt.data.chat.named import NAMED
from tests.data.model_tokenizers import write_tokenizer

Messages = list[dict[str, Any]]

TURN_TOKENS = [
    *NAMED["chatml"].tokens,
    *NAMED["llama3"].tokens,
    "<start_of_turn>",
    "<end_of_turn>",
]

# As the published ones write turns, with tags around what the assistant writes.
TEMPLATES = {
    **{name: template.source for name, template in NAMED.items()},
    # Qwen's form of calls: one more message form, JSON, a turn for all answers of tools.
    "calls": """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {%- if message.reasoning_content %}
                {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- message.content }}
            {%- for call in message.tool_calls %}
                {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    # Llama 2's and Mistral's: no header before an answer, the end of a document behind it.
    "inst": """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- ' ' + message.content | trim + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
""",
    # Gemma's: the assistant is the model, others than user and assistant are refused.
    "gemma": """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('System role not supported') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<end_of_turn>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content | trim + '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
""",
}
# Qwen 3's: an answer that comes last, after the last question, begins with an empty think block.
THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def without_tags(template: str) -> str:
    """The template as it was before anybody thought of tags."""
    for tag in ("{%- generation %}", "{%- endgeneration %}"):
        template = template.replace(tag, "{%- if true %}" if "end" not in tag else "{%- endif %}")
    return template


def write_chat_tokenizer(directory: Path, kind: str, template: str) -> Path:
    """The files of a chat model: tokenizer, its settings and its template."""
    write_tokenizer(directory, kind)
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens(TURN_TOKENS)
    tokenizer.save(path)
    (directory / "chat_template.jinja").write_text(template)
    return directory


def of_transformers(directory: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer in transformers."""
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key in ("bos_token", "eos_token", "unk_token")
    }
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        chat_template=(directory / "chat_template.jinja").read_text(),
        **named,
    )


def turns(*texts: str, system: str | None = None) -> Messages:
    """Messages of the user and the assistant in turns."""
    first = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return first + [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "units": "<metric>"}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "a name"}}}]
WITH_CALLS: Messages = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": false}'},
    {"role": "assistant", "content": "No.", "reasoning": "the tool says so"},
]
CONVERSATIONS = [
    turns("What is it?", "A fox."),
    turns("one", "two words", "three", "It's naïve — 日本語 🙂🙂", "and\n\nmore", "x" * 40),
    turns(" spaced ", "  an answer with space before\n\nand lines", "ok", "yes!"),
    turns("e\u0301 decomposed", "na\u0308ive, cafe\u0301 Ελληνικά"),
]
WITH_SYSTEM = turns("Hi", "Hello there", system="You are a fox. Be brief.")
