"""Logical tensors put together again from what the ranks hold, or from what they have stored."""

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from megagpt.checkpoint.reader import open_checkpoint
from megagpt.parallel.rectangles import Box
from tests.support.jobs.training import Held

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def stored_tensors(run: Path, step: int | None = None) -> dict[tuple[str, str], torch.Tensor]:
    """Those of a checkpoint of a run, the newest or that of a step, by (kind, parameter)."""
    reader = open_checkpoint(run, step)
    return {
        (kind, name): reader.tensor(kind, name)
        for kind in KINDS
        for name in reader.manifest.tensors
    }


def whole_tensors(ranks: Iterable[Held]) -> dict[tuple[str, str], torch.Tensor]:
    """Flat tensors by (kind, parameter); every element must be held exactly once."""
    pieces: dict[tuple[str, str], list[tuple[Box, int, torch.Tensor]]] = defaultdict(list)
    for held in ranks:
        for kind, name, box, start, values in held:
            pieces[kind, name].append((box, start, values))
    return {key: _whole(key, found) for key, found in pieces.items()}


def _whole(key: tuple[str, str], pieces: list[tuple[Box, int, torch.Tensor]]) -> torch.Tensor:
    shape = [
        max(end for _, end in spans) for spans in zip(*(box for box, _, _ in pieces), strict=True)
    ]
    whole = torch.empty(math.prod(shape))
    times_held = torch.zeros(whole.shape, dtype=torch.int64)
    for box, start, values in pieces:
        elements = flat_elements(box, start, values.numel(), shape)
        whole[elements] = values
        times_held[elements] += 1
    assert times_held.eq(1).all(), (
        f"{key}: {times_held.gt(1).sum()} elements held twice, {times_held.eq(0).sum()} not"
    )
    return whole


def flat_elements(box: Box, start: int, numel: int, shape: list[int]) -> torch.Tensor:
    """Where the elements [start, start + numel) of a flattened box lie in the flattened whole."""
    whole = torch.arange(math.prod(shape)).view(shape)
    return whole[tuple(slice(*span) for span in box)].flatten()[start : start + numel]
