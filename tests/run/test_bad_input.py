"""What every rank is told of bad input costs no import of torch, which takes seconds, and is all
there is to say.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.rundir.signals import ends_before_the_start
from megagpt.utils import ExitCode
from tests import REPOSITORY
from tests.support.config_documents import MINIMAL, put
from tests.support.processes import seconds_to_its_end

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
def test_bad_input_is_answered_before_torch_is_imported(
    words: list[str], said: str, tmp_path: Path
) -> None:
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


ANSWERED_WITHIN_S = 1.0
BAD_JSON = """{
    "train_batch_size": 2.5, "gradient_clipping": true, "gradient_clipping": 1,
    "zero_optimisation": {},
    "optimizer": {"type": "AdamW", "params": {"lr": "fast"}},
    "zero_optimization": {"stage": 4, "offload_optimizer": {"device": "gpu", "pin_memroy": 1}},
    "megagpt": {
        "model": {"num_layers": true, "hidden_size": 32, "num_heads": 4},
        "training": {"total_steps": 3},
        "parallel": {"tensr": 2}
    }
}"""
COMPLETE = put(MINIMAL, "megagpt.model.vocab_size", 256)  # the planner has no data to take it from
IMPOSSIBLE = put(COMPLETE, "megagpt.parallel", {"tensor": 3, "pipeline": 4})
THREE_HEADS = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 3,
    "sequence_length": 32,
    "vocab_size": 256,
}
UNEVEN_ROWS = put(put(MINIMAL, "megagpt.model", THREE_HEADS), "megagpt.parallel.tensor", 3)
STATED = put(put(COMPLETE, "megagpt.parallel.world_size", 5), "megagpt.parallel.pipeline", 3)


@pytest.mark.parametrize(
    ("text", "ranks", "lines"),
    [
        pytest.param('{\n  "train_batch_size": 8,,\n}', 1, ["line 2, column 25"], id="syntax"),
        pytest.param(
            BAD_JSON,
            1,
            [
                "train_batch_size: expected an integer, got 2.5",
                "gradient_clipping: written more than once",
                'zero_optimisation: unknown key, did you mean "zero_optimization"?',
                'optimizer.params.lr: expected a number, got "fast"',
                "zero_optimization.stage: must be at most 3, got 4",
                'zero_optimization.offload_optimizer.device: expected one of "none", "cpu", '
                '"nvme"; got "gpu"',
                "zero_optimization.offload_optimizer.pin_memroy: unknown key, did you mean "
                '"pin_memory"?',
                "megagpt.model.num_layers: expected an integer, got true",
                'megagpt.parallel.tensr: unknown key, did you mean "tensor"?',
            ],
            id="values (F13)",
        ),
        pytest.param(
            json.dumps(IMPOSSIBLE),
            24,
            [
                "megagpt.parallel.tensor: 3 is refused",
                "megagpt.parallel.pipeline: 4 is refused",
                "nearest legal: --set megagpt.parallel.tensor=",
            ],
            id="heads and layers (F14)",
        ),
        pytest.param(
            json.dumps(UNEVEN_ROWS),
            3,
            ["megagpt.parallel.tensor: 3 is refused: it must divide the rows of the embedding"],
            id="vocabulary (F14)",
        ),
        pytest.param(
            json.dumps(IMPOSSIBLE | {"train_batch_size": 17}),
            24,
            [
                "megagpt.parallel.tensor: 3 is refused",
                "megagpt.parallel.pipeline: 4 is refused",
                "train_batch_size: 17 on 2 data-parallel ranks: use 16 or 18",
                "nearest legal: --set megagpt.parallel.tensor=",
            ],
            id="batch (F14)",
        ),
        pytest.param(
            json.dumps(STATED),
            8,
            [
                "megagpt.parallel.pipeline: 3 is refused",
                "5 ranks is not a multiple of tensor 1 x pipeline 3: use 3 or 6 ranks",
                "the run expects 5 ranks and 8 started: start 5 of them",
                "nearest legal: --set megagpt.parallel.pipeline=2 megagpt.parallel.world_size=8",
            ],
            id="world size (F14)",
        ),
    ],
)
def test_all_that_is_wrong_is_said_within_a_second(
    text: str, ranks: int, lines: list[str], tmp_path: Path
) -> None:
    """By a rank, and by the planner, beside a plan where it can make one.

    The faster of two answers counts: the first may wait for a cold disk. Other work on the machine
    does not.
    """
    path = tmp_path / "bad.json"
    path.write_text(text)
    said, took_s = answer("launch/train.py", path, ranks, "--run_dir", tmp_path / "run")
    assert len(said) == len(lines), said
    assert took_s < ANSWERED_WITHIN_S
    planned, took_s = answer("launch/plan.py", path, ranks, "--ranks", ranks)
    assert took_s < ANSWERED_WITHIN_S
    for line in lines:
        assert any(line in shown for shown in said), (line, said)
        assert any(line in shown for shown in planned), (line, planned)
    assert not (tmp_path / "run").exists()


def answer(script: str, config: Path, ranks: int, *words: object) -> tuple[list[str], float]:
    """The lines of a refusal, and how long the faster of two took."""
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    command = [sys.executable, script, "--deepspeed_config", str(config), *map(str, words)]
    took_s = []
    for _ in range(2):
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        took_s.append(seconds_to_its_end(process))
        said = process.communicate()[0].splitlines()
        assert process.returncode == ExitCode.BAD_INPUT, said
    return said, min(took_s)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_start_ends_the_command_as_one_that_was_preempted(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with ends_before_the_start():
        os.kill(os.getpid(), signal.SIGUSR1)  # which would end a process without a handler
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
    assert ended.value.code == ExitCode.PREEMPTED_AND_SAVED
    assert signal.getsignal(number) is before
