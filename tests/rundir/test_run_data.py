"""The data that a run opens before it starts."""

import json
from pathlib import Path

import pytest

from megagpt.config import ResolvedConfig, RunConfig
from megagpt.dataset import open_dataset
from megagpt.download_data import PreparationRequest, prepare
from megagpt.rundir.data import open_data, validation_name
from megagpt.utils import UserError
from tests.support.configurations import tiny
from tests.support.trained_run import write_dataset


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


def with_sets(data: Path, **sets: Path | str) -> ResolvedConfig:
    config = resolved(data, 5)
    validation = {name: str(path) for name, path in sets.items()}
    changed = config.megagpt.data.model_copy(update={"validation": validation})
    return config.model_copy(
        update={"megagpt": config.megagpt.model_copy(update={"data": changed})}
    )


def test_a_validation_set_is_its_split_or_all_of_it(
    without_validation: Path, tmp_path: Path
) -> None:
    """With one, the training data need no validation split."""
    data = write_dataset(tmp_path / "other")
    config = with_sets(without_validation, split=data, all=without_validation)
    streams, _ = open_data(config, tmp_path / "run")
    keys = ["megagpt.data.validation.split", "megagpt.data.validation.all"]
    assert [*streams] == ["train", *keys]
    assert [validation_name(key) for key in ("val", *keys)] == [None, "split", "all"]
    for key, path, split in zip(keys, (data, without_validation), ("val", "train"), strict=True):
        windows = (open_dataset(path).manifest.tokens(split) - 1) // 16
        assert streams[key].samples_per_epoch == windows > 0


def test_a_validation_set_that_cannot_be_used_is_one_line(
    without_validation: Path, tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other", "bpe:300")
    with pytest.raises(UserError) as refused:
        open_data(with_sets(without_validation, odd=other), tmp_path / "run")
    assert str(refused.value).startswith(
        f"megagpt.data.validation.odd: the tokenizer of {other} is not that of the training data "
        "(found bpe:300, need bytes); prepare it with that one: python launch/download_data.py"
    )
    with pytest.raises(UserError, match=r"^megagpt\.data\.validation\.gone: nowhere: no dataset"):
        open_data(with_sets(without_validation, gone="nowhere"), tmp_path / "run")
