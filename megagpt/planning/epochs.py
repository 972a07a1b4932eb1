"""How long an epoch is: a length in epochs becomes steps with the data that are there. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from megagpt.config import RunConfig
from megagpt.dataset import Packing, SampleStream
from megagpt.schema.megagpt import DataSource


def counted_samples() -> Callable[[RunConfig], int]:
    """Return a function from a run to the samples of its training split, each counted once.

    The function raises UserError if the data are missing or cannot be read so.
    """

    @cache
    def count(
        sources: tuple[DataSource, ...], seed: int, packing: Packing | None, sequence_length: int
    ) -> int:
        return SampleStream.open(
            [(Path(source.path), source.weight) for source in sources],
            split="train",
            sequence_length=sequence_length,
            seed=seed,
            document_mask=False,  # has no part in their number
            packing=packing,
        ).samples_per_epoch

    def samples(run: RunConfig) -> int:
        data = run.megagpt.data
        length = run.megagpt.model.sequence_length
        return count(data.sources, data.seed, data.packing, length)

    return samples
