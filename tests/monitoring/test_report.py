"""The HTML page about a run: what it shows, that it is self-contained, and that hostile text
stays text.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.monitoring.metrics import METRICS_FILE, MetricsFile, StepRecord, plain
from megagpt.monitoring.plots import thinned
from megagpt.monitoring.report import REPORT_FILE, write_report
from megagpt.utils import UserError
from tests import REPOSITORY

SCRIPT = "<script>alert('x')</script>\x1b[2J"


def write_run(run_directory: Path, *, steps: int = 30, mfu: float | None = 0.4) -> None:
    """A run whose loss falls from 5, with a step that was skipped, a resume and a sample full of
    markup.
    """
    file = MetricsFile(run_directory, start_step=0)
    for step in range(1, steps + 1):
        loss = math.nan if step == 7 else 2 + 3 / step
        values = StepRecord(
            step * 10,
            4096 * step,
            loss,
            1 / step,
            1e-3,
            0.5,
            8192.0,
            8192.0,
            mfu,
            1.25,
            int(step > 7),
        )
        file.write(plain(values.as_line()))
    for event in (
        {"event": "eval", "step": 100, "val_loss": 2.75},
        {"event": "eval", "step": 200, "val_loss": 2.25},
        {"event": "eval", "step": 300, "val_loss": None},
        {"event": "skip", "step": 70, "reason": SCRIPT},
        {"event": "resume", "step": 150},
        {"event": "sample", "step": 200, "prompt": "<b>", "text": SCRIPT},
    ):
        file.write(event)
    file.close()


class Page(HTMLParser):
    """The text of a page by tag, its pictures, and whatever it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        source = values.get("src") or values.get("href") or ""
        if source.startswith("data:image/svg+xml;base64,"):
            self.pictures[str(values["alt"])] = base64.b64decode(source.split(",")[1])
        elif source:
            self.fetched.append(source)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] in ("dt", "dd", "td"):
            self.cells.append(data)


def test_the_page_shows_the_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    shutil.copy(REPOSITORY / "ds_configs" / "default.json", tmp_path / "config.json")
    page = Page(write_report(tmp_path))
    tiles = dict(zip(page.cells[0::2], page.cells[1::2], strict=False))
    assert tiles["step"] == "300"
    assert tiles["last loss"] == "2.1000"
    assert tiles["best val loss"] == "2.2500"
    assert tiles["MFU, median"] == "40.0 %"
    assert tiles["time in steps"] == "2 min 30 s"  # 300 steps of 0.5 s, every tenth logged
    assert tiles["skipped steps"] == "1"
    for text in (
        "ZeRO stage",
        "AdamW",
        "data/stdlib",
        '"stage3_param_persistence_threshold": 10000',
    ):
        assert text in page.text


def test_every_quantity_has_a_picture(tmp_path: Path) -> None:
    write_run(tmp_path)
    pictures = Page(write_report(tmp_path)).pictures
    quantities = (
        "loss",
        "gradient norm",
        "learning rate",
        "tokens/s",
        "MFU, %",
        "step time, s",
        "memory, GiB",
    )
    assert list(pictures) == [f"{quantity} over the steps" for quantity in quantities]
    for svg in pictures.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")  # noqa: S314, our own output
    for legend in (b"training", b"validation", b"resume", b"skipped step"):
        assert legend in pictures["loss over the steps"]


def test_validation_sets_and_sources_have_a_picture_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / METRICS_FILE).open("a") as file:
        for step, loss in [(400, 2.5), (500, None)]:
            event = {"event": "eval", "step": step, "source/code": loss, "validation/web": 3.0}
            file.write(json.dumps(event) + "\n")
    picture = Page(write_report(tmp_path)).pictures[
        "loss by validation set and source over the steps"
    ]
    for legend in (b"source/code", b"validation/web"):
        assert legend in picture


def test_a_quantity_that_is_unknown_has_none(tmp_path: Path) -> None:
    write_run(tmp_path, mfu=None)
    page = Page(write_report(tmp_path))
    assert "MFU, % over the steps" not in page.pictures
    assert "MFU" not in page.text


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.fetched == []
    assert "script" not in page.tags
    assert (
        page.text.count(r"<script>alert('x')</script>\x1b[2J") == 2
    )  # in the sample and in the skip, as text
    assert not re.search(r"url\(|@import", (tmp_path / REPORT_FILE).read_text())


def test_the_page_of_a_running_run_leaves_out_the_torn_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"step": 310, "to')
    page = Page(write_report(tmp_path))
    assert "steps 10 to 300, 30 of them logged" in page.text
    assert "unreadable" not in page.text


def test_one_step_is_enough(tmp_path: Path) -> None:
    write_run(tmp_path, steps=1)
    assert "steps 10 to 10, 1 of them logged" in Page(write_report(tmp_path)).text


def test_nothing_to_plot_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run directory .* \(metrics\.jsonl: .*--run_dir"):
        write_report(tmp_path)
    write_run(tmp_path, steps=0)
    with pytest.raises(UserError, match="no step is logged yet"):
        write_report(tmp_path)
    assert not (tmp_path / REPORT_FILE).exists()


def test_a_torn_config_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "config.json").write_text('{"megagpt": ')
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        write_report(tmp_path)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.none() | st.floats(width=32))), st.integers(1, 20)
)
def test_thinning_keeps_the_extremes(points: list[tuple[int, float | None]], most: int) -> None:
    curve = thinned(points, most)
    finite = [value for _, value in points if value is not None and math.isfinite(value)]
    assert len(curve.steps) == len(curve.mean) <= most
    assert min(curve.low, default=None) == min(finite, default=None)
    assert max(curve.high, default=None) == max(finite, default=None)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "launch" / "report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_prints_the_path(tmp_path: Path) -> None:
    write_run(tmp_path)
    done = run_command("--run_dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / REPORT_FILE}\n")
    assert (tmp_path / REPORT_FILE).exists()


def test_the_command_names_a_wrong_directory_without_a_traceback(tmp_path: Path) -> None:
    done = run_command("--run_dir", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere: not a run directory" in done.stderr


def test_neither_the_monitor_nor_the_report_imports_torch_by_itself() -> None:
    check = (
        "import sys, megagpt.monitoring.monitor, megagpt.monitoring.report; print({'torch', "
        "'matplotlib', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
