"""Our kernels on this GPU: are they right, how fast beside the others, and what do they bring to a training step?

    python -m benchmarks.gpu_kernels [--only tests targets benchmark training] [--ops attention ...]

Four phases, each for itself: the tests of the GPU (accuracy against fp64); what the targets compare, in bf16 and one
process; the whole benchmark, a process for each operation; and GPT-2 124M through DeepSpeed ZeRO-3 with and without our
kernels, in turns. Each writes to benchmarks/results/ as it goes. Where DeepSpeed is not installed there is no training.
"""

import argparse
import importlib.util
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

from benchmarks.machine import RESULTS, markdown, write_table
from kernels.costs import OPERATIONS

REPOSITORY = Path(__file__).parent.parent
CONFIGURATION = REPOSITORY / "ds_configs" / "gpt2_124m.json"
OVERRIDES = ("zero_optimization.stage=3", "train_batch_size=16", "bf16.enabled=true")
ROUNDS, STEPS = 5, 10
PHASES = ("tests", "targets", "benchmark", "training")
CONTENDERS = {"ours": None, "torch, its loss in chunks": "torch"}  # plain cross_entropy would need more memory
# The files with tests of the GPU, by name: collecting all of tests/ would need all that training needs.
KERNEL_TESTS = (
    "test_attention", "test_hopper_attention", "test_norms", "test_cross_entropy", "test_activations", "test_rotary",
    "test_dropout", "test_large_tensors", "test_benchmark",
)  # fmt: skip
MODEL_TESTS = ("test_fused_model",)  # run where DeepSpeed is installed


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
    # At widths from 4096 on the weight's fp32 gradient, which both hold, is most of the memory.
    Target("linear_cross_entropy", "both", "megagpt triton", "torch", 10.0, "width 768,", quantity="smallness"),
)


