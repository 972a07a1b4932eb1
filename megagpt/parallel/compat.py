"""Every use of DeepSpeed's internals, in one file: what is done, why, and the line it relies on.

The rest of the project sees ``Bucket``: a flat run of optimizer state that this rank holds,
whatever the ZeRO stage and wherever it lies (device, host memory, NVMe). Paths below are relative
to the ``deepspeed`` package, lines are those of 0.19.8; ``internals.py`` checks at the start that
the installed files are those. Lines of torch's files are those of 2.13; comments say where 2.11
differs.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import cpu_adam
from deepspeed.runtime import compiler
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
)
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.pipelining import PipelineStage, schedules

from megagpt.utils import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
Names = dict[nn.Parameter, str]  # the global name of each parameter


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long collectives of a group may take.

    DeviceMesh gives its groups torch's default, and there is no public way to change it
    (torch/distributed/distributed_c10d.py, _set_pg_timeout).
    """
    distributed_c10d._set_pg_timeout(timeout, group)


def suppress_shared_memory_collectives() -> None:
    """Keep ``init_distributed`` from compiling an op that training never calls.

    On CPUs it builds a shared-memory all-reduce, which only inference uses (comm/torch.py:47, 207).
    That takes 75 s on two cores and fails without a compiler. An op listed as incompatible is
    skipped.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def suppress_compilation_of_muon() -> None:
    """Keep ``initialize`` from importing torch's compiler: 1 s of CPU and 600 modules per rank.

    Each ZeRO optimizer imports Muon to recognise it (zero/utils.py:71), and Muon asks torch to
    compile its functions as it is imported (zero/muon/original_muon.py:50). No run here uses Muon.
    """
    compiling = compiler.compile
    compiler.compile = lambda **options: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiling


def silence_cpu_adam() -> None:
    """Keep CPU Adam from printing its settings from C++.

    It prints past the log and through the live table where DeepSpeed's logger passes info messages
    (ops/adam/cpu_adam.py:98), which the rank's log needs.
    """
    cpu_adam.should_log_le = lambda level: False


@contextmanager
def vendor_without_processes() -> Iterator[None]:
    """Keep CPU Adam from starting processes to learn the processor's vendor.

    It wants the vendor to warn of fp16 on AMD (ops/adam/cpu_adam.py:76). py-cpuinfo starts three
    processes for that, a Python among them: 0.4 s of CPU for each engine. The kernel has it in a
    file.
    """
    answer = types.SimpleNamespace(get_cpu_info=lambda: {"vendor_id_raw": _vendor()})
    imported = sys.modules.get("cpuinfo")
    sys.modules["cpuinfo"] = cast(types.ModuleType, answer)
    try:
        yield
    finally:
        if imported is None:
            del sys.modules["cpuinfo"]
        else:
            sys.modules["cpuinfo"] = imported


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(named, "unknown")


class Partitioner:
    """Partitions single parameters over the data axis for ZeRO-3, as soon as each has its values.

    ``zero.Init`` as a context partitions what a constructor allocates, before it has values, and
    calls ``Module.apply`` with broadcasts from global rank 0, which fails in other groups. Its
    conversion of a single parameter (zero/partition_parameters.py:1209) has neither problem.
    """

    def __init__(self, ds_config: dict[str, Any], mesh: Any) -> None:
        self._init = deepspeed.zero.Init(
            module=nn.Module(),
            data_parallel_group=mesh.data_group,
            config_dict_or_path=ds_config,
            mpu=mesh,
        )

    def partition(self, parameter: nn.Parameter) -> None:
        """Leave this rank its shard of the parameter; every rank of the data axis must call it."""
        self._init._convert_to_zero_parameters([parameter])


def destroy(engine: DeepSpeedEngine) -> None:
    """Destroy an engine so that nothing of it stays in the process.

    ZeRO-3 replaces ``torch.nn.functional.linear`` for good (zero/partition_parameters.py:419). What
    the process trains afterwards must not use it: torch 2.11 compiles its gradient wrongly. ZeRO-3
    pushes the module on a stack (zero/parameter_offload.py:315) and never pops it, and a
    cache of the class holds the parameters that it releases after each module
    (zero/partitioned_param_coordinator.py:633). Without this the model, its engine and the engine's
    process groups would live as long as the process.
    """
    module = engine.module
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entered for entered in stack if entered is not module]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    timed: Any = coordinator._PartitionedParameterCoordinator__params_to_release
    (cached,) = (cell.cell_contents for cell in timed.__closure__)
    cached.cache_clear()
    replaced = partition_parameters.InsertPostInitMethodToModuleSubClasses
    nn.functional.linear = getattr(replaced, "linear_bk", nn.functional.linear)


def read_when_needed(engine: DeepSpeedEngine) -> None:
    """With parameters on NVMe, read each when its module needs it, and release it after use.

    Once the order of modules is known, DeepSpeed reads ahead
    (zero/partitioned_param_coordinator.py:667) without checking whether a parameter is already
    being read, and fails in the second micro-batch: "param 28 already assigned swap buffer". It
    also keeps parameters that are used again within stage3_max_reuse_distance (line 657), each in
    one of `offload_param.buffer_count` buffers, without counting them: "Not enough buffers 0 for
    swapping 1".
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    coordinator._PartitionedParameterCoordinator__prefetch_nvme = False
    coordinator._PartitionedParameterCoordinator__max_reuse_dist_in_numel = 0


