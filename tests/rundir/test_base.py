"""Where the base of adapters is, and what is refused in its place: one line, nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ConfigError, ResolvedConfig
from megagpt.rundir import directory as run_directory
from megagpt.rundir.base import BASE_FILE, find_base, record_base
from megagpt.rundir.data import open_data
from megagpt.utils import UserError
from tests.support.trained_run import write_dataset, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def base(tmp_path: Path, data: Path) -> Path:
    return write_run(tmp_path / "base", data, steps=(10, 20))


def adapted(run: Path, lora: dict[str, Any] | None = None, **model: Any) -> ResolvedConfig:
    """The run in the directory, if it trained adapters."""
    document = json.loads(run_directory.read_config(run).to_json())
    document["megagpt"]["model"] |= model
    document["megagpt"]["training"]["lora"] = {"rank": 2, "base": str(run)} | (lora or {})
    document["megagpt"]["training"]["eval_interval_steps"] = 0
    return ResolvedConfig.from_json(json.dumps(document))


def refusal(config: ResolvedConfig, run: Path) -> str:
    """The one line that is said before anything is written."""
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError) as refused:
        open_data(config, run)
    assert sorted(run.rglob("*")) == before
    (line,) = str(refused.value).splitlines()
    return line


def test_the_base_is_the_newest_checkpoint_and_stays_it(base: Path, tmp_path: Path) -> None:
    config = adapted(base)
    place = find_base(config, tmp_path / "run")
    assert place is not None
    assert (place.step, place.sha256) == (20, None)
    (tmp_path / "run").mkdir()
    earlier = find_base(adapted(base), tmp_path / "none")
    assert earlier is not None
    record_base(tmp_path / "run", place, "0" * 64)
    (base / "checkpoints" / "step_00000020").rename(base / "checkpoints" / "step_00000030")
    (base / "checkpoints" / "step_00000010").rename(base / "checkpoints" / "step_00000020")
    again = find_base(config, tmp_path / "run")
    assert again is not None
    assert (again.step, again.sha256) == (20, "0" * 64)


def test_a_run_of_the_whole_model_has_no_base(base: Path) -> None:
    assert find_base(run_directory.read_config(base), base) is None


def test_what_is_no_base_is_refused_with_what_to_type(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "--set megagpt.training.lora.base=runs/NAME" in refusal(
        adapted(base, {"base": None}), run
    )
    assert "import_hf.py --model" in refusal(adapted(base, {"base": str(tmp_path)}), run)
    other = refusal(adapted(base, num_heads=2, num_kv_heads=2), run)
    assert "megagpt.model.num_heads 4 (not 2)" in other
    assert find_base(adapted(base, dropout=0.2), run), "dropout is the run's own"
    adapters = tmp_path / "adapters"
    run_directory.record(adapters, adapted(base))
    assert "holds adapters" in refusal(adapted(base, {"base": str(adapters)}), run)
    for step in (base / "checkpoints").iterdir():
        step.rename(tmp_path / step.name)
    assert "has no checkpoint yet" in refusal(adapted(base), run)


def test_adapters_and_the_whole_model_do_not_share_a_directory(base: Path, tmp_path: Path) -> None:
    assert f"megagpt.training.lora.base={base}" in refusal(adapted(base), base)
    adapters = tmp_path / "adapters"
    run_directory.record(adapters, adapted(base))
    whole = run_directory.read_config(base)
    assert "megagpt.training.lora is missing" in refusal(whole, adapters)
    with pytest.raises(ConfigError, match=r"megagpt\.training\.lora\.rank: 2 in the run directory"):
        open_data(adapted(base, {"rank": 3}), adapters)


def test_a_damaged_record_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / BASE_FILE).write_text('{"path": "x", "step": -1, "sha256": ""}')
    assert f"{BASE_FILE}: damaged" in refusal(adapted(base), tmp_path / "run")
