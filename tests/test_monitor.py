"""What a run writes and shows: metrics.jsonl, samples.txt, screens, trackers, rank logs, the crash page."""

from __future__ import annotations

import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import RunConfig, load_config
from megagpt.crash import crash_page
from megagpt.metrics import METRICS_FILE, REPLACED_FILE, MetricsFile, StepRecord, encode_line, plain, read_metrics
from megagpt.monitor import Monitor, open_rank_log
from megagpt.screen import Progress
from megagpt.text import MASK, without_control_characters
from megagpt.trackers import why_offline
from megagpt.utils import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
CANARY = "canary" + "0123456789abcdef" * 2 + "0f"  # 40 characters, as long as wandb's keys
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


def record(step: int, loss: float = 2.5, step_time_s: float = 0.5) -> StepRecord:
    return StepRecord(step, 4096 * step, loss, 0.7, 6e-4, step_time_s, 8192.0, 4096.0, 0.412, 1.25, 0)


def config(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "ds_configs" / "default.json", overrides)


def open_monitor(run_directory: Path, *overrides: str, start_step: int = 0, is_writer: bool = True) -> Monitor:
    return Monitor.open(config(*overrides), run_directory, total_steps=100, start_step=start_step, is_writer=is_writer)


@pytest.fixture(autouse=True)
def _no_trackers_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


# metrics.jsonl


def test_a_step_line_has_exactly_the_documented_keys(tmp_path: Path) -> None:
    with open_monitor(tmp_path) as monitor:
        monitor.step(record(1))
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    keys = "step tokens loss grad_norm learning_rate step_time_s tokens_per_s tokens_per_s_per_device mfu memory_gib"
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
    assert [(line.step, line.loss) for line in history.steps] == [(step, 1.0) for step in range(1, 7)] + [(7, 2.0)]
    assert [event["step"] for event in history.events] == [1, 2, 3, 4, 5, 6, 6]
    assert history.unreadable_lines == 0
    replaced = [json.loads(line)["step"] for line in (tmp_path / REPLACED_FILE).read_text().splitlines()]
    assert replaced == [7, 7, 8, 8, 9, 9, 10, 10]


def test_damage_in_the_middle_is_counted_then_set_aside(tmp_path: Path) -> None:
    good = encode_line(record(1).as_line())
    (tmp_path / METRICS_FILE).write_bytes(good + b"\xff\x00 no line of ours\n" + b'{"step": 2}\n' + b"[]\n")
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
from megagpt.metrics import *
from pathlib import Path
file = MetricsFile(Path({str(tmp_path)!r}), start_step=0)
for step in range(10**9):
    file.write({{"event": "warning", "step": step, "text": "x" * 3000}})
    if step == 500: print("going", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY)
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
from tests.test_monitor import *
run = Path({str(tmp_path)!r})
with open_monitor(run) as monitor:
    monitor.step(record(1))
    size = (run / METRICS_FILE).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))  # half of a line fits
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
        with pytest.raises(ValueError, match="unknown event 'evall', did you mean \"eval\""):
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


# The screen


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a script in a fresh process with pipes for its output."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        timeout=60,
        check=True,
    )


def training(run_directory: Path, steps: int = 12) -> str:
    """A script that reports as a training loop does, with a hostile sample."""
    return f"""
import logging
from tests.test_monitor import *
open_rank_log(Path({str(run_directory)!r}), 0)
with open_monitor(Path({str(run_directory)!r})) as monitor:
    for step in range(1, {steps} + 1):
        monitor.step(record(step))
    monitor.event("eval", step=step, val_loss=2.4134)
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
        "step 12  eval  val_loss 2.4134",
        "step 12  sample  'def '",
        r"    def f():\x1b[31m\x9b2J",
        "      pass",
        "step 12  eval  val_loss None",
        "step 12  save  path runs/x/checkpoints/step_00000012",
    ]
    assert done.stderr.decode() == "WARNING megagpt.train: a thing to know\n"
    assert not CONTROL.search(done.stdout + done.stderr)


def run_on_terminal(script: str, **environment: str) -> bytes:
    """What a script writes to a terminal of its own."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "LINES": "30"} | environment
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


