"""Hostile files given to the commands themselves: a malicious pickle in the place of any file
that one reads (S1), and tensor files that would take much memory and time (S3).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import runpy
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from megagpt.checkpoint.format import MANIFEST, StoredFile, read_manifest, step_directory
from megagpt.huggingface.export import export
from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import record, run_script
from tests.support.processes import PATIENCE_S, Start
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset, write_run

STEP = 2
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
    """A copy to corrupt; it is where commands run."""
    shutil.copytree(sound, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    write_run(Path("run"), Path("data"), steps=(STEP,))
    export(Path("run"), Path("model"))
    Path("run/metrics.jsonl").write_text(json.dumps(record(STEP).as_line()) + "\n")
    Path("small.json").write_text(json.dumps(run_config(tmp_path / "place" / "data", 4)))
    return tmp_path / "place"


def malice(place: Path) -> bytes:
    return pickle.dumps(Malice(place / "sung"))


def spoil(place: Path, file: str, content: bytes = b"") -> None:
    """Put the pickle there, or other content, also into a manifest that has the file's digest."""
    content = content or malice(place)
    (place / file).write_bytes(content)
    checkpoint = step_directory(place / "run" / "checkpoints", STEP)
    if Path(file).name == WEIGHTS:
        manifest = read_manifest(checkpoint)
        vouched = StoredFile(len(content), hashlib.sha256(content).hexdigest())
        (checkpoint / MANIFEST).write_text(
            replace(manifest, files={**manifest.files, WEIGHTS: vouched}).to_json()
        )


CHECKPOINT = f"run/checkpoints/step_{STEP:08d}"
OF_A_RUN = [
    f"{CHECKPOINT}/{WEIGHTS}",
    f"{CHECKPOINT}/{MANIFEST}",
    "run/config.json",
    "run/metrics.jsonl",
]
OF_A_MODEL = ["model/config.json", "model/model.safetensors", "model/tokenizer.json"]
OF_A_DATASET = [
    "data/manifest.json",
    "data/tokenizer.json",
    "data/train-00000.bin",
    "data/val-00000.bin",
]
RUN = ["--run_dir", "run"]
COMMANDS = {
    "evaluate": [*RUN, "--batches", "1"],
    "generate": [*RUN, "--prompt", "a", "--max_new_tokens", "1"],
    "export": [*RUN, "--output", "exported", "--overwrite"],
    "import_hf": ["--model", "model", "--deepspeed_config", "small.json", "--run_dir", "imported"],
    "report": RUN,
    "plan": ["--deepspeed_config", "small.json", "--ranks", "1"],
    "download_data": ["--dataset", "TEXTS", "--tokenizer", "bytes", "--output", "data"],
}


@pytest.fixture
def outcome(sound: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """The exit code of a command that runs in this process.

    Raises what the command does not catch.
    """
    return lambda command: exit_code(monkeypatch, command, texts=f"{sound}/texts/*.txt")


def exit_code(monkeypatch: pytest.MonkeyPatch, command: str, texts: str) -> int:
    words = [texts if word == "TEXTS" else word for word in COMMANDS[command]]
    monkeypatch.setattr(sys, "argv", [f"launch/{command}.py", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:  # evaluate adopts a launch
        runpy.run_path(str(REPOSITORY / "launch" / f"{command}.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_commands_work_on_what_is_sound(place: Path, outcome: Callable[[str], int]) -> None:
    assert [outcome(command) for command in COMMANDS] == [0] * len(COMMANDS)


@pytest.mark.parametrize("file", [*OF_A_RUN, *OF_A_DATASET, *OF_A_MODEL, "small.json"])
def test_no_command_executes_a_pickle(
    place: Path, outcome: Callable[[str], int], file: str
) -> None:
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
    ("file", "code"),
    [
        (f"{CHECKPOINT}/next_step.json", 0),  # it gives way
        ("run/end.json", 0),
        ("run/metrics.jsonl", 0),
        (f"{CHECKPOINT}/{WEIGHTS}", 2),
        (f"{CHECKPOINT}/{MANIFEST}", 2),
        ("run/config.json", 2),
        *((file, 2) for file in (*OF_A_DATASET, "small.json")),
    ],
)
def test_training_executes_no_pickle(
    one_rank: RankPool, start: Start, place: Path, file: str, code: int
) -> None:
    """A run that would go on from its checkpoint."""
    shutil.rmtree("run")
    first = run_config(place / "data", STEP, save_every=STEP)
    one_rank.run("tests.support.jobs.checkpoint:train", config=first, directory=place / "run")
    spoil(place, file)
    (rank,) = start(
        typed=f"cd {place} && exec {sys.executable} {REPOSITORY}/launch/train.py "
        f"--deepspeed_config small.json "
        "--run_dir run"
    )
    said = rank.communicate(timeout=PATIENCE_S)[1]
    assert rank.returncode == code, said
    assert "Traceback" not in said
    assert not (place / "sung").exists()


# ----------------------------------------------------------------------------- memory and time (S3)

LOADING = """
import time
from pathlib import Path
from unittest.mock import patch
from megagpt.inference.stored_model import load_model
from megagpt.utils import UserError

def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (proc_pid_clear_refs(5))
before, began_s = peak_kib(), time.process_time()
try:
    load_model(Path("run"))
except UserError as error:
    print(peak_kib() - before, time.process_time() - began_s, error)
"""
LARGEST = 99_000_000  # of a header that safetensors itself would read
HEADERS = {
    "shape": lambda: (
        b'{"a":{"dtype":"F32","shape":[' + b"1," * (LARGEST // 2) + b'1],"data_offsets":[0,4]}}'
    ),
    "metadata": lambda: (
        b'{"__metadata__":{' + b",".join(b'"%08d":""' % i for i in range(LARGEST // 14)) + b"}}"
    ),
    "deep": lambda: b"[" * LARGEST,
    "length": lambda: b"{}",
}


@pytest.mark.parametrize(
    "kind",
    [
        "length",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("shape", "metadata", "deep")),
    ],
)
def test_a_giant_header_takes_neither_memory_nor_time(place: Path, kind: str) -> None:
    """The processor's time, so that other work on the machine does not count; the process's own
    peak of memory.
    """
    header = HEADERS[kind]()
    content = struct.pack("<Q", 2**62 if kind == "length" else len(header)) + header
    spoil(place, f"{CHECKPOINT}/{WEIGHTS}", content)
    done = run_script(LOADING, cwd=place)
    grown_kib, took_s, said = done.stdout.decode().split(" ", 2)
    assert f"{WEIGHTS}: header too large" in said
    assert int(grown_kib) < 200 * 1024
    assert float(took_s) < 1.0
