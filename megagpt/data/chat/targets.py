"""From the assistant's characters to tokens that are targets, kept as the bounds of their runs.

Bounds are increasing: tokens [bounds[0], bounds[1]) are targets, [bounds[2], bounds[3]) too, and so
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megagpt.data.chat.answers import Span


class CutConversation(NamedTuple):
    """Ids and bounds of a conversation, and what was left out at its end."""

    ids: np.ndarray
    bounds: np.ndarray  # int64
    tokens_left_out: int
    targets_left_out: int


def target_bounds(starts: np.ndarray, ends: np.ndarray, answers: Sequence[Span]) -> np.ndarray:
    """Return the bounds of the tokens that have a character of an answer, int64.

    `starts` and `ends`: the first character of each token, and the one behind its last. The first
    token is no target: nothing comes before it. transformers' mask
    (`return_assistant_tokens_mask`) is the same, except where the last character of an answer is
    several tokens, of which it has the first alone.
    """
    bounds: list[int] = []
    for first_character, end_character in answers:
        first = max(int(np.searchsorted(ends, first_character, side="right")), 1)
        end = int(np.searchsorted(starts, end_character, side="left"))
        if first >= end:
            continue
        if bounds and first <= bounds[-1]:
            bounds[-1] = max(bounds[-1], end)
        else:
            bounds += [first, end]
    return np.array(bounds, np.int64)


def cut(ids: np.ndarray, bounds: np.ndarray, max_length: int | None) -> CutConversation:
    """Return a conversation's first `max_length` tokens (None: all) with the targets in them."""
    if max_length is None or len(ids) <= max_length:
        return CutConversation(ids, bounds, 0, 0)
    kept = np.minimum(bounds, max_length).reshape(-1, 2)
    kept = kept[kept[:, 0] < kept[:, 1]].reshape(-1)
    lost = count(bounds) - count(kept)
    return CutConversation(ids[:max_length], kept, len(ids) - max_length, lost)


def count(bounds: np.ndarray) -> int:
    """Return how many tokens are targets."""
    return int((bounds[1::2] - bounds[0::2]).sum())
