"""What a search varies: the mesh, the schedule, the micro-batch, recomputation, ZeRO and offload.

The model, the ranks and the global batch stay. A choice has two halves that are independent of each
other on one mesh: what the passes do (`Work`), and what is kept where (`States`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megagpt.config import ModelConfig
from megagpt.planning.alternatives import DEVICES, Device, divisors, with_states
from megagpt.planning.layout import Layout
from megagpt.planning.schedules import round_length

RECOMPUTES = ("none", "selective", "full")
MOST_VIRTUAL_STAGES = 8


class Mesh(NamedTuple):
    """The axes: ranks on each."""

    tensor: int
    pipeline: int
    data: int


class Work(NamedTuple):
    """What decides how long the passes take, besides ZeRO 3."""

    schedule: str
    virtual_stages: int
    micro_batch: int
    micro_batches: int
    recompute: str


class States(NamedTuple):
    """What ZeRO partitions, and where optimizer state and parameters are: none, cpu or nvme."""

    stage: int
    optimizer: Device
    parameters: Device


@dataclass(frozen=True)
class Space:
    """All layouts of a model on a number of ranks.

    `bases` have the model and everything that is not varied, from ZeRO 1 on (True) and at ZeRO 0
    (False), where "auto" computes in fp32; their mesh does not matter. `batch` counts sequences of
    a step. `reduction`: `megagpt.parallel.gradient_reduction` if the
    configuration sets it. `nvme_path`: a directory on the hosts' NVMe, None if there is none.
    """

    bases: dict[bool, Layout]
    ranks: int
    ranks_per_host: int
    batch: int
    reduction: str | None = None
    nvme_path: str | None = None

    @property
    def model(self) -> ModelConfig:
        """The model."""
        return self.bases[True].model

    def meshes(self) -> Iterator[Mesh]:
        """Yield every mesh: a tensor axis within a host, a pipeline with a block in each stage."""
        for tensor in divisors(self.ranks):
            for pipeline in divisors(self.ranks // tensor):
                data = self.ranks // (tensor * pipeline)
                fits = tensor <= self.ranks_per_host and pipeline <= self.model.num_layers
                if fits and self.batch % data == 0:
                    yield Mesh(tensor, pipeline, data)

    def works(self, mesh: Mesh) -> Iterator[Work]:
        """Yield every schedule, micro-batch and recomputation on a mesh."""
        sequences = self.batch // mesh.data
        orders = list(self._orders(mesh))
        for micro_batch in divisors(sequences):
            count = sequences // micro_batch
            for (schedule, virtual), recompute in itertools.product(orders, RECOMPUTES):
                rounds = count % round_length(mesh.pipeline, count) == 0
                if schedule != "interleaved" or rounds:
                    yield Work(schedule, virtual, micro_batch, count, recompute)

    def _orders(self, mesh: Mesh) -> Iterator[tuple[str, int]]:
        """Yield the schedules, with the stages of a rank.

        Interleaved: 2 stages, and every number up to 8 that gives all stages equally many blocks.
        """
        yield "1f1b", 1
        if mesh.pipeline == 1:
            return
        yield "gpipe", 1
        blocks = self.model.num_layers
        for virtual in range(2, MOST_VIRTUAL_STAGES + 1):
            stages = mesh.pipeline * virtual
            if stages <= blocks and (virtual == 2 or blocks % stages == 0):
                yield "interleaved", virtual

    def states(self) -> Iterator[States]:
        """Yield every ZeRO stage with every place for optimizer state and parameters."""
        yield States(0, "none", "none")
        yield from (States(stage, place, "none") for stage in (1, 2) for place in DEVICES)
        places: tuple[Device, ...] = (*DEVICES, "nvme") if self.nvme_path else DEVICES
        yield from (States(3, *both) for both in itertools.product(places, places))

    def sequences(self, mesh: Mesh) -> tuple[bool, ...]:
        """Return the values of `megagpt.parallel.sequence` on a mesh."""
        return (False, True) if mesh.tensor > 1 else (False,)

    def layout(self, mesh: Mesh, work: Work, states: States, sequence: bool) -> Layout:
        """Return the layout of a choice."""
        usual = "per_step" if mesh.pipeline > 1 else "per_micro_batch"
        placed = with_states(self.bases[states.stage > 0], *states, self.nvme_path)
        base = replace(
            placed,
            data=mesh.data,
            micro_batch=work.micro_batch,
            micro_batches=work.micro_batches,
            recompute=work.recompute,
        )
        return base.with_parallel(
            tensor=mesh.tensor,
            pipeline=mesh.pipeline,
            schedule=work.schedule,
            virtual_stages=work.virtual_stages,
            sequence=sequence,
            gradient_reduction=self.reduction or usual,
        )
