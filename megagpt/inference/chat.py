"""Converse with a trained model: its chat template, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megagpt.data.chat.answers import ASSISTANT, Conversation, rendered
from megagpt.data.chat.records import require_plain
from megagpt.data.chat.template import ChatTemplate, choose_template, default_template
from megagpt.data.columns import BadRowError
from megagpt.data.manifest import read_dataset_manifest
from megagpt.data.token_files.opening import is_token_files
from megagpt.data.tokenizer import Tokenizer
from megagpt.schema.megagpt import DataConfig
from megagpt.utils import UserError

PROBE = "Certainly"  # an answer whose end is looked for

Messages = Sequence[Mapping[str, str]]


class Chat:
    """Turns messages into a prompt. ``end_tokens`` are what the template ends an answer with."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        """Raise UserError if the template cannot be used."""
        self.template = template
        self._tokenizer = tokenizer
        try:
            self.end_tokens = self._end_tokens()
        except BadRowError as error:
            raise UserError(str(error)) from None

    def prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a conversation and of the beginning of the next answer.

        Raise UserError for what the template does not write.
        """
        try:
            require_plain(Conversation(tuple(messages)), self.template.tokens)
            text = self.template.text(messages, prompt=True)
        except BadRowError as error:
            raise UserError(str(error)) from None
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ((ids, _, _),) = self._tokenizer.encode_with_places([text])
        found: list[int] = ids.tolist()
        return found

    def _end_tokens(self) -> tuple[int, ...]:
        """Return the special token behind an answer, or nothing if it ends with a text."""
        probe = ({"role": "user", "content": "?"}, {"role": ASSISTANT, "content": PROBE})
        text, answers = rendered(self.template, Conversation(probe))
        start, end = answers[-1] if answers else (0, 0)
        behind = self._ids(text[text.rfind(PROBE, start, end) + len(PROBE) : end])
        special = behind[:1] and not set(behind[:1]) & set(self._tokenizer.text_ids)
        return tuple(behind[:1]) if special else ()


def ends_of_answers(data: DataConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end an answer of a run on conversations, beside that of a document.

    Of a run on text, nothing.
    """
    paths = (Path(source.path) for source in data.sources)
    manifests = (read_dataset_manifest(path) for path in paths if not is_token_files(path))
    if not any(manifest.has_conversations for manifest in manifests):
        return ()
    ends = open_chat(data, tokenizer).end_tokens
    return tuple(end for end in ends if end != tokenizer.end_of_document)


def open_chat(data: DataConfig, tokenizer: Tokenizer, chosen: str | None = None) -> Chat:
    """Return a chat with the template of a run's data, or with the ``chosen`` one.

    Raise UserError if there is none.
    """
    directories = [Path(data.tokenizer or source.path) for source in data.sources]
    own = (path for path in directories if default_template(path) is not None)
    return Chat(choose_template(chosen, next(own, directories[0])), tokenizer)
