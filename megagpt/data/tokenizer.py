"""Tokenizers: chosen or trained once, stored with the data, loaded without the network.

There are two kinds behind one interface. Ours (megagpt/data/byte_level_bpe.py) is one file,
`tokenizer.json`, and runs in tiktoken. That of an open model (megagpt/data/model_tokenizer/) is
the model's own files, unchanged, and runs in Hugging Face `tokenizers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import JsonValue

from megagpt.data.byte_level_bpe import (
    PUBLISHED_NAMES,
    SMALLEST_VOCABULARY,
    ByteLevelTokenizer,
    bytes_only,
    fetch_published,
    load_encoding,
    save_encoding,
    train_byte_level_bpe,
)
from megagpt.data.manifest import MODEL_TOKENIZER_FILES, TOKENIZER_FILE
from megagpt.data.model_tokenizer.encoding import ModelTokenizer
from megagpt.data.model_tokenizer.files import files_of_tokenizer, is_of_a_model
from megagpt.data.model_tokenizer.storing import copy_tokenizer
from megagpt.utils import UserError, did_you_mean

NAMES = (*PUBLISHED_NAMES, "bytes")
TOKENIZER_FILES = (TOKENIZER_FILE, *MODEL_TOKENIZER_FILES)


class Tokenizer(Protocol):
    """Text to ids and back.

    A special token that occurs in a text by name is text, never the token: no document can end
    another. `vocabulary` is the largest id + 1. `start_of_document` are the ids before every
    document and prompt, `unknown` that of text without an id; most tokenizers have neither.
    `prefix` is the id before a text that has to be predicted from its first token on: the token
    that is named for the beginning, also where no document has it, or the end of a document.
    `text_ids` are the ids that stand for text, so without special tokens.
    """

    vocabulary: int
    end_of_document: int
    start_of_document: tuple[int, ...]
    prefix: int
    unknown: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_texts(self, texts: Sequence[str], continues: Sequence[bool]) -> list[np.ndarray]:
        """Return the ids of each text, uint32 [n].

        `continues` says which ones go on with a document, after a line break; the ids are then
        those that they have in the whole document.
        """

    def encode_with_places(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return ids, uint32 [n], and the characters [starts, ends) of each, int64 [n].

        Here the name of a special token is that token: a chat template has written it.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Yield text as soon as no later token can change it.

        Together it is what `tokens` add to the text of the ids `after` which they come.
        """

    @property
    def text_ids(self) -> list[int]: ...

    def text_bytes(self, tokens: np.ndarray, targets: np.ndarray) -> int:
        """Return the bytes of text of `targets`, each of which follows its token in `tokens`.

        Special tokens stand for none.
        """


def parse_tokenizer_name(name: str) -> int | Path | None:
    """Check a tokenizer's name: the size of `bpe:SIZE`, the directory of a model, else None.

    Raises UserError for an unknown name.
    """
    size = re.fullmatch(r"bpe:(\d{1,7})", name)
    if size and int(size[1]) >= SMALLEST_VOCABULARY:
        return int(size[1])
    if size:
        raise UserError(
            f"--tokenizer {name}: a byte-level BPE has at least {SMALLEST_VOCABULARY} tokens; "
            f"use bpe:8192"
        )
    if name in NAMES:
        return None
    if Path(name).is_dir():
        return Path(name)
    raise UserError(
        f"--tokenizer {name}: unknown tokenizer{did_you_mean(name, NAMES)}; use one of "
        f"{', '.join(NAMES)}, bpe:8192, or a model's directory with {TOKENIZER_FILE}"
    )


def describe_tokenizer(name: str) -> dict[str, JsonValue]:
    """Return what decides the ids, for the manifest: the name, and the hashes of a model's files.

    A directory is named without its parents, so that a dataset does not depend on where it was.
    """
    directory = parse_tokenizer_name(name)
    if not isinstance(directory, Path):
        return {"tokenizer": name}
    hashes: dict[str, JsonValue] = dict(files_of_tokenizer(directory))
    return {"tokenizer": directory.resolve().name, "tokenizer_files": hashes}


def store_tokenizer(
    name: str,
    directory: Path,
    documents: Callable[[], Iterable[str]],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Store the tokenizer `name` in `directory`.

    It is published, plain bytes, a model's own, or trained on `documents()` for `bpe:SIZE`;
    `report` gets a line about that.
    """
    parsed = parse_tokenizer_name(name)
    if isinstance(parsed, Path):
        copy_tokenizer(parsed, directory)
    elif parsed is not None:
        save_encoding(train_byte_level_bpe(documents(), parsed, report), directory)
    else:
        save_encoding(bytes_only() if name == "bytes" else fetch_published(name), directory)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer stored in a directory; never uses the network.

    Raises UserError if there is none, or not one that can be used.
    """
    if is_of_a_model(Path(directory)):
        return ModelTokenizer(Path(directory))
    return ByteLevelTokenizer(load_encoding(Path(directory)))