def test_a_terminal_gets_a_live_table(tmp_path: Path) -> None:
    output = run_on_terminal(training(tmp_path), TERM="xterm-256color").decode()
    assert output.index("\x1b[?25l") < output.rindex("\x1b[?25h")  # the cursor hidden, then given back
    assert "\x1b[31m\x9b" not in output
    last_table = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output[output.rindex("╭") :])
    for text in ("12/100", "━", "ETA 44 s", "2.5000", "8.19k (4.1k a device)", "41.2 %", "6.00e-04", "0.700"):
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


# Trackers


def test_wandb_writes_offline_by_itself_and_says_so_once(tmp_path: Path) -> None:
    script = f"""
from tests.test_monitor import *
for start_step in (0, 2):
    with open_monitor(Path({str(tmp_path)!r}), "wandb.enabled=true", start_step=start_step) as monitor:
        monitor.step(record(start_step + 1))
        monitor.event("eval", step=start_step + 1, val_loss=2.4)
"""
    done = run_script(script, NETRC=os.devnull, HOME=str(tmp_path))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in runs}) == 1  # one identity: the second run continues the first
    content = b"".join(path.read_bytes() for path in runs)
    assert b"train/loss" in content
    assert b"eval/val_loss" in content
    assert done.stderr.count(b"upload later with: wandb sync") == 2  # once each time it opens
    assert done.stderr.count(b"\n") == 2


def test_wandb_goes_offline_for_a_stated_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "no API key" in str(why_offline())
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert why_offline() == "127.0.0.1 cannot be reached"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert why_offline() is None