def count(parameter: nn.Parameter, counted: bool) -> None:
    """Set whether this rank's copy of a parameter counts in the gradient norm and in checkpoints.

    Exactly one copy of a replicated parameter must count. DeepSpeed counts parameters flagged
    model_parallel and those on model-parallel rank 0 (zero/stage3.py:1982, 2455).
    """
    parameter.model_parallel = counted  # type: ignore[attr-defined]


def is_counted(parameter: nn.Parameter) -> bool:
    """Return whether this rank's copy counts (see ``count``)."""
    return bool(parameter.model_parallel)  # type: ignore[attr-defined]


def scope_trace_check(mesh: Any) -> None:
    """Compare ZeRO-3's module traces within the data axis: pipeline stages run different modules.

    DeepSpeed broadcasts on the WORLD group at each root forward
    (zero/partitioned_param_coordinator.py:260), which deadlocks when stages differ.
    """

    def agree(numbers: list[int]) -> None:
        """Raise RuntimeError if the module ids differ between data ranks.

        Ids count up from engine to engine of a process, and the stages of an earlier engine may
        have had other numbers of modules, so only ids relative to the smallest are compared.
        """
        seen: list[Any] = [None] * mesh.data_size
        relative = [number - min(numbers) for number in numbers]
        dist.all_gather_object(seen, relative, group=mesh.data_group)
        if any(other != seen[0] for other in seen):
            raise RuntimeError(
                f"{mesh.name}: data-parallel ranks of one stage ran different modules"
            )

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = agree


