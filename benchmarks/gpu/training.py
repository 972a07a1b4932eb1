"""Train a GPT on one device: through the trainer, and as a plain compiled PyTorch loop."""

import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import NotRun
from benchmarks.gpu.child import Context
from benchmarks.gpu.machine import GIB
from kernels.launcher import launches
from megagpt.config import ResolvedConfig, RunConfig
from megagpt.parallel.device import announce_to_deepspeed, peak_flops, set_cuda_defaults
from megagpt.planning.cost.memory import rank_memory
from megagpt.planning.flops import model_flops_utilisation
from megagpt.planning.layout import Layout, Pins
from megagpt.planning.plan import RESERVE_GIB

announce_to_deepspeed()  # before anything imports it
# Before the plan asks for free memory: that makes torch read the allocator's settings.
set_cuda_defaults()

DIFFERENT_TARGETS = 256  # few enough that the loss falls in a few steps, with any vocabulary
# Of a mean loss, our kernels against torch's.
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-3}


def configuration(
    model: dict[str, Any],
    stage: int,
    micro_batch: int,
    learning_rate: float = 6e-4,
    recompute: str = "none",
    bf16: bool = True,
    **zero: Any,
) -> ResolvedConfig:
    """Return a run of one micro-batch for each step on one rank.

    ``model`` are keys of megagpt.model, ``zero`` keys of ZeRO's section. At ZeRO 0 it computes in
    fp32, because the trainer refuses 16 bits there.
    """
    document = {
        "train_batch_size": micro_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16 and stage > 0},
        "zero_optimization": {"stage": stage, **zero},
        "megagpt": {"model": model, "training": {"total_steps": 1_000_000, "recompute": recompute}},
    }
    run = RunConfig.from_json(json.dumps(document))
    return run.resolved(
        world_size=1, vocabulary=run.megagpt.model.published_vocabulary, bf16_native=True
    )


def batch(config: ResolvedConfig, step: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return random tokens and targets that follow from them, each (micro-batch, length)."""
    model = config.megagpt.model
    generator = torch.Generator().manual_seed(step)
    shape = (config.train_batch_size, model.sequence_length)
    tokens = torch.randint(model.vocabulary, shape, generator=generator).to(device)
    return tokens, tokens % min(DIFFERENT_TARGETS, model.vocabulary)


@dataclass(frozen=True)
class Steps:
    """The seconds and the loss of each of a few steps; the first step compiles."""

    seconds: list[float]
    losses: list[float]

    @property
    def step_s(self) -> float:
        """Return the median of the steps after the first two."""
        return statistics.median(self.seconds[2:] or self.seconds[-1:])

    @property
    def learnt(self) -> str:
        """Return what is wrong with the losses; empty if they are finite and fell."""
        if not all(map(math.isfinite, self.losses)):
            return f"a loss is not finite: {self.losses}"
        return (
            ""
            if self.losses[-1] < self.losses[0]
            else f"the loss did not fall: {self.losses[0]} {self.losses[-1]}"
        )


def run_steps(step: Callable[[int], float], count: int) -> Steps:
    """Take steps; each returns its loss, so it has ended on the device."""
    seconds, losses = [], []
    for index in range(count):
        began = time.perf_counter()
        losses.append(step(index))
        seconds.append(time.perf_counter() - began)
    return Steps(seconds, losses)


def trainer(config: ResolvedConfig) -> tuple[Any, Callable[[int], float], Callable[[], float]]:
    """Return (engine, a step, the mean loss of a batch) of the trainer.

    Joins a group of one rank, unless ranks have joined already.
    """
    from megagpt.parallel.engine import build_engine, build_mesh, join_ranks
    from megagpt.parallel.pipeline import MicroBatch, evaluate, train_step

    if not torch.distributed.is_initialized():
        join_ranks()
    engine = build_engine(config, build_mesh(config))
    batches = [MicroBatch(*batch(config, index, engine.device)) for index in range(8)]

    def step(index: int) -> float:
        return train_step(engine, [batches[index % len(batches)]]).loss

    def loss() -> float:
        (nats,), (targets,) = evaluate(engine, batches[:1]).tolist()
        return nats / targets

    return engine, step, loss


def measure(context: Context, steps: int, **settings: Any) -> None:
    """Measure MFU, tokens/s, the first step, and memory beside the plan's.

    ``settings`` are those of ``configuration``. MEGAGPT_KERNELS=torch in the environment selects
    torch's kernels. Right if the loss falls and equals that of torch's kernels.
    """
    config = configuration(**settings)
    memory = planned(config, context.device)
    began = time.perf_counter()
    engine, step, evaluate = trainer(config)
    built_s = time.perf_counter() - began
    try:
        done = run_steps(step, steps)
        figures = speed(config, done, context.device) | memory | peaks(context.device)
        loss = evaluate()
        launched = sum(launches().values())
        with forced("torch"):
            difference = abs(loss - evaluate())
    finally:
        engine.close()
    allowed = TOLERANCE[torch.bfloat16 if config.bf16.enabled else torch.float32]
    reason = done.learnt
    if not difference <= allowed:
        reason = (
            f"the loss {loss} differs from that of torch's kernels by {difference:.3g}, "
            f"{allowed} allowed"
        )
    if context.device == "cuda" and "MEGAGPT_KERNELS" not in os.environ and not launched:
        reason = reason or "none of our kernels ran"
    figures |= {
        "built_s": round(built_s, 2),
        "launches": launched,
        "difference_to_torch": difference,
    }
    context.judge("training", not reason, reason, **figures)


def plain(context: Context, steps: int, backend: str = "inductor", **settings: Any) -> None:
    """Train in a plain loop: torch.compile, torch's fused AdamW, fp32 weights.

    Right if the loss falls and the compiled model's loss is that of the eager model.
    """
    from megagpt.model import GPT, initialise_
    from megagpt.parity.plain import adam, computing_in

    config = configuration(**settings)
    dtype = torch.bfloat16 if config.bf16.enabled else torch.float32
    model = initialise_(GPT(config.megagpt.model), seed=0).to(context.device)
    optimizer = adam(config, model, fused=context.device == "cuda")
    eager = computing_in(dtype, model)
    compiled = torch.compile(eager, backend=backend)
    batches = [batch(config, index, context.device) for index in range(8)]

    def step(index: int) -> float:
        loss = compiled(*batches[index % len(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    done = run_steps(step, steps)
    figures = speed(config, done, context.device) | peaks(context.device)
    with torch.no_grad():
        difference = abs(float(compiled(*batches[0])) - float(eager(*batches[0])))
    reason = done.learnt
    if not difference <= TOLERANCE[dtype]:
        reason = f"compiled and eager losses differ by {difference:.3g}, {TOLERANCE[dtype]} allowed"
    context.judge("training", not reason, reason, **figures)


def trace(context: Context, steps: int, **settings: Any) -> None:
    """Write a profiler's trace of three steps to DIR/traces, and the share of device time."""
    from torch.profiler import ProfilerActivity, profile

    config = configuration(**settings)
    engine, step, _ = trainer(config)
    path = context.directory / "traces" / f"{context.case.replace(' ', '_')}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = run_steps(step, steps)
        wanted = [ProfilerActivity.CPU] + (
            [ProfilerActivity.CUDA] if context.device == "cuda" else []
        )
        with profile(activities=wanted) as seen:
            profiled = run_steps(step, 3)
        seen.export_chrome_trace(str(path))
    finally:
        engine.close()
    kind = (
        torch.autograd.DeviceType.CUDA
        if context.device == "cuda"
        else torch.autograd.DeviceType.CPU
    )
    spent_us = {  # of kernels on a GPU, of operators elsewhere
        event.key: event.self_device_time_total
        if context.device == "cuda"
        else event.self_cpu_time_total
        for event in seen.key_averages()
        if event.device_type == kind
        and not event.is_user_annotation  # a range over kernels, such as Adam's step
    }
    figures = {
        "step_ms": round(1000 * done.step_s, 2),
        "profiled_step_ms": round(1000 * statistics.mean(profiled.seconds), 2),
        # Overlapping kernels count twice.
        "busy_share": round(sum(spent_us.values()) / 1e6 / sum(profiled.seconds), 3),
        "longest": [name[:60] for name in sorted(spent_us, key=lambda name: -spent_us[name])[:5]],
        "file": f"traces/{path.name}",
    }
    context.judge("trace", not done.learnt, done.learnt, **figures)


def planned(config: ResolvedConfig, device: str) -> dict[str, Any]:
    """Return the plan's peaks in GiB. Raises NotRun if the device has less free memory."""
    pins: Pins = "torch" if device == "cuda" else "nobody"
    peak = rank_memory(Layout.of(config, pins=pins), 0).peak
    needed, host = peak.device / GIB, peak.host / GIB
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0] / GIB
        if free < needed + RESERVE_GIB:
            raise NotRun(
                f"too little device memory: {free:.0f} GiB free, needs {needed:.0f} and a "
                f"reserve of {RESERVE_GIB:.0f}"
            )
    return {"planned_gib": round(needed, 3), "planned_host_gib": round(host, 3)}


