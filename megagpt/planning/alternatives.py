"""Other layouts that run the same step on the same ranks, and those that fit into memory.

`launch/plan.py` prints them; `legality.py` finds the nearest legal run of one that is refused.
An alternative has the same model, world size and global batch. It differs in the mesh, in ZeRO and
offload, in recomputation or in the micro-batch. Single changes are tried before pairs; among those
that fit, the fastest by estimate comes first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from megagpt.config import RunConfig
from megagpt.planning.cost.memory import RankMemory, rank_memory
from megagpt.planning.cost.performance import Assumptions, estimate
from megagpt.planning.layout import Layout
from megagpt.schema.deepspeed import ZERO_KEY_STAGES, OffloadOptimizerConfig, OffloadParamConfig
from megagpt.schema.idle import NOT_FROM_NVME

Change = Callable[[Layout], Layout | None]
Fits = Callable[[RankMemory], bool]
ENOUGH = 3
Device = Literal["none", "cpu", "nvme"]
DEVICES: tuple[Device, ...] = ("none", "cpu")


def alternatives(
    layout: Layout, assumed: Assumptions, fits: Fits, legal: Callable[[Layout], bool]
) -> list[Layout]:
    """Return the fastest few alternatives that fit and are legal.

    Empty if two changes are not enough.
    """
    axes = [_meshes(layout, assumed), _states(), _recomputes(), _micro_batches(layout)]
    one = [(change,) for axis in axes for change in axis]
    two = [
        pair
        for first, second in itertools.combinations(axes, 2)
        for pair in itertools.product(first, second)
    ]
    for changes in (one, two):
        found = [other for other in _changed(layout, changes) if _fits_somewhere(other, fits)]
        found.sort(key=lambda other: estimate(other, assumed, simulated=False).step_s)
        checked = (other for other in found if legal(other) and _fits_everywhere(other, fits))
        if best := list(itertools.islice(checked, ENOUGH)):
            return best
    return []


def _changed(layout: Layout, changes: Iterable[tuple[Change, ...]]) -> Iterator[Layout]:
    """Yield the layouts that these changes make, each once, without the impossible ones."""
    seen = {layout}
    for combination in changes:
        other: Layout | None = layout
        for change in combination:
            other = change(other) if other is not None else None
        if other is not None and other not in seen:
            seen.add(other)
            yield other


def _fits_everywhere(layout: Layout, fits: Fits) -> bool:
    return all(fits(rank_memory(layout, rank)) for rank in range(layout.pipeline))


def _fits_somewhere(layout: Layout, fits: Fits) -> bool:
    """Return whether the ranks that hold most would fit: the first two and the last."""
    ranks = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
    return all(fits(rank_memory(layout, rank, data_ranks=1)) for rank in ranks)


def _meshes(layout: Layout, assumed: Assumptions) -> list[Change]:
    """Return changes to other tensor and pipeline axes.

    A longer data axis means fewer accumulation steps.
    """
    sizes = itertools.product(divisors(layout.world_size), repeat=2)
    return [
        partial(_to_mesh, tensor, pipeline)
        for tensor, pipeline in sizes
        if layout.model.num_kv_heads % tensor == 0
        and tensor <= assumed.ranks_per_host
        and layout.world_size % (tensor * pipeline) == 0
        and pipeline <= layout.model.num_layers
    ]


def _to_mesh(tensor: int, pipeline: int, layout: Layout) -> Layout | None:
    data = layout.world_size // (tensor * pipeline)
    samples = layout.micro_batch * layout.micro_batches * layout.data
    if samples % (data * layout.micro_batch):
        return None
    virtual = (
        layout.virtual_stages
        if 1 < pipeline <= layout.model.num_layers // layout.virtual_stages
        else 1
    )
    schedule = (
        "1f1b"
        if virtual == 1 and layout.parallel.schedule == "interleaved"
        else layout.parallel.schedule
    )
    changed = layout.with_parallel(
        tensor=tensor,
        pipeline=pipeline,
        virtual_stages=virtual,
        schedule="1f1b" if pipeline == 1 else schedule,
        sequence=layout.parallel.sequence and tensor > 1,
        gradient_reduction="per_step" if pipeline > 1 else "per_micro_batch",
    )
    return replace(changed, data=data, micro_batches=samples // (data * layout.micro_batch))


def _states() -> list[Change]:
    """Return changes to other ZeRO stages, with or without offload of the optimizer state.

    At ZeRO 3 also with or without offload of the parameters.
    """
    choices = itertools.product((1, 2, 3), DEVICES, DEVICES)
    return [
        partial(_to_states, *choice) for choice in choices if choice[0] == 3 or choice[2] == "none"
    ]


def _to_states(stage: int, optimizer: Device, parameters: Device, layout: Layout) -> Layout:
    return with_states(layout, stage, optimizer, parameters)


def with_states(
    layout: Layout,
    stage: int,
    optimizer: Device,
    parameters: Device,
    nvme_path: str | None = None,
) -> Layout:
    """Return the layout at another ZeRO stage, with optimizer state and parameters elsewhere.

    Keys without effect there are dropped. What stays in its place keeps its other keys.
    """
    changes: dict[str, Any] = {
        key: None for key, stages in ZERO_KEY_STAGES.items() if stage not in stages
    }
    if parameters == "nvme":
        changes |= dict.fromkeys(NOT_FROM_NVME)
    if optimizer != layout.zero.optimizer_device:
        path = nvme_path if optimizer == "nvme" else None
        changes["offload_optimizer"] = OffloadOptimizerConfig(device=optimizer, nvme_path=path)
    if parameters != layout.zero.parameter_device:
        path = nvme_path if parameters == "nvme" else None
        changes["offload_param"] = OffloadParamConfig(device=parameters, nvme_path=path)
    return layout.with_zero(stage=stage, **changes)


def _recomputes() -> list[Change]:
    return [partial(_to_recompute, kind) for kind in ("none", "selective", "full")]


def _to_recompute(kind: str, layout: Layout) -> Layout:
    return replace(layout, recompute=kind)


def _micro_batches(layout: Layout) -> list[Change]:
    """Return changes to smaller micro-batches, and more of them."""
    return [
        partial(_to_micro_batch, layout.micro_batch // size)
        for size in divisors(layout.micro_batch)[:-1]
    ]


def _to_micro_batch(parts: int, layout: Layout) -> Layout:
    return replace(
        layout, micro_batch=layout.micro_batch // parts, micro_batches=layout.micro_batches * parts
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, smallest first."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def set_items(written: RunConfig, layout: Layout) -> list[str]:
    """Return the `--set` items that turn a configuration into one with this layout."""
    before = written.megagpt.parallel
    zero = written.zero_optimization
    items = {
        f"megagpt.parallel.{key}": getattr(layout.parallel, key)
        for key in (
            "tensor",
            "pipeline",
            "schedule",
            "virtual_stages",
            "sequence",
            "gradient_reduction",
        )
        if getattr(layout.parallel, key) != getattr(before, key)
    }
    if "gradient_reduction" not in before.model_fields_set:
        items.pop(
            "megagpt.parallel.gradient_reduction", None
        )  # its default depends on the pipeline
    if layout.recompute != written.megagpt.training.recompute:
        items["megagpt.training.recompute"] = layout.recompute
    if layout.micro_batch != written.train_micro_batch_size_per_gpu:
        items["train_micro_batch_size_per_gpu"] = layout.micro_batch
    if written.train_batch_size is None:
        items["train_batch_size"] = layout.micro_batch * layout.micro_batches * layout.data
    if written.gradient_accumulation_steps not in (None, layout.micro_batches):
        items["gradient_accumulation_steps"] = layout.micro_batches
    for key in type(zero).model_fields:
        value = getattr(layout.zero, key)
        acts = layout.zero.stage in ZERO_KEY_STAGES.get(key, (layout.zero.stage,))
        if value != getattr(zero, key) and acts:  # the others are dropped where they do not act
            items[f"zero_optimization.{key}"] = _offload(value) if "offload" in key else value
    if written.aio is not None and "nvme" not in (
        layout.zero.optimizer_device,
        layout.zero.parameter_device,
    ):
        items["aio"] = None
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in items.items()
    ]


def _offload(section: OffloadOptimizerConfig | OffloadParamConfig | None) -> dict[str, Any]:
    if section is None:
        return {"device": "none"}
    return section.model_dump(mode="json", exclude_none=True, exclude_defaults=True) | {
        "device": section.device
    }
