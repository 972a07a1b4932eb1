"""Tokenize in worker threads: batches in order, a bounded number of them in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megagpt.data.chat.targets import CutConversation, cut, target_bounds
from megagpt.data.corpora import TextPiece
from megagpt.data.manifest import Split
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from megagpt.utils import MIB

BATCH_CHARACTERS = MIB  # about 50 ms of work for one core
BATCH_PIECES = 4096  # limit if the documents are short


class EncodedPiece(NamedTuple):
    split: Split
    starts_document: bool
    tokens: np.ndarray  # uint32; with the tokens that start and end a document where it does
    conversation: CutConversation | None = None  # what else there is to a conversation
    place: str = ""


Batch = list[tuple[Split, TextPiece]]
Encode = Callable[[Iterable[Batch]], Iterator[list[EncodedPiece]]]


def batches(pieces: Iterable[tuple[Split, TextPiece]]) -> Iterator[Batch]:
    """Yield batches of pieces, each of about a megabyte of text."""
    batch: Batch = []
    characters = 0
    for split, piece in pieces:
        batch.append((split, piece))
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def encode_conversations(
    tokenizer: Tokenizer, max_length: int | None, batch: Batch
) -> list[EncodedPiece]:
    """Return the token ids of each conversation, which its template has written as a whole."""
    encoded = tokenizer.encode_with_places([piece.text for _, piece in batch])
    pieces = []
    for (split, piece), (ids, starts, ends) in zip(batch, encoded, strict=True):
        kept = cut(ids, target_bounds(starts, ends, piece.answers or ()), max_length)
        pieces.append(EncodedPiece(split, True, kept.ids, kept, piece.place))
    return pieces


def encode_batch(tokenizer: Tokenizer, batch: Batch) -> list[EncodedPiece]:
    """Return the token ids of each piece; one without any stays without."""
    start = np.array(tokenizer.start_of_document, np.uint32)
    end = np.array([tokenizer.end_of_document], np.uint32)
    none = np.empty(0, np.uint32)
    encoded = tokenizer.encode_texts(
        [piece.text for _, piece in batch], [not piece.starts for _, piece in batch]
    )
    return [
        EncodedPiece(
            split,
            piece.starts,
            np.concatenate((start if piece.starts else none, tokens, end if piece.ends else none))
            if len(tokens)
            else tokens,
        )
        for (split, piece), tokens in zip(batch, encoded, strict=True)
    ]


@contextmanager
def encoder(
    workers: int,
    tokenizer_directory: Path,
    *,
    conversations: bool = False,
    max_length: int | None = None,
) -> Iterator[Encode]:
    """Yield a function from batches to tokens, in order; one worker is this thread.

    Threads are enough: both tokenizer libraries compute without Python's lock.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    encode = partial(encode_batch, tokenizer)
    if conversations:
        encode = partial(encode_conversations, tokenizer, max_length)
    if workers == 1:
        yield partial(map, encode)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield partial(_in_order, pool, 2 * workers, encode)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor,
    in_flight: int,
    encode: Callable[[Batch], list[EncodedPiece]],
    batches: Iterable[Batch],
) -> Iterator[list[EncodedPiece]]:
    """Map like `pool.map`, but read only `in_flight` batches ahead: a corpus may exceed memory."""
    futures: deque[Future[list[EncodedPiece]]] = deque()
    for batch in batches:
        futures.append(pool.submit(encode, batch))
        if len(futures) >= in_flight:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
