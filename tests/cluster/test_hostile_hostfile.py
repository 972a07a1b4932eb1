"""A hostile hostfile, given to every command of ours that reads one: each line is refused,
nothing is started (S5).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.utils import ExitCode
from tests import REPOSITORY

PROGRAMS = (
    "ssh",
    "pdsh",
    "touch",
    "reboot",
)  # whatever a hostile line would have run leaves a file behind

# A command named `deepspeed`, as far as the ranks that it starts can see: its own reader of
# hostfiles is left out.
LAUNCHER = (
    "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[3:]]).returncode)"
)

COMMANDS = {
    "plan": [sys.executable, "launch/plan.py", "--hostfile", "HOSTS"],
    "preflight": [sys.executable, "launch/preflight.py", "--hostfile", "HOSTS", "--bandwidth"],
    "train": [
        sys.executable,
        "LAUNCHER",
        "--hostfile",
        "HOSTS",
        "launch/train.py",
        "--run_dir",
        "RUN",
    ],
    "parity": [sys.executable, "LAUNCHER", "--hostfile", "HOSTS", "launch/parity.py"],
    "supervise": [
        sys.executable,
        "launch/supervise.py",
        "--",
        "LAUNCHER",
        "--hostfile",
        "HOSTS",
        "launch/train.py",
    ],
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that any of PROGRAMS makes, which come first in `tmp_path/bin`."""
    sung = tmp_path / "sung"
    (tmp_path / "bin").mkdir()
    for name in PROGRAMS:
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n: > {sung}\n")
        program.chmod(0o755)
    return sung


def attacks(canary: Path) -> list[str]:
    return [
        f"-oProxyCommand=touch${{IFS}}{canary} slots=1",
        f"host;touch${{IFS}}{canary} slots=1",
        f"`touch${{IFS}}{canary}` slots=1",
        f"$(touch${{IFS}}{canary}) slots=1",
        f"host|touch${{IFS}}{canary} slots=1",
        f"host slots=1;touch {canary}",
        "h\u00f6st slots=1",
        "\u202ehost slots=1",
        "host\x1b[2J slots=1",
        "h" * 300 + " slots=1",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_hostfile_is_refused_line_by_line(
    command: str, canary: Path, tmp_path: Path
) -> None:
    hosts, launcher, run = tmp_path / "hosts", tmp_path / "deepspeed", tmp_path / "run"
    lines = attacks(canary)
    hosts.write_text("good slots=1\n" + "\n".join(lines) + "\n")
    launcher.write_text(f"#!{sys.executable}\n{LAUNCHER}\n")
    launcher.chmod(0o755)
    places = {"HOSTS": str(hosts), "LAUNCHER": str(launcher), "RUN": str(run)}
    done = subprocess.run(
        [places.get(word, word) for word in COMMANDS[command]],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    refused = [line for line in done.stderr.splitlines() if line.startswith(str(hosts))]
    assert [line.split(": ")[1] for line in refused] == [
        f"line {number}" for number in range(2, 2 + len(lines))
    ]
    assert "".join(refused).isascii()
    assert "".join(refused).isprintable()
    assert "Traceback" not in done.stderr
    assert not canary.exists()
    assert not run.exists()


def test_the_canary_would_have_sung(canary: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        ["sh", "-c", attacks(canary)[1]], env=environment, check=False, capture_output=True
    )
    assert canary.exists()
