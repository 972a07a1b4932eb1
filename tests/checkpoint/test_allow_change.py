"""A run that is continued with another learning rate, schedule, dropout, batch or data: what was
changed acts, the rest goes on, and it is on record.
"""

import copy
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint.format import read_manifest, step_directory
from megagpt.monitoring.metrics import read_metrics
from megagpt.rundir.directory import CONFIG_FILE, read_config
from tests.support import trained_run
from tests.support.configurations import Config, with_zero
from tests.support.jobs.checkpoint import assert_same_state, gathered, run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

JOBS = "tests.support.jobs.checkpoint"
SAVED = 4  # steps before the change
DROPOUT = "megagpt.model.dropout"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, other text."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trained_run, "TEXTS", ["Another text.\n" * 60, *trained_run.TEXTS])
        return write_dataset(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def config(data: Path) -> Config:
    return run_config(data, SAVED, save_every=SAVED)


@pytest.fixture(scope="module")
def saved(pools: Any, config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of four steps, and what its rank held at the end."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    held = pools.get(1).run(f"{JOBS}:train", config=config, directory=directory)
    return directory, held


@pytest.fixture
def run(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    return shutil.copytree(saved[0], tmp_path / "run")


def changed(config: Config, steps: int, **values: Any) -> Config:
    """The configuration with dotted keys changed: ``optimizer__params__lr=3``."""
    document = copy.deepcopy(config)
    document["megagpt"]["training"]["total_steps"] = steps
    for path, value in values.items():
        *sections, key = path.split("__")
        place = document
        for section in sections:
            place = place[section]
        place[key] = value
    return document


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    return read_metrics(directory).events_named(name)


def test_another_schedule_and_batch_act_from_the_next_step_on(
    two_ranks: RankPool, config: Config, saved: tuple[Path, Any], run: Path
) -> None:
    """On other ranks, too, under another ZeRO stage and with offload."""
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 16, "warmup_type": "linear"}}
    keys = {"optimizer__params__lr": 0.02, "scheduler": schedule, "train_batch_size": 4}
    other = with_zero(changed(config, SAVED + 3, **keys), 3, "cpu")
    said = two_ranks.run(f"{JOBS}:refusal", config=other, directory=run)[0]
    switch = "--allow_change train_batch_size optimizer.params.lr scheduler"
    assert f"to continue with them: {switch}; or choose another --run_dir" in said
    before = (run / CONFIG_FILE).read_bytes()

    allow = switch.split()[1:]
    went_on = two_ranks.run(f"{JOBS}:train", config=other, directory=run, allow_change=allow)
    assert went_on[0]["first_step"] == SAVED
    assert_same_state(gathered(saved[1], "at_end"), gathered(went_on, "at_start"))  # moments too

    steps = read_metrics(run).steps[SAVED:]
    # WarmupLR by its definition: after n updates, n - 1 of 16 steps up from 0.
    assert [step.learning_rate for step in steps] == pytest.approx(
        [0.02 * (updates - 1) / 16 for updates in (4, 5, 6)]
    )
    first = 8 * SAVED
    for step in (1, 2, 3):
        read = sorted(sample for rank in went_on for sample in rank["samples"][SAVED + step])
        assert read == list(range(first + 4 * (step - 1), first + 4 * step))
    (entry,) = json.loads((run / CONFIG_FILE).read_text())["changes"]
    assert entry["step"] == SAVED
    assert entry["keys"]["optimizer.params.lr"] == [0.001, 0.02]
    assert entry["keys"]["scheduler.type"] == ["WarmupCosineLR", "WarmupLR"]
    assert (run / CONFIG_FILE).read_bytes() != before
    (event,) = events(run, "change")
    assert event["step"] == SAVED
    assert "optimizer.params.lr 0.001 -> 0.02" in event["changes"]
    assert "Adam's moments are kept" in event["changes"]
    assert not events(run, "proof")  # step 5 of another run proves nothing
    stored = read_manifest(step_directory(run / "checkpoints", SAVED + 3))
    assert stored.identity["optimizer.params.lr"] == 0.02
    assert read_config(run).optimizer.params.lr == 0.02


def test_a_restart_before_the_next_checkpoint_needs_no_switch_and_forgets_nothing(
    one_rank: RankPool, config: Config, run: Path
) -> None:
    """As under supervise.py after a crash: the newest checkpoint is still of before the change."""
    other = changed(config, SAVED, optimizer__params__lr=0.02)
    allow = ["optimizer"]
    one_rank.run(f"{JOBS}:resumption", config=other, directory=run, allow_change=allow)
    recorded = (run / CONFIG_FILE).read_text()
    for switch in (allow, []):
        again = one_rank.run(
            f"{JOBS}:resumption", config=other, directory=run, allow_change=switch
        )[0]
        assert again["step"] == SAVED
        assert "changed: optimizer.params.lr 0.001 -> 0.02" in again["said"]
        assert "cannot be compared: the run changed" in again["said"]
        assert (run / CONFIG_FILE).read_text() == recorded
    # Back to what it was: a change like any other, and then the recorded step is a proof again.
    back = one_rank.run(
        f"{JOBS}:train",
        config=changed(config, SAVED + 1),
        directory=run,
        allow_change=["optimizer.params.lr"],
    )
    assert back[0]["first_step"] == SAVED
    entries = json.loads((run / CONFIG_FILE).read_text())["changes"]
    assert [entry["keys"]["optimizer.params.lr"] for entry in entries] == [
        [0.001, 0.02],
        [0.02, 0.001],
    ]
    cosine = 0.001 * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi / 17)) / 2)
    assert read_metrics(run).steps[-1].learning_rate == pytest.approx(cosine)


