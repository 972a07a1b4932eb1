"""Files from strangers: they name no code that runs, and nothing outside their own directory.

The canary is a module that leaves a file when it is imported; hostile files name it wherever a name
may stand.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megagpt.checkpoint import directory as checkpoint_directory
from megagpt.checkpoint.format import (
    MANIFEST,
    StoredFile,
    complete_steps,
    read_manifest,
    step_directory,
)
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.common.atomic_directory import AtomicDirectory
from megagpt.common.disk import sha256_of
from megagpt.config import ConfigError, load_config
from megagpt.data import corpora, tokenizer
from megagpt.dataset import open_dataset
from megagpt.inference.stored_model import load_model
from megagpt.migration.checkpoint import pickles
from megagpt.parallel.compat import set_loss_scaler_state
from megagpt.rundir import directory as run_directory
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.support.config_documents import MINIMAL, errors_of, put
from tests.support.jobs.checkpoint import run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import trained_model, write_dataset, write_run

CODE = {
    "__reduce__": ["canary.run", []],
    "_target_": "canary.run",
    "auto_map": {"AutoModel": "canary.run"},
}
CODE |= {"trust_remote_code": True}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that the canary would leave; after the test, it is shown that it would have."""
    sung = tmp_path / "sung"
    (tmp_path / "canary.py").write_text(
        f"open({str(sung)!r}, 'w').close()\nrun = Optimizer = print\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield sung
    assert not sung.exists()
    importlib.import_module("canary")
    assert sung.exists()
    del sys.modules["canary"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with its data, and checkpoints of steps 10 and 20."""
    return write_run(
        tmp_path / "runs" / "first", write_dataset(tmp_path / "dataset"), steps=(10, 20)
    )


# ------------------------------------------------------------------------------------ names of code


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *CODE.items(),
        ("megagpt.model.__class__", "canary.run"),
        ("megagpt.model.trust_remote_code", True),
        ("megagpt.model.activation", "canary.run"),
        ("megagpt.parallel.schedule", "canary.run"),
        ("optimizer.type", "canary.Optimizer"),
        ("optimizer.params.__reduce__", ["canary.run", []]),
        ("scheduler", {"type": "canary.run", "params": {}}),
        ("megagpt.training.total_steps", "__import__('canary')"),
    ],
)
def test_a_configuration_selects_from_closed_lists_only(
    canary: Path, key: str, value: object
) -> None:
    assert any(key in error for error in errors_of(put(MINIMAL, key, value)))
    Path("small.json").write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError, match=key):
        load_config("small.json", [f"{key}={json.dumps(value)}"])


def test_a_checkpoint_that_names_code_is_read_as_data(canary: Path, run: Path) -> None:
    directory, file = step_directory(run / "checkpoints", 20), "rank_00000_000.safetensors"
    named = {key: json.dumps(value) for key, value in CODE.items()}
    save_file(load_file(directory / file), directory / file, metadata=named)
    assert b"canary.run" in (directory / file).read_bytes()
    manifest = read_manifest(directory)
    files = {file: StoredFile((directory / file).stat().st_size, sha256_of(directory / file))}
    hostile = replace(
        manifest, files=files, versions=named, topology=CODE, scheduler=CODE, identity=CODE
    )
    (directory / MANIFEST).write_text(hostile.to_json())
    model, config, step = load_model(run)
    assert step == 20
    for name, parameter in trained_model(config, 20).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_a_checkpoint_sets_no_attribute_but_a_loss_scales_own() -> None:
    its_own = {"cur_scale": 8.0, "cur_iter": 3, "last_overflow_iter": 2, "cur_hysteresis": 1}
    scaler = SimpleNamespace(**dict.fromkeys(its_own, 0), dynamic=True, backward=print)
    set_loss_scaler_state(
        SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler)),  # type: ignore[arg-type]
        {**its_own, "backward": 1, "dynamic": 0, "__class__": 1},
    )
    assert vars(scaler) == {**its_own, "dynamic": True, "backward": print}


def test_a_runs_own_configuration_is_read_as_strictly(canary: Path, run: Path) -> None:
    config = json.loads((run / run_directory.CONFIG_FILE).read_text())
    (run / run_directory.CONFIG_FILE).write_text(json.dumps(config | CODE))
    with pytest.raises(UserError, match="__reduce__") as refusal:
        load_model(run)
    assert all(key in str(refusal.value) for key in CODE)


def test_a_tokenizer_that_names_code_is_read_as_data(canary: Path, tmp_path: Path) -> None:
    tokenizer.store_tokenizer("bytes", tmp_path, list)
    path = tmp_path / tokenizer.TOKENIZER_FILE
    content = json.loads(path.read_text())
    content["model"] |= CODE | {"type": "canary.run"}
    content["decoder"] = {"type": "canary.run"}
    path.write_text(json.dumps(content | CODE | {"tokenizer_class": "canary.run"}))
    assert tokenizer.load_tokenizer(tmp_path).encode("né") == list("né".encode())


def test_a_dataset_that_names_code_is_read_as_data(canary: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "dataset")
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"source": CODE}))
    assert open_dataset(data).manifest.source == CODE
    path.write_text(json.dumps(manifest | CODE))
    with pytest.raises(UserError, match="__reduce__"):
        open_dataset(data)


def test_a_script_beside_a_corpus_is_not_run(canary: Path, tmp_path: Path) -> None:
    """Hugging Face's datasets once ran `NAME/NAME.py` for a dataset called NAME. It is a text."""
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for name in ("json", "owner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("import canary\n")
    pieces = corpora.open_source("texts.jsonl").pieces()
    assert [piece.text for piece in pieces] == ["one", "two"]
    pieces = corpora.open_source("owner").pieces()
    assert [piece.text for piece in pieces] == ["import canary\n"]


RUNS_CODE = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNPACKS = {"tarfile", "zipfile", "unpack_archive"}
CALLED = {"eval", "exec", "__import__", "torch.load", "np.load", "numpy.load"}


def unsafe(source: str) -> set[str]:
    """What in a source could run code from a file, or unpack an archive."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names} & (RUNS_CODE | UNPACKS)
            case ast.ImportFrom():
                found |= {node.module or "", *(alias.name for alias in node.names)} & (
                    RUNS_CODE | UNPACKS
                )
            case ast.Call():
                found |= {ast.unparse(node.func)} & CALLED
            case ast.Attribute():
                found |= {node.attr} & UNPACKS
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=False)):
                pass
            case ast.keyword():
                found |= {node.arg or ""} & {"trust_remote_code"}
    return found


def test_nothing_of_ours_can_run_code_from_a_file_or_unpack_an_archive() -> None:
    sources = [
        path
        for folder in ("megagpt", "kernels", "launch")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    found = {path.name: found for path in sources if (found := unsafe(path.read_text()))}
    # Of a checkpoint of another trainer, it takes tensors alone.
    assert found.pop("pickles.py") == {"pickle", "torch.load"}
    ours = ast.parse(Path(pickles.__file__).read_text())
    calls = [ast.unparse(node) for node in ast.walk(ours) if isinstance(node, ast.Call)]
    assert [call for call in calls if call.startswith(("torch.load", "pickle."))] == [
        "torch.load(path, map_location='cpu', mmap=True, weights_only=True)"
    ]
    assert found == {}
    sample = (
        "import tarfile\nfrom pickle import "
        "loads\neval(x)\ntorch.load(f)\nshutil.unpack_archive(f)\n"
    )
    sample += "load_dataset(name, trust_remote_code=True)\n"
    assert unsafe(sample) == {
        "tarfile",
        "pickle",
        "eval",
        "torch.load",
        "unpack_archive",
        "trust_remote_code",
    }


# ---------------------------------------------------------------------------------- names of places


@pytest.mark.parametrize(
    "name", ["../tokenizer.json", "/etc/passwd", "train-00000.bin/..", "..", "train-00000.bin\n"]
)
@pytest.mark.parametrize("place", ["shard", "offsets", "tokenizer"])
def test_a_datasets_manifest_names_no_file_outside_its_directory(
    tmp_path: Path, name: str, place: str
) -> None:
    data = write_dataset(tmp_path / "dataset")
    manifest = json.loads((data / "manifest.json").read_text())
    shard = manifest["splits"]["train"][0]
    {"shard": shard, "offsets": shard["offsets"], "tokenizer": manifest["tokenizer"]}[place][
        "file"
    ] = name
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: .*file: String should match pattern"):
        open_dataset(data)


def test_the_pointer_to_the_latest_leads_nowhere(run: Path, tmp_path: Path) -> None:
    """It is for people: what is loaded is found by looking, and a save replaces it, not what it
    links to.
    """
    latest, outside = run / "checkpoints" / "latest", tmp_path / "outside"
    outside.write_text("../../outside\n")
    latest.symlink_to(outside)
    assert open_checkpoint(run).manifest.state.step == 20
    place = AtomicDirectory.beside(step_directory(run / "checkpoints", 30))
    place.staging.mkdir()
    place.commit()
    checkpoint_directory.name_latest(step_directory(run / "checkpoints", 30))
    assert (latest.is_symlink(), latest.read_text()) == (False, "step_00000030\n")
    assert outside.read_text() == "../../outside\n"


def test_a_checkpoint_that_is_a_link_is_forgotten_and_what_it_leads_to_stays(
    run: Path, tmp_path: Path
) -> None:
    """People move old checkpoints to a larger disk; leftovers may be links as well."""
    checkpoints, disk = run / "checkpoints", tmp_path / "disk"
    step_directory(checkpoints, 10).rename(disk)
    (disk / ".next_step.json.x.partial").touch()
    kept = sorted(path.name for path in disk.iterdir())
    step_directory(checkpoints, 10).symlink_to(disk)
    for name in (".staging_step_00000030", ".deleting_step_00000010"):
        (checkpoints / name).symlink_to(disk)
    assert open_checkpoint(run, 10).manifest.state.step == 10
    checkpoint_directory.prepare_staging(checkpoints / ".staging_step_00000030", 0)
    checkpoint_directory.collect_leftovers(checkpoints)
    checkpoint_directory.retire(checkpoints, keep=1, milestone_interval_steps=0, last_good_step=20)
    assert complete_steps(checkpoints) == [20]
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000020"]
    assert sorted(path.name for path in disk.iterdir()) == kept


def test_damaged_links_are_set_aside_again_and_again(run: Path, tmp_path: Path) -> None:
    checkpoints, disk = run / "checkpoints", tmp_path / "disk"
    disk.mkdir()
    (disk / "precious").touch()
    (checkpoints / "damaged_step_00000010").symlink_to(disk)
    checkpoint_directory.set_aside(checkpoints, [10])
    assert not (checkpoints / "damaged_step_00000010").is_symlink()
    assert (disk / "precious").exists()


def test_a_run_writes_where_the_user_said_and_nowhere_else(
    one_rank: RankPool, tmp_path: Path
) -> None:
    """A `..` and a link mean what they mean to the shell."""
    data = write_dataset(tmp_path / "dataset")
    places = tmp_path / "places"
    (places / "here").mkdir(parents=True)
    (places / "there").mkdir()
    (places / "link").symlink_to("there")
    before = {path for path in tmp_path.rglob("*") if places not in path.parents}
    directory = places / "here" / ".." / "link"
    config = run_config(data, 2, save_every=1)
    one_rank.run("tests.support.jobs.checkpoint:train", config=config, directory=directory)
    assert complete_steps(places / "there" / "checkpoints") == [2, 1]
    assert {path.name for path in places.iterdir()} == {"here", "there", "link"}
    assert os.listdir(places / "here") == []
    assert {path for path in tmp_path.rglob("*") if places not in path.parents} == before


@pytest.mark.parametrize("file", ["...json", ".json", "configs/...json"])
def test_a_configuration_without_a_name_names_no_run(file: str) -> None:
    with pytest.raises(UserError, match="--run_dir"):
        run_directory.directory_of_run(None, file)
    assert run_directory.directory_of_run(Path("runs/x"), file) == Path("runs/x")
    assert run_directory.directory_of_run(None, "configs/first.json") == Path("runs/first")
