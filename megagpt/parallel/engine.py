"""The one place that builds a DeepSpeedEngine.

It builds the model, the ZeRO partitioning, the optimizer groups and the scheduler.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from megagpt.cluster.launchers import adopt_launch
from megagpt.config import ResolvedConfig
from megagpt.distributed import COLLECTIVE_TIMEOUT, Mesh
from megagpt.lora import build, is_of_an_adapter, starting_value
from megagpt.model import GPT, compile_blocks, decayed, global_names, replace_parameters
from megagpt.parallel import compat, internals, ops, tensor_parallel
from megagpt.parallel.device import set_cuda_defaults
from megagpt.parallel.rectangles import Box
from megagpt.parallel.tensor_parallel import TensorAxis
from megagpt.planning.stages import cut
from megagpt.utils import RankEnvironment

log = logging.getLogger(__name__)

# The time that the watch may take, after it noticed a hang, to diagnose it and end the run.
WATCH_SPEAKS_S = 120.0


@dataclass(frozen=True)
class FrozenBase:
    """The weights that adapters change.

    ``weight`` gives a rectangle of a weight by its global name, fp32 on the CPU. ``sha256`` is of
    all weights.
    """

    weight: Callable[[str, Box], Tensor]
    sha256: str


@dataclass(frozen=True)
class Engine:
    """A DeepSpeedEngine with the facts that the rest of the trainer needs."""

    deepspeed: DeepSpeedEngine
    mesh: Mesh
    config: ResolvedConfig
    names: compat.Names
    # By parameter name: the rectangle of the logical tensor that this rank holds.
    boxes: dict[str, Box]
    # The ranks that share each layer; None without tensor parallelism.
    tensor_axis: TensorAxis | None
    # The ranks that hold the two copies of the tied weight; None if there is one copy.
    tied_group: dist.ProcessGroup | None
    # Begins ZeRO-3's trace of a pipeline step; does nothing if no trace is needed.
    begin_trace: Callable[[], None]
    # Parameters whose gradients the ranks of the tensor axis sum once a step.
    partial: list[nn.Parameter]
    # Groups of this rank and one other, by the other's global rank.
    neighbour_groups: dict[int, dist.ProcessGroup]
    # Pipeline schedules, by number of micro-batches.
    schedules: dict[int, Any] = field(default_factory=dict)
    # SHA-256 of the weights that adapters change; None if the whole model is trained.
    base_sha256: str | None = None

    @property
    def chunks(self) -> list[GPT]:
        """The parts of the model on this rank, in stage order.

        Without a pipeline, the only one is the whole model.
        """
        return self.deepspeed.module.parts

    @property
    def num_stages(self) -> int:
        """The number of pipeline stages over all ranks."""
        return self.mesh.pipeline_size * self.config.megagpt.parallel.virtual_stages

    @property
    def stages(self) -> range:
        """The pipeline stages of this rank's chunks."""
        return self.mesh.stages(self.config.megagpt.parallel.virtual_stages)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.config.zero_optimization.stage

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return training_device()

    def close(self) -> None:
        """Release all memory, hooks and groups of the engine; every rank must call it."""
        compat.destroy(self.deepspeed)
        for group in (self.tied_group, *self.neighbour_groups.values()):
            if group is not None:
                dist.destroy_process_group(group)
        self.mesh.close()
        gc.collect()

    def logical_shape(self, name: str) -> torch.Size:
        """Return a parameter's shape in the whole model."""
        with torch.device("meta"):
            return build(self.config.megagpt).get_parameter(name).shape

    def buckets(self) -> list[compat.Bucket]:
        """Return the optimizer state that this rank holds."""
        return compat.buckets(self.deepspeed, self.names)


def training_device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device(get_accelerator().device_name(RankEnvironment.read().local_rank))


def collective_timeout(config: ResolvedConfig) -> timedelta:
    """Return how long a rank waits in one collective.

    It is longer than the watch waits, so that the watch can report which ranks differ.
    """
    return max(
        COLLECTIVE_TIMEOUT,
        timedelta(seconds=config.megagpt.monitor.stall_timeout_s + WATCH_SPEAKS_S),
    )


