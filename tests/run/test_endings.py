"""How a run ends: the exit code, and the page that is shown whatever the disk does."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from launch import generate as generate_command
from megagpt import train as loop
from megagpt.checkpoint.format import TrainState
from megagpt.common.text import MASK
from megagpt.data.tokenizer import load_tokenizer
from megagpt.dataset import SampleStream
from megagpt.download_data import PreparationRequest, prepare
from megagpt.planning import legality
from megagpt.planning.legality import World
from megagpt.run import assembly, endings, startup
from megagpt.rundir.changes import UNCHANGED
from megagpt.rundir.signals import StopRequests
from megagpt.schema.megagpt import TrainingConfig
from megagpt.utils import ExitCode, UserError, abandon
from tests.support.monitoring import CANARY, config


@pytest.fixture(autouse=True)
def environment_of_its_own() -> Iterator[None]:
    """A run puts into the environment which rank it is."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def end_of_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """The exit code of a run that stands at step 40, where its disk is full as it saves."""

    def save(run: Any) -> None:
        raise UserError("the disk is full: free some space")

    run = SimpleNamespace(
        state=TrainState(step=40),
        monitor=nullcontext(),
        engine=SimpleNamespace(mesh=SimpleNamespace(name="rank 0")),
    )
    monkeypatch.setattr(startup, "_open_log", lambda directory: None)
    monkeypatch.setattr(assembly, "assemble", lambda *_: run)
    monkeypatch.setattr(startup, "Watch", lambda *_, **__: nullcontext())
    monkeypatch.setattr(endings, "connect_watch", lambda *_: None)
    monkeypatch.setattr(loop, "train", save)
    legal = legality.resolve(config(), world=World(1, 128))
    return lambda directory: startup._run_to_its_end(
        legal, {}, UNCHANGED, directory, StopRequests()
    )


def test_a_save_that_fails_in_the_middle_ends_in_a_crash_page(
    end_of_run: Callable[[Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    assert end_of_run(tmp_path) == ExitCode.FAILED
    page = capsys.readouterr().err
    assert "the disk is full: free some space" in page
    assert "last step         40" in page
    assert (tmp_path / "logs" / "crash.txt").read_text() in page


def test_a_crash_page_that_cannot_be_written_is_still_shown(
    end_of_run: Callable[[Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of_run(tmp_path / "nowhere") == ExitCode.FAILED
    assert "the disk is full: free some space" in capsys.readouterr().err


def test_a_terminal_that_has_gone_changes_no_exit_code(
    end_of_run: Callable[[Path], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with pytest.raises(BrokenPipeError):
            print("anybody there?", file=gone, flush=True)
        assert end_of_run(tmp_path) == ExitCode.FAILED
        abandon(gone)  # what it still holds, before it is closed
    assert "the disk is full: free some space" in (tmp_path / "logs" / "crash.txt").read_text()


def test_a_secret_in_an_error_reaches_neither_record_nor_page(
    end_of_run: Callable[[Path], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(run: Any) -> None:
        raise ConnectionError(f"https://user:{CANARY}@host refused")

    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    (tmp_path / "logs").mkdir()
    assert end_of_run(tmp_path) == ExitCode.FAILED
    kept = [(tmp_path / name).read_text() for name in ("end.json", "logs/crash.txt")]
    for text in (*kept, capsys.readouterr().err):
        assert f"https://user:{MASK}@host refused" in text
        assert CANARY not in text


def test_bad_input_before_the_first_step_is_no_crash(
    end_of_run: Callable[[Path], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("every checkpoint is damaged")

    monkeypatch.setattr(assembly, "assemble", refuse)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        end_of_run(tmp_path)


# ------------------------------------------------------------------------------- what to type next


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("data")
    texts = {
        "words": "Long ago there was a hen\n" * 40,
        "dna": "acgtacgt" * 90,
        "dash": "--x y\n" * 90,
    }
    for name, text in texts.items():
        (place / f"{name}.txt").write_text(text)
        request = PreparationRequest(f"{place}/{name}.txt", place / name, tokenizer="bytes")
        prepare(request, report=lambda line: None)
    return {name: place / name for name in texts}


def outcome(data: Path, directory: Path, prompts: Sequence[str], samples: str | None) -> list[str]:
    """The last lines of a run that is done."""
    directory.mkdir()
    if samples is not None:
        (directory / "samples.txt").write_text(samples)
    training = SimpleNamespace(sample_prompts=prompts, total_steps=40)
    stream = SampleStream.open(
        [(data, 1.0)], split="train", sequence_length=8, seed=0, document_mask=False
    )
    run = SimpleNamespace(
        state=TrainState(step=40, tokens=1000),
        directory=directory,
        config=SimpleNamespace(megagpt=SimpleNamespace(training=training)),
        training=SimpleNamespace(stream=stream),
        tokenizer=load_tokenizer(data),
    )
    return endings._outcome(run, first_step=0).split("\n")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "name", "prompts", "samples", "prompt"),
    [
        ("words", "run", ["def ", "x"], "=== step 1", "def "),
        ("words", "my run (2)", [], "", "Long ago there"),
        ("dna", "it's", [], None, "acgt" * 16),
        ("words", "run", ["import os\n\nclass ", "it's"], "=== step 1", "it's"),
        ("words", "run", ["-5 degrees"], "=== step 1", "-5 degrees"),
        ("dash", "run", [], None, "--x y"),
    ],
)
def test_the_next_command_can_be_pasted(
    datasets: dict[str, Path],
    tmp_path: Path,
    data: str,
    name: str,
    prompts: list[str],
    samples: str | None,
    prompt: str,
) -> None:
    """Read as a shell reads it, and as the command itself does."""
    done, following = outcome(datasets[data], tmp_path / name, prompts, samples)
    assert ("samples in" in done) == bool(samples)
    program, script, *words = shlex.split(following.removeprefix("next: "))
    assert (program, script) == ("python", "launch/generate.py")
    with patch("sys.argv", [script, *words]):
        arguments = generate_command.parse_arguments()
    assert (arguments.run_dir, arguments.prompt) == (tmp_path / name, [prompt])


@pytest.mark.parametrize(
    ("length", "item"),
    [
        ({"total_epochs": 1.5}, "megagpt.training.total_epochs=3"),
        ({"total_tokens": 5000}, "megagpt.training.total_tokens=10000"),
        ({}, "megagpt.training.total_steps=80"),
    ],
)
def test_a_run_that_is_done_is_made_longer_by_its_own_key(
    length: dict[str, float], item: str
) -> None:
    training = TrainingConfig(total_steps=40, **length)
    run = SimpleNamespace(config=SimpleNamespace(megagpt=SimpleNamespace(training=training)))
    assert endings._twice_as_long(run, steps=40) == item  # type: ignore[arg-type]


def test_after_conversations_comes_a_chat() -> None:
    manifest = SimpleNamespace(has_conversations=True)
    stream = SimpleNamespace(datasets=[SimpleNamespace(manifest=manifest)])
    run = SimpleNamespace(training=SimpleNamespace(stream=stream))
    assert endings._what_to_say(run) == "--chat"  # type: ignore[arg-type]
