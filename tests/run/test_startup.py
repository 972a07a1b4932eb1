"""Bad input: found before anything is written, said in a line, with what to type."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
import pytest
import torch

from megagpt.config import RunConfig
from megagpt.inference.stored_model import load_model
from megagpt.run import startup
from megagpt.rundir import data as run_data
from megagpt.rundir import directory as run_directory
from megagpt.utils import ExitCode, UserError
from tests import REPOSITORY
from tests.support import trained_run
from tests.support.jobs.checkpoint import run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

REFUSED_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the data, to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    for name, value in alone.items():
        monkeypatch.setenv(name, value)


def refused(tmp_path: Path, config: dict[str, Any], *overrides: str, resume: bool = False) -> str:
    """What the command says of a configuration; it must not have written anything into the run
    directory.
    """
    path, directory = tmp_path / "run.json", tmp_path / "run"
    path.write_text(json.dumps(config))
    before = contents(directory)
    with pytest.raises(UserError) as error:
        startup.main(
            argparse.Namespace(
                deepspeed_config=str(path),
                run_dir=directory,
                set=list(overrides),
                resume=resume,
                allow_change=[],
            )
        )
    assert contents(directory) == before
    return str(error.value)


def contents(directory: Path) -> dict[Path, bytes]:
    if directory.is_file():
        return {directory: directory.read_bytes()}
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused_by_command(config: dict[str, Any], directory: Path) -> str:
    """What ``launch/train.py`` says; bad data have to be refused within two seconds, before torch
    is imported.

    They are two seconds of the processor, the only ones that do not depend on what else runs on the
    machine.
    """
    path = directory.with_suffix(".json")
    path.write_text(json.dumps(config))
    before = contents(directory)
    command = [
        sys.executable,
        "launch/train.py",
        "--deepspeed_config",
        str(path),
        "--run_dir",
        str(directory),
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == ExitCode.BAD_INPUT, said
    assert used.ru_utime + used.ru_stime < REFUSED_WITHIN_S
    assert contents(directory) == before
    return said


def truncate(data: Path) -> None:
    os.truncate(data / "train-00000.bin", (data / "train-00000.bin").stat().st_size - 1)


def empty(data: Path) -> None:
    (data / "train-00000.bin").write_bytes(b"")


def widen(data: Path) -> None:
    tokens = np.fromfile(data / "train-00000.bin", "<u2")
    tokens.astype("<u4").tofile(data / "train-00000.bin")


def misname_type(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"dtype": "uint32"}))


def change_a_token(data: Path) -> None:
    tokens = np.fromfile(data / "train-00000.bin", "<u2")
    tokens[100] ^= 1
    tokens.tofile(data / "train-00000.bin")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            shutil.rmtree,
            "no dataset here; prepare one: python launch/download_data.py --dataset stdlib "
            "--output",
        ),
        (truncate, "train-00000.bin: .* bytes found, .* expected .truncated at byte"),
        (empty, "train-00000.bin: empty, .* bytes expected"),
        (widen, "train-00000.bin: .* the other dtype"),
        (
            misname_type,
            "train-00000.bin: 2 bytes per token found, uint32 has 4: wrong dtype in the manifest",
        ),
        (change_a_token, "train-00000.bin: changed since preparation"),
    ],
)
def test_data_that_are_not_what_they_were_are_named(
    data: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(data)
    said = refused(tmp_path, run_config(data, 6))
    assert re.search(reason, said), said
    assert str(data) in said
    assert (
        f"python launch/download_data.py --dataset stdlib --output {data}" in said
        or "--force" in said
    )


def test_a_token_id_out_of_range_is_refused_with_its_place(data: Path, tmp_path: Path) -> None:
    tokens = np.fromfile(data / "train-00000.bin", "<u2")
    tokens[100] = 40_000
    tokens.tofile(data / "train-00000.bin")
    said = refused_by_command(run_config(data, 6), tmp_path / "run")
    assert (
        f"{data}/train-00000.bin: token id 40000 found at byte 200, ids below 257 expected" in said
    )


def test_a_vocabulary_larger_than_the_models_names_both(data: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, run_config(data, 6, vocab_size=128))
    assert (
        "megagpt.model.vocab_size: 128 is smaller than the data's vocabulary of 257: use 257 or "
        "remove it" in said
    )


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope.json: no such file"):
        startup.main(
            argparse.Namespace(
                deepspeed_config=f"{tmp_path}/nope.json",
                run_dir=None,
                set=[],
                resume=False,
                allow_change=[],
            )
        )


def test_resume_insists_on_something_to_resume(data: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, run_config(data, 6), resume=True)
    assert said == f"{tmp_path}/run: nothing to resume; leave out --resume to start it"


def test_ranks_that_the_batch_does_not_divide_into(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = refused(tmp_path, run_config(data, 6))
    assert "train_batch_size: 8 on 3 data-parallel ranks x micro-batches of 2: use 6 or 12" in said


def test_a_shrunken_world_is_refused(data: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, run_config(data, 6), "megagpt.parallel.world_size=2")
    assert "the run expects 2 ranks and 1 started: bring back the missing hosts" in said


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_number_format_that_the_device_lacks_is_refused_before_the_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    monkeypatch.setattr(accelerator, f"is_{name}_supported", lambda itself: False)
    config = run_config(data, 3, (1, "none", "none")) | {name: {"enabled": True}}
    line = refused(tmp_path, config)
    assert line.endswith(
        f"run.json: {name}.enabled: true is refused: the device has no {name}; nearest legal: "
        f"--set {name}.enabled=false"
    )


def test_an_unwritable_place_for_the_run_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert "cannot be read (Not a directory); choose another --run_dir" in refused(
        tmp_path, run_config(data, 6)
    )


def test_a_run_directory_that_cannot_be_written_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert refused(tmp_path, run_config(data, 6)) == (
        f"{tmp_path}/run: cannot be written (Permission denied); choose another --run_dir"
    )


def test_the_other_ranks_of_a_host_let_the_first_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All find the same fault; the launcher ends those that still wait when the first has gone."""
    pauses: list[float] = []
    monkeypatch.setattr(startup.time, "sleep", pauses.append)
    arguments = argparse.Namespace(
        deepspeed_config=f"{tmp_path}/nope.json",
        run_dir=None,
        set=[],
        resume=False,
        allow_change=[],
    )
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(UserError):
            startup.main(arguments)
    assert pauses == [startup.TURN_S]