def join_ranks(config: ResolvedConfig | None = None) -> None:
    """Join the other ranks as the launcher's environment says; without a launcher, run alone.

    Raise UserError if DeepSpeed's or torch's internals are unknown. With ``config`` None, the
    internals that only some configurations use are checked later, by ``build_engine``.
    """
    launch = adopt_launch()
    set_cuda_defaults()
    ops.use_private_extensions()
    _require_known_internals(config)
    compat.suppress_shared_memory_collectives()
    compat.suppress_compilation_of_muon()
    compat.silence_cpu_adam()
    get_accelerator().set_device(launch.local_rank)
    share_cores()
    deepspeed.init_distributed(
        timeout=COLLECTIVE_TIMEOUT if config is None else collective_timeout(config)
    )


def _require_known_internals(config: ResolvedConfig | None) -> None:
    """Raise UserError for unknown internals; if the user allows them, warn once.

    Only the first rank's warning reaches the screen.
    """
    launch = adopt_launch()
    parts = internals.parts_used(config, launch.launcher)
    if (unknown := internals.require_known_internals(parts)) is not None:
        _warn_once(unknown, logging.INFO if launch.rank else logging.WARNING)


@cache
def _warn_once(message: str, level: int) -> None:
    log.log(level, message)


def share_cores() -> None:
    """On a CPU, divide the cores among this host's ranks, unless OMP_NUM_THREADS is set."""
    ranks_here = RankEnvironment.read().local_size
    if "OMP_NUM_THREADS" not in os.environ and ranks_here > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def build_mesh(config: ResolvedConfig) -> Mesh:
    """Return the configured mesh over all ranks; every rank must call it."""
    parallel = config.megagpt.parallel
    data = dist.get_world_size() // parallel.model_parallel_size
    mesh = Mesh(parallel.pipeline, data, parallel.tensor, get_accelerator().device_name())
    for group in mesh.groups:
        compat.set_timeout(group, collective_timeout(config))
    return mesh


