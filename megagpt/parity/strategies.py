"""The strategies that `parity/compare.py` compares on a number of ranks, the file's own first.

No torch. Each mesh has every ZeRO stage and offload, and at every ZeRO stage its other schedules,
the other reduction, and `sequence`, one at a time; `planning/rules.py` says which of them compose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megagpt.config import RunConfig
from megagpt.schema.megagpt import ParallelConfig
from megagpt.schema.model import ModelSection

EVERY_MESH = 16  # ranks up to which all meshes are tried
USUAL_AXIS = 8  # beyond that, the largest axis, unless the file's model allows more
OF_MESH = ("schedule", "virtual_stages", "sequence", "gradient_reduction")


@dataclass(frozen=True)
class Strategy:
    """One way to train: the ``parallel`` section, the ZeRO stage, and the offload devices.

    ``file``: the configuration that asks for it; its other keys of ZeRO, offload and recomputation
    apply too.
    """

    parallel: dict[str, Any]
    stage: int
    optimizer: str = "none"
    parameters: str = "none"
    file: RunConfig | None = None

    @property
    def pipeline(self) -> int:
        """The number of ranks on the pipeline axis."""
        return self.parallel.get("pipeline", 1)

    @property
    def tensor(self) -> int:
        """The number of ranks on the tensor axis."""
        return self.parallel.get("tensor", 1)

    @property
    def num_stages(self) -> int:
        """The number of pipeline stages over all ranks."""
        return self.pipeline * self.parallel.get("virtual_stages", 1)

    def words(self) -> list[str]:
        """Return a row's first columns."""
        places = [
            "device" if place == "none" else place for place in (self.optimizer, self.parameters)
        ]
        rest = " ".join(f"{key}={value}" for key, value in self.parallel.items() if key in OF_MESH)
        return [str(self.pipeline), str(self.tensor), str(self.stage), *places, rest or "-"]


def own_strategy(file: RunConfig) -> Strategy:
    """Return the strategy of the file."""
    parallel = file.megagpt.parallel
    zero = file.zero_optimization
    usual = ParallelConfig(pipeline=parallel.pipeline, tensor=parallel.tensor)
    mesh: dict[str, Any] = {"pipeline": parallel.pipeline, "tensor": parallel.tensor}
    mesh |= {
        key: getattr(parallel, key)
        for key in OF_MESH
        if getattr(parallel, key) != getattr(usual, key)
    }
    return Strategy(mesh, zero.stage, zero.optimizer_device, zero.parameter_device, file)


def strategies(world_size: int, nvme: bool, model: ModelSection) -> Iterator[Strategy]:
    """Yield every mesh of these ranks with every ZeRO stage and offload, then other settings.

    The others are those that differ from the defaults, one at a time.
    """
    places = ("none", "cpu", "nvme") if nvme else ("none", "cpu")
    for pipeline, tensor in meshes(world_size, model):
        mesh = {"pipeline": pipeline, "tensor": tensor}
        for stage in range(4):
            yield from (Strategy(mesh, stage, optimizer) for optimizer in places)
        yield from (
            Strategy(mesh, 3, optimizer, parameters)
            for parameters in places[1:]
            for optimizer in places
        )
        # The reduction that is not the mesh's default.
        reduction = "per_micro_batch" if pipeline > 1 else "per_step"
        other: list[dict[str, Any]] = [{"gradient_reduction": reduction}]
        if pipeline > 1:
            other += [{"schedule": "gpipe"}, {"schedule": "interleaved", "virtual_stages": 2}]
        if tensor > 1:
            other += [{"sequence": True}]
        yield from (Strategy(mesh | keys, stage) for keys in other for stage in range(4))


def meshes(world_size: int, model: ModelSection) -> Iterator[tuple[int, int]]:
    """Yield (pipeline, tensor) of all meshes of a small world, or of the usual ones of a large one.

    In a large world these are axes of usual size, or those that the file's own model can be cut
    for: a model that fits all meshes would grow with the cube of the world.
    """
    every = world_size <= EVERY_MESH
    for tensor in _divisors(world_size):
        if every or tensor <= USUAL_AXIS or model.num_kv_heads % tensor == 0:
            for pipeline in _divisors(world_size // tensor):
                if every or pipeline <= max(USUAL_AXIS, model.num_layers):
                    yield pipeline, tensor


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
