"""Validate while training: the chosen windows, their exact mean loss, and that of each source.

All replicas read one micro-batch each at a time: a row of windows. Here each row has windows of
one dataset only, so the losses of rows are the losses by source of a blend, at no more forwards
than some rows that are not full. What fills those up has no targets.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch

from megagpt.config import ResolvedConfig
from megagpt.dataset import Batch, SampleStream
from megagpt.distributed import Mesh
from megagpt.model import IGNORED
from megagpt.parallel import pipeline
from megagpt.parallel.batches import BatchLoader
from megagpt.parallel.engine import Engine

FILLER = -1  # in the place of a window


@dataclass(frozen=True)
class Losses:
    """Mean losses in nats a target, NaN without any: over all windows, and by source of a blend."""

    mean: float
    by_source: dict[str, float] = field(default_factory=dict)


class ValidationSet:
    """The windows that a run validates on: the first of a stream, at most one epoch.

    ``name`` is that of a further validation set, None for the validation split of the data.
    """

    def __init__(
        self,
        name: str | None,
        stream: SampleStream,
        config: ResolvedConfig,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self.name = name
        self.stream = stream
        self.batch_size = config.train_batch_size
        wanted = config.megagpt.training.eval_batches * self.batch_size
        self.windows = min(wanted, stream.samples_per_epoch)
        row = config.train_micro_batch_size_per_gpu * mesh.data_size
        self.sources, self.chosen = rows_by_source(stream, self.windows, row, self.batch_size)
        read = cast(SampleStream, ChosenWindows(stream, self.chosen))  # to a loader it is one
        self.loader = BatchLoader(read, config, mesh, device)

    @property
    def share(self) -> float:
        """The share of the split, 0 to 1, that the windows are."""
        return self.stream.share(self.windows)

    def losses(self, engine: Engine, beat: Callable[[], None] = lambda: None) -> Losses:
        """Return the mean losses; every rank must call it.

        Each target has the same weight. ``beat`` is called before each global batch.
        """
        parts = []
        for first in range(0, len(self.chosen), self.batch_size):
            beat()
            parts.append(pipeline.evaluate(engine, self.loader.load(first)))
        nats, targets = torch.cat(parts, dim=1).tolist()
        return Losses(_mean(nats, targets), self._by_source(nats, targets))

    def _by_source(self, nats: Sequence[float], targets: Sequence[float]) -> dict[str, float]:
        if len(self.stream.datasets) == 1:
            return {}
        rows: dict[str, list[int]] = defaultdict(list)
        names = source_names(self.stream)
        for row, source in enumerate(self.sources):
            rows[names[source]].append(row)
        return {
            name: _mean([nats[row] for row in own], [targets[row] for row in own])
            for name, own in rows.items()
        }


def _mean(nats: Sequence[float], targets: Sequence[float]) -> float:
    return sum(nats) / sum(targets) if sum(targets) else float("nan")


@dataclass(frozen=True)
class ChosenWindows:
    """Some windows of a stream by their place in ``chosen`` (int64), fillers among them."""

    stream: SampleStream
    chosen: np.ndarray
    ignores_targets = True  # a filler's

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the windows at ``indices``, stacked; a filler has no targets."""
        windows = self.chosen[np.asarray(indices)]
        batch = self.stream.batch([max(int(window), 0) for window in windows])
        targets = np.where(windows[:, None] == FILLER, IGNORED, batch.targets)
        return replace(batch, targets=targets)


def rows_by_source(
    stream: SampleStream, windows: int, row: int, batch_size: int
) -> tuple[list[int], np.ndarray]:
    """Return the source of each row, and the first ``windows`` windows in rows of one source.

    Fillers follow each source's windows up to a whole row, and the last row up to a whole batch;
    rows of fillers have no source.
    """
    by_source: dict[int, list[int]] = defaultdict(list)
    for window in range(windows):
        by_source[stream.source_of(window)].append(window)
    chosen: list[int] = []
    sources: list[int] = []
    for source, own in sorted(by_source.items()):
        rows = -(-len(own) // row)
        sources += [source] * rows
        chosen += [*own, *[FILLER] * (rows * row - len(own))]
    chosen += [FILLER] * (-len(chosen) % batch_size)
    return sources, np.array(chosen)


def source_names(stream: SampleStream) -> list[str]:
    """Return a name for each dataset of a blend.

    That is the name of its directory, or the path if two directories share it.
    """
    directories = [dataset.directory for dataset in stream.datasets]
    shared = Counter(directory.name for directory in {*directories})
    return [str(path) if shared[path.name] > 1 else path.name for path in directories]
