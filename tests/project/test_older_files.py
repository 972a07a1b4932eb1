"""Datasets, runs and checkpoints that older versions wrote still load, and give the numbers that
they gave.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.support.monitoring import ENVIRONMENT

# Written by version 0.1.0 (2026-11-30, before its modules were sorted into packages):
# download_data.py on one line of text thirty times, then two steps of ZeRO 1. It went on to the
# losses below.
VERSION_0_1_0 = REPOSITORY / "tests" / "fixtures" / "version_0.1.0"
LOSS_OF_EVALUATE = 5.457505702972412
LOSS_OF_STEP_4 = 5.425329208374023
# Of windows 2, 0 and 1, the whole validation split once: `evaluate.py` finds it after step 4, too.
# Version 0.1.0 validated on windows 0, 1, 2 and 0 again.
VALIDATION_AT_STEP_4 = 5.383684158325195


def command(place: Path, script: str, *words: str) -> str:
    """What a command prints when it is run in ``place``, as its exit code is 0."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / script), *words],
        cwd=place,
        env=os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_0_1_0(tmp_path: Path) -> None:
    place = shutil.copytree(VERSION_0_1_0, tmp_path / "place")
    found = json.loads(command(place, "evaluate.py", "--run_dir", "runs/old"))
    assert found["loss"] == pytest.approx(LOSS_OF_EVALUATE, rel=1e-5)
    command(place, "train.py", "--deepspeed_config", "old.json", "--run_dir", "runs/old")
    lines = [
        json.loads(line)
        for line in (place / "runs" / "old" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if line.get("event") == "resume"] == [2]
    (step,) = (line for line in lines if line["step"] == 4 and "event" not in line)
    assert step["loss"] == pytest.approx(LOSS_OF_STEP_4, rel=1e-5)
    (validation,) = (line for line in lines if line.get("event") == "eval")
    assert validation["val_loss"] == pytest.approx(VALIDATION_AT_STEP_4, rel=1e-5)
