"""The command trains on the Triton kernels: under their interpreter it goes where it goes on
plain torch.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.monitoring.metrics import read_metrics
from megagpt.monitoring.rank_log import rank_log_path
from tests import REPOSITORY
from tests.conftest import HAS_GPU
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import ENVIRONMENT
from tests.support.trained_run import write_dataset

STEPS = 3
OPERATIONS = (
    "attention",
    "layer_norm",
    "linear_cross_entropy",
)  # what a GPT-2 without dropout has kernels for


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ds_configs/default.json with two layers of width 32 and sequences of 16, for three steps."""
    directory = tmp_path_factory.mktemp("configuration")
    config = run_config(
        write_dataset(directory), STEPS, (3, "cpu", "cpu"), num_layers=2, hidden_size=32
    )
    path = directory / "small.json"
    path.write_text(json.dumps(config))
    return path


def train(configuration: Path, run_directory: Path, kernels: str) -> None:
    words = ["launch/train.py", "--deepspeed_config", configuration, "--run_dir", run_directory]
    environment = os.environ | ENVIRONMENT | {"MEGAGPT_KERNELS": kernels}
    environment.pop(
        "TRITON_INTERPRET", None
    )  # tests.conftest sets it; a user types MEGAGPT_KERNELS alone
    subprocess.run(
        [sys.executable, *map(str, words)], cwd=REPOSITORY, env=environment, timeout=500, check=True
    )


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="the interpreter works on CPU tensors")
def test_training_on_interpreted_kernels_follows_torch(
    configuration: Path, tmp_path: Path, compiled_ops: None
) -> None:
    losses, norms, logs = {}, {}, {}
    for kernels in ("torch", "interpret"):
        train(configuration, tmp_path / kernels, kernels)
        steps = read_metrics(tmp_path / kernels).steps
        losses[kernels], norms[kernels] = (
            [step.loss for step in steps],
            [step.grad_norm for step in steps],
        )
        logs[kernels] = rank_log_path(tmp_path / kernels, 0).read_text()
    assert len(losses["torch"]) == STEPS
    assert losses["interpret"] == pytest.approx(losses["torch"], rel=1e-5)
    assert norms["interpret"] == pytest.approx(norms["torch"], rel=1e-5)
    for operation in OPERATIONS:
        assert f"{operation}: triton (" in logs["interpret"]
        assert re.search(rf"{operation}: torch \(.*triton: MEGAGPT_KERNELS=torch\)", logs["torch"])
    assert ": torch (" not in logs["interpret"]
