"""wandb and tensorboard, up and down, and secrets that reach no file."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megagpt.common.text import MASK
from megagpt.monitoring.metrics import METRICS_FILE, MetricsFile, read_metrics
from megagpt.monitoring.monitor import Monitor
from megagpt.monitoring.trackers import why_offline
from tests.support.monitoring import CANARY, SECRETS, open_monitor, record, run_script


@pytest.fixture(autouse=True)
def _no_trackers_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


def test_wandb_writes_offline_by_itself_and_says_so_once(tmp_path: Path) -> None:
    script = f"""
from tests.support.monitoring import *
run = Path({str(tmp_path)!r})
for start_step in (0, 2):
    with open_monitor(run, "wandb.enabled=true", start_step=start_step) as monitor:
        monitor.step(record(start_step + 1))
        monitor.event("eval", step=start_step + 1, val_loss=2.4)
"""
    done = run_script(script, NETRC=os.devnull, HOME=str(tmp_path))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert (
        len({path.name for path in runs}) == 1
    )  # one identity: the second run continues the first
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
    monkeypatch.setenv(
        "HTTPS_PROXY", "http://proxy.invalid"
    )  # then only the proxy can tell what is reachable
    assert why_offline() is None


@pytest.mark.parametrize(
    ("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_costs_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tracker: str,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with open_monitor(tmp_path, f"{tracker}.enabled=true") as monitor:
        for step in range(1, 4):
            monitor.step(record(step))
    assert len(read_metrics(tmp_path).steps) == 3
    assert [tracker in message for message in caplog.messages] == [True]


def test_a_tracker_that_goes_down_is_dropped_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        name, retried, writes = "wandb", False, 0

        def write(self, line: object) -> None:
            self.writes += 1
            raise ConnectionError("server gone")

        def close(self) -> None:
            raise ConnectionError("server gone")

    failing = Failing()
    metrics = MetricsFile(tmp_path, start_step=0)
    openers: list[tuple[str, Callable[[], object]]] = [
        ("wandb", lambda: failing),
        (METRICS_FILE, lambda: metrics),
    ]
    with Monitor(openers) as monitor:  # type: ignore[arg-type]
        for step in range(1, 4):
            monitor.step(record(step))
    assert failing.writes == 1
    assert len(read_metrics(tmp_path).steps) == 3
    assert caplog.messages == [
        "wandb failed (ConnectionError: server gone); training continues without it"
    ]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step, last_step, loss in ((0, 4, 1.0), (2, 5, 2.0)):
        with open_monitor(tmp_path, "tensorboard.enabled=true", start_step=start_step) as monitor:
            for step in range(start_step + 1, last_step + 1):
                monitor.step(record(step, loss=loss if step != 5 else math.nan))
            monitor.event("eval", step=last_step, val_loss=2.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
    ]
    assert [event.step for event in events.Scalars("eval/val_loss")] == [5]
    assert {"train/mfu", "train/grad_norm", "train/tokens_per_s"} <= set(events.Tags()["scalars"])


def test_tensorboard_writes_where_its_section_says(tmp_path: Path) -> None:
    overrides = (
        "tensorboard.enabled=true",
        f"tensorboard.output_path={tmp_path}/board",
        "tensorboard.job_name=first",
    )
    with open_monitor(tmp_path / "run", *overrides) as monitor:
        monitor.step(record(1))
    assert list((tmp_path / "board" / "first").glob("events.out.tfevents.*"))


def test_no_secret_reaches_a_file_or_the_screen(tmp_path: Path) -> None:
    script = f"""
import logging
from megagpt.health.crash import crash_page
from megagpt.monitoring.monitor import open_rank_log
from tests.support.monitoring import *
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
        known = dict(last_step=1, last_checkpoint=None, resume_command=None)
        print(crash_page(error, rank_name="rank 0", **known))
"""
    secrets = dict.fromkeys(SECRETS, CANARY)
    done = run_script(script, WANDB_MODE="offline", HOME=str(tmp_path), **secrets)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {METRICS_FILE, "samples.txt", "rank_00000.log"}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY.encode() not in done.stdout + done.stderr
    for masked in (METRICS_FILE, "samples.txt", "logs/rank_00000.log"):
        assert MASK in (tmp_path / masked).read_text()
