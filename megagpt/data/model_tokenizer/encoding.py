"""Text to ids and back with a model's tokenizer, in Hugging Face `tokenizers`.

The ids are those of transformers' `PreTrainedTokenizerFast` with `split_special_tokens=True`. Its
default is the same but where a special token occurs in a text by name: there it is the token, here
it is text. Decoding is that of transformers without `clean_up_tokenization_spaces`, which takes
away spaces that the model wrote.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.byte_level_bpe import is_byte_level, replace_surrogates
from megagpt.data.manifest import TOKENIZER_FILE
from megagpt.data.model_tokenizer.files import (
    end_of_document,
    open_backend,
    read_settings,
    text_of,
)

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
LINE_BREAK = "\n"
REPLACEMENT = "\ufffd"  # what decoders give for bytes that are not UTF-8, or not yet


class ModelTokenizer:
    """A model's tokenizer as a `Tokenizer` (megagpt/data/tokenizer.py).

    `start_of_document` is what transformers puts before a text by default, such as Llama's `<s>`.
    Raises UserError if the files cannot be used.
    """

    def __init__(self, directory: Path, content: bytes | None = None) -> None:
        # A call is one core's work here: preparation has worker threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = directory / TOKENIZER_FILE
        self._backend, parts = open_backend(path, content)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        settings = read_settings(directory)
        self._add_named_tokens(settings)
        ids = self._backend.get_vocab(with_added_tokens=True)
        self.vocabulary = max(ids.values()) + 1
        self.end_of_document = end_of_document(directory, settings, ids)
        self.start_of_document = self._start_of_document(settings, ids)
        named = text_of(settings.get("bos_token")) or ""
        self.prefix = ids.get(named, self.end_of_document)
        self._special = {
            number
            for number, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._decodes = _kinds_of(parts.get("decoder"))
        self._byte_tokens = (
            {number for token, number in ids.items() if BYTE_TOKEN.fullmatch(token)}
            if "ByteFallback" in self._decodes
            else set()
        )
        self.unknown = self._unknown(parts["model"], ids)
        self._line_break = np.array(self._plain(LINE_BREAK), np.uint32)
        self._as_text = self._special_tokens_as_text()

    # ---------------------------------------------------------------------------------- to ids

    def encode(self, text: str) -> list[int]:
        return self.encode_texts([text], [False])[0].tolist()

    def encode_texts(self, texts: Sequence[str], continues: Sequence[bool]) -> list[np.ndarray]:
        """Return the ids of each text, in one call: a third faster than one by one.

        A text that continues a document is read after a line break, whose ids are left out: what
        comes before a first word, such as Llama 2's space, comes once in a document.
        """
        given = [
            replace_surrogates(LINE_BREAK + text if goes_on else text)
            for text, goes_on in zip(texts, continues, strict=True)
        ]
        encoded = self._backend.encode_batch_fast(given, add_special_tokens=False)
        found = []
        for text, goes_on, encoding in zip(texts, continues, encoded, strict=True):
            tokens = np.array(encoding.ids, np.uint32)
            if goes_on:
                tokens = self._after_line_break(tokens, text)
            found.append(self._without_special_tokens(tokens))
        return found

    def encode_with_places(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        found = self._with_special_tokens.encode_batch(
            [replace_surrogates(text) for text in texts], add_special_tokens=False
        )
        places = []
        for encoding in found:
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            # A token may stand for nothing of the text, such as a space that is put before it.
            starts, ends = np.maximum.accumulate(offsets, axis=0).T
            places.append((np.array(encoding.ids, np.uint32), starts, ends))
        return places

    @cached_property
    def _with_special_tokens(self) -> Any:
        """The same tokenizer, to which the name of a special token in a text is that token."""
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _plain(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _after_line_break(self, tokens: np.ndarray, text: str) -> np.ndarray:
        length = len(self._line_break)
        if np.array_equal(tokens[:length], self._line_break):
            return tokens[length:]
        # The break has merged with the text.
        return np.array(self._plain(replace_surrogates(text)), np.uint32)

    def _special_tokens_as_text(self) -> dict[int, list[int]]:
        """Return the special tokens that their names would give, with the ids of the characters.

        Some vocabularies hold `</s>` as a piece like any other, which a text would then match.
        """
        found = {}
        for number in self._special - {self.unknown}:
            name = self._backend.id_to_token(number)
            if number in self._plain(name):
                pieces = (self._backend.token_to_id(character) for character in name)
                found[number] = [self.unknown if p is None else p for p in pieces]
        return {n: [p for p in pieces if p is not None] for n, pieces in found.items()}

    def _without_special_tokens(self, tokens: np.ndarray) -> np.ndarray:
        if not self._as_text or not np.isin(tokens, list(self._as_text)).any():
            return tokens
        ids = (self._as_text.get(token, [token]) for token in tokens.tolist())
        return np.array([token for group in ids for token in group], np.uint32)

    # --------------------------------------------------------------------------------- to text

    def decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Yield what each token adds to the text of the ones before it.

        A decoder treats the first token of a text in its own way, so the ones that were yielded
        last are decoded again, as context. A run of byte tokens is one piece: a single byte that
        does not fit makes the decoder replace all of them.
        """
        context = [token for token in after if token not in self._special]
        pending: list[int] = []
        for token in tokens:
            if token in self._special:
                continue
            pending.append(token)
            if token in self._byte_tokens:
                continue
            text = self.decode(context + pending)
            if text.endswith(REPLACEMENT):  # a character whose bytes are not all there
                continue
            if piece := text[len(self.decode(context)) :]:
                yield piece
                context, pending = pending, []
        if rest := self.decode(context + pending)[len(self.decode(context)) :]:
            yield rest

    @cached_property
    def text_ids(self) -> list[int]:
        ids = set(self._backend.get_vocab(with_added_tokens=True).values())
        return sorted(ids - self._special - {self.unknown})

    # --------------------------------------------------------------------------- bytes of text

    def text_bytes(self, tokens: np.ndarray, targets: np.ndarray) -> int:
        inside, first = self._bytes_of_token
        begins = np.isin(tokens, [self.end_of_document, *self.start_of_document])
        return int(np.where(begins, first[targets], inside[targets]).sum())

    @cached_property
    def _bytes_of_token(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes that each id adds within a text, and as its first token."""
        inside = np.zeros(self.vocabulary, np.int64)
        first = np.zeros(self.vocabulary, np.int64)
        ids = self.text_ids
        if "ByteLevel" in self._decodes:
            of_token = [_bytes_of_byte_level(self._backend.id_to_token(number)) for number in ids]
            inside[ids] = of_token
            first[ids] = of_token
            # What the tokenizer itself puts before a text is none of it.
            if self._plain("a") == self._plain(" a"):
                spaced = [self._backend.id_to_token(n).startswith("Ġ") for n in ids]
                first[ids] -= np.array(spaced, np.int64)
            return inside, first
        context = self._plain("a")
        before = len(self.decode(context).encode())
        alone = self._backend.decode_batch([[number] for number in ids])
        after = self._backend.decode_batch([[*context, number] for number in ids])
        first[ids] = [len(text.encode()) for text in alone]
        inside[ids] = [len(text.encode()) - before for text in after]
        inside[list(self._byte_tokens)] = 1
        first[list(self._byte_tokens)] = 1
        return inside, first

    # ----------------------------------------------------------------------- the named tokens

    def _add_named_tokens(self, settings: Mapping[str, Any]) -> None:
        """Make the named tokens special, as transformers does; none gets a new id."""
        from tokenizers import AddedToken

        names = (text_of(settings.get(key)) for key in NAMED_TOKENS)
        known = [n for n in names if n and self._backend.token_to_id(n) is not None]
        self._backend.add_special_tokens([AddedToken(n, normalized=False) for n in known])

    def _start_of_document(
        self, settings: Mapping[str, Any], ids: Mapping[str, int]
    ) -> tuple[int, ...]:
        # As transformers reads them: either key replaces what tokenizer.json would add.
        if "add_bos_token" in settings or "add_eos_token" in settings:
            bos = ids.get(text_of(settings.get("bos_token")) or "")
            return (bos,) if settings.get("add_bos_token") and bos is not None else ()
        plain = self._plain("a")
        whole = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
        return ()

    def _unknown(self, model: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
        """Return the id of text without an id, None if every byte has one."""
        if len(self._byte_tokens) == 256 or "ByteLevel" in self._decodes:
            return None
        number: int | None = model.get("unk_id", ids.get(model.get("unk_token") or ""))
        return number


def _kinds_of(part: Mapping[str, Any] | None) -> set[str]:
    """Return the types of a tokenizer's part and of what it is a sequence of."""
    if part is None:
        return set()
    return {part["type"]}.union(*map(_kinds_of, part.get("decoders", [])))


def _bytes_of_byte_level(token: str) -> int:
    """Return the bytes of a token; each of GPT-2's characters stands for one.

    One with another character, such as an added token, is its own text.
    """
    return len(token) if is_byte_level(token) else len(token.encode())
