"""Every touch of DeepSpeed's internals, in one file: what is done, why, and the line of 0.19.8 it
answers to.

The rest of the project sees ``Bucket``: a run of optimizer state that this rank holds, whatever the
ZeRO stage and wherever it lies (device, host memory, NVMe). Paths below are relative to the
``deepspeed`` package; ``internals.py`` checks at the start that those files are the ones meant.
Lines of torch's files are those of 2.13; where 2.11 differs, a comment says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import cpu_adam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.pipelining import PipelineStage, schedules

from megagpt.utils import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
Names = dict[nn.Parameter, str]  # the global name of each parameter


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Let collectives of a group wait so long.

    DeviceMesh gives the groups that it makes torch's default
    (torch/distributed/distributed_c10d.py, _set_pg_timeout; there is no public way).
    """
    distributed_c10d._set_pg_timeout(timeout, group)


def suppress_shared_memory_collectives() -> None:
    """Keep ``init_distributed`` from compiling an op that training never calls.

    On CPUs it builds a shared-memory all-reduce (75 s on two cores, an error without a compiler),
    which serves inference only (comm/torch.py:47, 207). An op listed as incompatible is passed
    over.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def silence_cpu_adam() -> None:
    """Keep CPU Adam from printing its settings from C++, past the log and through the live table.

    It does where DeepSpeed's logger lets info pass (ops/adam/cpu_adam.py:98), as the rank's log
    wants it.
    """
    cpu_adam.should_log_le = lambda level: False


class Partitioner:
    """Hands over parameters, one by one, to ZeRO-3: each is cut over the data axis as soon as it
    has its values.

    ``zero.Init`` as a context partitions what a constructor allocates, before it has values, and
    calls ``Module.apply`` with broadcasts from global rank 0, which fails in other groups. Its
    conversion of a single parameter (zero/partition_parameters.py:1209) has neither fault.
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
    """End an engine so that nothing of it stays in memory.

    ZeRO-3 puts the module at the bottom of a stack (zero/parameter_offload.py:315) and never takes
    it away, and what it releases after each module lies in a cache of the class
    (zero/partitioned_param_coordinator.py:633): the model, the engine that it hooks into and the
    process groups of that would live as long as the process.
    """
    module = engine.module
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entered for entered in stack if entered is not module]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    timed: Any = coordinator._PartitionedParameterCoordinator__params_to_release
    (cached,) = (cell.cell_contents for cell in timed.__closure__)
    cached.cache_clear()


