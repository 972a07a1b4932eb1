"""The wheels for a bare GPU image: which they are, that a run needs no others, what is refused.

Without a network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import wheels
from benchmarks.wheels import PROVIDED, TRAINING, Target, closure
from megagpt.monitoring.metrics import read_metrics
from megagpt.utils import ExitCode, UserError
from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import ENVIRONMENT
from tests.support.trained_run import write_dataset

PYTHON = sys.executable  # a test replaces that by a stand-in for pip
# Runs a script in a process that finds only some of the distributions that are installed here.
ONLY = """
import os, runpy, sys
from importlib import metadata
from importlib.machinery import PathFinder
allowed = set(os.environ["ALLOWED"].split())
owners = metadata.packages_distributions()

class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owned_by = owners.get(name.partition(".")[0], ())
        found = {owner.lower().replace("_", "-") for owner in owned_by}
        return None if found and not found & allowed else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Only
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
REQUIREMENTS = {
    "trainer": [
        "Core_Library>=1",
        "torch>=2",
        'old-python; python_version < "3.12"',
        'arm; platform_machine == "aarch64"',
    ],
    "core-library": ["shared", "fast[speed]", 'docs; extra == "docs"'],
    "fast": ["shared", 'quick; extra == "speed"'],
    "shared": ["trainer"],  # a cycle
    **{name: [] for name in ("quick", "old-python", "arm")},
}


@pytest.mark.parametrize(
    ("target", "more"),
    [(Target(), []), (Target("3.11"), ["old-python"]), (Target(machine="aarch64"), ["arm"])],
    ids=["3.12", "3.11", "aarch64"],
)
def test_the_closure_follows_markers_and_extras_of_the_target(
    target: Target, more: list[str]
) -> None:
    found = closure(["trainer"], target.environment, requires=REQUIREMENTS.__getitem__)
    assert found == sorted(["core-library", "fast", "quick", "shared", "trainer", *more])


def test_a_run_needs_nothing_but_the_wheels_and_what_the_image_has(tmp_path: Path) -> None:
    """It trains with ZeRO 3, saves and writes a sample; the same process cannot import anything
    else.
    """
    environment = Target().environment
    carried, image = closure(TRAINING, environment), closure(PROVIDED, environment, provided=())
    assert not PROVIDED.intersection(carried)
    config = run_config(write_dataset(tmp_path / "data"), 2, (3, "none", "none"))
    config["megagpt"]["training"] |= {"sample_interval_steps": 2, "sample_prompts": ["The"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    paths = ["--deepspeed_config", tmp_path / "config.json", "--run_dir", tmp_path / "run"]

    def train(allowed: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", ONLY, "launch/train.py", *paths],
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "ALLOWED": " ".join(allowed)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    lacking = train(image)
    assert "ModuleNotFoundError: No module named 'pydantic'" in lacking.stderr, (
        "anything can be imported"
    )
    done = train([*image, *carried])
    assert done.returncode == ExitCode.DONE, done.stderr
    history = read_metrics(tmp_path / "run")
    assert {"save", "sample"} <= {event["event"] for event in history.events}


def test_what_is_not_installed_has_no_version() -> None:
    with pytest.raises(
        UserError, match=r"no-such-package: not installed here.*pip install no-such-package"
    ):
        closure(["no-such-package"], Target().environment)


def fake_pip(directory: Path, code: str) -> str:
    """A program that stands for `python -m pip ...`."""
    program = directory / "python"
    program.write_text(f"#!{PYTHON}\nimport os, sys\nfrom pathlib import Path\n{code}\n")
    program.chmod(0o755)
    return str(program)


BUILD = """
if sys.argv[3:5] == ["--quiet", "--disable-pip-version-check"] and sys.argv[5] == "wheel":
    assert os.environ["DS_BUILD_OPS"] == "0" and "DS_BUILD_AIO" not in os.environ
    (directory,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--wheel-dir="))
    (Path(directory) / "deepspeed-1-py3-none-any.whl").write_bytes(bytes(1000))
"""
DOWNLOAD = """
if sys.argv[5] == "download":
    (directory,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--dest="))
    assert "--python-version=3.12" in sys.argv
    assert not any("deepspeed" in word for word in sys.argv)
    for word in (word for word in sys.argv[6:] if "==" in word):
        wheel = Path(directory) / (word.replace("==", "-") + "-py3-none-any.whl")
        wheel.write_bytes(bytes({size}))
"""


def test_the_directory_is_filled_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too much, a failing pip: nothing stays behind.

    Otherwise every distribution of the closure is there.
    """
    monkeypatch.setenv("DS_BUILD_AIO", "1")
    target = tmp_path / "wheels"
    fail = "if 'download' in sys.argv: sys.exit('ERROR: No matching distribution')"
    foreign = "deepspeed-1-py3-none-linux_x86_64.whl"
    faults = {
        BUILD + DOWNLOAD.format(size=1_000_000): r"MB of wheels, limit 15 MB \(largest: .*1\.0 MB",
        BUILD + fail: "pip download: No matching distribution; check the network",
        BUILD.replace(
            "deepspeed-1-py3-none-any.whl", foreign
        ): f"{foreign}: built for this machine",
    }
    for code, said in faults.items():
        monkeypatch.setattr(sys, "executable", fake_pip(tmp_path, code))
        with pytest.raises(UserError, match=said):
            wheels.collect(target, TRAINING, Target())
        assert not [*target.iterdir()]
    monkeypatch.setattr(sys, "executable", fake_pip(tmp_path, BUILD + DOWNLOAD.format(size=1000)))
    found = wheels.collect(target, TRAINING, Target())
    assert len(found) == len(closure(TRAINING, Target().environment))
    assert all(wheel.is_file() and wheel.parent == target for wheel in found)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot be written \(.*\); name another directory"):
        wheels.collect(tmp_path / "file", TRAINING, Target())
