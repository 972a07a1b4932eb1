"""Which samples a rank reads at a step, and how they reach its device."""

import torch
from torch import Tensor

import kernels
from kernels.philox import fold_seed
from megagpt.config import ResolvedConfig
from megagpt.dataset import SampleStream
from megagpt.distributed import Mesh
from megagpt.parallel.pipeline import MicroBatch


class BatchLoader:
    """The micro-batches of one data replica.

    A global batch is the samples [first, first + train_batch_size). The step alone determines them,
    not the mesh. Dropout seeds depend on (training seed, step, sample), so a sample's masks are the
    same on every rank.
    """

    def __init__(
        self, stream: SampleStream, config: ResolvedConfig, mesh: Mesh, device: torch.device
    ) -> None:
        self.stream = stream
        self.mesh = mesh
        self.device = device
        self.batch_size = config.train_batch_size
        self.micro_batch_size = config.train_micro_batch_size_per_gpu
        self.micro_batches = config.gradient_accumulation_steps
        self.seed = config.megagpt.training.seed if config.megagpt.drops else None

    def load(self, first: int, step: int | None = None) -> list[MicroBatch]:
        """Return this replica's micro-batches of the global batch that begins at sample ``first``.

        ``step`` seeds dropout; None means no dropout.
        """
        return [self._micro_batch(first, index, step) for index in range(self.micro_batches)]

    def _micro_batch(self, first: int, index: int, step: int | None) -> MicroBatch:
        start = first + (index * self.mesh.data_size + self.mesh.data_rank) * self.micro_batch_size
        batch = self.stream.batch(range(start, start + self.micro_batch_size))
        seeds = None
        if self.seed is not None and step is not None:
            seeds = fold_seed(self.seed, step, torch.from_numpy(batch.sample_ids)).to(self.device)
        documents = None
        if batch.document_ids is not None:
            documents = kernels.document_bounds(
                self._to_device(torch.from_numpy(batch.document_ids))
            )
        positions = None
        if batch.positions is not None:
            positions = self._to_device(torch.from_numpy(batch.positions))
        return MicroBatch(
            self._to_device(torch.from_numpy(batch.tokens)),
            self._to_device(torch.from_numpy(batch.targets)),
            documents,
            seeds,
            positions,
        )

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)