def compare(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """One line for each target and shape that anyone was measured in; ``rows`` are kernels.benchmark_report's."""
    found = {(row.op, row.mode, _without_version(row.provider), row.shape): row for row in rows}
    lines = []
    for target in TARGETS:
        measured = {shape: None for op, mode, _, shape in found if (op, mode) == (target.op, target.mode)}
        for shape in [shape for shape in measured if target.shape in shape] or [target.shape or "any"]:
            ours, rival = (found.get((target.op, target.mode, who, shape)) for who in (target.ours, target.rival))
            lines.append(_line(target, shape, ours, rival))
    return lines


def _line(target: Target, shape: str, ours: Any, rival: Any) -> dict[str, Any]:
    figure = _figure(ours, target.quantity)
    other = _figure(rival, target.quantity) if target.rival else 1.0
    ratio = None if figure is None or not other else figure / other
    met = ratio is not None and ours.correct and ratio >= target.least
    return {
        "operation": f"{target.op} {target.mode}",
        "shape": shape,
        "measured": f"{target.ours}, {target.quantity.replace('_', ' ')}" + (f" / {target.rival}" * bool(target.rival)),
        "ours_ms": _milliseconds(ours),
        "rival_ms": _milliseconds(rival),
        "ratio": _why_not(ours) if ratio is None else f"{ratio:.2f}",
        "wanted": target.least,
        "met": "yes" if met else "no",
    }


def _milliseconds(row: Any) -> str:
    return "" if row is None or row.p50_ms is None else f"{row.p50_ms:.4f}"


def _why_not(ours: Any) -> str:
    return "FAILED" if ours is not None and ours.failure else "not run"


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
    absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if absent:
        print(f"tests: not run; type: pip install {' '.join(absent)}", file=sys.stderr)
        return False
    names = KERNEL_TESTS + (MODEL_TESTS if importlib.util.find_spec("deepspeed") is not None else ())
    files = [str(Path("tests", f"{name}.py")) for name in names]
    return _run("pytest", "-q", "-m", "gpu", *files) == 0


def targets() -> bool:
    """Measure what the targets compare, and write their lines beside all the rows."""
    output = RESULTS / "gpu_kernels_targets"
    rows = output / "results.csv"
    rows.unlink(missing_ok=True)  # those of another day, should this run write none
    ops = dict.fromkeys(target.op for target in TARGETS)
    measured = ("--lengths", "4096", "8192", "16384", "--dtype", "bf16", "--mode", "fwd", "bwd", "both")
    providers = {"megagpt", *(target.rival for target in TARGETS if target.rival)}
    arguments = (*ops, *measured, "--providers", *sorted(providers), "--output", str(output))
    right = _run("kernels.benchmark", *arguments) == 0
    write_table("gpu_kernels_targets", "benchmarks.gpu_kernels", compare(read_rows(rows)))
    return right


def benchmark(ops: Sequence[str]) -> bool:
    """The whole benchmark; an operation that takes its process with it leaves the others theirs."""
    right = True
    for op in ops:
        output = RESULTS / "gpu_kernels" / op
        right &= _run("kernels.benchmark", op, "--mode", "fwd", "bwd", "both", "--output", str(output)) == 0
    return right


def _run(module: str, *arguments: str) -> int:
    """A module in a process of its own, whose memory, on the GPU too, ends with it; the table chooses the kernels."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MEGAGPT_KERNELS", "MEGAGPT_HOPPER")}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=REPOSITORY, env=environment).returncode


def read_rows(path: Path) -> list[Any]:
    """The rows of a results.csv; none where there is no such file."""
    from kernels.benchmark_report import from_csv

    return from_csv(path.read_text()) if path.exists() else []


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
    """A row for each contender; they take turns, so that whatever else slows the machine slows all.

    Raises RuntimeError where a contender's process ends early; what it wrote says why.
    """
    context = get_context("spawn")
    started: dict[str, tuple[Connection, Any]] = {}
    try:
        for name, kernels in contenders.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(config, kernels, theirs), daemon=True)
            process.start()
            theirs.close()  # the process holds the other end alone, so that its end is an end of file
            started[name] = ours, process
        answers: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
        for _ in range(rounds + 1):
            for name, (connection, process) in started.items():
                answers[name].append(_ask(name, connection, process, steps))
        for connection, process in started.values():
            connection.send(0)
            process.join()
    finally:
        for _, process in started.values():
            process.terminate()
    tokens = config.train_batch_size * config.megagpt.model.sequence_length
    return [_training_row(name, of, tokens, steps) for name, of in answers.items()]


def _ask(name: str, connection: Connection, process: Any, steps: int) -> tuple[float, float, float]:
    try:
        connection.send(steps)
        while not connection.poll(1.0):
            if not process.is_alive():
                raise EOFError
        answer: tuple[float, float, float] = connection.recv()
    except (EOFError, OSError) as error:
        process.join(10)
        raise RuntimeError(f"{name}: its process ended early, with exit code {process.exitcode}") from error
    return answer


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


def training() -> bool:
    """The training step, where there is DeepSpeed to take it with."""
    if importlib.util.find_spec("deepspeed") is None:
        print("training: skipped, the package deepspeed is not installed")
        return True
    try:
        rows = training_step(configuration(), CONTENDERS)
    except RuntimeError as error:
        print(f"training: FAILED: {error}", file=sys.stderr)
        return False
    write_table("gpu_kernels_training", "benchmarks.gpu_kernels", rows)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 without a GPU, 1 where something is wrong; a target that is not met is a finding, not an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES, help="these phases, of all four")
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="of the phase benchmark")
    options = parser.parse_args(arguments)
    lack = missing()
    if lack is not None:
        print(f"gpu_kernels: {lack}", file=sys.stderr)
        return 2
    run = {"tests": accuracy, "targets": targets, "benchmark": lambda: benchmark(options.ops), "training": training}
    verdicts = [
        {"phase": name, "verdict": "right" if run[name]() else "WRONG"} for name in PHASES if name in options.only
    ]
    print(markdown(["phase", "verdict"], verdicts))
    return 1 if any(row["verdict"] == "WRONG" for row in verdicts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
