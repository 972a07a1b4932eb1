"""A row of a file as a conversation: a list of messages, or a prompt with its answer.

Messages are `{"role", "content"}`, or ShareGPT's `{"from", "value"}`. What is wrong with a row is
said with the number of the message, from 1 on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from megagpt.data.byte_level_bpe import replace_surrogates
from megagpt.data.chat.answers import ASSISTANT, SIGN, Conversation, Rendered, rendered
from megagpt.data.chat.sandbox import BEGIN, END
from megagpt.data.chat.template import ChatTemplate, ChatTokens
from megagpt.data.columns import ABSENT, BadRowError, Column, kind_of, value_at
from megagpt.utils import did_you_mean

DEFAULT_MESSAGES = "messages"
ROLES = ("system", "user", ASSISTANT, "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT, "function_response": "tool"}
# As transformers 5.23 takes them (_alias_reasoning_fields): the first that a message has.
REASONING = ("reasoning_content", "thinking", "reasoning")
NOT_CHARACTERS = (BEGIN, END, SIGN)


class ChatRows:
    """Reads the conversation of a row and writes it with a template.

    It takes the place of a `Column`: `written`, `sources` and `is_absent_from` are as there.
    """

    def __init__(self, template: ChatTemplate, **columns: str) -> None:
        """`columns`: that of the `messages`, or those of `prompt` and `answer`."""
        self.template = template
        self._columns = [Column(name, f"--{option}") for option, name in columns.items()]
        self.option = self._columns[0].option
        self.written = ", ".join(columns.values())

    def sources(self, names: Iterable[str]) -> list[str]:
        """Return the columns of a table that are read; raise BadRowError if one is absent."""
        known = list(names)
        needed = [name for column in self._columns for name in column.sources(known)]
        more = ["tools"] if len(self._columns) == 1 and "tools" in known else []
        return list(dict.fromkeys([*needed, *more]))

    def is_absent_from(self, row: Any) -> bool:
        """Return whether a row has not even the name of one of the columns."""
        return any(column.is_absent_from(row) for column in self._columns)

    def text(self, row: Any) -> Rendered | None:
        """Return the conversation of a row as text, None if it has none; raise BadRowError."""
        conversation = self._pair(row) if len(self._columns) == 2 else self._messages(row)
        if conversation is None:
            return None
        require_plain(conversation, self.template.tokens)
        found = rendered(self.template, conversation)
        if not found.answers:
            raise BadRowError(
                f"chat template {self.template.name} marks nothing in it as the assistant's"
            )
        return found

    def _pair(self, row: Any) -> Conversation | None:
        prompt, answer = (column.text(row) for column in self._columns)
        if prompt is None and answer is None:
            return None
        if prompt is None:
            raise BadRowError(f"no prompt in column {self._columns[0].written!r}")
        messages = ({"role": "user", "content": prompt}, {"role": ASSISTANT, "content": answer})
        return Conversation(tuple(_message(n, raw) for n, raw in enumerate(messages, start=1)))

    def _messages(self, row: Any) -> Conversation | None:
        (column,) = self._columns
        if not isinstance(row, dict):
            raise BadRowError(f"holds {kind_of(row)}, need an object with {column.written!r}")
        found = _from_json(value_at(row, column.written), column.written)
        if found is ABSENT or found is None or found == []:
            return None
        if not isinstance(found, list):
            raise BadRowError(
                f"column {column.written!r} holds {kind_of(found)}, need a list of messages"
            )
        messages = tuple(_message(number, raw) for number, raw in enumerate(found, start=1))
        if all(message["role"] != ASSISTANT for message in messages):
            raise BadRowError("no message of the assistant: nothing to learn from it")
        tools = _from_json(row.get("tools"), "tools") or None
        return Conversation(messages, _plain(tools))


def require_plain(conversation: Conversation, tokens: ChatTokens) -> None:
    """Raise BadRowError for a special token in a text: it would end or begin a turn."""
    places = [
        *((f"message {n}", message) for n, message in enumerate(conversation.messages, start=1)),
        ("tools", conversation.tools),
    ]
    for place, value in places:
        for text in _strings(value):
            if match := tokens.pattern.search(text):
                raise BadRowError(
                    f"{place}: holds the special token {match[0]!r}, which only the chat template "
                    "may write"
                )
            if any(sign in text for sign in NOT_CHARACTERS):
                raise BadRowError(f"{place}: holds U+FDD0 to U+FDD2, which are not characters")


def _message(number: int, raw: Any) -> dict[str, Any]:
    """Return a message as a template takes it; raise BadRowError."""
    if not isinstance(raw, dict):
        raise BadRowError(
            f"message {number}: is {kind_of(raw)}, need an object with role and content"
        )
    # As transformers does: null is absent. A parquet file has every key in every message.
    given = {key: value for key, value in raw.items() if value is not None}
    if "from" in given and "role" not in given:
        sender = given.pop("from")
        given = {"role": SHAREGPT_ROLES.get(sender, sender), **given}
        given["content"] = given.pop("value", None)
    role = given.get("role")
    if role not in ROLES:
        raise BadRowError(
            f"message {number}: unknown role {role!r}{did_you_mean(str(role), ROLES)}; need "
            f"{', '.join(ROLES)}"
        )
    calls = role == ASSISTANT and given.get("tool_calls")
    content = given.get("content", "" if calls else None)
    if role == ASSISTANT and not calls and (content is None or not str(content).strip()):
        raise BadRowError(f"message {number}: an empty answer of the assistant")
    if not isinstance(content, str):
        what = "no content" if content is None else f"its content is {kind_of(content)}"
        raise BadRowError(f"message {number} ({role}): {what}, need a text")
    reasoning = next((given[key] for key in REASONING if key in given), None)
    if reasoning is not None:
        given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
    message: dict[str, Any] = _plain(given)
    return message


def _from_json(value: Any, column: str) -> Any:
    """Return a value that a table or a parquet file may hold as JSON in a text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"column {column!r}: a text that is not JSON ({error})") from None


def _plain(value: Any) -> Any:
    """Return a value built of JSON's types alone: a template gets nothing with methods of its own.

    Lone surrogates are replaced: the places of answers are counted in the text that is encoded.
    """
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, dict):
        return {replace_surrogates(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
