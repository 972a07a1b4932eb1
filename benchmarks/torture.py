"""Check that a run that is killed many times ends exactly where an undisturbed one does.

    python -m benchmarks.torture --minutes 10

A small run uses DeepSpeed's launcher under ``launch/supervise.py``. Its ranks, and sometimes their
launcher, get kill -9 at random moments: while starting, training or saving. When the run is done,
weights and moments of its last checkpoint are compared bit for bit with those of the undisturbed
run. Then the next round begins, with the next ZeRO stage and way of saving, until the time is over.
Writes benchmarks/results/torture.csv.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.machine import write_table
from megagpt.checkpoint.format import WEIGHT
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.cluster.launch_command import NODE_LAUNCHER
from megagpt.cluster.processes import all_processes
from megagpt.common.arguments import command_parser, positive, whole_number
from megagpt.download_data import PreparationRequest, prepare
from megagpt.monitoring.metrics import read_metrics
from megagpt.parallel.compat import MOMENTS
from megagpt.run.supervise import newest_checkpoint

ROOT = Path(__file__).parent.parent
RESTARTS = 1000
LAUNCHERS_SHARE = 0.1  # of the kills; the rest are ranks'
# ZeRO stage, and whether saves run in the background.
EXECUTIONS = ((1, False), (3, True), (1, True), (3, False))
# The share of kills that may also come while the run starts; the others wait for a new save.
AT_ANY_MOMENT = 0.2


def main() -> None:
    """Run the rounds, print and write the table."""
    arguments = parse_arguments()
    rows = torture(arguments)
    write_table("torture", "benchmarks.torture", rows)
    if not all(row["bit_equal"] for row in rows):
        sys.exit("a killed run and the undisturbed run differ (bit_equal is False in the table)")


def torture(
    arguments: argparse.Namespace, executions: Sequence[tuple[int, bool]] = EXECUTIONS
) -> list[dict[str, Any]]:
    """Return one row for each round; the rounds take the executions in turn."""
    rows: list[dict[str, Any]] = []
    killer = Killer(random.Random(arguments.seed), arguments.mean_s)
    with tempfile.TemporaryDirectory(prefix="torture_") as name:
        directory = Path(name)
        prepare_data(directory)
        for stage in sorted({stage for stage, _ in executions}):
            left_alone = write_configuration(directory, arguments, stage, asynchronous=False)
            with supervised(left_alone, undisturbed(directory, stage), arguments.ranks) as process:
                require_done(process)
        end_s = time.monotonic() + 60 * arguments.minutes
        for stage, asynchronous in cycle(executions):
            run = directory / f"round_{len(rows) + 1}"
            configuration = write_configuration(
                directory, arguments, stage, asynchronous=asynchronous
            )
            with supervised(configuration, run, arguments.ranks) as process:
                kills = killer.haunt(process, run, end_s)
                require_done(process)
            execution = {
                "zero_stage": stage,
                "saves": "in the background" if asynchronous else "at once",
            }
            rows.append(
                execution
                | result(run, kills, bit_equal=same_state(undisturbed(directory, stage), run))
            )
            print(rows[-1], flush=True)
            if time.monotonic() > end_s:
                break
    return rows


def undisturbed(directory: Path, stage: int) -> Path:
    """Return the directory of the undisturbed run of a ZeRO stage.

    There is one for each ZeRO stage, which may change the result by rounding; how a run saves may
    not.
    """
    return directory / f"undisturbed_{stage}"


def prepare_data(directory: Path) -> None:
    """Prepare this package's own sources, as bytes."""
    text = directory / "sources.txt"
    text.write_text(
        "\n".join(path.read_text() for path in sorted((ROOT / "megagpt").rglob("*.py")))
    )
    prepare(
        PreparationRequest(str(text), directory / "data", tokenizer="bytes"),
        report=lambda line: None,
    )


