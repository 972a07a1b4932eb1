"""What all commands share: the console script, `--version`, the word about another `kernels`."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import commands
from megagpt import __version__
from tests import REPOSITORY
from tests.support.monitoring import ENVIRONMENT

LAUNCH = REPOSITORY / "launch"
PLAN = ("--deepspeed_config", "ds_configs/gpt2_124m.json", "--ranks", "8", "--device", "h100")


def run(*words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run `megagpt WORDS ...` as the console script does."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin"} | ENVIRONMENT | ({"PYTHONPATH": path} if path else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_help_lists_every_command() -> None:
    shown = run("--help").stdout
    assert set(commands()) == {path.stem for path in LAUNCH.glob("[!_]*.py")}
    assert [name for name in commands() if f"\n  {name} " not in shown] == []


def test_a_command_is_run_as_its_script() -> None:
    script = subprocess.run(
        [sys.executable, "launch/plan.py", *PLAN],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    console = run("plan", *PLAN)
    assert (console.stdout, console.returncode) == (script.stdout, script.returncode)
    assert console.stdout


def test_exit_codes_come_through() -> None:
    assert run("plan", "--ranks", "none").returncode == 2
    assert run("plam").returncode == 2
    assert 'megagpt plam: unknown command, did you mean "plan"?' in run("plam").stderr
    assert run("import-hf", "--help").returncode == 0


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_says_its_version_without_torch(command: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['launch/{command}.py', '--version']\n"
        f"try: runpy.run_path('launch/{command}.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"megagpt {__version__}")
    assert "deepspeed 0." in done.stdout
    assert done.stdout.endswith("False\n")


def test_another_package_named_kernels_is_named(tmp_path: Path) -> None:
    quiet = run("plan", *PLAN)
    assert "kernels" not in quiet.stderr
    metadata = tmp_path / "kernels-1.2.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 1.2.3\n")
    told = run("plan", *PLAN, path=f"{REPOSITORY}:{tmp_path}")
    assert "kernels 1.2.3 (Hugging Face's) is installed" in told.stderr
    assert told.stdout == quiet.stdout
