"""The committed configurations, their schema and their documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.config import load_config
from megagpt.planning import legality
from megagpt.schema.reference import reference_text, schema_text
from tests import REPOSITORY

CONFIG_FILES = sorted(
    path for path in (REPOSITORY / "ds_configs").glob("*.json") if path.name != "schema.json"
)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_every_file_loads_is_legal_and_resolves(path: Path) -> None:
    config = load_config(path)
    world = legality.World(
        config.megagpt.parallel.world_size or 2, vocabulary=50257, bf16_native=True
    )
    legality.require_legal(config, world=world)
    assert json.loads(path.read_text())["$schema"] == "schema.json"


def test_the_default_run_is_small_offloaded_and_writes_samples() -> None:
    config = load_config(REPOSITORY / "ds_configs" / "default.json")
    resolved = config.resolved(world_size=2, vocabulary=8192, bf16_native=False)
    assert 1e6 <= resolved.megagpt.model.num_parameters <= 3e6
    assert resolved.zero_optimization.stage == 3
    assert (
        resolved.zero_optimization.optimizer_device,
        resolved.zero_optimization.parameter_device,
    ) == ("cpu", "cpu")
    assert resolved.megagpt.training.sample_interval_steps
    assert resolved.megagpt.training.sample_prompts


def test_the_committed_schema_is_up_to_date() -> None:
    committed = (REPOSITORY / "ds_configs" / "schema.json").read_text()
    assert committed == schema_text(), (
        "run: python -m megagpt.schema.reference > ds_configs/schema.json"
    )


def test_the_documentation_holds_every_key() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert reference_text().strip() in page, (
        "paste the output of: python -m megagpt.schema.reference --tables"
    )
    assert all(path.name in page for path in CONFIG_FILES), (
        "each file's numbers are explained there"
    )


def test_reading_a_configuration_imports_no_torch() -> None:
    program = (
        "import sys; from megagpt.planning import flops, legality; "
        "from megagpt.cluster import hosts; from megagpt.config import load_config; "
        "config = load_config('ds_configs/default.json'); legality.require_legal(config); "
        "print(sorted({'torch', 'deepspeed', 'numpy', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_schema_command_prints_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megagpt.schema.reference"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == schema_text()
