"""What every rank is told of bad input costs no import of torch, which takes seconds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.signals import ends_before_the_start
from megagpt.utils import ExitCode
from tests.monitoring import REPOSITORY

WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["launch/train.py", *sys.argv[1:]]
try:
    runpy.run_path("launch/train.py", run_name="__main__")
finally:
    assert not {"torch", "deepspeed", "triton"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "zero_optimization.stge=2"], 'unknown key, did you mean "stage"?'),
        (["--set", "megagpt.parallel.tensor=0"], "megagpt.parallel.tensor"),
        (["--set", "train_batch_size=17", "train_micro_batch_size_per_gpu=2"], "train_batch_size"),
        (["--deepspeed_config", "ds_configs/nothing.json"], "ds_configs/nothing.json"),
    ],
    ids=["typo", "value", "arithmetic", "file"],
)
def test_bad_input_is_answered_before_torch_is_imported(words: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "--run_dir", str(tmp_path / "run"), *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_start_ends_the_command_as_one_that_was_preempted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with ends_before_the_start():
        os.kill(os.getpid(), signal.SIGUSR1)  # which would end a process without a handler
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
    assert ended.value.code == ExitCode.PREEMPTED_AND_SAVED
    assert signal.getsignal(number) is before
