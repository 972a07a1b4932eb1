"""Packed sequences: where the documents of a batch begin and end."""

from typing import NamedTuple

import torch
from torch import Tensor


class DocumentBounds(NamedTuple):
    """Where documents begin and end: the result of ``document_bounds``.

    Attention takes it in place of document ids. ``positions`` (batch, 2, length) int32: the first
    and the last position of each position's document. It is a named tuple, so that compilers,
    pipeline schedules and module hooks reach the tensor; its batch dimension may be split.
    """

    positions: Tensor


def document_bounds(document_ids: Tensor | DocumentBounds) -> DocumentBounds:
    """Return the bounds of the documents in ``document_ids`` (batch, length), for all layers.

    The positions of a document need not be contiguous. A document is identified by its first
    position; attention skips blocks of keys outside the bounds of a block of queries. Given bounds
    are returned unchanged. Raises ValueError for ids of another shape.
    """
    if isinstance(document_ids, DocumentBounds):
        return document_ids
    if document_ids.dim() != 2:
        raise ValueError(
            f"document_bounds: document_ids has shape {tuple(document_ids.shape)}, need (batch, "
            f"length)"
        )
    # A stable sort makes each document contiguous, with its positions in order.
    ordered, order = document_ids.sort(dim=1, stable=True)  # (batch, length), like all below
    index = torch.arange(ordered.shape[1], device=ordered.device).expand_as(order)
    changes = ordered != ordered.roll(1, dims=1)
    heads = torch.where(changes, index, 0).cummax(dim=1).values
    tails = (
        torch.where(changes.roll(-1, dims=1), index, index[:, -1:])
        .flip(1)
        .cummin(dim=1)
        .values.flip(1)
    )
    # (batch, 2, length)
    ends = order[:, None].expand(-1, 2, -1).gather(2, torch.stack((heads, tails), dim=1))
    positions = torch.empty_like(ends).scatter_(2, order[:, None].expand_as(ends), ends)
    return DocumentBounds(positions.to(torch.int32))
