"""What stands for a tokenizer where nobody said which one made the ids: a text of numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megagpt.utils import UserError


class IdsOnly:
    """Ids as text: `464 3290` is two tokens. No id is known to begin or end a document."""

    start_of_document: tuple[int, ...] = ()
    end_of_document = -1
    prefix = 0  # of a text, and there is none
    unknown: int | None = None

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def encode(self, text: str) -> list[int]:
        """Return the ids that a text lists; raise UserError if it is another text, or empty."""
        words = text.split()
        if not words or not all(word.isdecimal() and int(word) < self.vocabulary for word in words):
            raise UserError(
                f"{text[:40]!r}: no text can be encoded (the data are ids without a tokenizer); "
                f"write ids below {self.vocabulary} such as '464 3290', or train with "
                f"the tokenizer of the data: megagpt.data.tokenizer"
            )
        return [int(word) for word in words]

    def encode_with_places(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return ids, uint32 [n], and the characters [starts, ends) of each, int64 [n]."""
        found = []
        for text in texts:
            ids = np.array(self.encode(text), np.uint32)  # raises for the text of a chat template
            places = np.array([word.span() for word in re.finditer(r"\S+", text)], np.int64)
            found.append((ids, places[:, 0], places[:, 1]))
        return found

    def encode_texts(self, texts: Sequence[str], continues: Sequence[bool]) -> list[np.ndarray]:
        """Return the ids of each text, uint32 [n]."""
        return [np.array(self.encode(text), np.uint32) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the ids, with a space between them."""
        return " ".join(map(str, tokens))

    def decode_stream(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Yield each id, with a space before it."""
        return (f" {token}" for token in tokens)

    @property
    def text_ids(self) -> list[int]:
        """All ids."""
        return list(range(self.vocabulary))

    def text_bytes(self, tokens: np.ndarray, targets: np.ndarray) -> int:
        """Return 0: how many bytes an id stands for is not known."""
        return 0
