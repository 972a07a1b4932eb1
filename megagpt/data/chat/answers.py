"""Which characters of a conversation's text the assistant has to write.

Exactly, in one of two ways. A template with generation tags says it itself. Of another one, the
text up to an answer is what the template writes for the messages before it, with the beginning of
an answer; and the answer ends where the text of the messages up to it ends. Where a template
writes an answer in another way once more messages follow (Qwen 3 then leaves out an empty think
block), its end is found with a sign behind the answer. A template that allows none of this is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megagpt.data.chat.sandbox import BEGIN, END
from megagpt.data.chat.template import MARKS, ChatTemplate, TemplateUnusableError

ASSISTANT = "assistant"
SIGN = "\ufdd2"  # not a character, like the marks

Span = tuple[int, int]  # a first character, and the one behind the last


class Rendered(NamedTuple):
    """The text of a conversation, and the spans of it that the assistant writes, in order."""

    text: str
    answers: tuple[Span, ...]


class Conversation(NamedTuple):
    """Messages as transformers takes them, and the tools that they may call."""

    messages: tuple[Mapping[str, Any], ...]
    tools: Any = None


def rendered(template: ChatTemplate, conversation: Conversation) -> Rendered:
    """Return a conversation as text with its answers.

    Raises BadRowError if the template does not write it, TemplateUnusableError if it never can.
    """
    if template.has_tags:
        marked = template.marked_text(*conversation)
        return Rendered(marked.translate(MARKS), tuple(_marked_spans(marked)))
    text = template.text(*conversation)
    answers = [
        _answer(template, conversation, index, text)
        for index, message in enumerate(conversation.messages)
        if message["role"] == ASSISTANT
    ]
    return Rendered(text, tuple(span for span in answers if span[0] < span[1]))


def _marked_spans(marked: str) -> Iterator[Span]:
    """Yield the spans between outermost marks, as places in the text without marks."""
    place = 0
    start = 0
    depth = 0
    for piece in re.split(f"([{BEGIN}{END}])", marked):
        if piece == BEGIN:
            start = start if depth else place
            depth += 1
        elif piece == END:
            depth -= 1
            if depth == 0 and start < place:
                yield start, place
        else:
            place += len(piece)


def _answer(template: ChatTemplate, conversation: Conversation, index: int, text: str) -> Span:
    """Return the span of the assistant's message `index`, told by texts of the first messages."""
    messages, tools = conversation
    before = template.text(messages[:index], tools, prompt=True)
    if not text.startswith(before):
        raise _unusable(template, index)
    upto = template.text(messages[: index + 1], tools)
    if text.startswith(upto) and len(upto) >= len(before):
        end = len(upto)
    else:
        end = _end_by_sign(template, conversation, index, text)
    return len(before), _without_space_after_token(template, text, len(before), end)


def _end_by_sign(template: ChatTemplate, conversation: Conversation, index: int, text: str) -> int:
    """Return where an answer ends that is written in another way if messages follow.

    What the template puts behind an answer that comes last must stand behind this one, too.
    """
    messages, tools = conversation
    answer = messages[index]
    signed = {**answer, "content": f"{answer.get('content') or ''}{SIGN}"}
    last = template.text((*messages[:index], signed), tools)
    whole = template.text((*messages[:index], signed, *messages[index + 1 :]), tools)
    behind_last = last.partition(SIGN)[2]
    behind = whole.partition(SIGN)[2]
    if (
        last.count(SIGN) == whole.count(SIGN) == 1
        and behind_last
        and behind.startswith(behind_last)
        and text.endswith(behind)
    ):
        return len(text) - len(behind) + len(behind_last)
    raise _unusable(template, index)


def _without_space_after_token(template: ChatTemplate, text: str, start: int, end: int) -> int:
    """Return the end of an answer without white space behind the token that ends it.

    That belongs to the template: a model stops at the token.
    """
    answer = text[start:end].rstrip()
    ends_with_token = any(answer.endswith(token) for token in template.tokens.special)
    return start + len(answer) if ends_with_token else end


def _unusable(template: ChatTemplate, index: int) -> TemplateUnusableError:
    return TemplateUnusableError(
        f"chat template {template.name} does not show which text is the assistant's: it has no "
        f"generation tags, and writes message {index + 1} in another way if others follow; put "
        "{% generation %} and {% endgeneration %} around the answers, or name another template: "
        "--chat_template NAME"
    )
