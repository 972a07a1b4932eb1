"""What keeps a run from starting is named in time, by real ranks: other data, code or libraries
on one of them (F19), and what an earlier run has left behind (F20).
"""

import json
import os
import re
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megagpt.health.agreement import SOURCES
from megagpt.monitoring.rank_log import rank_log_path
from megagpt.parallel.ops import EXTENSIONS_VARIABLE
from megagpt.rundir import directory as run_directory
from megagpt.utils import ExitCode
from tests import REPOSITORY
from tests.support import trained_run
from tests.support.jobs.checkpoint import run_config
from tests.support.processes import Start, import_s, seconds_to_its_end, until
from tests.support.trained_run import write_dataset

END_WITHIN_S = 5.0  # once the ranks have met
NAMED_WITHIN_S = 10.0
IMPORT_TAKES_S = 5.0  # of these, at most, on a machine with nothing else to do


# -------------------------------------------------------------------------- ranks that differ (F19)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What four hosts have at the same places, `host_0` to `host_3`: data/, code/, and packages/ of
    their own.

    Host 1 has other data, host 2 other code, host 3 another Triton, as far as its installer's
    record says it.
    """
    for rank in range(4):
        host = tmp_path / f"host_{rank}"
        host.mkdir()
        (host / "data").symlink_to(tmp_path / "same" / "data")
        (host / "code").symlink_to(REPOSITORY)
    write_dataset(tmp_path / "same")
    monkeypatch.setattr(trained_run, "TEXTS", [*trained_run.TEXTS[:-1], "Another text.\n" * 40])
    (tmp_path / "host_1" / "data").unlink()
    write_dataset(tmp_path / "host_1")
    (tmp_path / "host_2" / "code").unlink()
    for package in (*SOURCES, REPOSITORY / "launch"):
        shutil.copytree(package, tmp_path / "host_2" / "code" / package.name)
    with (tmp_path / "host_2" / "code" / "megagpt" / "model.py").open("a") as source:
        source.write("# one comment more\n")
    record = tmp_path / "host_3" / "packages" / "triton-0.1.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 0.1\n")
    return tmp_path


@pytest.mark.slow
def test_ranks_that_differ_in_data_code_and_libraries_end_at_once(
    start: Start, hosts: Path
) -> None:
    """Every difference is named with its ranks, by every rank: no launcher ends those that let
    rank 0 speak first.
    """
    path, run = hosts / "config.json", hosts / "run"
    path.write_text(json.dumps(run_config(Path("data"), 8, (1, "none", "none"))))
    ranks = start(
        typed=f"cd {hosts}/host_$RANK && PYTHONPATH=$PWD/packages:{REPOSITORY} "
        f"exec {sys.executable} code/launch/train.py --deepspeed_config {path} --run_dir {run}",
        ranks=4,
    )
    until(lambda: all(rank_log_path(run, rank).exists() for rank in range(4)))  # they have met
    with ThreadPoolExecutor() as pool:
        took_s = list(pool.map(seconds_to_its_end, ranks))
    assert max(took_s) < END_WITHIN_S
    for rank in ranks:
        said = rank.communicate()[1]
        assert rank.returncode == ExitCode.BAD_INPUT, said
        assert (
            f"rank 1 (host {socket.gethostname()}) differs from rank 0 (host "
            f"{socket.gethostname()}) in data\n" in said
        )
        assert (
            f"rank 2 (host {socket.gethostname()}) differs from rank 0 (host "
            f"{socket.gethostname()}) in code\n" in said
        )
        assert "in version of triton; give every host the same and start again" in said
        assert said.count("differs from rank 0") == 3
    assert not (run / run_directory.CONFIG_FILE).exists()


# ----------------------------------------------------------------------- what was left behind (F20)


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """A run that needs DeepSpeed's own Adam."""
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(run_config(write_dataset(tmp_path / "dataset"), 8, (2, "cpu", "none")))
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("left", ["lock of a build", "port"])
def test_what_was_left_behind_is_named_in_time(
    start: Start, configuration: Path, tmp_path: Path, left: str
) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port, world_size = (other.getsockname()[1], 2) if left == "port" else (0, 1)
        first = (
            f"RANK=0 LOCAL_RANK=0 WORLD_SIZE={world_size} MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
        )
        expected_s = import_s() + NAMED_WITHIN_S - IMPORT_TAKES_S
        (rank,) = start(
            typed=f"exec env {first} {EXTENSIONS_VARIABLE}={lock.parent.parent} {sys.executable} "
            f"launch/train.py "
            f"--deepspeed_config {configuration} --run_dir {tmp_path / 'run'}"
        )
        assert seconds_to_its_end(rank) < expected_s
    said = rank.communicate()[1]
    assert rank.returncode == ExitCode.BAD_INPUT, said
    if left == "port":
        assert re.search(
            rf"port {port} of host .* is in use by process {os.getpid()} .* kill {os.getpid()}",
            said,
        )
    else:
        assert "another process has been compiling this op for" in said
        assert f"(lock: {lock})" in said
        assert f"rm {lock}" in said


def test_a_leftover_process_in_the_run_directory_is_named_in_time(
    start: Start, configuration: Path, tmp_path: Path
) -> None:
    """Before torch is imported, where there is one rank."""
    run = tmp_path / "run"
    with run_directory.lock(run):
        (rank,) = start("--deepspeed_config", configuration, "--run_dir", run)
        assert seconds_to_its_end(rank) < NAMED_WITHIN_S
    said = rank.communicate()[1]
    assert rank.returncode == ExitCode.BAD_INPUT, said
    assert (
        f"process {os.getpid()} on {socket.gethostname()} trains in it; end that run (kill "
        f"{os.getpid()})" in said
    )
