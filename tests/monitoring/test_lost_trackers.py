"""Training that reports to a tracker which cannot be had: it trains as without one, and says so
once (F21).
"""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagpt.monitoring.metrics import read_metrics
from megagpt.monitoring.rank_log import rank_log_path
from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import CANARY
from tests.support.processes import PATIENCE_S, Start
from tests.support.ranks import RankPool, free_port
from tests.support.trained_run import write_dataset

STEPS = 4


@contextmanager
def nobody() -> Iterator[int]:
    """A port at which nothing listens: the server is down, or there is no network."""
    yield free_port()


@contextmanager
def silence() -> Iterator[int]:
    """A port that takes connections and never answers, as behind a firewall or a server that is
    overloaded.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server.getsockname()[1]


@contextmanager
def hangs_up() -> Iterator[int]:
    """A port that takes connections and closes them."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:  # the test is over
                    return

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


SERVERS = {"nobody": nobody, "silence": silence, "hangs up": hangs_up}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("nobody", "wandb is offline: 127.0.0.1 cannot be reached"),
        ("silence", "wandb failed (CommError"),
        ("hangs up", "wandb failed (CommError"),
        ("package", "wandb failed (ModuleNotFoundError: No module named 'wandb')"),
    ],
)
def test_a_run_without_its_tracker_is_the_same_run(
    one_rank: RankPool,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
    said: str,
) -> None:
    data, run = write_dataset(tmp_path / "dataset"), tmp_path / "run"
    config = run_config(data, STEPS, (1, "none", "none"), save_every=2)
    one_rank.run(
        "tests.support.jobs.checkpoint:train", config=config, directory=tmp_path / "undisturbed"
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"wandb": {"enabled": True}}))
    (tmp_path / "absent").mkdir()
    if lost == "package":  # found before the one that is installed, and as absent as one can be
        (tmp_path / "absent" / "wandb.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')\n"
        )
    with SERVERS.get(lost, nobody)() as port:
        for name, value in {
            "WANDB_API_KEY": CANARY,
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        (process,) = start(
            typed=f"PYTHONPATH={tmp_path / 'absent'}:{REPOSITORY} exec {sys.executable} "
            f"launch/train.py "
            f"--deepspeed_config {tmp_path / 'config.json'} --run_dir {run}"
        )
        shown = process.communicate(timeout=2 * PATIENCE_S)[1]
    assert process.returncode == 0, shown
    log = rank_log_path(run, 0).read_text()
    for lines in (shown.splitlines(), log.splitlines()):
        (warning,) = [line for line in lines if "WARNING" in line and "wandb" in line]
        assert said in warning
    steps, undisturbed = (
        read_metrics(directory).steps for directory in (run, tmp_path / "undisturbed")
    )
    assert [(step.step, step.loss, step.grad_norm) for step in steps] == [
        (step.step, step.loss, step.grad_norm) for step in undisturbed
    ]
    assert [event["at_step"] for event in read_metrics(run).events_named("save")] == [2, 4]
    assert len(steps) == STEPS
