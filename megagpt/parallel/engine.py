"""The one place that builds a DeepSpeedEngine: model, ZeRO partitioning, optimizer groups,
scheduler.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
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
from megagpt.model import GPT, decayed, global_names, initial_value, replace_parameters
from megagpt.parallel import compat, internals, ops, tensor_parallel
from megagpt.parallel.device import set_cuda_defaults
from megagpt.parallel.rectangles import Box
from megagpt.parallel.tensor_parallel import TensorAxis
from megagpt.planning.stages import cut
from megagpt.utils import RankEnvironment

log = logging.getLogger(__name__)

WATCH_SPEAKS_S = (
    120.0  # what the watch may take, beyond the time that it waits, to look, write and end the run
)


@dataclass(frozen=True)
class Engine:
    """A DeepSpeedEngine with what the rest of the trainer wants to know of it."""

    deepspeed: DeepSpeedEngine
    mesh: Mesh
    config: ResolvedConfig
    names: compat.Names
    boxes: dict[
        str, Box
    ]  # what this rank's share of each of its parameters is of the logical tensor
    tensor_axis: TensorAxis | None  # the ranks that share each layer, where there are several
    tied_group: (
        dist.ProcessGroup | None
    )  # of the ranks that hold copies of the tied weight, where there are two
    begin_trace: Callable[
        [], None
    ]  # of ZeRO-3 over a whole step of a pipeline; elsewhere it does nothing
    neighbour_groups: dict[
        int, dist.ProcessGroup
    ]  # of this rank and one other, by the other's global rank
    schedules: dict[int, Any] = field(
        default_factory=dict
    )  # pipeline schedules by number of micro-batches

    @property
    def chunks(self) -> list[GPT]:
        """This rank's parts of the model, in the order of its stages: one, the whole, without a
        pipeline.
        """
        return self.deepspeed.module.parts

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.mesh.pipeline_size * self.config.megagpt.parallel.virtual_stages

    @property
    def stages(self) -> range:
        """The stages that this rank's chunks are."""
        return self.mesh.stages(self.config.megagpt.parallel.virtual_stages)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage."""
        return self.config.zero_optimization.stage

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return training_device()

    def close(self) -> None:
        """Leave the process as if the engine had never been; every rank must call it."""
        compat.destroy(self.deepspeed)
        for group in (self.tied_group, *self.neighbour_groups.values()):
            if group is not None:
                dist.destroy_process_group(group)
        self.mesh.close()
        gc.collect()

    def logical_shape(self, name: str) -> torch.Size:
        """The shape that a parameter has in the whole model."""
        with torch.device("meta"):
            return GPT(self.config.megagpt.model).get_parameter(name).shape

    def buckets(self) -> list[compat.Bucket]:
        """The optimizer state that this rank holds."""
        return compat.buckets(self.deepspeed, self.names)


def training_device() -> torch.device:
    """Where this rank computes."""
    return torch.device(get_accelerator().device_name(RankEnvironment.read().local_rank))


def collective_timeout(config: ResolvedConfig) -> timedelta:
    """How long a rank waits for the others in one collective: longer than the watch, which says
    who differs, waits.
    """
    return max(
        COLLECTIVE_TIMEOUT,
        timedelta(seconds=config.megagpt.monitor.stall_timeout_s + WATCH_SPEAKS_S),
    )


def join_ranks(config: ResolvedConfig | None = None) -> None:
    """Join the other ranks, as a launcher's environment says; alone where there is no launcher.

    Raise UserError where DeepSpeed's or torch's internals are unknown; `build_engine` checks those
    that only some configurations use where `config` is None.
    """
    launch = adopt_launch()
    set_cuda_defaults()
    ops.use_private_extensions()
    if (
        unknown := internals.require_known_internals(internals.parts_used(config, launch.launcher))
    ) is not None:
        log.log(logging.INFO if launch.rank else logging.WARNING, unknown)
    compat.suppress_shared_memory_collectives()
    compat.silence_cpu_adam()
    get_accelerator().set_device(launch.local_rank)
    share_cores()
    deepspeed.init_distributed(
        timeout=COLLECTIVE_TIMEOUT if config is None else collective_timeout(config)
    )


def share_cores() -> None:
    """On a CPU, give each rank of this host its part of the cores, unless the user decided."""
    ranks_here = RankEnvironment.read().local_size
    if "OMP_NUM_THREADS" not in os.environ and ranks_here > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def build_mesh(config: ResolvedConfig) -> Mesh:
    """The mesh of the configuration over all ranks; every rank must call it."""
    parallel = config.megagpt.parallel
    data = dist.get_world_size() // parallel.model_parallel_size
    mesh = Mesh(parallel.pipeline, data, parallel.tensor, get_accelerator().device_name())
    for group in mesh.groups:
        compat.set_timeout(group, collective_timeout(config))
    return mesh


class Chunks(nn.Module):
    """A rank's parts of the model under one engine, so that clipping and stepping see them
    together.
    """

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
    """The layers of every pipeline stage."""
    parallel = config.megagpt.parallel
    return cut(config.megagpt.model, parallel.pipeline * parallel.virtual_stages)


def tied_copies(model: Chunks) -> set[nn.Parameter]:
    """Head weights that are copies of an embedding on another rank; where both are here, they
    become one parameter.
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
    """The ranks of the first and last stage, where tied embeddings lie on two of them; every
    rank must call it.
    """
    if not config.megagpt.model.tie_embeddings or mesh.pipeline_size == 1:
        return None
    ends = mesh.device_mesh.mesh[[0, -1]].flatten(1).T.tolist()
    timeout = collective_timeout(config)
    groups = {tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in ends}
    return next((group for ranks, group in groups.items() if mesh.rank in ranks), None)


