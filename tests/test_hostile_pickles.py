"""A malicious pickle in the place of any file that a command reads: never executed, whatever reads it (S1)."""

from __future__ import annotations

import hashlib
import json
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megagpt.checkpoint_format import MANIFEST, StoredFile, read_manifest, step_directory
from tests.checkpoint_jobs import run_config
from tests.monitoring import REPOSITORY, record
from tests.processes import PATIENCE_S, Start
from tests.trained_run import write_dataset, write_run

STEP = 10
WEIGHTS = "rank_00000_000.safetensors"


class Malice:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, sung: Path) -> None:
        self.sung = sung

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.sung), "w")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with a checkpoint, `data/`, and a configuration `small.json` that trains on them."""
    place = tmp_path_factory.mktemp("sound")
    write_dataset(place)
    return place


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoilt; it is where commands run."""
    shutil.copytree(sound, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    write_run(Path("run"), Path("data"), steps=(STEP,))
    Path("run/metrics.jsonl").write_text(json.dumps(record(STEP).as_line()) + "\n")
    Path("small.json").write_text(json.dumps(run_config(Path("data"), 4)))
    return tmp_path / "place"


def malice(place: Path) -> bytes:
    return pickle.dumps(Malice(place / "sung"))


def spoil(place: Path, file: str) -> None:
    """Put the pickle there; where a manifest vouches for the file, let it vouch for the pickle."""
    (place / file).write_bytes(malice(place))
    checkpoint = step_directory(place / "run" / "checkpoints", STEP)
    if Path(file).name == WEIGHTS:
        manifest = read_manifest(checkpoint)
        vouched = StoredFile(len(malice(place)), hashlib.sha256(malice(place)).hexdigest())
        (checkpoint / MANIFEST).write_text(replace(manifest, files={**manifest.files, WEIGHTS: vouched}).to_json())


CHECKPOINT = f"run/checkpoints/step_{STEP:08d}"
OF_A_RUN = [f"{CHECKPOINT}/{WEIGHTS}", f"{CHECKPOINT}/{MANIFEST}", "run/config.json", "run/metrics.jsonl"]
OF_A_DATASET = ["data/manifest.json", "data/tokenizer.json", "data/train-00000.bin", "data/val-00000.bin"]
RUN = ["--run_dir", "run"]
COMMANDS = {
    "evaluate": [*RUN, "--batches", "1"],
    "generate": [*RUN, "--prompt", "a", "--max_new_tokens", "1"],
    "report": RUN,
    "plan": ["--deepspeed_config", "small.json", "--ranks", "1"],
    "download_data": ["--dataset", "TEXTS", "--tokenizer", "bytes", "--output", "data"],
}


@pytest.fixture
def outcome(sound: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """The exit code of a command that runs in this process. Raises what the command does not catch."""
    return lambda command: exit_code(monkeypatch, command, texts=f"{sound}/texts/*.txt")


def exit_code(monkeypatch: pytest.MonkeyPatch, command: str, texts: str) -> int:
    words = [texts if word == "TEXTS" else word for word in COMMANDS[command]]
    monkeypatch.setattr(sys, "argv", [f"launch/{command}.py", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "launch" / f"{command}.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_commands_work_on_what_is_sound(place: Path, outcome: Callable[[str], int]) -> None:
    assert [outcome(command) for command in COMMANDS] == [0] * len(COMMANDS)


@pytest.mark.parametrize("file", [*OF_A_RUN, *OF_A_DATASET, "small.json"])
def test_no_command_executes_a_pickle(place: Path, outcome: Callable[[str], int], file: str) -> None:
    """Each refuses the file in words, or does not need it."""
    spoil(place, file)
    codes = {command: outcome(command) for command in COMMANDS}
    assert set(codes.values()) <= {0, 2}
    assert 2 in codes.values()
    assert not (place / "sung").exists()
    pickle.loads(malice(place))  # noqa: S301  # it would have
    assert (place / "sung").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [*OF_A_RUN, *OF_A_DATASET, "small.json", f"{CHECKPOINT}/next_step.json", "run/end.json"]
)
def test_training_executes_no_pickle(start: Start, place: Path, file: str) -> None:
    """A run that would go on from the checkpoint ends by itself; nothing else is asked of it here."""
    config = json.loads(Path("run/config.json").read_text())
    Path("small.json").write_text(json.dumps(config | {"train_batch_size": 4}))
    spoil(place, file)
    (rank,) = start(
        typed=f"cd {place} && exec {sys.executable} {REPOSITORY}/launch/train.py "
        "--deepspeed_config small.json --run_dir run --set megagpt.training.total_steps=12"
    )
    said = rank.communicate(timeout=PATIENCE_S)[1]
    assert not (place / "sung").exists()
    assert "Traceback" not in said
    assert rank.returncode in (0, 1, 2), said
    print(file, rank.returncode, said[-300:])
