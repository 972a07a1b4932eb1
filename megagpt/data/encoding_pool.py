"""Tokenize in worker processes: batches in order, a bounded number of them in flight."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

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


Batch = list[tuple[Split, TextPiece]]
Encode = Callable[[Iterable[Batch]], Iterator[list[EncodedPiece]]]

_tokenizer: Tokenizer | None = None  # set in a worker process


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
def encoder(workers: int, tokenizer_directory: Path) -> Iterator[Encode]:
    """Yield a function from batches to tokens, in order; one worker is this process."""
    if workers == 1:
        yield partial(map, partial(encode_batch, load_tokenizer(tokenizer_directory)))
        return
    # Spawned, not forked: the parent may have threads of datasets and pyarrow.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(tokenizer_directory,)
    )
    try:
        yield partial(_in_order, pool, 2 * workers)
    except BrokenProcessPool:
        raise RuntimeError(
            "a tokenizer worker died (often out of memory); rerun the same command to continue, "
            "with fewer --workers if it happens again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, in_flight: int, batches: Iterable[Batch]
) -> Iterator[list[EncodedPiece]]:
    """Map like `pool.map`, but read only `in_flight` batches ahead: a corpus may exceed memory."""
    futures: deque[Future[list[EncodedPiece]]] = deque()
    for batch in batches:
        futures.append(pool.submit(_encode_in_worker, batch))
        if len(futures) >= in_flight:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _start_worker(tokenizer_directory: Path) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer_directory)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent dies; it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(batch: Batch) -> list[EncodedPiece]:
    assert _tokenizer is not None
    return encode_batch(_tokenizer, batch)