def test_a_login_on_this_machine_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n login user\n password {CANARY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid")  # then only the proxy can tell what is reachable
    assert why_offline() is None


@pytest.mark.parametrize(("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tracker: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with open_monitor(tmp_path, f"{tracker}.enabled=true") as monitor:
        for step in range(1, 4):
            monitor.step(record(step))
    assert len(read_metrics(tmp_path).steps) == 3
    assert [tracker in message for message in caplog.messages] == [True]


def test_a_tracker_that_goes_down_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        name, retried, writes = "wandb", False, 0

        def write(self, line: object) -> None:
            self.writes += 1
            raise ConnectionError("server gone")

        def close(self) -> None:
            raise ConnectionError("server gone")

    failing = Failing()
    metrics = MetricsFile(tmp_path, start_step=0)
    openers: list[tuple[str, Callable[[], object]]] = [("wandb", lambda: failing), (METRICS_FILE, lambda: metrics)]
    with Monitor(openers) as monitor:  # type: ignore[arg-type]
        for step in range(1, 4):
            monitor.step(record(step))
    assert failing.writes == 1
    assert len(read_metrics(tmp_path).steps) == 3
    assert caplog.messages == ["wandb failed (ConnectionError: server gone); training goes on without it"]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step, last_step, loss in ((0, 4, 1.0), (2, 5, 2.0)):
        with open_monitor(tmp_path, "tensorboard.enabled=true", start_step=start_step) as monitor:
            for step in range(start_step + 1, last_step + 1):
                monitor.step(record(step, loss=loss if step != 5 else math.nan))
            monitor.event("eval", step=last_step, val_loss=2.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [event.step for event in events.Scalars("eval/val_loss")] == [5]
    assert {"train/mfu", "train/grad_norm", "train/tokens_per_s"} <= set(events.Tags()["scalars"])


def test_tensorboard_writes_where_its_section_says(tmp_path: Path) -> None:
    overrides = ("tensorboard.enabled=true", f"tensorboard.output_path={tmp_path}/board", "tensorboard.job_name=first")
    with open_monitor(tmp_path / "run", *overrides) as monitor:
        monitor.step(record(1))
    assert list((tmp_path / "board" / "first").glob("events.out.tfevents.*"))


# Secrets


def test_no_secret_reaches_a_file_or_the_screen(tmp_path: Path) -> None:
    script = f"""
import logging
from tests.test_monitor import *
run = Path({str(tmp_path)!r})
open_rank_log(run, 0)
with open_monitor(run, "wandb.enabled=true", "tensorboard.enabled=true") as monitor:
    monitor.step(record(1))
    monitor.event("warning", step=1, text="denied for {CANARY}", details=["{CANARY}"])
    monitor.sample(1, "key ", "{CANARY}")
    try:
        raise RuntimeError("cannot reach https://user:{CANARY}@host")
    except RuntimeError as error:
        logging.exception("failed with %s", "{CANARY}")
        print(crash_page(error, rank_name="rank 0", last_step=1, last_checkpoint=None, resume_command=None))
"""
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"), CANARY)
    done = run_script(script, WANDB_MODE="offline", HOME=str(tmp_path), **secrets)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {METRICS_FILE, "samples.txt", "rank_00000.log"}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY.encode() not in done.stdout + done.stderr
    for masked in (METRICS_FILE, "samples.txt", "logs/rank_00000.log"):
        assert MASK in (tmp_path / masked).read_text()


# Rank logs


@pytest.mark.usefixtures("restored_logging")
def test_only_rank_0_warns_on_the_screen_and_every_rank_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        assert open_rank_log(tmp_path, rank) == tmp_path / "logs" / f"rank_{rank:05d}.log"
        logging.getLogger("megagpt.test").info("chatter of %d", rank)
        logging.getLogger("megagpt.test").warning("warning of %d", rank)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(f"for developers, rank {rank}", stacklevel=1)
    assert capsys.readouterr().err == "WARNING megagpt.test: warning of 0\n"
    for rank in (0, 1):
        log = (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text()
        for text in (f"INFO    megagpt.test: chatter of {rank}", f"warning of {rank}", f"for developers, rank {rank}"):
            assert text in log
        assert f"of {1 - rank}" not in log


def test_deepspeeds_chatter_goes_to_the_log(tmp_path: Path) -> None:
    script = f"""
import deepspeed
from deepspeed.utils import logger
from megagpt.rank_log import open_rank_log
from pathlib import Path
print("---", flush=True)
open_rank_log(Path({str(tmp_path)!r}), 1)
logger.info("a detail")
logger.warning("a warning")
"""
    done = run_script(script)
    assert done.stdout.split(b"---\n")[1] == b""
    log = (tmp_path / "logs" / "rank_00001.log").read_text()
    assert re.findall(r"(\w+) +DeepSpeed: (.*)", log) == [("INFO", "a detail"), ("WARNING", "a warning")]


# The crash page


def failure(message: str) -> Exception:
    def innermost() -> None:
        raise RuntimeError(message)

    try:
        innermost()
    except RuntimeError as error:
        return error
    raise AssertionError


def test_the_crash_page_says_what_is_needed_on_one_screen() -> None:
    page = crash_page(
        failure("\x1b[31mout of memory\n" + "word " * 300),
        rank_name="rank 3 (host-a, pipeline 1, data 0)",
        last_step=1234,
        last_checkpoint=Path("runs/x/checkpoints/step_00001200"),
        resume_command="deepspeed launch/train.py --run_dir runs/x",
        log_path=Path("runs/x/logs/rank_00003.log"),
    )
    lines = page.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in page
    assert lines[1] == "  RuntimeError on rank 3 (host-a, pipeline 1, data 0)"
    facts = dict(re.findall(r"^  (\w[\w ]*?)  +(\S.*)$", page, re.MULTILINE))
    assert facts == {
        "last step": "1234",
        "last checkpoint": "runs/x/checkpoints/step_00001200",
        "full log": "runs/x/logs/rank_00003.log",
        "to resume": "deepspeed launch/train.py --run_dir runs/x",
    }
    assert re.search(r"tests/test_monitor\.py:\d+ +innermost", lines[-2])


def test_the_crash_page_of_a_run_that_saved_nothing() -> None:
    page = crash_page(ValueError(), rank_name="rank 0", last_step=None, last_checkpoint=None, resume_command=None)
    assert "(no message)" in page
    assert "nothing was saved: start again" in page
    assert "(no traceback)" in page
