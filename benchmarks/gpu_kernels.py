"""Our kernels on this GPU: are they right, how fast beside the others, and what do they bring to a training step?

    python -m benchmarks.gpu_kernels

Runs the tests of the GPU (accuracy against fp64), measures what the targets compare, in bf16 and one process, and
trains GPT-2 124M through DeepSpeed ZeRO-3 with and without our kernels, in turns. Tables go to benchmarks/results/.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.machine import markdown, write_table

REPOSITORY = Path(__file__).parent.parent
CONFIGURATION = REPOSITORY / "ds_configs" / "gpt2_124m.json"
OVERRIDES = ("zero_optimization.stage=3", "train_batch_size=16", "bf16.enabled=true")
ROUNDS, STEPS = 5, 10


@dataclass(frozen=True)
class Target:
    """Ours must reach ``least`` times the rival's figure (of ``quantity``, larger is better) in every matching row.

    ``shape`` is a part of the shape's name. Without a rival the figure itself must.
    """

    op: str
    mode: str
    ours: str
    rival: str
    least: float
    shape: str = ""
    quantity: str = "rate"


TARGETS = (
    Target("attention", "fwd", "megagpt triton", "sdpa flash", 1.15),
    Target("attention", "fwd", "megagpt hopper", "sdpa cudnn", 1.0, "head_dim 64"),
    Target("attention", "fwd", "megagpt hopper", "sdpa cudnn", 0.9, "head_dim 128"),
    Target("attention", "bwd", "megagpt triton", "sdpa flash", 1.1),
    Target("layer_norm", "fwd", "megagpt triton", "", 0.9, quantity="fraction_of_ceiling"),
    Target("layer_norm", "bwd", "megagpt triton", "", 0.8, quantity="fraction_of_ceiling"),
    Target("layer_norm", "bwd", "megagpt triton", "torch", 2.0),
    Target("linear_cross_entropy", "both", "megagpt triton", "torch", 1.0),
    Target("linear_cross_entropy", "both", "megagpt triton", "torch", 10.0, quantity="smallness"),
)


def compare(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """One line for each target and shape that was measured; ``rows`` are kernels.benchmark_report's."""
    found = {(row.op, row.mode, _without_version(row.provider), row.shape): row for row in rows}
    return [
        _line(target, row, found.get((row.op, row.mode, target.rival, row.shape)))
        for target in TARGETS
        for row in rows
        if (row.op, row.mode, row.provider) == (target.op, target.mode, target.ours) and target.shape in row.shape
    ]


def _line(target: Target, row: Any, rival: Any) -> dict[str, Any]:
    figure = _figure(row, target.quantity)
    other = _figure(rival, target.quantity) if target.rival else 1.0
    ratio = None if figure is None or not other else figure / other
    return {
        "operation": f"{row.op} {row.mode}",
        "shape": row.shape,
        "measured": f"{target.ours}, {target.quantity.replace('_', ' ')}" + (f" / {target.rival}" * bool(target.rival)),
        "ratio": "not run" if ratio is None else f"{ratio:.2f}",
        "wanted": target.least,
        "met": "yes" if row.correct and ratio is not None and ratio >= target.least else "no",
    }


def _figure(row: Any, quantity: str) -> float | None:
    if row is None:
        return None
    if quantity == "smallness":
        return 1.0 / row.peak_mib if row.peak_mib else None
    value: float | None = getattr(row, quantity)
    return value


def _without_version(provider: str) -> str:
    """``sdpa cudnn 91900`` is ``sdpa cudnn`` to a target."""
    return provider.rstrip("0123456789 ") if provider.startswith("sdpa") else provider


def accuracy() -> bool:
    """The tests of the GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    environment = {key: value for key, value in os.environ.items() if key not in ("MEGAGPT_KERNELS", "MEGAGPT_HOPPER")}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode == 0


def speed() -> list[dict[str, Any]]:
    """The targets' lines."""
    from dataclasses import replace

    from kernels.benchmark_cases import GPU_SIZES
    from kernels.benchmark_run import measure_all

    sizes = replace(GPU_SIZES, lengths=(4096, 8192, 16384))
    run = measure_all(("attention", "layer_norm", "linear_cross_entropy"), sizes, "bf16", ("fwd", "bwd", "both"))
    return compare(run.rows)


# -------------------------------------------------------------------------------------------------------- training step


