"""A plan as text for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from megagpt.common.text import text_table
from megagpt.planning.cost.memory import RankMemory
from megagpt.planning.cost.model_states import Bytes
from megagpt.planning.cost.performance import Assumptions
from megagpt.planning.flops import adapter_elements
from megagpt.planning.layout import Layout
from megagpt.planning.placement import Place
from megagpt.planning.plan import Alternative, Limits, Plan
from megagpt.planning.price import Budget
from megagpt.planning.schedules import bubble_formula
from megagpt.planning.stages import describe_stage
from megagpt.utils import GIB, human_count, human_duration

FEW_RANKS = 16  # up to this many ranks, show each
SHOWN_STAGES = 8  # columns of memory; with more stages, show the first, the last and the fullest


def text(plan: Plan, budget: Budget = Budget()) -> str:  # noqa: B008  # frozen
    """Return the whole plan as text: the verdict first, alternatives last if it is negative."""
    parts = [
        _verdict(plan),
        *_refusals(plan),
        *_notes(plan),
        _mesh(plan),
        _stages(plan),
        _memory(plan),
        _speed(plan, budget),
    ]
    return "\n\n".join(
        [*parts, assumptions(plan.assumed, plan.limits)]
        + ([] if plan.good else [_alternatives(plan.alternatives)])
    )


def _verdict(plan: Plan) -> str:
    layout = plan.layout
    room = plan.limits.device_gib - plan.limits.reserve_gib
    legal = "refused" if plan.refusals else "legal"
    fits = "it fits" if plan.fits_device and plan.fits_host else "IT DOES NOT FIT"
    used = f"{plan.device_gib:.1f} of {room:.1f} GiB a device"
    of_host = f"{plan.host_gib:.1f} of {plan.limits.host_gib:.0f} GiB a host"
    if plan.limits.shared:
        used = of_host
    elif plan.host_gib:
        used += f", {of_host}"
    mesh = (
        f"pipeline {layout.pipeline} x data {layout.data} x tensor {layout.tensor}; ZeRO "
        f"{layout.zero.stage}"
    )
    batch = f"{layout.micro_batch} x {layout.micro_batches} micro-batches x {layout.data} replicas"
    return (
        f"{plan.source}: {legal}; {fits}: {used}\n"
        f"{human_count(layout.model.num_parameters)} parameters{_adapters(layout)} on "
        f"{layout.world_size} ranks: {mesh}\n"
        f"batch {plan.config.train_batch_size} = {batch}; recomputation {layout.recompute}"
    )


def _adapters(layout: Layout) -> str:
    """Return what is trained of a model that adapters change."""
    if layout.lora is None:
        return ""
    elements = layout.model.num_layers * adapter_elements(layout.lora, layout.model)
    return f", frozen, and {human_count(elements)} of adapters"


def mesh_line(layout: Layout) -> str:
    """Return a layout in a line, without what is absent."""
    zero = layout.zero
    words = [f"pipeline {layout.pipeline} x data {layout.data} x tensor {layout.tensor}"]
    if layout.parallel.sequence:
        words.append("sequence-parallel")
    if layout.pipeline > 1:
        chunks = f" of {layout.virtual_stages} stages a rank" if layout.virtual_stages > 1 else ""
        words.append(f"{layout.schedule}{chunks}")
    words.append(f"ZeRO {zero.stage}")
    for what, place in (
        ("optimizer", zero.optimizer_device),
        ("parameters", zero.parameter_device),
    ):
        if place != "none":
            words.append(f"{what} on {place}")
    words.append(f"{layout.micro_batches} micro-batches of {layout.micro_batch}")
    words.append(f"recomputation {layout.recompute}")
    return ", ".join(words)


def _refusals(plan: Plan) -> Iterator[str]:
    if plan.refusals:
        yield "\n".join(["refused:", *(f"  {line}" for line in plan.refusals)])


def _notes(plan: Plan) -> Iterator[str]:
    if plan.notes:
        yield "\n".join(["notes:", *(f"  {line}" for line in plan.notes)])


def _mesh(plan: Plan) -> str:
    """Return each rank if there are few, else the hosts of each pipeline rank."""
    places = plan.placement.places
    if len(places) <= FEW_RANKS:
        rows = [
            [f"{p.rank}", p.host, f"{p.slot}", f"{p.pipeline}", f"{p.data}", f"{p.tensor}"]
            for p in places
        ]
        lines = text_table([["rank", "host", "slot", "pipeline", "data", "tensor"], *rows])
    else:
        lines = [
            _run_of_ranks(plan.placement.of_pipeline_rank(rank), rank)
            for rank in range(plan.layout.pipeline)
        ]
    split = plan.placement.split_tensor_groups()
    if split:
        hosts = " and ".join(dict.fromkeys(place.host for place in split[0]))
        lines.append(
            f"warning: {len(split)} tensor groups cross hosts, such as ranks "
            f"{split[0][0].rank}-{split[0][-1].rank} on {hosts}: every layer waits for the "
            "network; set megagpt.parallel.tensor to a divisor of the slots of a host"
        )
    return "\n".join(["mesh:", *(f"  {line}" for line in lines)])


def _run_of_ranks(places: Sequence[Place], pipeline_rank: int) -> str:
    first, last = places[0], places[-1]
    where = f"{first.host} slot {first.slot} to {last.host} slot {last.slot}"
    return f"pipeline {pipeline_rank}: ranks {first.rank}-{last.rank}, {where}"


def _stages(plan: Plan) -> str:
    """Return what each stage holds, with its shares of work and parameters."""
    layout = plan.layout
    lines = [
        f"stage {stage} on pipeline {stage % layout.pipeline}: "
        f"{describe_stage(layout.model, layers)}"
        for stage, layers in enumerate(layout.stages)
    ]
    if len(lines) > FEW_RANKS:
        lines = [*lines[:3], f"... {len(lines) - 6} more ...", *lines[-3:]]
    return "\n".join(["stages, with their shares:", *(f"  {line}" for line in lines)])


def _memory(plan: Plan) -> str:
    """Return a table of GiB by kind, one column a pipeline rank; lines of zeros are left out."""
    shown = _shown(plan.memory)
    columns = [[*memory.lines(), ("peak", memory.peak)] for memory in shown]
    rows = [
        [columns[0][line][0], *(_gib(column[line][1]) for column in columns)]
        for line in range(len(columns[0]))
        if any(vars(column[line][1]) != vars(Bytes()) for column in columns)
    ]
    rows.append(["peak is in", *(memory.peak_phase for memory in shown)])
    head = ["GiB of a rank", *(f"pipeline {memory.pipeline_rank}" for memory in shown)]
    fullest = _fullest(plan.memory)
    note = f"most: pipeline rank {fullest.pipeline_rank}; +H in host memory, +N on NVMe"
    return "\n".join([f"memory ({note}):", *(f"  {line}" for line in text_table([head, *rows]))])


def _shown(memory: Sequence[RankMemory]) -> list[RankMemory]:
    if len(memory) <= SHOWN_STAGES:
        return list(memory)
    return [memory[rank] for rank in sorted({0, _fullest(memory).pipeline_rank, len(memory) - 1})]


def _fullest(memory: Sequence[RankMemory]) -> RankMemory:
    return max(memory, key=lambda rank: rank.peak.device)


def _gib(size: Bytes) -> str:
    parts = [f"{size.device / GIB:.2f}"] if size.device or not (size.host or size.nvme) else []
    parts += [f"{size.host / GIB:.2f} H"] if size.host else []
    parts += [f"{size.nvme / GIB:.2f} N"] if size.nvme else []
    return " + ".join(parts)


def _speed(plan: Plan, budget: Budget) -> str:
    layout = plan.layout
    result = plan.estimate
    sent = max(plan.sent, key=lambda of_rank: sum(vars(of_rank).values()))
    axes = {
        "data, parameters": sent.gathers,
        "data, gradients": sent.reductions,
        "tensor": sent.tensor,
        "pipeline": sent.pipeline,
    }
    volume = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in axes.items())
    idle = bubble_formula(layout.pipeline, layout.virtual_stages, layout.micro_batches)
    length = budget.line(result, layout.world_size)
    device_rate = human_count(result.tokens_per_s / layout.world_size)
    parts = (
        f"passes {result.passes_s:.2f} + reduction {result.reduction_s:.2f} + update "
        f"{result.update_s:.2f}"
    )
    work = ", ".join(
        f"{name} {seconds / result.step_s:.0%}"
        for name, seconds in result.parts.items()
        if seconds >= result.step_s / 200
    )
    return (
        "speed (an estimate, not a measurement):\n"
        f"  step {result.step_s:.2f} s = {parts}\n  of the slowest rank: {work}\n"
        f"  {_length(plan)}{human_count(result.tokens_per_s)} tokens/s, {device_rate} a device, "
        f"MFU {result.mfu:.0%}\n"
        f"  bubble {result.bubble:.1%} of the passes ({idle:.1%} with equal stages)\n"
        f"  GB sent by a rank in a step: {volume}" + (f"\n  {length}" if length else "")
    )


def _length(plan: Plan) -> str:
    """Return how long the whole run is, and takes, for the beginning of a line."""
    if plan.steps is None:
        return ""
    return f"{plan.steps:,} steps take {human_duration(plan.steps * plan.estimate.step_s)}; "


def assumptions(assumed: Assumptions, limits_: Limits) -> str:
    """Return all rates and limits that a plan assumes."""
    words = [f"{name} {value:g}" for name, value in vars(assumed).items()]
    limits = [f"{name} {value:g}" for name, value in vars(limits_).items() if name.endswith("_gib")]
    if limits_.pins != "torch" and not limits_.shared:
        limits.append("page-locked memory by DeepSpeed's own allocator")
    return f"assumed (see --help):\n  {', '.join(words)}\n  {', '.join(limits)}"


def _alternatives(found: Sequence[Alternative]) -> str:
    if not found:
        return (
            "found no legal run that fits within two changes; search all of them with --search, or "
            "use more ranks, a smaller model or a smaller batch"
        )
    lines = [
        f"  --set {shlex.join(other.items)}\n"
        f"      {other.peak_gib:.1f} GiB a device, step {other.estimate.step_s:.2f} s, MFU "
        f"{other.estimate.mfu:.0%}"
        for other in found
    ]
    return "\n".join(
        ["these are legal and fit, with the same ranks and batch, fastest first:", *lines]
    )