def neighbour_groups(config: ResolvedConfig, mesh: Mesh) -> dict[int, dist.ProcessGroup]:
    """Return a group with each neighbour in an interleaved pipeline, by global rank; every rank
    must call it.

    NCCL does a communicator's operations in order. The interleaved schedule posts receives long
    before they are due, and a send to one neighbour would wait behind a receive from the other:
    with equal stages, two of them a rank and 2 p micro-batches, a step of p = 4 takes 1.23 times as
    long, of p = 8 1.47 times, before transfers are counted (tests/parallel/test_pipeline_order.py).
    1F1B posts what is due, and loses nothing.
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
    """The type of the model's parameters and matrix products."""
    if config.bf16.enabled:
        return torch.bfloat16
    return torch.float16 if config.fp16.enabled else torch.float32


def build_engine(config: ResolvedConfig, mesh: Mesh) -> Engine:
    """Initialise the model straight into its ZeRO shards and wrap it; every rank must call it.

    Peak memory is this rank's shard plus one parameter. Raises UserError where an op that the
    configuration needs cannot be built.
    """
    internals.require_known_internals(internals.parts_used(config, adopt_launch().launcher))
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
    model, names, held = build_model(config, mesh, axis, ds_config)
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
    groups = tied_group(config, mesh), neighbour_groups(config, mesh)
    return Engine(engine, mesh, config, names, held, axis, groups[0], begin_trace, groups[1])


def nothing() -> None:
    """Where there is nothing to begin."""


def build_model(
    config: ResolvedConfig, mesh: Mesh, axis: TensorAxis | None, ds_config: dict[str, Any]
) -> tuple["Chunks", compat.Names, dict[str, Box]]:
    """This rank's part of the initialised model, the global name of each parameter, and what its
    share is by name.
    """
    spans = stage_layers(config)
    own = [spans[stage] for stage in mesh.stages(config.megagpt.parallel.virtual_stages)]
    with torch.device("meta"):
        model = Chunks(
            GPT(config.megagpt.model, config.megagpt.training.recompute, layers) for layers in own
        )
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
    dtype, device = compute_dtype(config), training_device()
    seed = config.megagpt.training.seed
    partitioner = (
        compat.Partitioner(ds_config, mesh) if config.zero_optimization.stage == 3 else None
    )

    def allocate(template: nn.Parameter) -> nn.Parameter:
        name = templates[template]
        value = initial_value(name, template.shape, config.megagpt.model, seed)
        share = value[tuple(slice(*span) for span in held[name])]
        parameter = nn.Parameter(
            share.to(device=device, dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        )
        compat.count(
            parameter, (template in split or mesh.tensor_rank == 0) and template not in copies
        )
        if partitioner is not None:
            partitioner.partition(parameter)
        return parameter

    allocated = replace_parameters(model, allocate)
    if axis is not None and axis.sequence:
        for part in model.parts:
            tensor_parallel.sum_partial_gradients(part, axis)
    return model, {allocated[template]: name for template, name in templates.items()}, held


def parameter_groups(model: nn.Module, names: compat.Names) -> list[dict[str, Any]]:
    """Matrices with the configured weight decay, the rest (biases, norm weights) without."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        groups[0 if decayed(names[parameter]) else 1].append(parameter)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]


def deepspeed_config(config: ResolvedConfig, device_type: str) -> dict[str, Any]:
    """What DeepSpeed is given: its own sections, with the optimizer implementation that works on
    this machine.
    """
    result = config.deepspeed_dict()
    result["steps_per_print"] = None
    if not config.optimizer.params.torch_adam and (reason := _why_torch_adam(config, device_type)):
        log.warning("Adam is torch's own: %s", reason)
        result["optimizer"]["params"]["torch_adam"] = True
        result["zero_force_ds_cpu_optimizer"] = False
    return result


def _why_torch_adam(config: ResolvedConfig, device_type: str) -> str | None:
    """Why DeepSpeed's compiled Adam is not used, or None where it is."""
    for op in ops.needed_ops(config, device_type):
        if ops.has_substitute(op) and (reason := ops.missing_tools(op)):
            return reason
    offload = config.zero_optimization.offload_optimizer
    if device_type == "cpu" and (offload is None or offload.device == "none"):
        return "DeepSpeed has none for a CPU without offload"
    return None