class Chunks(nn.Module):
    """A rank's parts of the model under one engine, so that clipping and stepping cover all."""

    def __init__(self, chunks: Iterable[GPT]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    @property
    def parts(self) -> list[GPT]:
        """The chunks, typed."""
        return [cast(GPT, chunk) for chunk in self.chunks]

    def forward(self, *inputs: Tensor, chunk: int = 0, **context: Any) -> Tensor:
        return self.chunks[chunk](*inputs, **context)


def stage_layers(config: ResolvedConfig) -> list[range]:
    """Return the layers of every pipeline stage."""
    parallel = config.megagpt.parallel
    return cut(config.megagpt.model, parallel.pipeline * parallel.virtual_stages)


def tied_copies(model: Chunks) -> set[nn.Parameter]:
    """Return the head weights that are copies of an embedding on another rank.

    If both are on this rank, make them one parameter and return the empty set.
    """
    embedding = next((part.embedding for part in model.parts if part.embedding is not None), None)
    head = next((part.head for part in model.parts if part.head is not None), None)
    if head is None or not model.parts[0].config.tie_embeddings:
        return set()
    if embedding is None:
        return {head.weight}
    head.weight = embedding.tokens.weight
    return set()


def tied_group(config: ResolvedConfig, mesh: Mesh) -> dist.ProcessGroup | None:
    """Return the group of the two ranks that hold the copies of a tied weight; collective.

    None if embeddings are not tied, if they are frozen, if there is one pipeline rank, and on ranks
    that hold no copy. Every rank must call it.
    """
    frozen = config.megagpt.training.lora is not None
    if not config.megagpt.model.tie_embeddings or frozen or mesh.pipeline_size == 1:
        return None
    ends = mesh.device_mesh.mesh[[0, -1]].flatten(1).T.tolist()
    timeout = collective_timeout(config)
    groups = {tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in ends}
    return next((group for ranks, group in groups.items() if mesh.rank in ranks), None)


def neighbour_groups(config: ResolvedConfig, mesh: Mesh) -> dict[int, dist.ProcessGroup]:
    """Return a group with each neighbour in an interleaved pipeline, by global rank; collective.

    Every rank must call it. NCCL executes a communicator's operations in order. The interleaved
    schedule posts receives long before they are due, so a send to one neighbour would wait behind a
    receive from the other. With equal stages, two per rank, and 2 p micro-batches, that makes a
    step 1.23 times as long at p = 4 and 1.47 times at p = 8, not counting transfers
    (tests/parallel/test_pipeline_order.py). 1F1B posts only what is due and loses nothing.
    """
    if config.megagpt.parallel.schedule != "interleaved" or mesh.pipeline_size <= 2:
        return {}
    pipelines = mesh.device_mesh.mesh.flatten(1).T.tolist()  # each a list of pipeline_size ranks
    pairs = [
        pair for ranks in pipelines for pair in zip(ranks, [*ranks[1:], ranks[0]], strict=True)
    ]
    timeout = collective_timeout(config)
    groups = {pair: dist.new_group(sorted(pair), timeout=timeout) for pair in pairs}
    return {sum(pair) - mesh.rank: group for pair, group in groups.items() if mesh.rank in pair}


def compute_dtype(config: ResolvedConfig) -> torch.dtype:
    """Return the dtype of the model's parameters and matrix products."""
    if config.bf16.enabled:
        return torch.bfloat16
    return torch.float16 if config.fp16.enabled else torch.float32


def supported_formats() -> set[str]:
    """Return which of bf16 and fp16 DeepSpeed accepts on this device."""
    accelerator = get_accelerator()
    answers = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    return {name for name, supported in answers.items() if supported}


def build_engine(config: ResolvedConfig, mesh: Mesh, base: FrozenBase | None = None) -> Engine:
    """Initialise the model directly into its ZeRO shards and wrap it; every rank must call it.

    ``base`` has the weights that adapters change; None: they are initialised too. Peak memory is
    this rank's shard plus one parameter. Raise UserError if an op that the configuration needs
    cannot be built.
    """
    _require_known_internals(config)
    needed = ops.needed_ops(config, get_accelerator().device_name())
    ops.require_tools(needed)
    ops.build([op for op in needed if not ops.missing_tools(op)])
    ds_config = deepspeed_config(config, get_accelerator().device_name())
    compat.scope_trace_check(mesh)
    axis = (
        TensorAxis(mesh.tensor_group, config.megagpt.parallel.sequence)
        if mesh.tensor_size > 1
        else None
    )
    model, names, held, partial = build_model(config, mesh, axis, ds_config, base)
    with compat.vendor_without_processes():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, names),
            config=ds_config,
            mpu=mesh,
            dist_init_required=False,
        )
    compat.keep_least_loss_scale(engine)
    zero = config.zero_optimization
    if zero.parameter_device == "nvme":
        compat.read_when_needed(engine)
    begin_trace = nothing
    if mesh.pipeline_size > 1:
        compat.require_equal_tiles(engine, mesh)
        if zero.stage == 3 and zero.parameter_device != "nvme":
            begin_trace = compat.trace_whole_steps(engine)
    return Engine(
        deepspeed=engine,
        mesh=mesh,
        config=config,
        names=names,
        boxes=held,
        tensor_axis=axis,
        tied_group=tied_group(config, mesh),
        begin_trace=begin_trace,
        partial=partial,
        neighbour_groups=neighbour_groups(config, mesh),
        base_sha256=base.sha256 if base is not None else None,
    )


def nothing() -> None:
    """Do nothing (used when no trace is needed)."""


