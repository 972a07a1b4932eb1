"""Which samples a rank reads at a step, and how they reach its device."""

import threading
from concurrent.futures import Future
from contextlib import nullcontext

import torch
from torch import Tensor

import kernels
from kernels.philox import fold_seed
from megagpt.config import ResolvedConfig
from megagpt.dataset import SampleStream
from megagpt.distributed import Mesh
from megagpt.model import IGNORED, place_seeds
from megagpt.parallel.pipeline import MicroBatch


class BatchLoader:
    """The micro-batches of one data replica.

    A global batch is the samples [first, first + train_batch_size). The step alone determines them,
    not the mesh. Dropout seeds depend on (training seed, step, sample), so a sample's masks are the
    same on every rank.

    While a step runs, a thread prepares the batch of the next one in host memory, page-locked
    beside a GPU: the copy to it then waits for nothing.
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
        self.model = config.megagpt.model
        self.seed = config.megagpt.training.seed if config.megagpt.drops else None
        self._ahead: tuple[int, int, Future[list[MicroBatch]]] | None = None

    def load(self, first: int, step: int | None = None) -> list[MicroBatch]:
        """Return this replica's micro-batches of the global batch that begins at sample ``first``.

        ``step`` seeds dropout; None means no dropout. With a step, the batch after this one is
        prepared in the background, for the step after this one. Another one may be loaded all the
        same: after a skipped or rewound step, only the time is lost.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (first, step):
            prepared = ahead[2].result()
        else:
            prepared = self._prepare(first, step)
        if step is not None:
            self._begin(first + self.batch_size, step + 1)
        return [self._to_device(micro_batch) for micro_batch in prepared]

    def _begin(self, first: int, step: int) -> None:
        """Prepare a batch in a thread, which does not keep the process alive.

        What it raises is raised when that batch is asked for.
        """
        future: Future[list[MicroBatch]] = Future()
        self._ahead = (first, step, future)

        def work() -> None:
            try:
                future.set_result(self._prepare(first, step))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="batch ahead", daemon=True).start()

    def _prepare(self, first: int, step: int | None) -> list[MicroBatch]:
        """Return the micro-batches in host memory."""
        # The allocator of page-locked memory would wake GPU 0 in a thread without a device.
        on_gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_gpu else nullcontext():
            return [self._micro_batch(first, index, step) for index in range(self.micro_batches)]

    def _micro_batch(self, first: int, index: int, step: int | None) -> MicroBatch:
        start = first + (index * self.mesh.data_size + self.mesh.data_rank) * self.micro_batch_size
        batch = self.stream.batch(range(start, start + self.micro_batch_size))
        all_counted = not self.stream.ignores_targets
        if all_counted and (batch.targets == IGNORED).any():
            raise AssertionError("a sample ignores targets, but SampleStream.ignores_targets is no")
        seeds = None
        if self.seed is not None and step is not None:
            of_samples = fold_seed(self.seed, step, torch.from_numpy(batch.sample_ids))
            seeds = self._page_locked(place_seeds(self.model, of_samples))
        documents = None
        if batch.document_ids is not None:
            bounds = kernels.document_bounds(torch.from_numpy(batch.document_ids))
            documents = kernels.DocumentBounds(self._page_locked(bounds.positions))
        positions = None
        if batch.positions is not None:
            positions = self._page_locked(torch.from_numpy(batch.positions))
        return MicroBatch(
            self._page_locked(torch.from_numpy(batch.tokens)),
            self._page_locked(torch.from_numpy(batch.targets)),
            documents,
            seeds,
            positions,
            all_counted,
        )

    def _page_locked(self, value: Tensor) -> Tensor:
        return value.pin_memory() if self.device.type == "cuda" else value

    def _to_device(self, prepared: MicroBatch) -> MicroBatch:
        def copied(value: Tensor) -> Tensor:
            return value.to(self.device, non_blocking=True)

        documents, seeds, positions = prepared.documents, prepared.dropout_seed, prepared.positions
        return MicroBatch(
            copied(prepared.tokens),
            copied(prepared.targets),
            None if documents is None else kernels.DocumentBounds(copied(documents.positions)),
            None if seeds is None else copied(seeds),
            None if positions is None else copied(positions),
            prepared.all_counted,
        )