def test_data_that_changed_since_the_save_are_refused(
    two_ranks: RankPool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound in themselves, prepared again: another order of tokens under the same cursor would go
    unnoticed.
    """
    config, directory = run_config(data, 2, (1, "none", "none"), save_every=2), tmp_path / "run"
    two_ranks.run("tests.support.jobs.checkpoint:train", config=config, directory=directory)
    monkeypatch.setattr(
        trained_run, "TEXTS", ["Another text.\n" * 40, "A second.\n" * 60, "A third.\n" * 30]
    )
    shutil.rmtree(data)
    shutil.copytree(write_dataset(tmp_path / "other"), data)
    config["megagpt"]["training"]["total_steps"] = 4
    said = refused_by_command(config, directory)
    assert re.search(
        rf"{directory}: its data changed since step 2 was saved \(found \w{{16}} in {data}, "
        rf"need \w{{16}}\); restore them, start again with another --run_dir, or continue",
        said,
    )


def test_ranks_that_disagree_are_named(two_ranks: RankPool, prepared: Path, tmp_path: Path) -> None:
    said = two_ranks.run(
        "tests.support.jobs.checkpoint:disagreement",
        config=run_config(prepared, 2),
        directory=tmp_path,
    )
    here = f"(host {gethostname()})"
    expected = (
        f"rank 1 {here} differs from rank 0 {here} in configuration; give every host the "
        f"same and start again"
    )
    assert said == [expected] * 2


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 2},
        *(
            pytest.param(parallel, marks=pytest.mark.slow)
            for parallel in ({}, {"tensor": 2}, {"tensor": 2, "sequence": True})
        ),
    ],
    ids=str,
)
def test_all_ranks_write_the_same_sample_and_validate_as_the_stored_model_does(
    two_ranks: RankPool, prepared: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    """Under ZeRO-3: a rank holds half of each parameter, layer, or of the layers; the reference
    is on disk.
    """
    config = run_config(prepared, 4, (3, "none", "none"), save_every=4)
    config["megagpt"]["parallel"] = parallel
    config["megagpt"]["training"] |= {
        "eval_interval_steps": 4,
        "eval_batches": 1,
        "sample_interval_steps": 4,
        "sample_prompts": ["The ", "Zug"],
    }
    ranks = two_ranks.run(
        "tests.support.jobs.checkpoint:validation_and_samples", config=config, directory=tmp_path
    )
    assert ranks[0] == ranks[1]
    assert len(ranks[0]["texts"]) == 2
    model, resolved, step = load_model(tmp_path)
    config["megagpt"]["parallel"] = {}  # the reference is one process
    legal = run_data.resolve_run(RunConfig.from_json(json.dumps(config)))
    stream = run_data.open_data(legal.config, tmp_path)[0]["val"]
    batch = stream.batch(range(resolved.train_batch_size))
    with torch.no_grad():
        expected = model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)).item()
    assert step == 4
    assert ranks[0]["val_loss"] == pytest.approx(expected, abs=1e-5)


def test_two_runs_share_no_directory(data: Path, tmp_path: Path) -> None:
    with run_directory.lock(tmp_path / "run"):
        assert "trains in it; end that run (kill " in refused(tmp_path, run_config(data, 6))


def test_several_hosts_have_to_say_how_many_ranks_there_are(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSS_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "--set megagpt.parallel.world_size=4" in refused(tmp_path, run_config(data, 6))