def build_model(
    config: ResolvedConfig,
    mesh: Mesh,
    axis: TensorAxis | None,
    ds_config: dict[str, Any],
    base: FrozenBase | None = None,
) -> tuple["Chunks", compat.Names, dict[str, Box], list[nn.Parameter]]:
    """Return this rank's initialised chunks, the global names, and its rectangles by name.

    The last are the parameters whose gradients the tensor axis must sum once a step.
    """
    spans = stage_layers(config)
    own = [spans[stage] for stage in mesh.stages(config.megagpt.parallel.virtual_stages)]
    with torch.device("meta"):
        model = Chunks(build(config.megagpt, layers) for layers in own)
    templates = {
        parameter: name for part in model.parts for parameter, name in global_names(part).items()
    }
    copies = tied_copies(model)
    split: dict[nn.Parameter, int] = {}
    if axis is not None:
        for part in model.parts:
            split |= tensor_parallel.split_dimensions(part)
            tensor_parallel.share(part, axis)
    held = {name: tensor_parallel.box(p.shape, split.get(p), axis) for p, name in templates.items()}
    dtype = compute_dtype(config)
    device = training_device()
    seed = config.megagpt.training.seed
    partitioner = (
        compat.Partitioner(ds_config, mesh) if config.zero_optimization.stage == 3 else None
    )

    def allocate(template: nn.Parameter) -> nn.Parameter:
        name = templates[template]
        if base is not None and not is_of_an_adapter(name):
            share = base.weight(name, held[name])
        else:
            value = starting_value(name, template.shape, config.megagpt.model, seed)
            share = value[tuple(slice(*span) for span in held[name])]
        parameter = nn.Parameter(
            share.to(device=device, dtype=dtype, memory_format=torch.contiguous_format, copy=True),
            requires_grad=template.requires_grad,
        )
        compat.count(
            parameter, (template in split or mesh.tensor_rank == 0) and template not in copies
        )
        if partitioner is not None:
            partitioner.partition(parameter)
        return parameter

    allocated = replace_parameters(model, allocate)
    if config.megagpt.training.compile == "blocks":
        for part in model.parts:
            compile_blocks(part)
    names = {allocated[template]: name for template, name in templates.items()}
    return model, names, held, _summed_once(config, model, axis)


def _summed_once(
    config: ResolvedConfig, model: "Chunks", axis: TensorAxis | None
) -> list[nn.Parameter]:
    """Return the partial parameters whose whole gradients wait for the end of a step.

    Elsewhere ZeRO takes each gradient in backward, so a hook must sum it before.
    """
    if axis is None:
        return []
    partial = [p for part in model.parts for p in tensor_parallel.partial_parameters(part, axis)]
    zero = config.zero_optimization
    if zero.stage == 0 or config.megagpt.parallel.gradient_reduction == "per_step":
        return partial
    for parameter in partial:
        parameter.register_hook(axis.sum_gradient)
    return []


def parameter_groups(model: nn.Module, names: compat.Names) -> list[dict[str, Any]]:
    """Return two groups: matrices with weight decay; biases and norm weights without.

    Frozen parameters are in none; a group without parameters is left out.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[0 if decayed(names[parameter]) else 1].append(parameter)
    described: list[dict[str, Any]] = [
        {"params": groups[0]},
        {"params": groups[1], "weight_decay": 0.0},
    ]
    return [group for group in described if group["params"]]


def deepspeed_config(config: ResolvedConfig, device_type: str) -> dict[str, Any]:
    """Return DeepSpeed's sections, with the Adam implementation that works on this machine."""
    result = config.deepspeed_dict()
    result["steps_per_print"] = None
    params = result["optimizer"]["params"]
    if not config.optimizer.params.torch_adam and (reason := _why_torch_adam(config, device_type)):
        log.warning("optimizer: using torch's Adam instead of DeepSpeed's: %s", reason)
        params["torch_adam"] = True
        result["zero_force_ds_cpu_optimizer"] = False
    if params.get("torch_adam"):
        params["fused"] = True  # one pass over memory; DeepSpeed hands it on to torch.optim
    return result


def _why_torch_adam(config: ResolvedConfig, device_type: str) -> str | None:
    """Return why DeepSpeed's compiled Adam cannot be used, or None if it can."""
    for op in ops.needed_ops(config, device_type):
        if ops.has_substitute(op) and (reason := ops.missing_tools(op)):
            return reason
    offload = config.zero_optimization.offload_optimizer
    if device_type == "cpu" and (offload is None or offload.device == "none"):
        return "DeepSpeed has no Adam for a CPU without offload"
    return None
