"""The data that a run opens before it starts."""

import json
from pathlib import Path

import pytest

from megagpt.config import ResolvedConfig, RunConfig
from megagpt.download_data import PreparationRequest, prepare
from megagpt.rundir.data import open_data
from megagpt.utils import UserError
from tests.support.configurations import tiny


@pytest.fixture(scope="module")
def without_validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    (directory / "a.txt").write_text("some text\n" * 100)
    request = PreparationRequest(
        str(directory / "a.txt"), directory / "data", "bytes", validation_fraction=0
    )
    prepare(request, report=lambda line: None)
    return directory / "data"


def resolved(data: Path, eval_interval_steps: int) -> ResolvedConfig:
    config = tiny()
    config["megagpt"]["data"] = {"path": str(data)}
    config["megagpt"]["model"]["vocab_size"] = 384
    config["megagpt"].setdefault("training", {})["eval_interval_steps"] = eval_interval_steps
    return RunConfig.from_json(json.dumps(config)).resolved(
        world_size=1, vocabulary=257, bf16_native=False
    )


def test_evaluation_needs_a_validation_split(without_validation: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        open_data(resolved(without_validation, 5), tmp_path / "run")
    assert "no tokens in its val split" in str(refused.value)
    assert "or turn evaluation off: --set megagpt.training.eval_interval_steps=0" in str(
        refused.value
    )


def test_evaluation_that_is_off_needs_none(without_validation: Path, tmp_path: Path) -> None:
    streams, _ = open_data(resolved(without_validation, 0), tmp_path / "run")
    assert set(streams) == {"train"}
    assert streams["train"].samples_per_epoch > 0
