"""The standard-library helpers: files that are never half-written, exit codes, suggestions,
sizes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt import utils
from megagpt.utils import (
    ExitCode,
    RankEnvironment,
    UserError,
    closest,
    did_you_mean,
    human_bytes,
    human_count,
    human_duration,
    run_command,
    write_atomically,
)


@pytest.mark.parametrize(
    ("data", "stored"), [("tëxt\n", "tëxt\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")]
)
def test_text_and_bytes_are_written_in_a_new_directory(
    tmp_path: Path, data: str | bytes, stored: bytes
) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, data)
    assert path.read_bytes() == stored
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, step, full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_content_is_on_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        utils.os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor))
    )
    monkeypatch.setattr(
        utils.os, "replace", lambda old, new: (order.append("rename"), replace(old, new))
    )
    write_atomically(tmp_path / "file", "x")
    assert order == ["fsync", "rename", "fsync"]  # content, name, directory


def test_bad_input_is_a_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise UserError("data/x: no such dataset; type make data")

    assert run_command(main) == ExitCode.BAD_INPUT == 2
    assert capsys.readouterr() == ("", "data/x: no such dataset; type make data\n")
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 4) == 4


def test_suggestions_ignore_case_and_stay_silent_when_nothing_is_near() -> None:
    assert closest("STAGE", ["stage", "device"]) == "stage"
    assert did_you_mean("stge", ["stage", "device"]) == ', did you mean "stage"?'
    assert did_you_mean("zzz", ["stage", "device"]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (human_count(950), "950"),
        (human_count(124_439_808), "124M"),
        (human_count(1_557_611_200), "1.56B"),
        (human_bytes(512), "512 B"),
        (human_bytes(3 * 1024**3 / 2), "1.50 GiB"),
        (human_duration(42.4), "42 s"),
        (human_duration(185), "3 min 05 s"),
        (human_duration(7620), "2 h 07 min"),
        (human_duration(5 * 86400 + 3 * 3600), "5 d 03 h"),
    ],
)
def test_sizes_for_people(text: str, expected: str) -> None:
    assert text == expected


def run_with_a_reader_that_has_gone(stream: str, script: str) -> subprocess.CompletedProcess[bytes]:
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONUNBUFFERED": ""}, check=False, **streams
    )
    os.close(writer)
    return done


@pytest.mark.parametrize("code", [0, 2])
def test_a_reader_that_leaves_does_not_change_a_commands_exit_code(code: int) -> None:
    script = (
        f"import sys; from megagpt.utils import run_command; sys.exit(run_command(lambda: "
        f"print('x') or {code}))"
    )
    done = run_with_a_reader_that_has_gone("stdout", script)
    assert (done.returncode, done.stderr) == (code, b"")


REFUSING = """
import sys
from megagpt.utils import UserError, end_process, run_command

def refuse():
    print("so far", end="")
    raise UserError("bad input")

{end}(run_command(refuse))
"""


@pytest.mark.parametrize("end", ["sys.exit", "end_process"])
def test_a_terminal_that_has_gone_does_not_change_the_code_of_bad_input(end: str) -> None:
    """Python itself would exit with 120 where it cannot flush stderr."""
    done = run_with_a_reader_that_has_gone("stderr", REFUSING.format(end=end))
    assert (done.returncode, done.stdout) == (2, b"so far")


def test_a_rank_that_failed_waits_for_no_thread() -> None:
    lingering = "import threading, time; threading.Thread(target=time.sleep, args=[1000]).start()\n"
    done = subprocess.run(
        [sys.executable, "-c", lingering + REFUSING.format(end="end_process")],
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, b"so far", b"bad input\n")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, RankEnvironment(0, 1, 0, 1)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"},
            RankEnvironment(5, 8, 1, 4),
        ),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "", "RANK": ""}, RankEnvironment(local_size=2)),
        ({"RANK": "x", "WORLD_SIZE": "-1", "LOCAL_RANK": "²"}, RankEnvironment()),
    ],
)
def test_the_rank_is_what_the_launcher_says(
    variables: dict[str, str], expected: RankEnvironment
) -> None:
    assert RankEnvironment.read(variables) == expected
    assert expected.is_first_of_host == (expected.local_rank == 0)