def read_when_needed(engine: DeepSpeedEngine) -> None:
    """With parameters on NVMe, read each when its module needs it, and let it go afterwards.

    Once the order of modules is known, DeepSpeed reads ahead
    (zero/partitioned_param_coordinator.py:667) without looking whether a parameter is being read
    already, and fails in the second micro-batch: "param 28 already assigned swap buffer". It also
    keeps what is used again within stage3_max_reuse_distance (line 657), each in one of
    `offload_param.buffer_count` buffers, without counting them: "Not enough buffers 0 for swapping
    1".
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    coordinator._PartitionedParameterCoordinator__prefetch_nvme = False
    coordinator._PartitionedParameterCoordinator__max_reuse_dist_in_numel = 0


def count(parameter: nn.Parameter, counted: bool) -> None:
    """Whether this rank's copy counts: of a replicated parameter one copy enters the gradient norm
    and checkpoints.

    DeepSpeed counts what is flagged model_parallel, or lies on model-parallel rank 0
    (zero/stage3.py:1982, 2455).
    """
    parameter.model_parallel = counted  # type: ignore[attr-defined]


def is_counted(parameter: nn.Parameter) -> bool:
    """What ``count`` said."""
    return bool(parameter.model_parallel)  # type: ignore[attr-defined]


def scope_trace_check(mesh: Any) -> None:
    """Compare ZeRO-3's module traces within the data axis: pipeline stages run different modules.

    DeepSpeed broadcasts on the WORLD group at each root forward
    (zero/partitioned_param_coordinator.py:260), which deadlocks as soon as stages differ.
    """

    def agree(numbers: list[int]) -> None:
        """Identity numbers go on from engine to engine of a process, where stages may have had
        others: relative.
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
    """Let ZeRO-3 learn the order of modules over a whole step of a pipeline; returns what to call
    at its beginning.

    DeepSpeed starts its trace anew at each forward of the root module
    (zero/parameter_offload.py:306), as if its backward came next. In a pipeline other forwards do,
    so the trace never holds for long, and nothing is prefetched. Over a step the order repeats:
    parameters are fetched ahead, and those used again within stage3_max_reuse_distance stay
    gathered from one micro-batch to the next.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    begin: Callable[[], None] = coordinator.reset_step
    coordinator.reset_step = lambda: None
    return begin


def require_equal_tiles(engine: DeepSpeedEngine, mesh: Any) -> None:
    """Fail at once where pipeline stages have different numbers of optimizer tiles.

    Each ZeRO optimizer makes one model-parallel all-reduce a tile in step(), and would wait for
    ever.
    """
    zero = engine.optimizer
    tiles = len(zero.fp16_groups if engine.zero_optimization_stage() == 3 else zero.bit16_groups)
    counts: list[Any] = [None] * mesh.get_model_parallel_world_size()
    dist.all_gather_object(counts, tiles, group=mesh.model_group)
    if len(set(counts)) > 1:
        raise UserError(
            f"zero_optimization.sub_group_size: pipeline stages have {sorted(set(counts))} "
            "optimizer tiles and need equal numbers; make it larger than the parameters of one "
            "stage's shard"
        )


class _Inject(torch.autograd.Function):
    """A scalar whose gradient with respect to the output is the gradient that the next stage sent.

    DeepSpeed multiplies every scalar by the loss scale of fp16. The next stage's gradient has been:
    the last stage's loss was, and all ranks of the mesh have the same scale, as they agree on each
    overflow (zero/stage3.py:2413).
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
    each other (pipelining/schedules.py:623). NCCL lets them only where no device is bound: then
    each pair of ranks gets one more communicator. DeepSpeed binds it (comm/torch.py:281), and
    unbatched operations wait for each other on the group's communicator. As a batch they use the
    group's in both cases, as in torch 2.11.

    The order is safe on serial communicators: where two ranks owe each other something at the same
    time (1F1B's steady state), both operations are one batch; GPipe and the interleaved schedule
    have no such time. That is not taken on trust: `tests/parallel/test_pipeline_order.py` executes
    what every schedule posts.
    """
    return dist.batch_isend_irecv(p2p_ops) if p2p_ops else []


schedules._batch_p2p = batch_p2p


class EngineStage(PipelineStage):
    """A torch pipeline stage whose forward and backward go through the DeepSpeed engine.

    torch's schedules call ``*_maybe_with_nosync`` (torch/distributed/pipelining/stage.py:755, 781);
    DeepSpeed must see every backward through ``engine.backward``, which takes scalars only: a
    torch-style backward with a gradient queues its epilogue once and crashes in step(). The
    schedules of ``pipeline.py`` make full backwards only; one of the inputs alone would leave the
    weights' for later, when ZeRO-3 has released them.

    ``neighbour_groups`` are groups of this rank and one other, by the other's global rank. What is
    sent to that rank or received from it goes through its group; what has none, through the
    pipeline's.
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
        self.engine, self.chunk, self.before_backward = engine, chunk, before_backward
        self.awaited: list[tuple[nn.Module, Any]] | None = (
            None  # by module: inputs whose gradients end its backward
        )

    # torch allocates what a stage receives for every micro-batch of a step beforehand
    # (stage.py:2204, 2286): of a large model tens of GiB. Here placeholders on the meta device
    # stand there but from the receipt to the use.

    def _prepare_forward_infra(self, *arguments: Any, **options: Any) -> Any:
        with self._placeholders():
            return super()._prepare_forward_infra(*arguments, **options)

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> tuple[Any, ...]:
        with self._placeholders():
            return super()._create_grad_recv_info(act_send_info)

    @contextmanager
    def _placeholders(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What to post for the inputs of a micro-batch."""
        self._hold(self.args_recv_info[fwd_chunk_id])
        return self._between_neighbours(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What to post for the gradients of a micro-batch's outputs."""
        if self.has_backward and not self.is_last:
            self._hold(self.grad_recv_info[bwd_chunk_id])
        return self._between_neighbours(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What to post for the outputs of a micro-batch."""
        return self._between_neighbours(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What to post for the gradients of a micro-batch's inputs."""
        return self._between_neighbours(super().get_bwd_send_ops(bwd_chunk_id))

    def _between_neighbours(self, operations: Sequence[dist.P2POp]) -> list[dist.P2POp]:
        """Let each operation use the group of the two ranks that it joins."""
        groups = self.neighbour_groups
        return [
            dist.P2POp(o.op, o.tensor, o.peer, groups.get(o.peer, self.group)) for o in operations
        ]

    def _hold(self, received: tuple[Any, ...]) -> None:
        for info in received:
            if (
                getattr(info, "buffer", None) is not None
            ):  # torch 2.11's entry for an input of the model has none
                info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=False)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        activations = super()._retrieve_recv_activations(fwd_chunk_id)
        for activation in (
            activations
        ):  # torch 2.11 asks for gradients when it allocates, and the placeholder for none
            activation.requires_grad_(self.has_backward and torch.is_grad_enabled())
        return self._let_go(self.args_recv_info[fwd_chunk_id], activations)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        return self._let_go(
            self.grad_recv_info[bwd_chunk_id], super()._retrieve_recv_grads(bwd_chunk_id)
        )

    def _let_go(self, received: tuple[Any, ...], tensors: Any) -> Any:
        """What was received belongs to the schedule from now on."""
        for info in received:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device="meta")
        return tensors

    def forward_maybe_with_nosync(self, *inputs: Tensor, **context: Any) -> Tensor:
        """One micro-batch forward."""
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
        """One micro-batch backward; the gradients of its inputs."""
        self.before_backward(self.chunk)
        self._release_after_use()
        output, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        if gradients is None:
            self.engine.backward(output)  # the loss: scaled by 1 / gradient_accumulation_steps
        else:
            self.engine.backward(_Inject.apply(output[0], gradients[0]), scale_wrt_gas=False)
        inputs = bwd_kwargs["input_values"]
        received = tuple(value.grad for value in inputs)
        for value in inputs:
            value.grad = None
        return received, None

    def _release_after_use(self) -> None:
        """Let ZeRO-3 release each module's parameters at the end of its part of the backward that
        comes.

        It counts down the gradients of the inputs of the latest forward
        (zero/parameter_offload.py:438, 521). Where several forwards came before, the second
        backward counts below zero and releases nothing until it has gathered the whole stage.
        """
        for module, gradients in self.awaited or ():
            module.ds_grads_remaining = gradients


def begin_backward(engine: DeepSpeedEngine, earlier: int) -> None:
    """Before every backward of a pipeline that reduces per micro-batch; ``earlier`` ones of the
    same chunk are behind.

    Two backwards with no forward between them overwrite gradients instead of adding to them:
    DeepSpeed counts micro-steps in forward, and of all chunks together. What it then adds to lies
    by parameter, hence by chunk, which needs its own count (zero/stage3.py:2024,
    stage_1_and_2.py:1855; the latter counts this one too, line 3258).
    """
    zero = engine.optimizer
    zero.clear_backward_seen_flag()
    if ends_by_chunk(engine):
        zero.micro_step_id = earlier if engine.zero_optimization_stage() == 3 else earlier - 1


def ends_by_chunk(engine: DeepSpeedEngine) -> bool:
    """Whether what is done at the end of an accumulation is done parameter by parameter, as its
    gradient is reduced.

    Elsewhere, at ZeRO 1 and 2 without offload, the end of the last chunk's collects the gradients
    of all (zero/stage_1_and_2.py:1046).
    """
    stage = engine.zero_optimization_stage()
    return stage == 3 or (stage == 2 and engine.optimizer.cpu_offload)


def sum_reduced_gradients(engine: DeepSpeedEngine, weight: Any, group: dist.ProcessGroup) -> None:
    """After a step's last backward, add up what ZeRO 3 accumulated of a weight that ranks of
    ``group`` have copies of.

    Each holds the same piece of it, as ZeRO 3 cuts parameter by parameter (zero/stage3.py:2021).
    With the optimizer in host memory, the gradient has been copied to it and its norm taken (line
    1444): both are done again.
    """
    zero = engine.optimizer
    partition = weight.partition_numel()
    held = max(
        0, min(partition, weight.ds_numel - weight.ds_zero_partition_rank * partition)
    )  # the rest is padding
    piece = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[weight.ds_id].narrow(
        0, 0, held
    )
    total = piece.to(engine.device)  # the same tensor where it is there already
    dist.all_reduce(total, group=group)
    piece.copy_(total)
    if zero.offload_optimizer and held > 0:
        zero._offload_grad_partition_at_boundary(weight, total, {}, {})
        # It copies to the host without waiting (stage3.py:1457), and CPU Adam reads what it finds.
        if (stream := get_accelerator().current_stream()) is not None:
            stream.synchronize()


@dataclass(frozen=True)
class Piece:
    """The elements [start, start + numel) of this rank's share of a parameter, found at ``offset``
    in its bucket.

    ``owned`` is false where another rank saves the same elements.
    """

    name: str
    start: int
    numel: int
    offset: int
    owned: bool


@dataclass(frozen=True)
class Bucket:
    """One flat run of fp32 master weights with its Adam moments, as this rank holds it.

    ``resident(write)`` brings it into memory and yields (master weights, optimizer state); with
    ``write`` the model's parameters follow the master weights afterwards.
    """

    pieces: tuple[Piece, ...]
    resident: Callable[[bool], AbstractContextManager[tuple[Tensor, dict[str, Any]]]]

    @property
    def owned_pieces(self) -> list[Piece]:
        """Those that this rank saves."""
        return [piece for piece in self.pieces if piece.owned]


def buckets(engine: DeepSpeedEngine, names: Names) -> list[Bucket]:
    """This rank's optimizer state, cut as its ZeRO stage cuts it."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_replicated_buckets(engine, names))
    return list(_zero3_buckets(engine, names) if stage == 3 else _zero12_buckets(engine, names))


def _replicated_buckets(engine: DeepSpeedEngine, names: Names) -> Iterator[Bucket]:
    """ZeRO 0 in fp32: every rank holds everything, the parameters themselves being the master
    weights.
    """
    data_rank, data_size = (
        engine.mpu.get_data_parallel_rank(),
        engine.mpu.get_data_parallel_world_size(),
    )
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
    """ZeRO 1 and 2: one flat partition a parameter group (zero/stage_1_and_2.py:824 links
    parameters to it).
    """
    zero = engine.optimizer
    for group, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        pieces = []
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                held, placed = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
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
    """ZeRO 3: one flat partition a sub-group, perhaps on NVMe (zero/stage3.py:2710, 2764, 2835)."""
    zero = engine.optimizer
    for index, group in enumerate(zero.fp16_groups):
        pieces = []
        for parameter in group:
            _, offset, partition = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.ds_zero_partition_rank * partition
            numel = min(
                partition, parameter.ds_numel - start
            )  # the last ranks may hold padding only
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
    """After every bucket was written: give the model's parameters the new values on all ranks (a
    collective call).
    """
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3 and engine.optimizer.persistent_parameters:
        # Small parameters stay gathered between steps; step() refreshes them the same way
        # (zero/stage3.py:2824).
        engine.optimizer._partition_all_parameters()
        engine.optimizer.persistent_parameters[0].all_gather(engine.optimizer.persistent_parameters)


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The Adam inside the ZeRO wrapper."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def set_adam_step(engine: DeepSpeedEngine, state: dict[str, Any], step: int) -> None:
    """Tell Adam how many updates it has made: torch's keeps a tensor, DeepSpeed's CPU Adam an
    integer, both by parameter (ops/adam/cpu_adam.py:141), its fused Adam one integer a group
    (ops/adam/fused_adam.py).
    """
    adam = base_optimizer(engine)
    if isinstance(adam, torch.optim.Adam):
        state["step"] = torch.tensor(float(step))
    else:
        state["step"] = step
    if type(adam).__name__ == "FusedAdam":
        for group in adam.param_groups:
            group["step"] = step


def replay_bias_correction(engine: DeepSpeedEngine, updates: int) -> None:
    """Bring DeepSpeed's CPU Adam to the powers of its betas that ``updates`` updates in a row leave
    behind.

    It multiplies them up in fp32, update by update, but takes ``pow`` after a jump in the count,
    which rounds otherwise (ops/csrc/includes/cpu_adam.h:80, 87): a resumed run would differ in the
    last bit. Powers below half a unit in the last place of 1 change no correction, so that beyond
    18,000 updates at a beta of 0.999 nothing is replayed.
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
    """None where the scale is fixed, or 1: DeepSpeed has a scaler in every format
    (fp16/loss_scaler.py:257).
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def keep_least_loss_scale(engine: DeepSpeedEngine) -> None:
    """An overflow at the least scale raises an exception in DeepSpeed; when to end is for the
    guard to say.
    """
    if (scaler := _dynamic_loss_scaler(engine)) is not None:
        scaler.raise_error_at_min_scale = False


def loss_scaler_state(engine: DeepSpeedEngine) -> dict[str, float]:
    """What a dynamic loss scale remembers; empty where there is none."""
    scaler = _dynamic_loss_scaler(engine)
    return (
        {} if scaler is None else {field: getattr(scaler, field) for field in _LOSS_SCALER_FIELDS}
    )


def set_loss_scaler_state(engine: DeepSpeedEngine, state: dict[str, float]) -> None:
    """The way back.

    A run that goes on from one without a dynamic scale begins with the configured one.
    """
    scaler = _dynamic_loss_scaler(engine)
    if scaler is None or not state.keys() >= set(_LOSS_SCALER_FIELDS):
        return
    for field in _LOSS_SCALER_FIELDS:  # a file names no other attribute
        setattr(scaler, field, state[field])


def set_counters(engine: DeepSpeedEngine, *, steps: int, skipped: int) -> None:
    """The engine's own counters, which its logs and accumulation boundaries use
    (runtime/engine.py:3558).
    """
    engine.global_steps, engine.skipped_steps = steps, skipped
    engine.micro_steps = steps * engine.gradient_accumulation_steps()
    engine.global_samples = steps * engine.train_batch_size()


def abandon_step(engine: DeepSpeedEngine) -> None:
    """End a step of ZeRO 0 without an update: DeepSpeed checks for overflow from stage 1 on
    only.
    """
    engine.zero_grad()
    engine.global_steps += 1
    engine.skipped_steps += 1
    engine.micro_steps += 1
    engine.global_samples += engine.train_batch_size()


def refuse_step(engine: DeepSpeedEngine) -> None:
    """End a step without an update although its gradients are finite; all ranks of the engine must
    agree on it.

    The ZeRO optimizers clear everything up where a gradient overflowed (zero/stage_1_and_2.py:3050,
    stage3.py:2891): they are told that one did, and a dynamic loss scale, which is not to blame, is
    told nothing.
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
