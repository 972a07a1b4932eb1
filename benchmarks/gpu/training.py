"""Cases that train a GPT on one device: through the trainer, and as a plain compiled PyTorch loop."""

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
from megagpt.device import announce_to_deepspeed, peak_flops, set_cuda_defaults
from megagpt.flops import model_flops_utilisation
from megagpt.layout import Layout
from megagpt.memory import rank_memory
from megagpt.plan import RESERVE_GIB

announce_to_deepspeed()  # before anything imports it
set_cuda_defaults()  # before the plan asks for free memory, which makes torch read the allocator's settings

DIFFERENT_TARGETS = 256  # so that a few steps bring the loss down, whatever the vocabulary
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-3}  # of a mean loss, ours against torch's kernels


def configuration(
    model: dict[str, Any],
    stage: int,
    micro_batch: int,
    learning_rate: float = 6e-4,
    recompute: str = "none",
    bf16: bool = True,
    **zero: Any,
) -> ResolvedConfig:
    """A run of one micro-batch a step on one rank; ``model`` are keys of megagpt.model, ``zero`` of ZeRO's section.

    At ZeRO 0 it computes in fp32: the trainer refuses 16 bit there.
    """
    document = {
        "train_batch_size": micro_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "optimizer": {"type": "AdamW", "params": {"lr": learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16 and stage > 0},
        "zero_optimization": {"stage": stage, **zero},
        "megagpt": {"model": model, "training": {"total_steps": 1_000_000, "recompute": recompute}},
    }
    run = RunConfig.from_json(json.dumps(document))
    return run.resolved(world_size=1, vocabulary=run.megagpt.model.published_vocabulary, bf16_native=True)


def batch(config: ResolvedConfig, step: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Random tokens and targets that follow from them, each (micro-batch, length)."""
    model = config.megagpt.model
    generator = torch.Generator().manual_seed(step)
    shape = (config.train_batch_size, model.sequence_length)
    tokens = torch.randint(model.vocabulary, shape, generator=generator).to(device)
    return tokens, tokens % min(DIFFERENT_TARGETS, model.vocabulary)


@dataclass(frozen=True)
class Steps:
    """What a few steps did: seconds of each (the first compiles), losses."""

    seconds: list[float]
    losses: list[float]

    @property
    def step_s(self) -> float:
        """The median of those after the first two."""
        return statistics.median(self.seconds[2:] or self.seconds[-1:])

    @property
    def learnt(self) -> str:
        """What speaks against the losses; empty where they are finite and fell."""
        if not all(map(math.isfinite, self.losses)):
            return f"a loss is not finite: {self.losses}"
        return "" if self.losses[-1] < self.losses[0] else f"the loss did not fall: {self.losses[0]} {self.losses[-1]}"


def run_steps(step: Callable[[int], float], count: int) -> Steps:
    """Take steps, each of which returns its loss and so has ended."""
    seconds, losses = [], []
    for index in range(count):
        began = time.perf_counter()
        losses.append(step(index))
        seconds.append(time.perf_counter() - began)
    return Steps(seconds, losses)


def trainer(config: ResolvedConfig) -> tuple[Any, Callable[[int], float], Callable[[], float]]:
    """(engine, a step, the mean loss of a batch) of the trainer; alone, or as a rank that has joined already."""
    from megagpt.engine import build_engine, build_mesh, join_ranks
    from megagpt.pipeline import MicroBatch, evaluate, train_step

    if not torch.distributed.is_initialized():
        join_ranks()
    engine = build_engine(config, build_mesh(config))
    batches = [MicroBatch(*batch(config, index, engine.device)) for index in range(8)]

    def step(index: int) -> float:
        return train_step(engine, [batches[index % len(batches)]]).loss

    return engine, step, lambda: evaluate(engine, batches[:1])


def measure(context: Context, steps: int, **settings: Any) -> None:
    """MFU, tokens/s, the first step, memory beside the plan's; ``settings`` as in ``configuration``.

    MEGAGPT_KERNELS in the environment chooses torch's kernels. Right where the loss falls, and is torch's kernels' own.
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
        reason = f"the loss {loss} is {difference:.3g} from that of torch's kernels, {allowed} allowed"
    if context.device == "cuda" and "MEGAGPT_KERNELS" not in os.environ and not launched:
        reason = reason or "none of our kernels ran"
    figures |= {"built_s": round(built_s, 2), "launches": launched, "difference_to_torch": difference}
    context.judge("training", not reason, reason, **figures)


def plain(context: Context, steps: int, backend: str = "inductor", **settings: Any) -> None:
    """The same steps in a plain loop: our model under torch.compile, torch's fused AdamW, fp32 weights.

    Right where the loss falls, and the compiled model's is the eager one's.
    """
    from megagpt.model import GPT, initialise_
    from megagpt.plain import adam, computing_in

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
    """A profiler's trace of three steps in DIR/traces, and how much of their time the device computed."""
    from torch.profiler import ProfilerActivity, profile

    config = configuration(**settings)
    engine, step, _ = trainer(config)
    path = context.directory / "traces" / f"{context.case.replace(' ', '_')}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = run_steps(step, steps)
        wanted = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if context.device == "cuda" else [])
        with profile(activities=wanted) as seen:
            profiled = run_steps(step, 3)
        seen.export_chrome_trace(str(path))
    finally:
        engine.close()
    kind = torch.autograd.DeviceType.CUDA if context.device == "cuda" else torch.autograd.DeviceType.CPU
    spent_us = {  # of kernels on a GPU, of operators elsewhere
        event.key: event.self_device_time_total if context.device == "cuda" else event.self_cpu_time_total
        for event in seen.key_averages()
        if event.device_type == kind and not event.is_user_annotation  # a range over kernels, such as Adam's step
    }
    figures = {
        "step_ms": round(1000 * done.step_s, 2),
        "profiled_step_ms": round(1000 * statistics.mean(profiled.seconds), 2),
        "busy_share": round(sum(spent_us.values()) / 1e6 / sum(profiled.seconds), 3),  # overlaps count twice
        "longest": [name[:60] for name in sorted(spent_us, key=lambda name: -spent_us[name])[:5]],
        "file": f"traces/{path.name}",
    }
    context.judge("trace", not done.learnt, done.learnt, **figures)


def planned(config: ResolvedConfig, device: str) -> dict[str, Any]:
    """The plan's peaks in GiB. Raises NotRun where the device has not so much left."""
    peak = rank_memory(Layout.of(config), 0).peak
    needed, host = peak.device / GIB, peak.host / GIB
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0] / GIB
        if free < needed + RESERVE_GIB:
            raise NotRun(
                f"too little device memory: {free:.0f} GiB free, planned {needed:.0f} and {RESERVE_GIB:.0f} more"
            )
    return {"planned_gib": round(needed, 3), "planned_host_gib": round(host, 3)}


def peaks(device: str) -> dict[str, Any]:
    """What was held at most, in GiB: allocated and reserved on a GPU, resident in the host's memory."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    found: dict[str, Any] = {"allocated_gib": None, "reserved_gib": None, "host_gib": round(host, 2)}
    if device == "cuda":
        found["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    return found


def speed(config: ResolvedConfig, done: Steps, device: str) -> dict[str, Any]:
    """What the steps took. MFU is of the 16-bit peak also where the run computes in fp32, attention in full."""
    model = config.megagpt.model
    tokens_per_s = config.train_batch_size * model.sequence_length / done.step_s
    peak = peak_flops(torch.device(device), torch.bfloat16)
    rate: dict[str, Any] = {"tokens_per_s_per_device": tokens_per_s}
    mfu = None if peak is None else round(model_flops_utilisation(model, peak_flops_per_s=peak, **rate), 4)
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
    """Let MEGAGPT_KERNELS choose for a while."""
    before = os.environ.get("MEGAGPT_KERNELS")
    os.environ["MEGAGPT_KERNELS"] = kernels
    try:
        yield
    finally:
        del os.environ["MEGAGPT_KERNELS"]
        if before is not None:
            os.environ["MEGAGPT_KERNELS"] = before
