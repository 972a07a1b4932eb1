"""metrics.jsonl and samples.txt: each step once, whole lines, nothing lost, and faults that cost
no run.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.monitoring.metrics import (
    METRICS_FILE,
    REPLACED_FILE,
    MetricsFile,
    StepRecord,
    encode_line,
    plain,
    read_metrics,
)
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.support.monitoring import CONTROL, open_monitor, record, run_script


def test_a_step_line_has_exactly_the_documented_keys(tmp_path: Path) -> None:
    with open_monitor(tmp_path) as monitor:
        monitor.step(record(1))
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    keys = (
        "step tokens loss grad_norm learning_rate step_time_s tokens_per_s "
        "tokens_per_s_per_device mfu memory_gib"
    )
    assert list(json.loads(line)) == [*keys.split(), "skipped_steps"]


@given(st.floats(), st.floats(allow_nan=False) | st.none(), st.integers(0, 2**60))
def test_a_record_survives_its_line(loss: float, mfu: float | None, step: int) -> None:
    before = StepRecord(step, 1, loss, 0.7, 6e-4, 0.5, 1.0, 1.0, mfu, 1.0, 0)
    line = json.loads(encode_line(plain(before.as_line())))
    after = StepRecord.from_line(line)
    assert after.step == step
    assert math.isnan(after.loss) if not math.isfinite(loss) else after.loss == loss
    assert after.mfu == (mfu if mfu is not None and math.isfinite(mfu) else None)


def test_a_resume_keeps_each_step_once_and_loses_nothing(tmp_path: Path) -> None:
    with open_monitor(tmp_path) as monitor:
        for step in range(1, 11):
            monitor.step(record(step, loss=1.0))
            monitor.event("eval", step=step, val_loss=3.0)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"step": 11, "tok')  # a kill in the middle of a line
    with open_monitor(tmp_path, start_step=6) as monitor:
        monitor.event("resume", step=6)
        monitor.step(record(7, loss=2.0))
    history = read_metrics(tmp_path)
    assert [(line.step, line.loss) for line in history.steps] == [
        (step, 1.0) for step in range(1, 7)
    ] + [(7, 2.0)]
    assert [event["step"] for event in history.events] == [1, 2, 3, 4, 5, 6, 6]
    assert history.unreadable_lines == 0
    replaced = [
        json.loads(line)["step"] for line in (tmp_path / REPLACED_FILE).read_text().splitlines()
    ]
    assert replaced == [7, 7, 8, 8, 9, 9, 10, 10]


def test_damage_in_the_middle_is_counted_then_set_aside(tmp_path: Path) -> None:
    good = encode_line(record(1).as_line())
    (tmp_path / METRICS_FILE).write_bytes(
        good + b"\xff\x00 no line of ours\n" + b'{"step": 2}\n' + b"[]\n"
    )
    history = read_metrics(tmp_path)
    assert ([line.step for line in history.steps], history.unreadable_lines) == ([1], 3)
    MetricsFile(tmp_path, start_step=5).close()
    assert (tmp_path / METRICS_FILE).read_bytes() == good
    assert (tmp_path / REPLACED_FILE).read_bytes().count(b"\n") == 3


def test_reopening_a_sound_file_leaves_it_untouched(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_bytes(encode_line(record(1).as_line()))
    inode = (tmp_path / METRICS_FILE).stat().st_ino
    MetricsFile(tmp_path, start_step=1).close()
    assert (tmp_path / METRICS_FILE).stat().st_ino == inode
    assert not (tmp_path / REPLACED_FILE).exists()


def test_a_kill_leaves_whole_lines(tmp_path: Path) -> None:
    script = f"""
from megagpt.monitoring.metrics import *
from pathlib import Path
file = MetricsFile(Path({str(tmp_path)!r}), start_step=0)
for step in range(10**9):
    file.write({{"event": "warning", "step": step, "text": "x" * 3000}})
    if step == 500: print("going", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"going\n"
    process.kill()
    process.communicate()
    history = read_metrics(tmp_path)
    assert [event["step"] for event in history.events] == list(range(len(history.events)))
    assert len(history.events) > 500
    assert history.unreadable_lines == 0


def test_a_full_disk_costs_lines_and_one_warning_not_the_run(tmp_path: Path) -> None:
    script = f"""
import resource
from megagpt.monitoring.metrics import METRICS_FILE
from tests.support.monitoring import *
run = Path({str(tmp_path)!r})
with open_monitor(run) as monitor:
    monitor.step(record(1))
    size = (run / METRICS_FILE).stat().st_size
    half_of_a_line = (size + 40, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, half_of_a_line)
    monitor.step(record(2))
    monitor.step(record(3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monitor.step(record(4))
"""
    done = run_script(script)
    assert [line.step for line in read_metrics(tmp_path).steps] == [1, 4]
    assert done.stderr.count(b"metrics.jsonl failed") == 1
    assert done.stdout.count(b"\n") == 4


def test_an_unwritable_run_directory_is_the_users_to_fix(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where a directory should be")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written .*--run_dir"):
        open_monitor(tmp_path / "run")


def test_only_the_writer_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_monitor(tmp_path, is_writer=False) as monitor:
        monitor.step(record(1))
        monitor.sample(1, "a", "b")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_callers_mistake_is_not_swallowed(tmp_path: Path) -> None:
    with open_monitor(tmp_path) as monitor:
        with pytest.raises(TypeError, match="cannot hold"):
            monitor.event("warning", step=1, about={1, 2})
        with pytest.raises(ValueError, match="event 'evall': unknown, did you mean \"eval\""):
            monitor.event("evall", step=1)


def test_samples_txt_follows_a_resume(tmp_path: Path) -> None:
    with open_monitor(tmp_path) as monitor:
        for step in (1, 2, 3):
            monitor.sample(step, "def ", f"sample_{step}():\n\x1b[2J\udc80")
    with open_monitor(tmp_path, start_step=2) as monitor:
        monitor.sample(3, "def ", "second_try()")
    text = (tmp_path / "samples.txt").read_text()
    assert re.findall(r"^=== step (\d+), prompt 'def ' ===\ndef (\w+)", text, re.MULTILINE) == [
        ("1", "sample_1"),
        ("2", "sample_2"),
        ("3", "second_try"),
    ]
    assert not CONTROL.search(text.encode())
