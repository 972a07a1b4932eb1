"""Measure how fast a training state is saved and loaded: ours, torch.save and DeepSpeed's own.

    python -m benchmarks.checkpoint_speed --directory /path/on/the/disk

The state is fp32 weights and both Adam moments, 12 bytes for each parameter, under ZeRO 1. GB/s
count these bytes, even for a contender that writes more. The contenders take turns in the same
processes, and every file is flushed before the next one begins, so that a noisy machine slows all
of them alike. Numbers are medians.

Ours flushes files to the disk and hashes them in the save, and verifies the hashes in the load. For
the others, the time with a flush is a column of its own. Loads find the files in the page cache.
``save_cpu_s`` and ``load_cpu_s`` are seconds of processor time on rank 0, which other work on the
machine hardly changes. If the ranks use every core, a save in the background takes the first from
the steps that run during it.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine_overhead import batches
from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser, user_path, whole_number

SHAPE = {
    "num_layers": 11,
    "hidden_size": 768,
    "num_heads": 12,
    "vocab_size": 8192,
    "sequence_length": 128,
}
OURS = "megagpt"
BACKGROUND = "megagpt, in the background"
TORCH = "torch.save"
DEEPSPEED = "DeepSpeed"
Times = dict[str, list[float]]


def resolve(world_size: int) -> Any:
    """Return the run's resolved configuration."""
    import json

    from megagpt.config import RunConfig

    document = {
        "train_batch_size": 2 * world_size,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1},
        "megagpt": {
            "model": SHAPE,
            "training": {"total_steps": 1_000_000},
            "checkpoint": {"asynchronous": True},
        },
    }
    return RunConfig.from_json(json.dumps(document)).resolved(
        world_size=world_size, vocabulary=None, bf16_native=False
    )


class Rank:
    """One rank with a trained state, and every way of saving it."""

    def __init__(self) -> None:
        import torch.distributed as dist

        from megagpt.parallel.engine import build_engine, build_mesh

        config = resolve(dist.get_world_size())
        self.engine = build_engine(config, build_mesh(config))
        self.data = batches(config)
        self.step()

    def step(self) -> float:
        """Train a step and return its seconds."""
        from megagpt.parallel.pipeline import train_step

        every = next(self.data)
        return self.timed(
            lambda: train_step(self.engine, every[: self.engine.config.gradient_accumulation_steps])
        )

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds from when all ranks begin until all have ended."""
        import torch.distributed as dist

        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - started

    def saver(self, directory: Path, *, asynchronous: bool) -> Any:
        """Return our saver."""
        from megagpt.checkpoint.saver import Saver

        saver = Saver(self.engine, directory, "")
        saver.settings = saver.settings.model_copy(update={"asynchronous": asynchronous})
        return saver

    def shard(self) -> dict[str, Any]:
        """Return this rank's flat tensors, as a plain script would save them."""
        from megagpt.checkpoint.writer import live

        return {
            f"{index}/{kind}": flat
            for index, flats in enumerate(live(self.engine))
            for kind, flat in flats.items()
        }

    def load_shard(self, path: Path) -> None:
        """Load what ``shard`` returned from a file."""
        import torch

        loaded = torch.load(path, weights_only=True)
        for name, flat in self.shard().items():
            flat.copy_(loaded[name])

    def measure(self, contender: str, directory: Path, times: Times) -> None:
        """Save and load once each; seconds go to ``times``."""
        import torch

        from megagpt.checkpoint.format import TrainState
        from megagpt.checkpoint.resume import resume

        shard = directory / f"shard_{self.engine.mesh.rank}.pt"
        engine = self.engine.deepspeed
        save, load = {
            OURS: (
                lambda: self.saver(directory, asynchronous=False).save(TrainState(step=1)),
                lambda: resume(self.engine, directory),
            ),
            TORCH: (lambda: torch.save(self.shard(), shard), lambda: self.load_shard(shard)),
            DEEPSPEED: (
                lambda: engine.save_checkpoint(str(directory), tag="1"),
                lambda: engine.load_checkpoint(str(directory), tag="1"),
            ),
        }[contender]
        self.flush(directory)
        begun = time.process_time()
        saved_s = self.timed(save)
        times[f"{contender}: save, processor"].append(time.process_time() - begun)
        times[f"{contender}: save"].append(saved_s)
        times[f"{contender}: save and flush"].append(
            saved_s + self.timed(lambda: self.flush(directory))
        )
        begun = time.process_time()
        times[f"{contender}: load"].append(self.timed(load))
        times[f"{contender}: load, processor"].append(time.process_time() - begun)

    def flush(self, directory: Path) -> None:
        """Flush every file in the directory to the disk, on rank 0 only."""
        if self.engine.mesh.rank == 0:
            for path in directory.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())

    def measure_background(self, directory: Path, times: Times) -> None:
        """Save while training continues.

        Measures how long the loop stops, and how long the steps take during the save.
        """
        from megagpt.checkpoint.format import TrainState

        saver = self.saver(directory, asynchronous=True)
        take = saver._snapshot.take
        copies_s = []
        take(self.engine)  # allocates the memory, which later saves reuse

        def timed_take(engine: Any) -> Any:
            started = time.perf_counter()
            copy = take(engine)
            copies_s.append(time.perf_counter() - started)
            return copy

        saver._snapshot.take = timed_take
        times["step"] += [self.step() for _ in range(2)]
        blocked_s = self.timed(lambda: saver.save(TrainState(step=1)))
        times["copy"] += copies_s
        times["blocked beyond copy"].append(blocked_s - copies_s[0])
        committed: list[Any] = []
        polled_s = 0.0
        while not committed:
            times["step while writing"].append(self.step())
            started = time.perf_counter()
            committed = saver.poll()
            polled_s += time.perf_counter() - started
        times["polls"].append(polled_s)
        times[f"{BACKGROUND}: save"].append(committed[0].duration_s)


