"""The memory of one rank, line by line, and its peak: model states plus working memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megagpt.planning.cost.model_states import Bytes, ModelStates, model_states, shard_of
from megagpt.planning.cost.page_locking import page_locking
from megagpt.planning.cost.working_memory import WorkingMemory, working_memory
from megagpt.planning.layout import Layout

NOTHING = Bytes()
GRADIENT_LINES = ("accumulating_gradients", "reduced_gradients")


@dataclass(frozen=True)
class RankMemory:
    """What a rank of one pipeline rank holds.

    A step has three phases; the largest one sets the peak.
    """

    layout: Layout
    pipeline_rank: int
    states: ModelStates
    working: WorkingMemory
    locking: Bytes = NOTHING

    @property
    def resident(self) -> Bytes:
        """Held throughout the run: states without gradients, pipeline buffers, ZeRO 3's bucket.

        Page-locking too.
        """
        held = [
            getattr(self.states, name) for name in _names(self.states) if name not in GRADIENT_LINES
        ]
        bucket = self.working.reduce_buffers if self.layout.zero.stage == 3 else 0
        return sum(held, self.locking + Bytes(device=self.working.pipeline_buffers + bucket))

    @property
    def phases(self) -> dict[str, Bytes]:
        """What each phase of a step adds to `resident`."""
        states, work = self.states, self.working
        passes = work.activations + work.head + work.recomputation + work.gathered_parameters
        buffers = work.reduce_buffers if self.layout.zero.stage < 3 else 0
        reduction = buffers + work.reduce_copies
        if not self.layout.reduces_per_step:
            passes += reduction if self.layout.zero.stage >= 2 else buffers
        return {
            "forward and backward": states.accumulating_gradients + Bytes(device=passes),
            "reduction": states.accumulating_gradients + Bytes(device=reduction),
            "update": states.reduced_gradients + Bytes(device=work.update),
        }

    @property
    def peak(self) -> Bytes:
        """The maximum in device memory, in host memory and on NVMe, each over the phases."""
        sums = [self.resident + phase for phase in self.phases.values()]
        return Bytes(
            max(s.device for s in sums), max(s.host for s in sums), max(s.nvme for s in sums)
        )

    @property
    def peak_phase(self) -> str:
        """The phase that uses most device memory."""
        return max(self.phases, key=lambda name: self.phases[name].device)

    def lines(self) -> Iterator[tuple[str, Bytes]]:
        """Yield every line with its name, states first."""
        for name in _names(self.states):
            yield name.replace("_", " "), getattr(self.states, name)
        for name in _names(self.working):
            yield name.replace("_", " "), Bytes(device=getattr(self.working, name))
        yield "page-locking", self.locking


def rank_memory(layout: Layout, pipeline_rank: int, *, data_ranks: int | None = None) -> RankMemory:
    """Return the memory of the data rank that holds most, among all or the first `data_ranks`.

    Tensor ranks hold the same amount.
    """
    shard = shard_of(layout, pipeline_rank)
    states = fullest_states(layout, pipeline_rank, data_ranks=data_ranks)
    working = working_memory(layout, pipeline_rank, shard)
    return RankMemory(layout, pipeline_rank, states, working, page_locking(shard))


def fullest_states(
    layout: Layout, pipeline_rank: int, *, data_ranks: int | None = None
) -> ModelStates:
    """Return the states of the data rank that holds most, among all or the first `data_ranks`.

    Data ranks differ at ZeRO 1 and 2, which keep a gradient whole if the rank's partition contains
    a part of it, with the partition's padding (`accumulating_gradients`, `reduced_gradients`).
    """
    looked_at = {0}
    if layout.zero.stage in (1, 2) and data_ranks != 1:
        shard = shard_of(layout, pipeline_rank)
        touched = shard.touched_by_rank[:data_ranks]
        padded = [size + shard.padding_of(rank) for rank, size in enumerate(touched)]
        looked_at = {touched.index(max(touched)), padded.index(max(padded))}
    return max(
        (model_states(layout, pipeline_rank, rank) for rank in sorted(looked_at)), key=_gradients
    )


def _gradients(states: ModelStates) -> float:
    held = (states.accumulating_gradients, states.reduced_gradients)
    return max(bytes_.device + bytes_.host for bytes_ in held)


def _names(lines: ModelStates | WorkingMemory) -> list[str]:
    return [field.name for field in fields(lines)]
