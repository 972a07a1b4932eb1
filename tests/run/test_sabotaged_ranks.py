"""Real ranks, in processes of their own, whose numbers or whose disk go bad: how they end, and
how the run goes on.
"""

import json
from pathlib import Path

import pytest

from megagpt.checkpoint.format import complete_steps
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.health.guard import MOST_SKIPS_IN_A_ROW
from megagpt.monitoring.metrics import read_metrics
from megagpt.rundir.end_record import EndRecord
from tests.support.jobs.checkpoint import assert_same_state, run_config
from tests.support.processes import PATIENCE_S, Start
from tests.support.shards import stored_tensors
from tests.support.trained_run import write_dataset

STEPS = 10
FIRST_SPOILT = 3
LAST_SPOILT = FIRST_SPOILT + MOST_SKIPS_IN_A_ROW - 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def written_config(data: Path, directory: Path, stage: int, keep: int) -> Path:
    """Of a run that saves every other step; its file."""
    config = run_config(data, STEPS, (stage, "none", "none"), save_every=2)
    config["megagpt"]["checkpoint"]["keep"] = keep
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "stage"), [("nan_loss", 3), ("inf_gradient", 1)])
def test_a_guard_ends_every_rank_with_exit_code_four(
    start: Start, data: Path, tmp_path: Path, fault: str, stage: int
) -> None:
    """One rank's numbers are bad, step after step; what is saved in the end are the weights from
    before (F8).
    """
    run = tmp_path / "run"
    words = [
        "--deepspeed_config",
        written_config(data, tmp_path, stage, keep=STEPS),
        "--run_dir",
        run,
    ]
    faults = "; ".join(
        f"{fault}@rank=1,step={step}" for step in range(FIRST_SPOILT, LAST_SPOILT + 1)
    )
    ranks = start(*words, ranks=2, faults=faults)
    assert [rank.wait(PATIENCE_S) for rank in ranks] == [4, 4]
    shown = [rank.communicate()[1] for rank in ranks]
    assert sum("StoppedByGuardError" in text or "steps in a row" in text for text in shown) == 1
    assert not any("Traceback" in text for text in shown)
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code, record.step) == ("stopped by a guard", 4, LAST_SPOILT)
    history = read_metrics(run)
    assert [skip["step"] for skip in history.events_named("skip")] == [
        *range(FIRST_SPOILT, LAST_SPOILT + 1)
    ]
    assert complete_steps(run / "checkpoints") == [LAST_SPOILT, 6, 4, 2]
    before, after = stored_tensors(run, FIRST_SPOILT - 1), stored_tensors(run, LAST_SPOILT)
    assert_same_state(before, after)
    assert all(values.isfinite().all() for values in after.values())
    ranks = start(*words, ranks=2)
    assert [rank.wait(PATIENCE_S) for rank in ranks] == [0, 0]
    (resume,) = read_metrics(run).events_named("resume")
    assert resume["step"] == LAST_SPOILT
    assert complete_steps(run / "checkpoints")[0] == STEPS
    assert all(values.isfinite().all() for values in stored_tensors(run).values())


@pytest.mark.slow
@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_ends_all_and_costs_no_checkpoint(
    start: Start, data: Path, tmp_path: Path, full_rank: int
) -> None:
    """From step 3 on no file of that rank grows; once there is room again the run goes on (F7)."""
    run = tmp_path / "run"
    words = [
        "--deepspeed_config",
        written_config(data, tmp_path, stage=1, keep=2),
        "--run_dir",
        run,
    ]
    ranks = start(*words, ranks=2, faults=f"disk_full@rank={full_rank},step=3")
    assert [rank.wait(PATIENCE_S) for rank in ranks] == [1, 1]
    shown = [rank.communicate()[1] for rank in ranks]
    assert (
        sum(f"rank_{full_rank:05d}_000.safetensors: File too large" in text for text in shown) == 1
    )
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code, record.step) == ("failed", 1, 4)
    assert complete_steps(run / "checkpoints") == [2]
    assert open_checkpoint(run).manifest.state.step == 2
    assert [rank.wait(PATIENCE_S) for rank in start(*words, ranks=2)] == [0, 0]
    (resume,) = read_metrics(run).events_named("resume")
    assert (resume["step"], resume["passed_over"]) == (2, [])
    assert complete_steps(run / "checkpoints")[0] == STEPS
    assert not list((run / "checkpoints").glob(".*"))