def trace_whole_steps(engine: DeepSpeedEngine) -> Callable[[], None]:
    """Let ZeRO-3 trace modules over a whole pipeline step; return what to call at its start.

    DeepSpeed restarts its trace at each forward of the root module (zero/parameter_offload.py:306),
    as if its backward came next. In a pipeline other forwards come next, so no trace stays valid
    and nothing is prefetched. Over a whole step the order repeats: parameters are prefetched, and
    those used again within stage3_max_reuse_distance stay gathered from one micro-batch to the
    next.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    begin: Callable[[], None] = coordinator.reset_step
    coordinator.reset_step = lambda: None
    return begin


def require_equal_tiles(engine: DeepSpeedEngine, mesh: Any) -> None:
    """Raise UserError if pipeline stages have different numbers of optimizer tiles; collective.

    Every ZeRO optimizer makes one model-parallel all-reduce per tile in step(), and would hang.
    """
    zero = engine.optimizer
    tiles = len(zero.fp16_groups if engine.zero_optimization_stage() == 3 else zero.bit16_groups)
    counts: list[Any] = [None] * mesh.get_model_parallel_world_size()
    dist.all_gather_object(counts, tiles, group=mesh.model_group)
    if len(set(counts)) > 1:
        raise UserError(
            "zero_optimization.sub_group_size: pipeline stages have different numbers of optimizer "
            f"tiles (found {sorted(set(counts))}, need equal numbers); set it above the number of "
            "parameters of one stage's shard"
        )


class _Inject(torch.autograd.Function):
    """A scalar whose gradient with respect to the output is the one that the next stage sent.

    DeepSpeed multiplies every scalar by the fp16 loss scale. The next stage's gradient is scaled
    already, because the last stage's loss was; all ranks of the mesh have the same scale, as they
    agree on each overflow (zero/stage3.py:2413).
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, of_scalar: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def batch_p2p(p2p_ops: list[dist.P2POp], desc: str | None = None) -> list[dist.Work]:
    """Post a pipeline's list of sends and receives as one batch.

    torch 2.13 posts a list of only sends, or only receives, unbatched, so that they may overtake
    each other (pipelining/schedules.py:623). NCCL permits that only if no device is bound: then
    each pair of ranks gets a communicator of its own. DeepSpeed binds the device
    (comm/torch.py:281), and unbatched operations then wait for each other on the group's
    communicator. As a batch they use the group's communicator in both cases, as in torch 2.11.

    The order is safe on serial communicators. Where two ranks owe each other something at the same
    time (1F1B's steady state), both operations are in one batch; GPipe and the interleaved schedule
    have no such time. `tests/parallel/test_pipeline_order.py` proves it by executing what every
    schedule posts.
    """
    return dist.batch_isend_irecv(p2p_ops) if p2p_ops else []


schedules._batch_p2p = batch_p2p


