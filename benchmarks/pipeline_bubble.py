"""Measure how long pipeline ranks idle in a step under each schedule, beside the formula.

    python -m benchmarks.pipeline_bubble

It runs a real engine and its pipeline. Each block also sleeps, and twice as long in backward as in
forward. This stands for compute: it is equal everywhere and needs no core, so a busy machine does
not matter. A rank is idle while it is in no stage's forward or backward; messages, reduction and
the optimizer count as idle. Numbers are medians over steps of the mean over ranks.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser, positive, whole_number

BLOCKS = 8
CASES = {2: (2, 4, 8, 16), 4: (4, 8, 16)}  # micro-batches by pipeline ranks
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2}  # stages a rank


def configuration(ranks: int, schedule: str, micro_batches: int) -> dict[str, Any]:
    """Return a pipeline of that many ranks, with a model too small to take time itself."""
    return {
        "train_batch_size": micro_batches,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1},
        "megagpt": {
            "model": {
                "vocab_size": 128,
                "num_layers": BLOCKS,
                "hidden_size": 32,
                "num_heads": 4,
                "sequence_length": 16,
            },
            "parallel": {
                "pipeline": ranks,
                "schedule": schedule,
                "virtual_stages": SCHEDULES[schedule],
            },
            "training": {"total_steps": 1_000_000},
        },
    }


def idle_by_formula(ranks: int, schedule: str, micro_batches: int) -> float:
    """Return the idle share of a step (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)."""
    bubble = (ranks - 1) / SCHEDULES[schedule]
    return bubble / (micro_batches + bubble)


def slow_down(chunks: list[Any], delay_s: float) -> None:
    """Make every block sleep ``delay_s`` in forward and twice that in backward."""
    import torch

    class Delay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(delay_s)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(2 * delay_s)
            return gradient

    for chunk in chunks:
        for block in chunk.blocks.values():
            block.register_forward_hook(lambda module, inputs, output: Delay.apply(output))


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each forward and backward of this rank's stages."""
    from megagpt.parallel.compat import EngineStage

    busy_s: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                busy_s.append(time.perf_counter() - started)

        return call

    methods = ("forward_maybe_with_nosync", "backward_maybe_with_nosync")
    forward, backward = (
        patch.object(EngineStage, name, timed(getattr(EngineStage, name))) for name in methods
    )
    with forward, backward:
        yield busy_s


def measure(
    ranks: int, schedule: str, micro_batches: int, delay_s: float, steps: int
) -> dict[str, Any]:
    """Return a row of the table; every rank must call it."""
    import torch
    import torch.distributed as dist

    from megagpt.config import RunConfig
    from megagpt.parallel import pipeline
    from megagpt.parallel.engine import build_engine, build_mesh
    from megagpt.parity import compare as parity

    text = json.dumps(configuration(ranks, schedule, micro_batches))
    config = RunConfig.from_json(text).resolved(
        world_size=ranks, vocabulary=None, bf16_native=False
    )
    engine = build_engine(config, build_mesh(config))
    slow_down(engine.chunks, delay_s)
    idle = []
    times_s = []
    for step in range(steps + 1):
        data = parity.micro_batches(engine, step)
        dist.barrier()
        started = time.perf_counter()
        with stopwatch() as busy_s:
            pipeline.train_step(engine, data)
        time_s = time.perf_counter() - started
        share = torch.tensor(1 - sum(busy_s) / time_s)
        dist.all_reduce(share)
        if step > 0:  # the first warms up
            idle.append(float(share) / ranks)
            times_s.append(time_s)
    engine.deepspeed.destroy()
    return {
        "pipeline_ranks": ranks,
        "schedule": schedule,
        "micro_batches": micro_batches,
        "step_s": f"{statistics.median(times_s):.2f}",
        "idle": f"{statistics.median(idle):.3f}",
        "idle_by_formula": f"{idle_by_formula(ranks, schedule, micro_batches):.3f}",
    }


def measure_all(delay_s: float, steps: int) -> list[dict[str, Any]]:
    """Return the rows for a pipeline over these ranks; every rank must call it."""
    import logging

    import torch.distributed as dist

    logging.disable(logging.WARNING)  # each engine would log its Adam again
    ranks = dist.get_world_size()
    return [
        measure(ranks, schedule, of, delay_s, steps)
        for of in CASES[ranks]
        for schedule in SCHEDULES
    ]


def main() -> None:
    from megagpt.parity import local_ranks

    parser = command_parser(description=__doc__.splitlines()[0])
    parser.add_argument("--delay_ms", type=positive, default=20.0, help="of a block, forward")
    parser.add_argument("--steps", type=whole_number(1), default=5)
    arguments = parser.parse_args()
    job = (measure_all, arguments.delay_ms / 1000, arguments.steps)
    write_table(
        "pipeline_bubble",
        "benchmarks.pipeline_bubble",
        [r for n in CASES for r in local_ranks.start(n, *job)],
    )


if __name__ == "__main__":
    main()