def peaks(device: str) -> dict[str, Any]:
    """Return the peaks in GiB: allocated and reserved on a GPU, resident on the host."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    found: dict[str, Any] = {
        "allocated_gib": None,
        "reserved_gib": None,
        "host_gib": round(host, 2),
    }
    if device == "cuda":
        found["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    return found


def speed(config: ResolvedConfig, done: Steps, device: str) -> dict[str, Any]:
    """Return what the steps took.

    MFU is relative to the 16-bit peak even if the run computes in fp32; attention counts in full.
    """
    model = config.megagpt.model
    tokens_per_s = config.train_batch_size * model.sequence_length / done.step_s
    peak = peak_flops(torch.device(device), torch.bfloat16)
    rate: dict[str, Any] = {"tokens_per_s_per_device": tokens_per_s}
    mfu = (
        None
        if peak is None
        else round(model_flops_utilisation(model, peak_flops_per_s=peak, **rate), 4)
    )
    return {
        "parameters": model.num_parameters,
        "dtype": "bf16" if config.bf16.enabled else "fp32",
        "kernels": os.environ.get("MEGAGPT_KERNELS", "ours"),
        "tokens_per_step": config.train_batch_size * model.sequence_length,
        "step_ms": round(1000 * done.step_s, 2),
        "tokens_per_s": round(tokens_per_s),
        "mfu": mfu,
        "first_step_s": round(done.seconds[0], 2),
        "first_loss": done.losses[0],
        "last_loss": done.losses[-1],
    }


@contextmanager
def forced(kernels: str) -> Iterator[None]:
    """Set MEGAGPT_KERNELS within the block."""
    before = os.environ.get("MEGAGPT_KERNELS")
    os.environ["MEGAGPT_KERNELS"] = kernels
    try:
        yield
    finally:
        del os.environ["MEGAGPT_KERNELS"]
        if before is not None:
            os.environ["MEGAGPT_KERNELS"] = before