def configuration() -> Any:
    """GPT-2 124M in bf16 under ZeRO-3, one micro-batch of 16 sequences a step."""
    from megagpt.config import load_config

    return load_config(CONFIGURATION, OVERRIDES).resolved(world_size=1, vocabulary=50257, bf16_native=True)


def batches(config: Any, device: Any) -> Iterator[list[Any]]:
    """Random tokens without end, in micro-batches."""
    import torch

    from megagpt.pipeline import MicroBatch

    model = config.megagpt.model
    generator = torch.Generator(device).manual_seed(0)
    shape = (config.train_batch_size, model.sequence_length)
    while True:
        tokens = torch.randint(model.vocab_size, shape, generator=generator, device=device)
        parts = tokens.split(config.train_micro_batch_size_per_gpu)
        yield [MicroBatch(part, part.roll(-1, dims=1)) for part in parts]


def serve(config: Any, kernels: str | None, connection: Connection) -> None:
    """A contender's process: told a number of steps, it answers (seconds, loss, peak GiB). None: the table chooses."""
    os.environ.pop("MEGAGPT_KERNELS", None)
    if kernels is not None:
        os.environ["MEGAGPT_KERNELS"] = kernels
    import torch

    from megagpt.engine import build_engine, build_mesh, join_ranks
    from megagpt.pipeline import train_step

    join_ranks()
    engine = build_engine(config, build_mesh(config))
    data = batches(config, engine.device)
    for steps in iter(connection.recv, 0):
        prepared = [next(data) for _ in range(steps)]
        started = time.perf_counter()
        for micro_batches in prepared:
            result = train_step(engine, micro_batches)
        loss = float(result.loss)  # waits for the device
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        connection.send((time.perf_counter() - started, loss, peak_gib))


def training_step(
    config: Any, contenders: dict[str, str | None], rounds: int = ROUNDS, steps: int = STEPS
) -> list[dict[str, Any]]:
    """A row for each contender; they take turns, so that whatever else slows the machine slows all."""
    context = get_context("spawn")
    connections, processes = {}, []
    for name, kernels in contenders.items():
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(config, kernels, theirs), daemon=True))
        processes[-1].start()
    answers: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, connection in connections.items():
            connection.send(steps)
            answers[name].append(connection.recv())
    for connection in connections.values():
        connection.send(0)
    for process in processes:
        process.join()
    tokens = config.train_batch_size * config.megagpt.model.sequence_length
    return [_training_row(name, of, tokens, steps) for name, of in answers.items()]


def _training_row(name: str, answers: list[tuple[float, float, float]], tokens: int, steps: int) -> dict[str, Any]:
    step_s = statistics.median(seconds for seconds, _, _ in answers[1:]) / steps  # the first round compiles
    return {
        "kernels": name,
        "step_ms": f"{1000 * step_s:.1f}",
        "tokens_per_s": round(tokens / step_s),
        "peak_gib": f"{answers[-1][2]:.2f}",
        "last_loss": f"{answers[-1][1]:.4f}",
    }


# ---------------------------------------------------------------------------------------------------------------- main


def missing() -> str | None:
    """What this machine lacks, and what can be done without it; None on a GPU that our kernels run on."""
    import torch

    if not torch.cuda.is_available():
        return (
            "no CUDA device: this measures our kernels on a GPU (compute capability 8.0 or more).\n"
            "Without one: pytest tests/test_attention.py (the interpreter), python -m kernels.compile_ahead (the "
            "compiler), python -m kernels.benchmark --output DIR (torch's providers)"
        )
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0: our kernels do not run here"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 without a GPU, 1 where something is wrong; a target that is not met is a finding, not an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--skip-tests", action="store_true", help="measure without running the tests of the GPU first")
    options = parser.parse_args(arguments)
    lack = missing()
    if lack is not None:
        print(f"gpu_kernels: {lack}", file=sys.stderr)
        return 2
    right = options.skip_tests or accuracy()
    targets = speed()
    write_table("gpu_kernels_targets", "benchmarks.gpu_kernels", targets)
    steps = training_step(configuration(), {"ours": None, "torch": "torch"})
    write_table("gpu_kernels_training", "benchmarks.gpu_kernels", steps)
    print(markdown(["tests of the GPU"], [{"tests of the GPU": "passed" if right else "FAILED"}]))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
