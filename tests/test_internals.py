"""Another DeepSpeed, or a patched one, is refused by name before anything relies on it."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megagpt import internals
from megagpt.utils import ExitCode
from tests.checkpoint_jobs import run_config
from tests.trained_run import write_dataset

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_installed_is_what_was_tested() -> None:
    internals.check()
    assert len({digest for _, digest in internals.digests()}) == len(internals.DIGESTS)


@pytest.mark.parametrize("fault", ["one line more", "a file less"])
def test_a_patched_deepspeed_is_refused(tmp_path: Path, fault: str) -> None:
    """A copy of the package stands before the installed one, as a vendored one would, for one rank of two.

    The rank does not wait for the other, which never comes.
    """
    installed = find_spec("deepspeed")
    assert installed is not None
    assert installed.origin is not None
    shutil.copytree(Path(installed.origin).parent, tmp_path / "deepspeed", ignore=shutil.ignore_patterns("*.pyc"))
    stage3 = tmp_path / "deepspeed" / "runtime" / "zero" / "stage3.py"
    stage3.write_text(stage3.read_text() + "\n") if fault == "one line more" else stage3.unlink()
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(run_config(write_dataset(tmp_path / "data"), 2)))
    place = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--deepspeed_config", config, "--run_dir", run],
        cwd=ROOT,
        env=os.environ | place | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    said = r"not as tested here: deepspeed/runtime/zero/stage3\.py; pip install .*0\.19\.8$"
    assert re.search(said, done.stderr.strip())
    assert not run.exists()


def test_the_versions_are_those_of_requirements_txt() -> None:
    pins = (ROOT / "requirements.txt").read_text().split()
    assert {f"{package}=={version}" for package, version in internals.TESTED.items()} <= set(pins)
