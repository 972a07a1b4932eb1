"""What stands in for a GPU in the tests of benchmarks.gpu: cases that end in every way, and the
real ones, tiny.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import RIGHT, WRONG, Case, NotRun
from benchmarks.gpu.child import Context
from benchmarks.gpu.machine import Machine

CPU = Machine("cpu", "a stand-in")


def stand_in(name: str, function: str, limit_s: float = 60.0, **rest: Any) -> Case:
    """A case made of a function below."""
    needs: dict[str, Any] = {"expected_s": 0.0, "packages": (), "compiles": False}
    return Case(
        "a part", name, f"tests.benchmarks.gpu_cases:{function}", limit_s=limit_s, **needs | rest
    )


def context(directory: str | Path, case: str = "a case") -> Context:
    return Context("a part", case, "key", "cpu", Path(directory))


def note(context: Context, text: str) -> None:
    """One line a run, so that a test can count them."""
    with (context.directory / "runs").open("a") as file:
        print(context.case, text, file=file)


def passes(context: Context, findings: int = 1) -> None:
    for index in range(findings):
        if f"finding {index}" not in context.done:
            note(context, f"finding {index}")
            context.report(f"finding {index}", RIGHT, figure=index)


def is_wrong(context: Context) -> None:
    context.report("a product", RIGHT)
    context.report("another", WRONG, "2 + 2 = 5")


def raises(context: Context) -> None:
    raise AttributeError("no such function")


def lacks(context: Context, what: str) -> None:
    if what == "a package":
        import no_such_package  # noqa: F401
    raise MemoryError("full") if what == "memory" else NotRun("there is none")


def half(context: Context) -> None:
    context.report("one", RIGHT)
    with context.finding("two"):
        raise NotRun("flash-attn is not installed")


def finds_nothing(context: Context) -> None:
    print("nothing to say")


def crashes(context: Context, by: str) -> None:
    context.report("before", RIGHT)
    os.kill(os.getpid(), signal.Signals[by])


def hangs(context: Context, findings: int = 0) -> None:
    """It and a process that it starts; the first findings come before."""
    passes(context, findings)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.directory / "pid").write_text(str(other.pid))
    time.sleep(600)


TINY: dict[str, Any] = {
    "vocab_size": 128,
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "sequence_length": 16,
}


def train(directory: str) -> None:
    """The training cases' own code in a rank of a pool, which has joined and imported everything
    already.
    """
    from benchmarks.gpu import offload, training

    shared = {"model": TINY, "micro_batch": 2}
    for stage in (0, 1, 3):
        training.measure(context(directory, f"ZeRO {stage}"), 8, stage=stage, bf16=False, **shared)
    training.plain(context(directory, "plain"), 8, "aot_eager", stage=1, bf16=False, **shared)
    training.trace(context(directory, "trace"), 4, stage=1, bf16=False, **shared)
    for pinned in (False, True):
        place = context(directory, f"offload, {pinned}")
        offload.measure(place, TINY, pinned, 6, bf16=False, recompute="full", micro_batch=2)
