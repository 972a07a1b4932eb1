"""Rank logs and the crash page."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.health.crash import crash_page
from megagpt.monitoring.monitor import open_rank_log
from tests.support.monitoring import run_script


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


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
        for text in (
            f"INFO    megagpt.test: chatter of {rank}",
            f"warning of {rank}",
            f"for developers, rank {rank}",
        ):
            assert text in log
        assert f"of {1 - rank}" not in log


def test_deepspeeds_chatter_goes_to_the_log(tmp_path: Path) -> None:
    script = f"""
import deepspeed
from deepspeed.utils import logger
from megagpt.monitoring.rank_log import open_rank_log
from pathlib import Path
print("---", flush=True)
open_rank_log(Path({str(tmp_path)!r}), 1)
logger.info("a detail")
logger.warning("a warning")
"""
    done = run_script(script)
    assert done.stdout.split(b"---\n")[1] == b""
    log = (tmp_path / "logs" / "rank_00001.log").read_text()
    assert re.findall(r"(\w+) +DeepSpeed: (.*)", log) == [
        ("INFO", "a detail"),
        ("WARNING", "a warning"),
    ]


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
    assert re.search(r"tests/health/test_crash\.py:\d+ +innermost", lines[-2])


def test_the_crash_page_of_a_run_that_saved_nothing() -> None:
    page = crash_page(
        ValueError(), rank_name="rank 0", last_step=None, last_checkpoint=None, resume_command=None
    )
    assert "(no message)" in page
    assert "nothing was saved: start again" in page
    assert "(no traceback)" in page