def write_configuration(
    directory: Path, arguments: argparse.Namespace, stage: int, *, asynchronous: bool
) -> Path:
    """Write the configuration of a small GPT, with a checkpoint every ten steps."""
    config = {
        "train_batch_size": 4 * arguments.ranks,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": stage,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        },
        "megagpt": {
            "model": {
                "num_layers": 2,
                "hidden_size": 64,
                "num_heads": 4,
                "sequence_length": 64,
                "dropout": 0.1,
            },
            "data": {"path": str(directory / "data")},
            "training": {
                "total_steps": arguments.steps,
                "eval_interval_steps": 50,
                "eval_batches": 1,
            },
            "checkpoint": {"interval_steps": 10, "keep": 2, "asynchronous": asynchronous},
            "monitor": {"log_interval_steps": 1},
        },
    }
    path = directory / "torture.json"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def supervised(configuration: Path, run: Path, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a supervised run of this number of ranks; end it at the end of the block."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "launch/train.py")]
    command += ["--deepspeed_config", str(configuration), "--run_dir", str(run)]
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "launch/supervise.py"),
            "--restarts",
            str(RESTARTS),
            "--",
            *command,
        ],
        env=os.environ | {"PATH": search, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def free_port() -> int:
    """Return a free port for the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_done(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a run; exit unless it succeeded."""
    if process.wait() != 0:
        sys.exit(f"the supervised run ended with exit code {process.returncode}")


class Killer:
    """Sends kill -9 to what a supervised command started, about ``mean_s`` after its last save.

    Two kills in a row without a new checkpoint would make the supervisor give up, as it should.
    """

    def __init__(self, chance: random.Random, mean_s: float) -> None:
        self.chance = chance
        self.mean_s = mean_s

    def haunt(self, process: subprocess.Popen[bytes], run: Path, end_s: float) -> int:
        """Kill until the run or the time is over, and return the number of kills."""
        kills = 0
        saved = ""
        patient = True
        while process.poll() is None and time.monotonic() < end_s:
            patient = patient or self.chance.random() > AT_ANY_MOMENT
            while patient and process.poll() is None and newest_checkpoint(run) == saved:
                time.sleep(0.1)
            time.sleep(self.chance.uniform(0, 2 * self.mean_s))
            saved = newest_checkpoint(run)
            patient = not patient
            kills += self._kill(process)
        return kills

    def _kill(self, process: subprocess.Popen[bytes]) -> bool:
        """Kill one rank or its launcher, and return whether there was one."""
        ranks, launchers = victims(process.pid)
        chosen = launchers if self.chance.random() < LAUNCHERS_SHARE else ranks
        if not chosen:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(chosen), signal.SIGKILL)
        return True


def victims(supervisor: int) -> tuple[list[int], list[int]]:
    """Return the ranks and the launchers of the command that runs under a supervisor."""
    ranks, launchers = [], []
    with contextlib.suppress(OSError):  # a process may have just ended
        groups = {member.number for member in all_processes() if member.parent == supervisor}
        for process in (
            member for member in all_processes() if os.getpgid(member.number) in groups
        ):
            if NODE_LAUNCHER in process.words:
                launchers.append(process.number)
            elif any(word.startswith("--local_rank") for word in process.words):
                ranks.append(process.number)
    return ranks, launchers


def same_state(left: Path, right: Path) -> bool:
    """Compare weights and moments of the newest checkpoints of two runs, bit for bit."""
    first, second = open_checkpoint(left), open_checkpoint(right)
    if first.manifest.state != second.manifest.state:
        return False
    return all(
        bool((first.tensor(kind, name) == second.tensor(kind, name)).all())
        for kind in (WEIGHT, *MOMENTS)
        for name in first.manifest.tensors
    )


def result(run: Path, kills: int, *, bit_equal: bool) -> dict[str, Any]:
    """Return the row of a round."""
    history = read_metrics(run)
    (whole,) = history.events_named("supervise")
    return {
        "steps": history.steps[-1].step,
        "kills": kills,
        "restarts": whole["restarts"],
        "bit_equal": bit_equal,
        "wall_s": f"{whole['wall_s']:.0f}",
        "effective_training_time_ratio": f"{whole['effective_training_time_ratio']:.3f}",
    }


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=positive, default=10, help="how long to torture [10]")
    parser.add_argument(
        "--mean_s", type=positive, default=5.0, help="mean time from new progress to a kill [5]"
    )
    parser.add_argument("--steps", type=whole_number(1), default=500, help="steps of a round [500]")
    parser.add_argument("--ranks", type=whole_number(1), default=2, help="ranks of a run [2]")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the moments and victims [0]"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
