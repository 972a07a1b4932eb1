"""The step that followed a save is made again after a resume: equal to the last bit, or a
warning with both numbers.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megagpt.checkpoint.format import MANIFEST, StoredFile, read_manifest, step_directory
from megagpt.checkpoint.resume_proof import NEXT_STEP, NextStep, compare
from megagpt.common.disk import sha256_of
from megagpt.monitoring.metrics import History, read_metrics
from tests.conftest import _Pools
from tests.support.jobs.checkpoint import run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

TRAIN = "tests.support.jobs.checkpoint:train"
ZERO3 = (3, "none", "none")
SAVED = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def interrupted(pools: _Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that went on for two steps after its save of step 3, and was killed."""
    directory = tmp_path_factory.mktemp("runs") / "interrupted"
    pools.get(2).run(
        TRAIN, config=run_config(data, SAVED + 2, ZERO3, save_every=SAVED), directory=directory
    )
    shutil.rmtree(step_directory(directory / "checkpoints", SAVED + 2))
    return directory


@pytest.fixture
def run_directory(interrupted: Path, tmp_path: Path) -> Path:
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def checkpoint(run_directory: Path) -> Path:
    return step_directory(run_directory / "checkpoints", SAVED)


def resumed(
    ranks: RankPool, data: Path, directory: Path, zero: tuple[int, str, str] = ZERO3
) -> History:
    """What the run records of going on to step 5."""
    outcome = ranks.run(
        TRAIN, config=run_config(data, SAVED + 2, zero, save_every=0), directory=directory
    )
    assert outcome[0]["first_step"] == SAVED
    return read_metrics(directory)


def test_the_record_is_that_of_the_step_after_the_save(interrupted: Path) -> None:
    record = NextStep.read(step_directory(interrupted / "checkpoints", SAVED))
    assert record is not None
    (step,) = [step for step in read_metrics(interrupted).steps if step.step == SAVED + 1]
    assert (record.step, record.loss, record.grad_norm) == (step.step, step.loss, step.grad_norm)
    assert (record.first_sample, record.last_sample) == (8 * SAVED, 8 * SAVED + 7)
    assert (record.conditions["zero_stage"], record.conditions["precision"]) == (3, "float32")


def test_a_resume_on_the_same_ranks_is_proven_to_the_last_bit(
    two_ranks: RankPool, data: Path, run_directory: Path
) -> None:
    history = resumed(two_ranks, data, run_directory)
    (proof,) = history.events_named("proof")
    assert proof["step"] == SAVED + 1
    assert proof["message"].startswith("resume proven: step 4 gives loss ")
    assert proof["message"].endswith("as before, to the last bit")
    assert not history.events_named("warning")


@pytest.mark.parametrize("zero", [(0, "none", "none")])
def test_a_resume_on_other_ranks_is_proven_within_rounding(
    one_rank: RankPool, data: Path, run_directory: Path, zero: tuple[int, str, str]
) -> None:
    history = resumed(one_rank, data, run_directory, zero)
    (proof,) = history.events_named("proof")
    assert proof["message"].endswith("(allowed 1e-05)") or proof["message"].endswith(
        "to the last bit"
    )
    assert not history.events_named("warning")


def tamper(checkpoint: Path, by: float) -> None:
    """Add to one weight, under hashes that agree."""
    manifest = read_manifest(checkpoint)
    file = manifest.tensors["blocks.0.attention_norm.weight"].slices[0].file
    tensors = load_file(checkpoint / file)
    tensors["weight/blocks.0.attention_norm.weight"][0] += by
    save_file(tensors, checkpoint / file)
    entry = StoredFile((checkpoint / file).stat().st_size, sha256_of(checkpoint / file))
    (checkpoint / MANIFEST).write_text(
        replace(manifest, files=manifest.files | {file: entry}).to_json()
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_were_tampered_with_are_noticed(
    pools: _Pools, data: Path, run_directory: Path, checkpoint: Path, world_size: int
) -> None:
    """The hashes agree, the loss does not: with one weight of one norm changed, also on another
    mesh.
    """
    tamper(checkpoint, by=0.5)
    before = NextStep.read(checkpoint)
    assert before is not None
    history = resumed(
        pools.get(world_size),
        data,
        run_directory,
        ZERO3 if world_size == 2 else (0, "none", "none"),
    )
    assert not history.events_named("proof")
    (warning,) = history.events_named("warning")
    (now,) = [step for step in history.steps if step.step == SAVED + 1]
    for number in (now.loss, now.grad_norm, before.loss, before.grad_norm):
        assert str(number) in warning["message"]
    assert "RESUME NOT PROVEN" in warning["message"]
    assert f"move {checkpoint} away" in warning["message"]


def test_one_changed_bit_is_noticed_on_the_same_ranks(
    two_ranks: RankPool, data: Path, run_directory: Path, checkpoint: Path
) -> None:
    tamper(checkpoint, by=2**-20)
    (warning,) = resumed(two_ranks, data, run_directory).events_named("warning")
    assert "expected the same bits" in warning["message"]


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_without_the_record_a_run_resumes_unproven(
    two_ranks: RankPool, data: Path, run_directory: Path, checkpoint: Path, damage: str
) -> None:
    record = checkpoint / NEXT_STEP
    text = record.read_text()
    record.unlink()
    if damage == "flip":
        record.write_text(text.replace("loss", "lass"))
    history = resumed(two_ranks, data, run_directory)
    assert not history.events_named("proof")
    assert not history.events_named("warning")
    assert record.read_text() == text  # what the same step gave again


# ----------------------------------------------------------------------------------- the comparison

CPU = {"precision": "float32", "device": "cpu", "data": 2}


def record(
    loss: float = 2.0, grad_norm: float = 0.5, samples: range = range(8, 16), **changed: Any
) -> NextStep:
    return NextStep.of(2, samples, loss, grad_norm, CPU | changed)


@pytest.mark.parametrize(
    ("before", "now", "proven"),
    [
        (record(), record(), True),
        (record(), record(2.0 + 1e-12), False),
        (record(), record(2.0 + 1e-5, data=1), True),
        (record(), record(2.0 + 1e-4, data=1), False),
        (record(), record(grad_norm=0.5001, data=1), False),
        (record(), record(2.01, precision="bfloat16"), True),
        (record(), record(2.1, precision="bfloat16"), False),
        (
            record(device="cuda"),
            record(2.0 + 1e-5, device="cuda"),
            True,
        ),  # atomic additions come in any order
        (record(math.nan, math.nan), record(math.nan, math.nan), True),
        (record(), record(math.nan, math.nan), False),
        (record(math.inf), record(), False),
        (record(), record(grad_norm=math.nan), True),  # a guard refused the step on one side
        (record(), record(samples=range(16, 24)), False),
    ],
)
def test_what_counts_as_the_same_step(before: NextStep, now: NextStep, proven: bool) -> None:
    assert compare(before, now, Path("step_00000001")).proven is proven