def test_other_data_start_from_their_first_sample_and_dropout_acts(
    one_rank: RankPool, config: Config, other_data: Path, saved: tuple[Path, Any], run: Path
) -> None:
    keys = {"megagpt__data__path": str(other_data), "megagpt__model__dropout": 0.4}
    other = changed(config, SAVED + 1, **keys)
    said = one_rank.run(f"{JOBS}:refusal", config=other, directory=run)[0]
    assert "--allow_change megagpt.model.dropout megagpt.data.path;" in said
    allow = ["dropout", "data"]
    went_on = one_rank.run(f"{JOBS}:train", config=other, directory=run, allow_change=allow)
    assert went_on[0]["samples"] == {SAVED + 1: list(range(8))}
    assert went_on[0]["state"].cursor == 8
    assert went_on[0]["state"].step == SAVED + 1
    lines = events(run, "change")[0]["changes"]
    assert "megagpt.model.dropout 0.0 -> 0.4" in lines
    assert "the data start from their first sample" in lines

    without = shutil.copytree(saved[0], run.with_name("without"))
    other["megagpt"]["model"]["dropout"] = 0.0
    one_rank.run(f"{JOBS}:train", config=other, directory=without, allow_change=["data"])
    losses = [read_metrics(directory).steps[-1].loss for directory in (run, without)]
    assert losses[0] != losses[1]

    # The data of before are refused now, and the cursor goes on: it restarts once.
    longer = changed(config, SAVED + 2, **keys)
    again = one_rank.run(f"{JOBS}:train", config=longer, directory=run)
    assert again[0]["samples"] == {SAVED + 2: list(range(8, 16))}


def test_longer_sequences_with_scaled_rotary_positions(
    one_rank: RankPool, config: Config, tmp_path: Path
) -> None:
    """Linear scaling by 2 of twice the positions: windows of 32 tokens, from the first one on."""
    rotary = changed(config, 2, megagpt__model__position="rotary")
    run = tmp_path / "run"
    one_rank.run(f"{JOBS}:train", config=rotary, directory=run)
    length = rotary["megagpt"]["model"]["sequence_length"]
    keys = {
        "megagpt__model__sequence_length": 2 * length,
        "megagpt__model__rope_scaling": {"type": "linear", "factor": 2.0},
    }
    longer = changed(rotary, 3, **keys)
    said = one_rank.run(f"{JOBS}:refusal", config=longer, directory=run)[0]
    assert (
        "--allow_change megagpt.model.sequence_length megagpt.model.rope_scaling; or choose" in said
    )
    allow = ["megagpt.model.sequence_length", "megagpt.model.rope_scaling"]
    went_on = one_rank.run(f"{JOBS}:train", config=longer, directory=run, allow_change=allow)
    assert went_on[0]["samples"] == {3: list(range(8))}
    assert went_on[0]["state"].cursor == 8
    tokens = [step.tokens for step in read_metrics(run).steps]
    assert [after - before for before, after in itertools.pairwise(tokens)] == [
        8 * length,
        2 * 8 * length,
    ]
    stored = read_config(run).megagpt.model
    assert (stored.sequence_length, stored.rope_scaling.type) == (2 * length, "linear")


def test_shapes_never_change(one_rank: RankPool, config: Config, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = changed(config, SAVED + 1, megagpt__model__num_layers=3, optimizer__params__lr=0.02)
    longer = changed(config, SAVED + 1, megagpt__model__sequence_length=32)
    allow = ["megagpt.model.sequence_length"]
    said = one_rank.run(f"{JOBS}:refusal", config=longer, directory=run, allow_change=allow)[0]
    assert "(cannot change: learned positions are a table of this length" in said
    for allow in ([], ["optimizer"]):
        said = one_rank.run(f"{JOBS}:refusal", config=other, directory=run, allow_change=allow)[0]
        assert "num_layers: 2 in the run directory, 3 requested (cannot change:" in said
        assert "holds another run; choose another --run_dir, or undo these differences" in said
        assert "--allow_change" not in said
    said = one_rank.run(
        f"{JOBS}:refusal", config=other, directory=run, allow_change=["megagpt.model.num_layers"]
    )[0]
    assert "--allow_change megagpt.model.num_layers: cannot change within a run" in said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