class EngineStage(PipelineStage):
    """A torch pipeline stage whose forward and backward go through the DeepSpeed engine.

    torch's schedules call ``*_maybe_with_nosync`` (torch/distributed/pipelining/stage.py:755, 781).
    DeepSpeed must see every backward through ``engine.backward``, which takes scalars only: a
    torch-style backward with a gradient queues its epilogue once and crashes in step(). The
    schedules of ``pipeline.py`` use full backwards only; a backward of the inputs alone would
    compute the weights' gradients later, after ZeRO-3 has released the weights.

    ``neighbour_groups`` are groups of this rank and one other, by the other's global rank.
    Transfers with that rank use its group; transfers with other ranks use the pipeline's.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        chunk: int,
        before_backward: Callable[[int], None],
        neighbour_groups: Mapping[int, dist.ProcessGroup],
        **place: Any,
    ) -> None:
        super().__init__(engine.module.chunks[chunk], **place)
        self.neighbour_groups = neighbour_groups
        self.engine = engine
        self.chunk = chunk
        self.before_backward = before_backward
        # By module: the number of input gradients that end its backward.
        self.awaited: list[tuple[nn.Module, Any]] | None = None

    # torch allocates the receive buffers of all micro-batches of a step in advance (stage.py:2204,
    # 2286), tens of GiB for a large model. Here they are placeholders on the meta device, replaced
    # by real buffers only from receipt to use.

    def _prepare_forward_infra(self, *arguments: Any, **options: Any) -> Any:
        with self._placeholders():
            return super()._prepare_forward_infra(*arguments, **options)

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> tuple[Any, ...]:
        with self._placeholders():
            return super()._create_grad_recv_info(act_send_info)

    @contextmanager
    def _placeholders(self) -> Iterator[None]:
        device = self.device
        self.device = torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the receives of a micro-batch's inputs."""
        self._hold(self.args_recv_info[fwd_chunk_id])
        return self._between_neighbours(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the receives of the gradients of a micro-batch's outputs."""
        if self.has_backward and not self.is_last:
            self._hold(self.grad_recv_info[bwd_chunk_id])
        return self._between_neighbours(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the sends of a micro-batch's outputs."""
        return self._between_neighbours(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return the sends of the gradients of a micro-batch's inputs."""
        return self._between_neighbours(super().get_bwd_send_ops(bwd_chunk_id))

    def _between_neighbours(self, operations: Sequence[dist.P2POp]) -> list[dist.P2POp]:
        """Return the operations, each on the group of the two ranks that it joins."""
        groups = self.neighbour_groups
        return [
            dist.P2POp(o.op, o.tensor, o.peer, groups.get(o.peer, self.group)) for o in operations
        ]

    def _hold(self, received: tuple[Any, ...]) -> None:
        for info in received:
            # In torch 2.11 the entry of a model input has no buffer.
            if getattr(info, "buffer", None) is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=False)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        activations = super()._retrieve_recv_activations(fwd_chunk_id)
        # torch 2.11 sets requires_grad when it allocates the buffer, and ``_hold`` clears it.
        for activation in activations:
            activation.requires_grad_(self.has_backward and torch.is_grad_enabled())
        return self._let_go(self.args_recv_info[fwd_chunk_id], activations)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        return self._let_go(
            self.grad_recv_info[bwd_chunk_id], super()._retrieve_recv_grads(bwd_chunk_id)
        )

    def _let_go(self, received: tuple[Any, ...], tensors: Any) -> Any:
        """Return the tensors, and put placeholders back: the schedule owns the tensors now."""
        for info in received:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device="meta")
        return tensors

    def forward_maybe_with_nosync(self, *inputs: Tensor, **context: Any) -> Tensor:
        """Run one micro-batch forward."""
        output = self.engine(*inputs, chunk=self.chunk, **context)
        if output.requires_grad and self.awaited is None:
            counted = (
                module for module in self.submod.modules() if hasattr(module, "ds_grads_remaining")
            )
            self.awaited = [(module, module.ds_grads_remaining) for module in counted]
        return output

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], None]:
        """Run one micro-batch backward; return the gradients of its inputs."""
        self.before_backward(self.chunk)
        self._release_after_use()
        output = bwd_kwargs["stage_output"]
        gradients = bwd_kwargs["output_grads"]
        if gradients is None:  # the last stage: the output is the loss
            self.engine.backward(output)  # scales it by 1 / gradient_accumulation_steps
        else:
            self.engine.backward(_Inject.apply(output[0], gradients[0]), scale_wrt_gas=False)
        inputs = bwd_kwargs["input_values"]
        received = tuple(value.grad for value in inputs)
        for value in inputs:
            value.grad = None
        return received, None

    def _release_after_use(self) -> None:
        """Let ZeRO-3 release each module's parameters when the coming backward has passed it.

        It counts down the gradients of the inputs of the latest forward
        (zero/parameter_offload.py:438, 521). If several forwards came before, the second backward
        counts below zero and releases nothing until it has gathered the whole stage.
        """
        for module, gradients in self.awaited or ():
            module.ds_grads_remaining = gradients


def begin_backward(engine: DeepSpeedEngine, earlier: int) -> None:
    """Prepare a backward of a pipeline that reduces per micro-batch.

    ``earlier`` is the number of backwards of the same chunk that came before in this step.

    Two backwards with no forward between them overwrite gradients instead of adding to them:
    DeepSpeed counts micro-batches in forward, over all chunks together. The accumulated gradients
    are stored by parameter, and so by chunk: each chunk needs its own count (zero/stage3.py:2024,
    stage_1_and_2.py:1855; the latter counts this one too, line 3258).
    """
    zero = engine.optimizer
    zero.clear_backward_seen_flag()
    if ends_by_chunk(engine):
        zero.micro_step_id = earlier if engine.zero_optimization_stage() == 3 else earlier - 1


