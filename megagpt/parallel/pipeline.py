"""One optimizer step, for every ZeRO stage and number of pipeline stages.

Forward and backward, guard, update.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from kernels.documents import DocumentBounds
from megagpt.model import IGNORED, TIED_WEIGHT, KeyValueCache
from megagpt.parallel import compat
from megagpt.parallel.engine import Engine, compute_dtype
from megagpt.planning.schedules import schedule_that_runs


@dataclass(frozen=True)
class MicroBatch:
    """One forward's input on the device.

    ``tokens`` and ``targets`` are (batch, length); targets of ``IGNORED`` have no loss.
    ``documents`` holds the bounds of packed documents or None; it is computed once for every layer,
    stage and recomputation. ``dropout_seed`` has one seed per sample (batch,), or one per sample
    and place (batch, places), or is None. ``positions`` (batch, length) are those of the tokens,
    where they begin again in each document. ``all_counted`` says that no target of any rank's
    micro-batch in this step is ``IGNORED``.
    """

    tokens: Tensor
    targets: Tensor
    documents: DocumentBounds | None = None
    dropout_seed: Tensor | None = None
    positions: Tensor | None = None
    all_counted: bool = False

    @property
    def context(self) -> dict[str, Any]:
        """The arguments that every block needs in addition to the hidden states."""
        optional = {
            "document_ids": self.documents,
            "dropout_seed": self.dropout_seed,
            "positions": self.positions,
        }
        return {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, equal on every rank.

    ``loss`` is the mean over the global batch's targets, ``grad_norm`` the norm before clipping.
    ``applied`` is false if the loss or a gradient was not finite or the loss was refused; weights
    and moments are then unchanged. ``sums`` are the sums over all ranks of the numbers that each
    gave.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    sums: tuple[float, ...] = ()


Numbers = Callable[[], Sequence[float]]


def no_numbers() -> tuple[float, ...]:
    """Give nothing to be summed."""
    return ()


def train_step(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    refuses: Callable[[float], bool] | None = None,
    numbers: Numbers = no_numbers,
) -> StepResult:
    """Train on one global batch; every rank must call it.

    ``micro_batches`` is this data replica's part. Skip the update if the loss is not finite or
    ``refuses(loss)`` is true. ``refuses`` is called on every rank and must give the same answer on
    each. ``numbers`` is called once; all ranks must give equally many.

    The host waits for the device once, to read the loss, the norm and the sums of the numbers
    together. Under ZeRO 1 to 3 that is after the update, which DeepSpeed itself skips if a gradient
    is not finite, as those of a loss that is not finite are. Only fp16, whose loss scale must not
    fall because of such a loss, and ``refuses`` need the loss before it and read twice.
    """
    learning_rate = compat.base_optimizer(engine.deepspeed).param_groups[0]["lr"]
    losses = accumulate(engine, micro_batches)
    if engine.zero_stage == 0:
        update = _update_replicated
    elif refuses is None and not engine.config.fp16.enabled:
        update = _update_and_read
    else:
        update = _read_and_update
    loss, norm, applied, sums = update(engine, losses, refuses, numbers)
    if not math.isfinite(loss):
        norm = math.nan
    return StepResult(loss, norm, learning_rate, applied, tuple(sums))


def accumulate(engine: Engine, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Run forward and backward of every micro-batch and reduce the gradients; do not update.

    Return the losses of the micro-batches on ranks that hold the head, else an empty list.
    """
    per_step = (
        engine.config.megagpt.parallel.gradient_reduction == "per_step" and engine.zero_stage > 0
    )
    # Per step, DeepSpeed reduces when this context closes; otherwise in each backward.
    with engine.deepspeed.coalesce_grad_reduction() if per_step else nullcontext():
        shares = loss_shares(engine, micro_batches)
        if engine.num_stages > 1:
            losses = _pipeline(engine, len(micro_batches)).train(micro_batches, shares)
        else:
            losses = _one_after_another(
                engine, micro_batches, shares, count_micro_steps=not per_step
            )
        if engine.tensor_axis is not None:  # before ZeRO reduces them over the data axis
            gradients = [compat.local_gradient(engine.deepspeed, p) for p in engine.partial]
            engine.tensor_axis.sum_gradients([g for g in gradients if g is not None])
    if per_step or engine.num_stages > 1:
        engine.deepspeed.set_gradient_accumulation_boundary(True)
    return losses


