"""Keys in the environment of a run that trains, saves and reports for real: they stay there."""

import json
from pathlib import Path

import pytest

from megagpt.checkpoint.format import complete_steps
from megagpt.cluster.processes import PROC, Process, all_processes
from megagpt.monitoring.metrics import METRICS_FILE
from megagpt.rundir.end_record import END_FILE
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import CANARY, SECRETS
from tests.support.processes import Start, ranks_of, steps_on_record, until
from tests.support.trained_run import write_dataset

LOOKS = 5  # at the processes of the machine, while steps are made


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """A run that reports to both trackers and saves, and that nobody waits for the end of."""
    config = run_config(
        write_dataset(tmp_path / "dataset"), 10**6, (1, "none", "none"), save_every=20
    )
    config |= {"wandb": {"enabled": True}, "tensorboard": {"enabled": True}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def local_ranks(members: list[Process]) -> set[str]:
    return {word for member in members for word in member.words if word.startswith("--local_rank=")}


@pytest.mark.slow
def test_no_secret_leaves_the_environment(
    start: Start, configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not into a file of the run, nor onto the screen, nor into the command line of any process
    (S4).
    """
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, screen = tmp_path / "run", tmp_path / "screen"
    (process,) = start(
        "--deepspeed_config", configuration, "--run_dir", run, launched=2, screen=screen
    )
    seen: list[Process] = []

    def look() -> bool:
        seen.extend(all_processes())
        return steps_on_record(run) > 0

    until(look)
    for _ in range(LOOKS):
        members = ranks_of(run)
        assert local_ranks(members) == {"--local_rank=0", "--local_rank=1"}
        assert all(
            CANARY in (PROC / str(member.number) / "environ").read_text() for member in members
        )
        look()
    until(lambda: complete_steps(run / "checkpoints"))
    (run / "stop").touch()
    until(lambda: look() and process.poll() is not None)
    assert {member.name for member in seen} >= {"wandb-core"}
    assert local_ranks(seen) >= {"--local_rank=0", "--local_rank=1"}
    assert [member for member in seen if CANARY in " ".join(member.words)] == []
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "config.json",
        METRICS_FILE,
        END_FILE,
        "manifest.json",
        "rank_00001.log",
    }
    assert {path.suffix for path in files} >= {".safetensors", ".wandb"}
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert "STOP_FILE: saved step" in screen.read_text()
    assert CANARY not in screen.read_text()
