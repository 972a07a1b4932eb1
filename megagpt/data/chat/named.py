"""Chat templates of our own, for tokenizers without one.

The generation tags hold what the model has to write: the answer and the token that ends it.
"""

from __future__ import annotations

from typing import NamedTuple


class NamedTemplate(NamedTuple):
    """A template, and the tokens that it writes beside bos_token and eos_token."""

    source: str
    tokens: tuple[str, ...] = ()


_NO_CALLS = (
    "{%- if message.tool_calls %}"
    "{{- raise_exception('this template has no form for tool calls') }}"
    "{%- endif %}"
)

# OpenAI's ChatML, as Qwen 2.5 writes it, without a system message of its own.
_CHATML = (
    "{%- for message in messages %}" + _NO_CALLS + "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Meta's Llama 3, without the date that 3.1 puts in front; a tool is called ipython.
_LLAMA3 = (
    "{%- if bos_token is defined %}{{- bos_token }}{%- endif %}"
    "{%- for message in messages %}" + _NO_CALLS + "{%- set role = 'ipython' if message.role == "
    "'tool' else message.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}"
    "{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)

# For a tokenizer that has no tokens for turns. A header ends with a line break, with which no
# tokenizer merges the first word of an answer.
_PLAIN = (
    "{%- if bos_token is defined %}{{- bos_token }}{%- endif %}"
    "{%- for message in messages %}" + _NO_CALLS + "{{- message.role | capitalize + ':\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}"
    "{%- else %}{{- message.content }}{%- endif %}"
    "{{- '\\n\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}"
)

NAMED: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": NamedTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "plain": NamedTemplate(_PLAIN),
}
