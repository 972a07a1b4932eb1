"""Measure what DeepSpeed's engine costs: the trainer against a plain PyTorch loop, one process.

    python -m benchmarks.engine_overhead

Both train the same model. Every contender has a process of its own. They take turns of a few steps,
so that a noisy machine slows all of them alike; a ratio is the median over the rounds. Data are
random tokens; fp32, with clipping and weight decay.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser, whole_number

CONTENDERS = {
    "plain PyTorch loop": None,
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
    "ZeRO 3, optimizer on cpu": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "ZeRO 3, optimizer and parameters on cpu": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}
SHAPES = {
    "10M": {
        "num_layers": 6,
        "hidden_size": 320,
        "num_heads": 5,
        "vocab_size": 8192,
        "sequence_length": 256,
    },
    "25M": {
        "num_layers": 8,
        "hidden_size": 448,
        "num_heads": 7,
        "vocab_size": 8192,
        "sequence_length": 256,
    },
}
BATCH = 8
MICRO_BATCH = 4


def configuration(shape: str, zero: dict[str, Any]) -> dict[str, Any]:
    """Return a run of that shape under a ZeRO section, as in a JSON file."""
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "bf16": {"enabled": False},
        "zero_optimization": zero,
        "megagpt": {"model": SHAPES[shape], "training": {"total_steps": 1_000_000}},
    }


def resolve(shape: str, zero: dict[str, Any]) -> Any:
    """Return the resolved configuration of that run."""
    import json

    from megagpt.config import RunConfig

    text = json.dumps(configuration(shape, zero))
    return RunConfig.from_json(text).resolved(world_size=1, vocabulary=None, bf16_native=False)


def batches(config: Any) -> Iterator[list[Any]]:
    """Yield micro-batches without end."""
    import torch

    from megagpt.parallel.pipeline import MicroBatch

    model = config.megagpt.model
    generator = torch.Generator().manual_seed(0)
    while True:
        shape = (config.train_batch_size, model.sequence_length)
        tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
        parts = tokens.split(config.train_micro_batch_size_per_gpu)
        yield [MicroBatch(part, part.roll(-1, dims=1)) for part in parts]


def plain_step(config: Any) -> Callable[[list[Any]], None]:
    """Return one optimizer step of a plain loop."""
    import torch

    from megagpt.model import GPT, decayed, initialise_

    model = initialise_(GPT(config.megagpt.model), seed=0)
    decay = [p for name, p in model.named_parameters() if decayed(name)]
    others = [p for name, p in model.named_parameters() if not decayed(name)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], 1e-3
    )

    def step(micro_batches: list[Any]) -> None:
        for micro_batch in micro_batches:
            (model(micro_batch.tokens, micro_batch.targets) / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def trainer_step(config: Any) -> Callable[[list[Any]], None]:
    """Return one optimizer step of the trainer."""
    from megagpt.parallel.engine import build_engine, build_mesh, join_ranks
    from megagpt.parallel.pipeline import train_step

    join_ranks()
    engine = build_engine(config, build_mesh(config))

    def step(micro_batches: list[Any]) -> None:
        train_step(engine, micro_batches)

    return step


def serve(shape: str, zero: dict[str, Any] | None, connection: Connection) -> None:
    """Receive numbers of steps, run them, and send the seconds they took, until a 0."""
    config = resolve(shape, zero or {"stage": 0})
    step = plain_step(config) if zero is None else trainer_step(config)
    data = batches(config)
    for steps in iter(connection.recv, 0):
        prepared = list(itertools.islice(data, steps))
        started = time.perf_counter()
        for micro_batches in prepared:
            step(micro_batches)
        connection.send(time.perf_counter() - started)


def measure(shape: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return the table's rows for one shape."""
    context = get_context("spawn")
    connections = {}
    processes = []
    for name, zero in CONTENDERS.items():
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(shape, zero, theirs), daemon=True))
        processes[-1].start()
    times_s: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_number in range(rounds + 1):
        for name, connection in connections.items():
            connection.send(steps)
            time_s = connection.recv()
            if round_number > 0:  # the first round warms up
                times_s[name].append(time_s / steps)
    for connection in connections.values():
        connection.send(0)
    for process in processes:
        process.join()
    plain = times_s["plain PyTorch loop"]
    tokens = BATCH * SHAPES[shape]["sequence_length"]
    rows = []
    for name, of in times_s.items():
        ratio = statistics.median(p / t for p, t in zip(plain, of, strict=True))
        rows.append(
            {
                "parameters": shape,
                "contender": name,
                "tokens_per_s": round(tokens / statistics.median(of)),
                "ratio_to_plain": f"{ratio:.3f}",
            }
        )
    return rows


def main() -> None:
    parser = command_parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole_number(1), default=7)
    parser.add_argument("--steps", type=whole_number(1), default=3, help="steps of one turn")
    arguments = parser.parse_args()
    rows = [row for shape in SHAPES for row in measure(shape, arguments.rounds, arguments.steps)]
    write_table("engine_overhead", "benchmarks.engine_overhead", rows)


if __name__ == "__main__":
    main()
