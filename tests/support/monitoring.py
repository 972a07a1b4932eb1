"""Runs that report without training, for the tests of what a run writes and shows."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from megagpt.config import RunConfig, load_config
from megagpt.monitoring.metrics import StepRecord
from megagpt.monitoring.monitor import Monitor
from tests import REPOSITORY

CANARY = "canary" + "0123456789abcdef" * 2 + "0f"  # 40 characters, as long as wandb's keys
SECRETS = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def record(step: int, loss: float = 2.5, step_time_s: float = 0.5) -> StepRecord:
    return StepRecord(
        step, 4096 * step, loss, 0.7, 6e-4, step_time_s, 8192.0, 4096.0, 0.412, 1.25, 0
    )


def config(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "ds_configs" / "default.json", overrides)


def open_monitor(
    run_directory: Path, *overrides: str, start_step: int = 0, is_writer: bool = True
) -> Monitor:
    return Monitor.open(
        config(*overrides),
        run_directory,
        total_steps=100,
        start_step=start_step,
        is_writer=is_writer,
    )


def run_script(
    script: str, *, cwd: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a script in a fresh process with pipes for its output; it may import this module."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        timeout=120,
        check=True,
    )


def run_on_terminal(script: str, **environment: str) -> bytes:
    """What a script writes to a terminal of its own."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        variables = os.environ | ENVIRONMENT | {"COLUMNS": "100", "LINES": "30"} | environment
        os.execve(sys.executable, [sys.executable, "-c", script], variables)
    output = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says EIO where the last writer has gone
            piece = b""
        if not piece:
            break
        output += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return output
