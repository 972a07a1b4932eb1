"""The command as a user types it, in real processes: it trains, it resumes, it refuses, and it
says so.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megagpt.monitoring.metrics import read_metrics
from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import ENVIRONMENT
from tests.support.ranks import free_port
from tests.support.trained_run import write_dataset

STEPS = 6
STEP_KEYS = {
    *("step", "tokens", "loss", "grad_norm", "learning_rate", "step_time_s", "tokens_per_s"),
    *("tokens_per_s_per_device", "mfu", "memory_gib", "skipped_steps"),
}
PROMPT = "The quick"


def command(
    *words: object, ranks: int = 1, script: object = "launch/train.py", options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """``python launch/train.py ...`` or, with more ranks, ``deepspeed ... launch/train.py ...``."""
    programs = Path(sys.executable).parent
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [
            str(programs / "deepspeed"),
            "--num_accelerators",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
        launcher += options
    search = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*launcher, str(script), *map(str, words)],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | search,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def configuration(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_config(data, STEPS, (3, "cpu", "cpu"), save_every=2)
    config["megagpt"]["training"] |= {
        "eval_interval_steps": 3,
        "eval_batches": 1,
        "sample_interval_steps": STEPS,
        "sample_prompts": [PROMPT],
    }
    config |= {"zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"}}
    config["zero_optimization"]["allgather_bucket_size"] = 1000  # of another ZeRO stage
    path = tmp_path_factory.mktemp("configuration") / "small.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def run(
    configuration: Path, compiled_ops: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Six steps on two ranks under the launcher: (run directory, the finished process)."""
    directory = tmp_path_factory.mktemp("runs") / "small"
    finished = command("--deepspeed_config", configuration, "--run_dir", directory, ranks=2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return directory, finished


def test_two_ranks_train_and_say_what_they_do(run: tuple[Path, Any]) -> None:
    directory, finished = run
    screen = finished.stdout
    assert "2 x CPU, 1 threads; ZeRO 3, optimizer on cpu, parameters on cpu" in screen
    assert "batch 8 = 2 x 2 micro-batches x 2 replicas" in screen
    for note in (
        "zero_allow_untested_optimizer: not handed to DeepSpeed: Adam and AdamW are tested",
        "zero_optimization.allgather_bucket_size: no effect at ZeRO 3",
        'bf16.enabled: "auto" is off, the device does not multiply bf16 in hardware',
    ):
        assert screen.count(f"note: {note}") == 1
    assert re.search(r"step 6/6  loss \d\.\d+", screen)
    assert f"done: step 6, 768 tokens; samples in {directory}/samples.txt" in screen
    assert "Traceback" not in screen + finished.stderr


def test_the_run_directory_holds_what_the_design_says(run: tuple[Path, Any]) -> None:
    directory, _ = run
    for name in (
        "config.json",
        "metrics.jsonl",
        "samples.txt",
        "logs/rank_00000.log",
        "logs/rank_00001.log",
    ):
        assert (directory / name).stat().st_size > 0, name
    assert not (directory / "logs" / "crash.txt").exists()
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000006\n"
    assert PROMPT in (directory / "samples.txt").read_text()


def test_each_step_and_event_is_on_record(run: tuple[Path, Any]) -> None:
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert all(line.keys() == STEP_KEYS for line in steps)
    assert [line["step"] for line in steps[:STEPS]] == [1, 2, 3, 4, 5, 6]
    events = [
        (line["event"], line["step"]) for line in lines if "event" in line and line["step"] <= STEPS
    ]
    assert {
        ("eval", 3),
        ("eval", 6),
        ("sample", 6),
        ("save", 2),
        ("save", 4),
        ("save", 6),
    } <= {*events}
    assert all(line["val_loss"] > 0 for line in lines if line.get("event") == "eval")
    shares = [line["split_share"] for line in lines if line.get("event") == "eval"]
    assert all(0 < share < 1 for share in shares)
    assert f"on {100 * shares[0]:.3g} % of the split" in run[1].stdout


@pytest.fixture(scope="module")
def resumed(run: tuple[Path, Any], configuration: Path) -> tuple[Path, Any]:
    """The same run, continued in one process without a launcher, without offload, two steps
    further.
    """
    longer = ["megagpt.training.total_steps=8", "zero_optimization={'stage':1}".replace("'", '"')]
    finished = command(
        "--deepspeed_config", configuration, "--run_dir", run[0], "--resume", "--set", *longer
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return run[0], finished


def test_one_process_continues_what_two_began(resumed: tuple[Path, Any]) -> None:
    directory, finished = resumed
    assert (
        "1 x CPU, 1 threads; ZeRO 1, optimizer on the device, parameters on the device"
        in finished.stdout
    )
    history = read_metrics(directory)
    assert [step.step for step in history.steps] == list(range(1, 9))
    (resume,) = history.events_named("resume")
    assert (resume["step"], resume["written_by"]["zero_stage"], resume["passed_over"]) == (6, 3, [])
    assert json.loads((directory / "config.json").read_text())["zero_optimization"]["stage"] == 1


@pytest.mark.slow
def test_a_finished_run_says_so_and_trains_no_further(
    resumed: tuple[Path, Any], configuration: Path
) -> None:
    directory, _ = resumed
    weights = {
        path: path.read_bytes() for path in (directory / "checkpoints").rglob("*.safetensors")
    }
    finished = command("--deepspeed_config", configuration, "--run_dir", directory)
    assert finished.returncode == 0, finished.stderr
    assert (
        f"already done: {directory} is at step 8 of 6; to train longer: --set "
        f"megagpt.training.total_steps=" in (finished.stdout)
    )
    assert weights == {
        path: path.read_bytes() for path in (directory / "checkpoints").rglob("*.safetensors")
    }
    assert [step.step for step in read_metrics(directory).steps] == list(range(1, 9))


@pytest.mark.parametrize(
    ("script", "options", "shown"),
    [
        ("generate", ["--prompt", PROMPT, "--max_new_tokens", 8], PROMPT),
        ("evaluate", ["--batches", 2], '"step": 8'),
        ("report", [], "report.html"),
    ],
)
def test_the_other_commands_work_on_the_run(
    resumed: tuple[Path, Any], script: str, options: list[object], shown: str
) -> None:
    finished = command("--run_dir", resumed[0], *options, script=f"launch/{script}.py")
    assert finished.returncode == 0, finished.stderr
    assert shown in finished.stdout


# ----------------------------------------------------------------------------------------- bad ends


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_exit_code_4(configuration: Path, tmp_path: Path) -> None:
    overrides = [
        "optimizer.params.lr=1e30",
        "gradient_clipping=0",
        "megagpt.training.total_steps=12",
    ]
    finished = command(
        "--deepspeed_config", configuration, "--run_dir", tmp_path / "run", "--set", *overrides
    )
    assert finished.returncode == 4, finished.stderr
    assert "StoppedByGuardError" in finished.stderr
    assert "5 steps in a row: lower optimizer.params.lr" in " ".join(finished.stderr.split())
    history = read_metrics(tmp_path / "run")
    skips = history.events_named("skip")
    assert len(skips) == 5
    assert (
        "no sample: the model returned logits that are not finite"
        in history.events_named("warning")[0]["message"]
    )
    assert f"step {skips[-1]['step']}: the loss is not finite" in finished.stderr


CRASHING = """
import os, sys
sys.path[0] = {repository!r}
from launch.train import parse_arguments
from megagpt.parallel import pipeline; from megagpt.run import startup
from megagpt.utils import run_command

train_step = pipeline.train_step

def failing(engine, micro_batches, *others, calls=[]):
    calls.append(None)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        raise RuntimeError("the fourth step went wrong")
    return train_step(engine, micro_batches, *others)

pipeline.train_step = failing
sys.exit(run_command(lambda: startup.main(parse_arguments())))
"""


def test_a_crash_ends_in_one_page_with_the_command_to_resume(
    configuration: Path, tmp_path: Path
) -> None:
    """One of two ranks fails in the fourth step: its page is shown once, its peer's lost
    connection is not.
    """
    (tmp_path / "crashing.py").write_text(CRASHING.format(repository=str(REPOSITORY)))
    run = ["--deepspeed_config", configuration, "--run_dir", tmp_path / "run"]
    unsampled = ["--set", "megagpt.training.eval_interval_steps=100"]
    finished = command(*run, *unsampled, ranks=2, script=tmp_path / "crashing.py")
    assert finished.returncode == 1
    shown = finished.stdout + finished.stderr
    assert shown.count("RuntimeError on pipeline 0, data 1, tensor 0 (rank 1, host ") == 1
    assert shown.count("to resume") == 1
    assert "the fourth step went wrong" in shown
    assert re.search(r"last step +3\n", shown)
    assert re.search(rf"last checkpoint +{tmp_path}/run/checkpoints/step_00000002\n", shown)
    assert re.search(
        r"to resume +deepspeed --num_accelerators 2 .*crashing.py --deepspeed_config .*small.json "
        r"--run_dir",
        shown,
    )
    assert "Traceback" not in shown
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    assert (tmp_path / "run" / "logs" / "crash.txt").read_text() in shown


def test_bad_input_under_the_launcher_is_said_once(
    run: tuple[Path, Any], configuration: Path
) -> None:
    before = (run[0] / "config.json").read_bytes()
    other = ["--set", "megagpt.model.num_layers=3", "--run_dir", run[0]]
    finished = command("--deepspeed_config", configuration, *other, ranks=2)
    shown = finished.stdout + finished.stderr
    assert finished.returncode == 2
    assert (
        shown.count("holds another run; choose another --run_dir, or undo these differences") == 1
    )
    assert shown.count("megagpt.model.num_layers: ") == 1
    assert "Traceback" not in shown
    assert (run[0] / "config.json").read_bytes() == before


def test_a_hostfile_that_is_not_there_is_refused(configuration: Path, tmp_path: Path) -> None:
    """DeepSpeed's launcher warns and would train on this machine alone."""
    words = ["--deepspeed_config", configuration, "--run_dir", tmp_path / "run"]
    finished = command(*words, ranks=2, options=["--hostfile", str(tmp_path / "hosts")])
    assert finished.returncode == 2
    assert f"{tmp_path / 'hosts'}: no such hostfile; write one line a host" in finished.stderr
    assert not (tmp_path / "run").exists()