def serve(directory: Path, rounds: int) -> tuple[Times, int]:
    """Measure all rounds; every rank must call it. Returns the times, and the state's bytes."""
    here = Rank()
    times: Times = defaultdict(list)
    for turn in range(rounds + 1):
        of_turn: Times = defaultdict(list)
        for contender in (OURS, TORCH, DEEPSPEED):
            here.measure(contender, emptied(here, directory), of_turn)
        here.measure_background(emptied(here, directory), of_turn)
        for name, values in of_turn.items():
            times[name] += values if turn > 0 else []  # the first turn warms up
    emptied(here, directory)
    return dict(times), 12 * here.engine.config.megagpt.model.num_parameters


def emptied(rank: Rank, directory: Path) -> Path:
    """Empty the directory, for all ranks."""
    if rank.engine.mesh.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    rank.timed(lambda: None)
    return directory


def measure(world_size: int, rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Return the table's rows for this number of ranks."""
    from megagpt.parity.local_ranks import start

    times, size = start(world_size, serve, directory, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        row(
            world_size,
            contender,
            size,
            median,
            median[f"{contender}: save and flush"],
            median[f"{contender}: load"],
        )
        for contender in (OURS, TORCH, DEEPSPEED)
    ]
    background = row(world_size, BACKGROUND, size, median, median[f"{BACKGROUND}: save"], None) | {
        "step_s": f"{median['step']:.2f}",
        "copy_s": f"{median['copy']:.3f}",
        "blocked_beyond_copy_s": f"{median['blocked beyond copy'] + median['polls']:.3f}",
        "step_while_writing_s": f"{median['step while writing']:.2f}",
    }
    return [*rows, background]


def row(
    world_size: int,
    contender: str,
    size: int,
    median: dict[str, float],
    flushed_s: float,
    load_s: float | None,
) -> dict[str, Any]:
    """Return one contender's row; a field is empty if it has no such number."""

    def processor_s(name: str) -> str:
        return f"{median[name]:.2f}" if name in median else ""

    save_s = median[f"{contender}: save"]
    return {
        "ranks": world_size,
        "contender": contender,
        "state_gb": f"{size / 1e9:.2f}",
        "save_s": f"{save_s:.2f}",
        "save_gb_per_s": f"{size / 1e9 / save_s:.2f}",
        "save_cpu_s": processor_s(f"{contender}: save, processor"),
        "save_and_flush_s": f"{flushed_s:.2f}",
        "load_s": f"{load_s:.2f}" if load_s is not None else "",
        "load_gb_per_s": f"{size / 1e9 / load_s:.2f}" if load_s is not None else "",
        "load_cpu_s": processor_s(f"{contender}: load, processor"),
        "step_s": "",
        "copy_s": "",
        "blocked_beyond_copy_s": "",
        "step_while_writing_s": "",
    }


def main() -> None:
    parser = command_parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole_number(1), default=5)
    parser.add_argument(
        "--directory",
        type=user_path,
        default=Path(tempfile.gettempdir()),
        help="a disk with 3 GB free",
    )
    arguments = parser.parse_args()
    directory = arguments.directory / "checkpoint_speed"
    rows = [row for ranks in (1, 2) for row in measure(ranks, arguments.rounds, directory)]
    shutil.rmtree(directory)
    write_table("checkpoint_speed", "benchmarks.checkpoint_speed", rows)


if __name__ == "__main__":
    main()
