"""One optimizer step, whatever the ZeRO stage: forward and backward of every micro-batch, guard, update."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt import compat
from megagpt.engine import Engine


@dataclass(frozen=True)
class MicroBatch:
    """One forward's input on the device: tokens and targets (batch, length), ids of packed documents (batch, length)
    or None, and a dropout seed for each sample (batch,) or None."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
    dropout_seed: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on every rank.

    ``loss`` is the mean over the global batch, ``grad_norm`` the norm before clipping. ``applied`` is false where a
    gradient was not finite: weights and moments are as before.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool


def train_step(engine: Engine, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """Train on one global batch, of which ``micro_batches`` is this data replica's part; every rank must call it."""
    learning_rate = compat.base_optimizer(engine.deepspeed).param_groups[0]["lr"]
    losses = accumulate(engine, micro_batches)
    loss = mean_over_data(engine, torch.stack(losses).mean())
    norm, applied = _update_replicated(engine) if engine.stage == 0 else _update_partitioned(engine)
    return StepResult(loss, norm, learning_rate, applied)


def accumulate(engine: Engine, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Forward and backward of every micro-batch; leaves the reduced gradients and everything but the update done."""
    per_step = engine.config.megagpt.parallel.gradient_reduction == "per_step" and engine.stage > 0
    losses = []
    with engine.deepspeed.coalesce_grad_reduction() if per_step else nullcontext():
        for index, micro_batch in enumerate(micro_batches):
            loss = forward(engine, micro_batch)
            engine.deepspeed.backward(loss)
            losses.append(loss.detach())
            if not per_step and index + 1 < len(micro_batches):
                engine.deepspeed.step()  # short of the boundary it only counts micro-steps
    if per_step:
        engine.deepspeed.set_gradient_accumulation_boundary(True)
    return losses


def forward(engine: Engine, micro_batch: MicroBatch) -> Tensor:
    """The mean loss of one micro-batch; every rank of the data axis must call it, as ZeRO-3 gathers parameters."""
    return engine.deepspeed(
        micro_batch.tokens,
        micro_batch.targets,
        document_ids=micro_batch.document_ids,
        dropout_seed=micro_batch.dropout_seed,
    )


def _update_partitioned(engine: Engine) -> tuple[float, bool]:
    """ZeRO 1 to 3 find a gradient that is not finite on any rank by themselves, and skip."""
    engine.deepspeed.step()
    return float(engine.deepspeed.get_global_grad_norm()), engine.deepspeed.was_step_applied()


def _update_replicated(engine: Engine) -> tuple[float, bool]:
    """ZeRO 0 neither reports the norm nor looks whether it is finite."""
    gradients = [parameter.grad for parameter in engine.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        compat.abandon_step(engine.deepspeed)
        return float(norm), False
    engine.deepspeed.step()
    return float(norm), True


def mean_over_data(engine: Engine, value: Tensor) -> float:
    """The mean of a scalar over the data axis, equal on all its ranks."""
    value = value.double()
    dist.all_reduce(value, group=engine.mesh.data_group)
    return float(value) / engine.mesh.data_size
