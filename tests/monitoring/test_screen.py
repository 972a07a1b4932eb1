"""What a run shows: plain lines in a pipe, a live table on a terminal, and control characters
nowhere else.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megagpt.common.text import without_control_characters
from megagpt.monitoring.metrics import METRICS_FILE, read_metrics
from megagpt.monitoring.screen import Progress
from tests import REPOSITORY
from tests.support.monitoring import CONTROL, ENVIRONMENT, record, run_on_terminal, run_script


def training(run_directory: Path, steps: int = 12) -> str:
    """A script that reports as a training loop does, with a hostile sample."""
    return f"""
import logging
from megagpt.monitoring.monitor import open_rank_log
from tests.support.monitoring import *
open_rank_log(Path({str(run_directory)!r}), 0)
with open_monitor(Path({str(run_directory)!r})) as monitor:
    for step in range(1, {steps} + 1):
        monitor.step(record(step))
    web = {{"validation/web": 3.5}}
    monitor.event("eval", step=step, val_loss=2.4134, split_share=0.30476, **web)
    monitor.sample(step, "def ", "f():\\x1b[31m\\x9b2J\\n  pass")
    logging.getLogger("megagpt.train").warning("a thing to know")
    monitor.event("eval", step=step, val_loss=float("nan"))
    monitor.event("save", step=step, path=Path("runs/x/checkpoints/step_00000012"))
"""


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    done = run_script(training(tmp_path))
    lines = done.stdout.decode().splitlines()
    assert lines[:2] == [
        "step 1/100  loss 2.5000  8.19k tokens/s  MFU 41.2 %  ETA 50 s",
        "step 2/100  loss 2.5000  8.19k tokens/s  MFU 41.2 %  ETA 49 s",
    ]
    assert lines[12:] == [
        "step 12  eval  val_loss 2.4134  on 30.5 % of the split  validation/web 3.5",
        "step 12  sample  'def '",
        r"    def f():\x1b[31m\x9b2J",
        "      pass",
        "step 12  eval  val_loss None",
        "step 12  save  path runs/x/checkpoints/step_00000012",
    ]
    assert done.stderr.decode() == "WARNING megagpt.train: a thing to know\n"
    assert not CONTROL.search(done.stdout + done.stderr)


def test_a_terminal_gets_a_live_table(tmp_path: Path) -> None:
    output = run_on_terminal(training(tmp_path), TERM="xterm-256color").decode()
    assert output.index("\x1b[?25l") < output.rindex(
        "\x1b[?25h"
    )  # the cursor hidden, then given back
    assert "\x1b[31m\x9b" not in output
    last_table = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output[output.rindex("╭") :])
    for text in (
        "12/100",
        "━",
        "ETA 44 s",
        "2.5000",
        "8.19k (4.1k per device)",
        "41.2 %",
        "6.00e-04",
        "0.700",
        "validation/web",
        "3.5000 at step 12",
    ):
        assert text in last_table
    assert r"sample  def f():\x1b[31m" in last_table
    assert "WARNING megagpt.train: a thing to know" in output[: output.rindex("╭")]
    assert "val_loss 2.4134" in output
    for path in (tmp_path / METRICS_FILE, tmp_path / "logs" / "rank_00000.log"):
        assert not CONTROL.search(path.read_bytes())


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path: Path) -> None:
    output = run_on_terminal(training(tmp_path), TERM="dumb")
    assert b"step 12/100  loss 2.5000" in output
    assert b"\x1b" not in output


def test_a_reader_that_leaves_does_not_stop_training(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", training(tmp_path, steps=3000)],
        cwd=REPOSITORY,
        env=os.environ
        | ENVIRONMENT
        | {"PYTHONUNBUFFERED": ""},  # unbuffered, Python would have nothing left to flush
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"step 1/100")
    process.stdout.close()  # as `| head -1` does
    assert process.wait(timeout=30) == 0
    assert len(read_metrics(tmp_path).steps) == 3000
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert log.count("screen failed (BrokenPipeError") == 1


def test_the_eta_ignores_one_slow_step() -> None:
    progress = Progress(title="x", total_steps=20, start_step=0)
    assert progress.eta == "n/a"
    for step in range(1, 11):
        progress.update(record(step, step_time_s=600.0 if step == 5 else 2.0).as_line())
    assert progress.eta == "20 s"


@given(st.text())
def test_no_control_character_is_let_through(text: str) -> None:
    shown = without_control_characters(text)
    assert not CONTROL.search(shown.encode(errors="backslashreplace"))
    if text.isprintable():
        assert shown == text
