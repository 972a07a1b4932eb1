"""Every way to start a run, in real processes; a second run that is refused, and a launcher that
is killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint.format import complete_steps
from megagpt.cluster.processes import Process, all_processes
from megagpt.monitoring.metrics import read_metrics
from megagpt.rundir import directory as run_directory
from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import ENVIRONMENT
from tests.support.ranks import free_port
from tests.support.trained_run import write_dataset

STEPS = 4
DEADLINE_S = 300.0  # a start takes seconds on a machine with nothing else to do
PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def configuration(compiled_ops: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("configuration")
    config = run_config(write_dataset(directory), STEPS, (3, "none", "none"), save_every=2)
    (directory / "small.json").write_text(json.dumps(config))
    return directory / "small.json"


def start(*command: object, **environment: str) -> subprocess.Popen[str]:
    search = {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | search | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def training(configuration: Path, directory: Path, *overrides: str) -> list[object]:
    words = ["launch/train.py", "--deepspeed_config", configuration, "--run_dir", directory]
    return [*words, *(["--set", *overrides] if overrides else [])]


def launcher_of_two() -> Sequence[object]:
    return ["deepspeed", "--num_accelerators", "2", "--master_port", free_port()]


def logged_start(directory: Path, rank: int) -> str:
    """How a rank says that it was started."""
    lines = (directory / "logs" / f"rank_{rank:05d}.log").read_text().splitlines()
    return next(line for line in lines if f"rank {rank} of 2, on host " in line)


@pytest.mark.slow
def test_torchrun_starts_a_run(configuration: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    port = str(free_port())
    command = [
        PROGRAMS / "torchrun",
        "--nproc-per-node",
        "2",
        "--master-port",
        port,
        *training(configuration, run),
    ]
    process = start(*command)
    shown, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, shown
    assert "2 x CPU, 1 threads; ZeRO 3" in shown
    assert all(logged_start(run, rank).endswith("by torchrun") for rank in (0, 1))
    assert [step.step for step in read_metrics(run).steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_tasks_as_srun_starts_them_make_a_run(configuration: Path, tmp_path: Path) -> None:
    """Two processes with the variables of two tasks on this machine."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    run = tmp_path / "run"
    tasks = [
        start(
            sys.executable,
            *training(configuration, run),
            **step,
            SLURM_PROCID=rank,
            SLURM_LOCALID=rank,
        )
        for rank in ("0", "1")
    ]
    shown = [task.communicate(timeout=DEADLINE_S)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], shown
    assert all(logged_start(run, rank).endswith("by srun python") for rank in (0, 1))
    assert [step.step for step in read_metrics(run).steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_processes_as_mpirun_starts_them_make_a_run(configuration: Path, tmp_path: Path) -> None:
    """Two processes with the variables that OpenMPI gives two on one machine."""
    job = {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_NAMESPACE": str(os.getpid()),
    }
    run = tmp_path / "run"
    processes = [
        start(
            sys.executable,
            *training(configuration, run),
            **job,
            OMPI_COMM_WORLD_RANK=rank,
            OMPI_COMM_WORLD_LOCAL_RANK=rank,
        )
        for rank in ("0", "1")
    ]
    shown = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    assert all(logged_start(run, rank).endswith("by mpirun -n 2 python") for rank in (0, 1))
    assert [step.step for step in read_metrics(run).steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_launchers_on_one_machine_do_not_collide(configuration: Path, tmp_path: Path) -> None:
    """Both are sent to DeepSpeed's port 29500, which is taken besides."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # somebody else has it: so much the better
            other.bind(("", 29500))
            other.listen()
        runs = [tmp_path / "a", tmp_path / "b"]
        launchers = [
            start("deepspeed", "--num_accelerators", "2", *training(configuration, run))
            for run in runs
        ]
        shown = [launcher.communicate(timeout=DEADLINE_S)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], shown
    for run, screen in zip(runs, shown, strict=True):
        assert "--master_port=29500" in screen
        assert [step.step for step in read_metrics(run).steps] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_second_run_leaves_no_trace_in_the_directory_of_the_first(
    configuration: Path, tmp_path: Path
) -> None:
    """Its second rank neither opens a log nor writes a crash page while the first is being
    refused.
    """
    run = tmp_path / "run"
    with run_directory.lock(run):
        process = start(*launcher_of_two(), *training(configuration, run))
        shown, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2, shown
    assert shown.count("trains in it; end that run (kill ") == 1
    assert [path.name for path in run.iterdir()] == [run_directory.LOCK_FILE]


def ranks_in(directory: Path) -> list[Process]:
    """The ranks that train in a directory, now."""
    return [
        process
        for process in all_processes()
        if str(directory) in process.words
        and "launch/train.py" in process.words[1:4]
        and is_rank(process)
    ]


def is_rank(process: Process) -> bool:
    return any(word.startswith("--local_rank=") for word in process.words)


def wait_for(condition: Callable[[], Any], what: Callable[[], object] = str) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (result := condition()):
        assert time.monotonic() < end, what()
        time.sleep(0.05)
    return result


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed_and_the_run_goes_on(
    configuration: Path, tmp_path: Path
) -> None:
    """A launcher that is killed ends no rank itself; what the ranks leave is whole, and the lock
    is free.
    """
    run = tmp_path / "run"
    endless = ["megagpt.training.total_steps=1000000", "megagpt.checkpoint.interval_steps=1"]
    process = start(*launcher_of_two(), *training(configuration, run, *endless))
    ranks: list[Process] = []
    try:
        wait_for(lambda: len(complete_steps(run / "checkpoints")) >= 2)
        ranks = ranks_in(run)
        assert len(ranks) == 2
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not any(rank.is_alive() for rank in ranks))
    finally:
        for rank in ranks:
            if rank.is_alive():
                os.kill(rank.number, signal.SIGKILL)
        process.kill()
        process.communicate()
    logs = [(run / "logs" / f"rank_0000{rank}.log").read_text() for rank in (0, 1)]
    assert any("the launcher has died" in text for text in logs), (
        logs
    )  # the first to see it takes the other along
    last = max(complete_steps(run / "checkpoints"))
    again = start(
        *launcher_of_two(),
        *training(configuration, run, f"megagpt.training.total_steps={last + 1}"),
    )
    shown, _ = again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 0, shown
    (resume,) = read_metrics(run).events_named("resume")
    assert (resume["step"], resume["passed_over"]) == (last, [])
