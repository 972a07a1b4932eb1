"""Which run a directory belongs to: the same one may go on under any execution, another is
refused with its keys.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ResolvedConfig, RunConfig
from megagpt.rundir import directory as run_directory
from megagpt.rundir.changes import DATA_FINGERPRINT, MAY_CHANGE, allowed_prefixes
from megagpt.rundir.data import open_data
from megagpt.utils import UserError
from tests.support.configurations import tiny
from tests.support.trained_run import write_dataset, write_run


def resolved(world_size: int = 1, **changes: Any) -> ResolvedConfig:
    """The tiny configuration with dotted keys changed: ``megagpt__model__num_layers=3``."""
    config = tiny()
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return RunConfig.from_json(json.dumps(config)).resolved(
        world_size=world_size, vocabulary=128, bf16_native=False
    )


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    run_directory.record(tmp_path / "run", resolved())
    return tmp_path / "run"


def test_a_new_directory_belongs_to_nobody(tmp_path: Path) -> None:
    run_directory.changes_of(tmp_path / "run", resolved())
    assert not (tmp_path / "run").exists()


def test_what_is_recorded_is_read_back(recorded: Path) -> None:
    assert run_directory.read_config(recorded) == resolved()


@pytest.mark.parametrize(
    "execution",
    [
        {"world_size": 2, "zero_optimization__stage": 3},
        {"train_micro_batch_size_per_gpu": 4},
        {"megagpt__training__total_steps": 400},
        {"megagpt__monitor__log_interval_steps": 1},
        {"bf16__enabled": True, "zero_optimization__stage": 1},
    ],
    ids=str,
)
def test_a_run_goes_on_under_any_execution(recorded: Path, execution: dict[str, Any]) -> None:
    run_directory.changes_of(recorded, resolved(**execution))


def test_another_run_is_refused_with_every_key_that_differs(recorded: Path) -> None:
    other = resolved(megagpt__model__num_layers=3, optimizer__params__lr=2e-3, train_batch_size=16)
    before = (recorded / "config.json").read_text()
    with pytest.raises(UserError) as refused:
        run_directory.changes_of(recorded, other)
    for key in ("megagpt.model.num_layers", "optimizer.params.lr", "train_batch_size"):
        assert key in str(refused.value)
    assert str(refused.value).endswith("choose another --run_dir, or undo these differences")
    assert (recorded / "config.json").read_text() == before


def test_checkpoints_without_their_configuration_are_not_adopted(recorded: Path) -> None:
    (recorded / "config.json").unlink()
    (recorded / "checkpoints").mkdir()
    with pytest.raises(
        UserError, match=r"config.json: missing beside checkpoints; restore it, or choose another"
    ):
        run_directory.changes_of(recorded, resolved())


@pytest.mark.parametrize("content", ["", "{", '{"megagpt": 3}', "\0\0"])
def test_a_damaged_configuration_names_its_file(recorded: Path, content: str) -> None:
    (recorded / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"run/config.json: "):
        run_directory.changes_of(recorded, resolved())


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(
        UserError, match=r"cannot be read \(Not a directory\); choose another --run_dir"
    ):
        run_directory.changes_of(tmp_path / "run", resolved())
    assert (tmp_path / "run").read_text() == "mine"


def test_a_directory_that_cannot_be_looked_into_is_named(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(
        UserError, match=r"cannot be read \(Permission denied\); choose another --run_dir"
    ):
        run_directory.changes_of(recorded, resolved())


def test_a_second_run_is_kept_out_for_as_long_as_the_first_lasts(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with run_directory.lock(directory):
        with pytest.raises(
            UserError,
            match=rf"process {os.getpid()} on .* \(kill {os.getpid()}\), or choose another",
        ):
            run_directory.lock(directory)
        assert [path.name for path in directory.iterdir()] == [run_directory.LOCK_FILE]
    run_directory.lock(directory).close()


# ----------------------------------------------------------------------- changing one's mind


@pytest.mark.parametrize(
    ("keys", "words", "allowed"),
    [
        ({"optimizer__params__lr": 2e-3}, ["optimizer.params.lr"], True),
        ({"optimizer__params__lr": 2e-3}, ["optimizer"], True),
        ({"optimizer__params__lr": 2e-3}, ["scheduler"], False),
        ({"train_batch_size": 16}, ["batch"], True),
        ({"gradient_clipping": 1.0}, ["gradient_clipping"], True),
        ({"megagpt__model__dropout": 0.1}, ["dropout"], True),
        ({"megagpt__data": {"seed": 3}}, ["data"], True),
        ({"megagpt__training__seed": 3}, ["data", "optimizer"], False),
        ({"megagpt__model__sequence_length": 32}, ["optimizer"], False),
        ({"megagpt__model__num_layers": 3, "train_batch_size": 16}, ["batch"], False),
    ],
    ids=str,
)
def test_what_may_change_changes_where_it_is_named(
    recorded: Path, keys: dict[str, Any], words: list[str], allowed: bool
) -> None:
    other, prefixes = resolved(**keys), allowed_prefixes(words)
    if not allowed:
        with pytest.raises(UserError, match="holds another run"):
            run_directory.changes_of(recorded, other, prefixes)
        return
    changes = run_directory.changes_of(recorded, other, prefixes)
    assert changes.now.keys() == run_directory.changes_of(recorded, other, MAY_CHANGE).now.keys()
    run_directory.record(recorded, other, changes, step=7)
    assert run_directory.read_config(recorded) == other
    assert run_directory.changes_of(recorded, other).now == {}  # the second start needs no switch
    for key, (before, after) in changes.now.items():
        assert run_directory.changes_of(recorded, other).known()[key] == [before, after]
        assert json.loads((recorded / "config.json").read_text())["changes"] == [
            {
                "step": 7,
                "keys": {key: [before, after] for key, (before, after) in changes.now.items()},
            }
        ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("megagpt.model", "cannot change within a run"),
        ("megagpt.model.hidden_size", "cannot change within a run: the checkpoint is of another"),
        ("megagpt.training.seed", "cannot change within a run: the initial weights"),
        ("megagpt.training.total_steps", "may change without it; leave it out"),
        ("zero_optimization.stage", "may change without it; leave it out"),
        ("lr", 'unknown key, did you mean "optimizer.params.lr"'),
        ("optimiser", 'unknown key, did you mean "optimizer"'),
        ("", "unknown key"),
    ],
)
def test_other_words_of_the_switch_are_answered_with_what_to_type(word: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^--allow_change {word}: {said}.*it takes: optimizer, "):
        allowed_prefixes([word])


def test_no_key_of_the_identity_is_said_to_change_without_the_switch() -> None:
    fixed = [key for key in resolved().identity() if not key.startswith(MAY_CHANGE)]
    assert "megagpt.training.seed" in fixed
    for key in fixed:
        with pytest.raises(UserError, match="cannot change within a run"):
            allowed_prefixes([key])


def test_a_change_that_cannot_be_written_leaves_the_record_whole(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (recorded / "config.json").read_bytes()
    other = resolved(optimizer__params__lr=2e-3)
    changes = run_directory.changes_of(recorded, other, ["optimizer"])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megagpt.utils.os.replace", full)  # the last of the steps of a write
    with pytest.raises(UserError, match="cannot be written"):
        run_directory.record(recorded, other, changes, step=7)
    assert (recorded / "config.json").read_bytes() == before
    assert [path.name for path in recorded.iterdir()] == ["config.json"]


def with_data(config: ResolvedConfig, data: Path) -> ResolvedConfig:
    document = json.loads(config.to_json())
    document["megagpt"]["data"]["path"] = str(data)
    return ResolvedConfig.from_json(json.dumps(document))


def test_other_tokens_in_the_same_place_are_a_change_too(tmp_path: Path) -> None:
    """The checkpoint of ``write_run`` was trained on no data that exist."""
    run = write_run(tmp_path / "run", write_dataset(tmp_path / "dataset"))
    config = run_directory.read_config(run)
    with pytest.raises(UserError, match=r"first sample: --allow_change megagpt\.data"):
        open_data(config, run)
    streams, changes = open_data(config, run, allowed_prefixes(["data"]))
    assert changes.now == {DATA_FINGERPRINT: ("", streams["train"].fingerprint)}
    run_directory.record(run, config, changes, step=10)
    assert open_data(config, run)[1].now == {}  # a restart before the next checkpoint


def test_data_of_another_tokenizer_are_no_change_that_can_be_made(tmp_path: Path) -> None:
    """Also where it has as many tokens."""
    run = write_run(tmp_path / "run", write_dataset(tmp_path / "dataset"))
    other = write_dataset(tmp_path / "other", tokenizer="bpe:257")
    changed = with_data(run_directory.read_config(run), other)
    assert changed.megagpt.model.vocabulary == 257
    with pytest.raises(UserError, match=r"its tokenizer \(bpe:257\) is not that of .* \(bytes\)"):
        open_data(changed, run, allowed_prefixes(["data"]))