def ends_by_chunk(engine: DeepSpeedEngine) -> bool:
    """Return whether DeepSpeed ends an accumulation parameter by parameter, as each is reduced.

    Otherwise, at ZeRO 1 and 2 without offload, the end of the last chunk's accumulation collects
    the gradients of all chunks (zero/stage_1_and_2.py:1046).
    """
    stage = engine.zero_optimization_stage()
    return stage == 3 or (stage == 2 and engine.optimizer.cpu_offload)


def local_gradient(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient that DeepSpeed has not reduced yet, or None.

    ZeRO 1 and 2 may accumulate it in fp32 beside the parameter (zero/stage_1_and_2.py).
    """
    if engine.zero_optimization_stage() in (1, 2):
        gradient: Tensor | None = engine.optimizer.get_gradient_for_reduction(parameter)
        return gradient
    return parameter.grad


def sum_reduced_gradients(engine: DeepSpeedEngine, weight: Any, group: dist.ProcessGroup) -> None:
    """Sum ZeRO-3's accumulated gradient of a weight over the ranks of ``group`` that hold copies.

    Call it after the last backward of a step. Every rank holds the same piece of the weight,
    because ZeRO-3 partitions parameter by parameter (zero/stage3.py:2021). With the optimizer in
    host memory, the gradient was already copied there and its norm computed (line 1444), so both
    are repeated.
    """
    zero = engine.optimizer
    partition = weight.partition_numel()
    # The rest of the partition is padding.
    held = max(0, min(partition, weight.ds_numel - weight.ds_zero_partition_rank * partition))
    piece = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[weight.ds_id].narrow(
        0, 0, held
    )
    total = piece.to(engine.device)  # the same tensor if it is there already
    dist.all_reduce(total, group=group)
    piece.copy_(total)
    if zero.offload_optimizer and held > 0:
        zero._offload_grad_partition_at_boundary(weight, total, {}, {})
        # The copy to the host is asynchronous (stage3.py:1457), and CPU Adam does not wait for it.
        if (stream := get_accelerator().current_stream()) is not None:
            stream.synchronize()


@dataclass(frozen=True)
class Piece:
    """A part of this rank's shard of a parameter, with its place in a bucket.

    It is the shard's elements [start, start + numel), found at ``offset`` in the bucket. ``owned``
    is false if another rank saves the same elements.
    """

    name: str
    start: int
    numel: int
    offset: int
    owned: bool


@dataclass(frozen=True)
class Bucket:
    """A flat run of fp32 master weights with its Adam moments, as this rank holds it.

    ``resident(write)`` brings it into memory and yields (master weights, optimizer state); with
    ``write`` the model's parameters are updated from the master weights afterwards.
    """

    pieces: tuple[Piece, ...]
    resident: Callable[[bool], AbstractContextManager[tuple[Tensor, dict[str, Any]]]]

    @property
    def owned_pieces(self) -> list[Piece]:
        """The pieces that this rank saves."""
        return [piece for piece in self.pieces if piece.owned]


def buckets(engine: DeepSpeedEngine, names: Names) -> list[Bucket]:
    """Return this rank's optimizer state, partitioned as its ZeRO stage does."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_replicated_buckets(engine, names))
    return list(_zero3_buckets(engine, names) if stage == 3 else _zero12_buckets(engine, names))


def _replicated_buckets(engine: DeepSpeedEngine, names: Names) -> Iterator[Bucket]:
    """Yield the buckets of ZeRO 0 in fp32: every rank holds everything.

    The parameters themselves are the master weights.
    """
    data_rank = engine.mpu.get_data_parallel_rank()
    data_size = engine.mpu.get_data_parallel_world_size()
    parameters = [
        parameter for group in engine.optimizer.param_groups for parameter in group["params"]
    ]
    for index, parameter in enumerate(parameters):

        @contextmanager
        def resident(
            write: bool, parameter: nn.Parameter = parameter
        ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
            yield parameter.data, engine.optimizer.state[parameter]

        owned = index % data_size == data_rank and is_counted(parameter)
        piece = Piece(names[parameter], 0, parameter.numel(), 0, owned)
        yield Bucket((piece,), resident)


def _zero12_buckets(engine: DeepSpeedEngine, names: Names) -> Iterator[Bucket]:
    """Yield the buckets of ZeRO 1 and 2: one flat partition per parameter group.

    zero/stage_1_and_2.py:824 links parameters to it.
    """
    zero = engine.optimizer
    for group, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        pieces = []
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                held = mapping.lp_fragment_address
                placed = mapping.get_hp_fragment_address()
                pieces.append(
                    Piece(
                        names[parameter],
                        held.start,
                        held.numel,
                        placed.start,
                        is_counted(parameter),
                    )
                )

        @contextmanager
        def resident(
            write: bool, master: Tensor = master
        ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
            yield master.data, zero.optimizer.state[master]

        yield Bucket(tuple(pieces), resident)


def _zero3_buckets(engine: DeepSpeedEngine, names: Names) -> Iterator[Bucket]:
    """Yield the buckets of ZeRO-3: one flat partition per sub-group, possibly on NVMe.

    zero/stage3.py:2710, 2764, 2835.
    """
    zero = engine.optimizer
    for index, group in enumerate(zero.fp16_groups):
        pieces = []
        for parameter in group:
            _, offset, partition = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * partition
            numel = min(partition, parameter.ds_numel - start)  # <= 0 if all of it is padding
            if numel > 0:
                pieces.append(Piece(names[parameter], start, numel, offset, is_counted(parameter)))

        @contextmanager
        def resident(write: bool, index: int = index) -> Iterator[tuple[Tensor, dict[str, Any]]]:
            swapped = zero._swappable_optimizer_subgroup(index)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(index)
            master = zero.fp32_partitioned_groups_flat[index]
            changed = False
            try:
                yield master.data, zero.optimizer.state[master]
                if write:
                    zero._reassign_or_swap_out_partitioned_parameters(index)
                    changed = True
            finally:
                if swapped:
                    (
                        zero._optimizer_states_and_gradient_swap_out
                        if changed
                        else zero._release_swap_buffers
                    )(index)

        yield Bucket(tuple(pieces), resident)


def publish_master_weights(engine: DeepSpeedEngine) -> None:
    """Update the model's parameters on all ranks after every bucket was written; collective."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3 and engine.optimizer.persistent_parameters:
        # Small parameters stay gathered between steps; step() refreshes them the same way
        # (zero/stage3.py:2824).
        engine.optimizer._partition_all_parameters()
        engine.optimizer.persistent_parameters[0].all_gather(engine.optimizer.persistent_parameters)


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return the Adam inside the ZeRO wrapper."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def set_adam_step(engine: DeepSpeedEngine, state: dict[str, Any], step: int) -> None:
    """Set the number of updates that Adam has made.

    torch's Adam keeps a tensor, beside the moments if it is fused; DeepSpeed's CPU Adam an integer,
    both by parameter (ops/adam/cpu_adam.py:141). DeepSpeed's fused Adam keeps one integer per group
    (ops/adam/fused_adam.py).
    """
    adam = base_optimizer(engine)
    if isinstance(adam, torch.optim.Adam):
        place = state[MOMENTS[0]].device if adam.defaults["fused"] else None
        state["step"] = torch.tensor(float(step), device=place)
    else:
        state["step"] = step
    if type(adam).__name__ == "FusedAdam":
        for group in adam.param_groups:
            group["step"] = step


def replay_bias_correction(engine: DeepSpeedEngine, updates: int) -> None:
    """Set CPU Adam's powers of its betas to those that ``updates`` consecutive updates leave.

    It multiplies them in fp32, update by update, but uses ``pow`` after a jump in the count, which
    rounds differently (ops/csrc/includes/cpu_adam.h:80, 87): a resumed run would differ in the last
    bit. Powers below half a unit in the last place of 1 change no correction, so beyond 18,000
    updates at a beta of 0.999 nothing is replayed.
    """
    adam: Any = base_optimizer(engine)
    if type(adam).__name__ != "DeepSpeedCPUAdam":
        return
    beta1, beta2 = adam.param_groups[0]["betas"]
    if max(beta1, beta2) ** updates < 2.0**-26:
        return
    nothing = [torch.zeros(1) for _ in range(4)]  # parameter, gradient and two moments
    for update in range(1, updates + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id, update, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing
        )


_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _dynamic_loss_scaler(engine: DeepSpeedEngine) -> Any:
    """Return the dynamic loss scaler, or None if the scale is fixed or there is none.

    DeepSpeed has a scaler object in every format (fp16/loss_scaler.py:257).
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def keep_least_loss_scale(engine: DeepSpeedEngine) -> None:
    """Keep DeepSpeed from raising an error on an overflow at the least scale.

    The guard decides when to stop.
    """
    if (scaler := _dynamic_loss_scaler(engine)) is not None:
        scaler.raise_error_at_min_scale = False


def loss_scaler_state(engine: DeepSpeedEngine) -> dict[str, float]:
    """Return the state of the dynamic loss scale, empty if there is none."""
    scaler = _dynamic_loss_scaler(engine)
    return (
        {} if scaler is None else {field: getattr(scaler, field) for field in _LOSS_SCALER_FIELDS}
    )


def set_loss_scaler_state(engine: DeepSpeedEngine, state: dict[str, float]) -> None:
    """Restore the state that ``loss_scaler_state`` returned.

    If the checkpoint has none, the run begins with the configured scale.
    """
    scaler = _dynamic_loss_scaler(engine)
    if scaler is None or not state.keys() >= set(_LOSS_SCALER_FIELDS):
        return
    for field in _LOSS_SCALER_FIELDS:  # never an attribute name from a file
        setattr(scaler, field, state[field])


def set_counters(engine: DeepSpeedEngine, *, steps: int, skipped: int) -> None:
    """Set the engine's own counters, which its logs and accumulation boundaries use.

    runtime/engine.py:3558.
    """
    engine.global_steps = steps
    engine.skipped_steps = skipped
    engine.micro_steps = steps * engine.gradient_accumulation_steps()
    engine.global_samples = steps * engine.train_batch_size()


def abandon_step(engine: DeepSpeedEngine) -> None:
    """End a step of ZeRO 0 without an update.

    DeepSpeed checks for overflow only from ZeRO stage 1 on.
    """
    engine.zero_grad()
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.micro_steps += 1
    engine.global_samples += engine.train_batch_size()


def refuse_step(engine: DeepSpeedEngine) -> None:
    """End a step without an update although its gradients are finite; all ranks must agree.

    The ZeRO optimizers clean up after an overflow (zero/stage_1_and_2.py:3050, stage3.py:2891), so
    this reports one to them. The dynamic loss scale is not at fault and is not told.
    """
    if engine.zero_optimization_stage() == 0:
        abandon_step(engine)
        return
    zero = engine.optimizer

    def overflow(**_: Any) -> bool:
        zero.overflow = True
        return True

    told = {
        "check_grad_overflow": True,
        "check_overflow": overflow,
        "_update_scale": lambda overflow: None,
    }
    told |= {"_overflow_check_and_loss_scale_update": overflow}
    before = {name: vars(zero)[name] for name in told if name in vars(zero)}
    vars(zero).update(told)
    try:
        engine.step()
    finally:
        for name in told:
            del vars(zero)[name]
        vars(zero).update(before)
