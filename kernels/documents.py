"""Packed sequences: where the documents of a batch begin and end."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SHARED = WeakTensorKeyDictionary()  # ids -> ((their version, the stream of the work), bounds)


def shared_bounds(document_ids: Tensor) -> Tensor:
    """``document_bounds``, computed once for all layers that are given the same tensor of ids.

    Not where other values may be there when the work is done: under torch.compile, which drops repetitions by itself,
    and in a CUDA graph, whose inputs are overwritten between replays.
    """
    if torch.compiler.is_compiling() or document_ids.is_inference():  # whose changes are not counted
        return document_bounds(document_ids)
    stream = 0
    if document_ids.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return document_bounds(document_ids)
        stream = torch.cuda.current_stream(document_ids.device).cuda_stream
    state = (document_ids._version, stream)
    known = _SHARED.get(document_ids)
    if known is None or known[0] != state:
        known = _SHARED[document_ids] = (state, document_bounds(document_ids))
    bounds: Tensor = known[1]
    return bounds


def document_bounds(document_ids: Tensor) -> Tensor:
    """The first and the last position of each position's document: (batch, length) -> (batch, 2, length), int32.

    Documents need not be runs of neighbours. A document is known by its first position, and blocks of keys outside the
    bounds of a block of queries are never visited.
    """
    # A stable sort brings a document together, its first position at the head and its last one at the tail.
    ordered, order = document_ids.sort(dim=1, stable=True)
    index = torch.arange(ordered.shape[1], device=ordered.device).expand_as(order)
    changes = ordered != ordered.roll(1, dims=1)
    heads = torch.where(changes, index, 0).cummax(dim=1).values
    tails = torch.where(changes.roll(-1, dims=1), index, index[:, -1:]).flip(1).cummin(dim=1).values.flip(1)
    ends = order[:, None].expand(-1, 2, -1).gather(2, torch.stack((heads, tails), dim=1))
    return torch.empty_like(ends).scatter_(2, order[:, None].expand_as(ends), ends).to(torch.int32)