def loss_shares(engine: Engine, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return the factor (micro-batches,) of each micro-batch's mean loss; collective.

    The step's loss is the mean over all targets of the global batch, wherever they are. The engine
    averages over micro-batches and replicas, so a micro-batch with more targets than the average
    counts for more: with n of the N targets in k micro-batches of all replicas, for n k / N. That
    is exactly 1 if no target is ignored; nothing is counted then. Ranks of a data group must call
    it together.
    """
    if all(micro_batch.all_counted for micro_batch in micro_batches):
        return torch.ones(len(micro_batches), device=engine.device)
    counts = target_counts(micro_batches)
    total = counts.sum()
    dist.all_reduce(total, group=engine.mesh.data_group)
    everywhere = len(micro_batches) * engine.mesh.data_size
    return (counts * everywhere / total.clamp(min=1)).float()


def target_counts(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return the number of targets of each micro-batch: double, (micro-batches,)."""
    return torch.stack([(m.targets != IGNORED).sum() for m in micro_batches]).double()


def _one_after_another(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    shares: Tensor,
    count_micro_steps: bool,
) -> list[Tensor]:
    losses = []
    for index, micro_batch in enumerate(micro_batches):
        loss = _with_its_gradients(
            shares[index]
            * engine.deepspeed(
                micro_batch.tokens, targets=micro_batch.targets, **micro_batch.context
            )
        )
        engine.deepspeed.backward(loss)
        losses.append(loss.detach())
        if count_micro_steps and index + 1 < len(micro_batches):
            engine.deepspeed.step()  # before the boundary it only counts micro-batches
    return losses


def _with_its_gradients(loss: Tensor) -> Tensor:
    """Return the loss; if it is not finite, its gradients will not be either.

    An infinite loss may have finite gradients. DeepSpeed skips an update if a gradient is not
    finite, so the host need not wait for the loss before the update.
    """
    if loss.requires_grad:
        value = loss.detach()
        loss.register_hook(lambda gradient: gradient + (value - value))  # + 0, or NaN
    return loss


@torch.no_grad()
def evaluate(engine: Engine, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return the loss in nats and the number of targets, without training; collective.

    Each is the sum over all replicas' micro-batches of one number: double, (2, micro-batches).
    Every rank must call it and gets the same.
    """
    engine.deepspeed.eval()
    counts = target_counts(micro_batches)
    if engine.num_stages > 1:
        losses = _pipeline(engine, len(micro_batches)).evaluate(micro_batches, counts)
    else:
        losses = [
            count * engine.deepspeed(m.tokens, targets=m.targets, **m.context)
            for count, m in zip(counts, micro_batches, strict=True)
        ]
    engine.deepspeed.train()
    nats = torch.stack(losses).double() if losses else torch.zeros_like(counts)
    dist.all_reduce(nats, group=engine.mesh.pipeline_group)
    sums = torch.stack([nats, counts])
    dist.all_reduce(sums, group=engine.mesh.data_group)
    return sums


def _read(
    engine: Engine,
    losses: Sequence[Tensor],
    numbers: Sequence[float] = (),
    norm: Tensor | None = None,
) -> list[float]:
    """Return the mean loss, the sums of the numbers and, if given, the norm: one read.

    ``losses`` are those of this rank's micro-batches, times their ``loss_shares``; ranks without
    the head have none. One all-reduce in fp64 sums over all ranks. The norm is equal on all ranks.
    """
    mesh = engine.mesh
    if losses and mesh.tensor_rank == 0:  # tensor ranks have the same loss
        loss = torch.stack(list(losses)).double().mean(0, keepdim=True) / mesh.data_size
    else:
        loss = torch.zeros(1, dtype=torch.float64, device=engine.device)
    values = [loss, to_device(numbers, engine.device)] if numbers else [loss]
    together = torch.cat(values) if numbers else loss
    if mesh.world_size > 1:
        dist.all_reduce(together)
    if norm is not None:
        together = torch.cat((together, norm.detach().double().view(1)))
    read: list[float] = together.tolist()
    return read


def to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers of the host in fp64 on the device, without waiting for it."""
    pinned = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _pipeline(engine: Engine, micro_batches: int) -> "Pipeline":
    """Return the engine's schedule for this number of micro-batches, created on first use."""
    if micro_batches not in engine.schedules:
        engine.schedules[micro_batches] = Pipeline(engine, micro_batches)
    return engine.schedules[micro_batches]


class Pipeline:
    """torch's schedule over this rank's stages, driving the DeepSpeed engine."""

    def __init__(self, engine: Engine, micro_batches: int) -> None:
        self.engine = engine
        self.micro_batches = micro_batches
        self.backwards = [0] * len(engine.stages)  # backwards done in this step, by chunk
        place = {
            "num_stages": engine.num_stages,
            "device": engine.device,
            "group": engine.mesh.pipeline_group,
        }
        self.stages = [
            compat.EngineStage(
                engine.deepspeed,
                chunk,
                self._before_backward,
                engine.neighbour_groups,
                stage_index=stage,
                **place,
                **self._shapes(stage),
            )
            for chunk, stage in enumerate(engine.stages)
        ]
        self.schedule = self._schedule()

    def _schedule(self) -> PipelineScheduleSingle | PipelineScheduleMulti:
        kind = schedule_that_runs(
            self.engine.config.megagpt.parallel.schedule,
            self.engine.num_stages,
            self.micro_batches,
        )
        # The model's last stage returns the loss itself, which the schedule hands on with the
        # micro-batch's share or count of targets (1,); the engine scales gradients.
        options: dict[str, Any] = {
            "loss_fn": lambda loss, share: _with_its_gradients(loss * share[0]),
            "scale_grads": False,
        }
        if kind == "interleaved":
            return ScheduleInterleaved1F1B([*self.stages], self.micro_batches, **options)
        single = ScheduleGPipe if kind == "gpipe" else Schedule1F1B
        return single(self.stages[0], self.micro_batches, **options)

    def _shapes(self, stage: int) -> dict[str, Tensor]:
        """Return meta tensors of a stage's input and output, which spare torch a trial forward."""
        config = self.engine.config
        model = config.megagpt.model
        batch = config.train_micro_batch_size_per_gpu
        tokens = torch.empty(batch, model.sequence_length, dtype=torch.int64, device="meta")
        parallel = config.megagpt.parallel
        positions = model.sequence_length // (parallel.tensor if parallel.sequence else 1)
        hidden = torch.empty(
            batch, positions, model.hidden_size, dtype=compute_dtype(config), device="meta"
        )
        hidden.requires_grad_()
        loss = torch.empty((), device="meta", requires_grad=True)
        last = self.engine.num_stages - 1
        return {
            "input_args": tokens if stage == 0 else hidden,
            "output_args": loss if stage == last else hidden,
        }

    def train(self, micro_batches: Sequence[MicroBatch], shares: Tensor) -> list[Tensor]:
        """Run forward and backward of every micro-batch; return the losses if the head is here."""
        self.backwards = [0] * len(self.stages)
        losses = self._run(self.schedule.step, micro_batches, shares)
        _add_tied_gradients(self.engine)
        return losses

    def evaluate(self, micro_batches: Sequence[MicroBatch], counts: Tensor) -> list[Tensor]:
        """Run forward of every micro-batch; return losses times counts if the head is here."""
        return self._run(self.schedule.eval, micro_batches, counts)

    def _run(self, run: Any, micro_batches: Sequence[MicroBatch], shares: Tensor) -> list[Tensor]:
        """Pass this rank's stages their inputs; the schedule splits them into micro-batches."""
        self.engine.begin_trace()
        stages = self.engine.stages
        losses: list[Tensor] = []
        context = _joined_context(micro_batches)
        inputs = (torch.cat([m.tokens for m in micro_batches]),) if stages[0] == 0 else ()
        if stages[-1] == self.engine.num_stages - 1:
            targets = torch.cat([m.targets for m in micro_batches])
            run(
                *inputs,
                target=shares,
                targets=targets,
                losses=losses,
                return_outputs=False,
                **context,
            )
        else:
            run(*inputs, return_outputs=False, **context)
        return [loss.detach() for loss in losses]

    def _before_backward(self, chunk: int) -> None:
        """Tell DeepSpeed which backward of the step this is, if it reduces per micro-batch.

        With per_step reduction nothing is needed: the reduction waits until all backwards are done.
        """
        if self.engine.config.megagpt.parallel.gradient_reduction == "per_step":
            return
        deepspeed = self.engine.deepspeed
        compat.begin_backward(deepspeed, earlier=self.backwards[chunk])
        self.backwards[chunk] += 1
        counted = (
            self.backwards[chunk : chunk + 1] if compat.ends_by_chunk(deepspeed) else self.backwards
        )
        deepspeed.set_gradient_accumulation_boundary(min(counted) == self.micro_batches)


def _joined_context(micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Return the context of several micro-batches as one; a schedule splits it along the batch."""
    context: dict[str, Any] = {}
    if micro_batches[0].documents is not None:
        bounds = [m.documents.positions for m in micro_batches if m.documents is not None]
        context["document_ids"] = DocumentBounds(torch.cat(bounds))
    for name in ("dropout_seed", "positions"):
        if getattr(micro_batches[0], name) is not None:
            context[name] = torch.cat([getattr(m, name) for m in micro_batches])
    return context


def _add_tied_gradients(engine: Engine) -> None:
    """Give both copies of the tied weight the sum of their gradients.

    The copies are on the first and the last stage.
    """
    if engine.tied_group is None:
        return
    weight = next(parameter for parameter, name in engine.names.items() if name == TIED_WEIGHT)
    if engine.config.megagpt.parallel.gradient_reduction == "per_step":
        dist.all_reduce(weight.grad, group=engine.tied_group)
    else:
        compat.sum_reduced_gradients(engine.deepspeed, weight, engine.tied_group)


@torch.no_grad()
def logits(engine: Engine, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    """Return the last position's logits (batch, 1, padded vocabulary) in fp32; collective.

    Every rank must call it and gets equal values. Each stage computes in turn and broadcasts its
    output within the replica. Rounding may differ between devices, and all ranks must draw the same
    token, so rank 0's logits are used everywhere.
    """
    axis = engine.tensor_axis
    with axis.whole_sequences() if axis is not None else nullcontext():
        x = _last_logits(engine, tokens, cache)
    dist.broadcast(x, src=0)
    return x


def _last_logits(engine: Engine, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    position = cache.length
    x = tokens.to(engine.device)
    model = engine.config.megagpt.model
    for stage in range(engine.num_stages):
        last = stage == engine.num_stages - 1
        if stage in engine.stages:
            x = engine.chunks[engine.stages.index(stage)](x, cache=cache)
            x = x[:, -1:].float().contiguous() if last else x
        elif engine.num_stages > 1:
            shape = (
                (tokens.shape[0], 1, model.vocab_size)
                if last
                else (*tokens.shape, model.hidden_size)
            )
            x = torch.empty(
                shape,
                dtype=torch.float32 if last else compute_dtype(engine.config),
                device=engine.device,
            )
        if engine.num_stages > 1:
            dist.broadcast(
                x, src=engine.mesh.rank_of_stage(stage), group=engine.mesh.pipeline_group
            )
        cache.length = position
    cache.length = position + tokens.shape[1]
    return x


# Loss, norm before clipping, whether the update was made, sums of the numbers.
Outcome = tuple[float, float, bool, Sequence[float]]
Refuses = Callable[[float], bool] | None


def _update_and_read(
    engine: Engine, losses: Sequence[Tensor], refuses: Refuses, numbers: Numbers
) -> Outcome:
    """Update under ZeRO 1 to 3, which skip by themselves if any rank has a non-finite gradient."""
    engine.deepspeed.step()
    norm = engine.deepspeed.get_global_grad_norm()
    if isinstance(norm, Tensor) and norm.device == engine.device:
        loss, *sums, norm = _read(engine, losses, numbers(), norm)
    else:  # in host memory: the optimizer is offloaded, or the step was skipped
        loss, *sums = _read(engine, losses, numbers())
    return loss, float(norm), engine.deepspeed.was_step_applied(), sums


def _read_and_update(
    engine: Engine, losses: Sequence[Tensor], refuses: Refuses, numbers: Numbers
) -> Outcome:
    """Update under ZeRO 1 to 3 unless the loss is not finite or refused."""
    loss, *sums = _read(engine, losses, numbers())
    if not math.isfinite(loss) or (refuses is not None and refuses(loss)):
        compat.refuse_step(engine.deepspeed)
        return loss, math.nan, False, sums
    engine.deepspeed.step()
    norm = float(engine.deepspeed.get_global_grad_norm())
    return loss, norm, engine.deepspeed.was_step_applied(), sums


def _update_replicated(
    engine: Engine, losses: Sequence[Tensor], refuses: Refuses, numbers: Numbers
) -> Outcome:
    """Update under ZeRO 0, which neither reports the gradient norm nor checks that it is finite."""
    gradients = [p.grad for p in engine.names if p.grad is not None and compat.is_counted(p)]
    squared = torch.nn.utils.get_total_norm(gradients).square()
    if engine.mesh.tensor_size > 1:
        dist.all_reduce(squared, group=engine.mesh.tensor_group)
    loss, *sums, norm = _read(engine, losses, numbers(), squared.sqrt())
    if not math.isfinite(loss) or (refuses is not None and refuses(loss)):
        compat.refuse_step(engine.deepspeed)
        return loss, math.nan, False, sums
    if not math.isfinite(norm):
        compat.abandon_step(engine.deepspeed)
        return loss, norm, False, sums
    engine.deepspeed.step()
    return loss, norm, True, sums
