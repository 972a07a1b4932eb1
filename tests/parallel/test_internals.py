"""Internals of DeepSpeed or torch that nobody has read are refused by name before anything
relies on them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagpt.config import RunConfig
from megagpt.monitoring.metrics import read_metrics
from megagpt.parallel import internals, tensor_parallel
from megagpt.utils import ExitCode, UserError
from tests import REPOSITORY
from tests.support.configurations import tiny, with_zero
from tests.support.jobs.checkpoint import run_config
from tests.support.ranks import free_port
from tests.support.trained_run import write_dataset

STAGE3 = "deepspeed/runtime/zero/stage3.py"


def test_what_is_installed_is_what_was_tested() -> None:
    assert internals.require_known_internals(internals.DIGESTS) is None
    known = [
        digest
        for files in internals.DIGESTS.values()
        for digests in files.values()
        for digest in digests
    ]
    assert len(set(known)) == len(known), (
        "a file that did not change between two versions needs one digest"
    )


def test_a_run_is_refused_only_for_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part in turn is unknown: only a run that uses it is refused."""
    runs: dict[str, tuple[Any, str]] = {
        "one process": (with_zero(tiny(), 3, "cpu", "cpu"), "python"),
        "pipeline": (
            tiny() | {"megagpt": tiny()["megagpt"] | {"parallel": {"pipeline": 2}}},
            "torchrun",
        ),
        "nvme": (with_zero(tiny(), 3, "nvme"), "python"),
        "launcher": (with_zero(tiny(), 1), "deepspeed"),
    }
    runs["nvme"][0]["zero_optimization"]["offload_optimizer"]["nvme_path"] = "swap"
    for part in ("engine", "pipeline", "nvme", "launcher"):
        with monkeypatch.context() as patch:
            patch.setitem(
                internals.DIGESTS, part, dict.fromkeys(internals.DIGESTS[part], ("0" * 12,))
            )
            for name, (config, launcher) in runs.items():
                parts = internals.parts_used(RunConfig.from_json(json.dumps(config)), launcher)
                if part in ("engine", name):
                    first = next(iter(internals.DIGESTS[part]))
                    with pytest.raises(
                        UserError, match=f"differ from all tested versions: {first}"
                    ):
                        internals.require_known_internals(parts)
                else:
                    assert internals.require_known_internals(parts) is None, (
                        f"{name} does not use {part}"
                    )


def test_the_remedy_fits_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file of a tested version: the same version again; another version: the pinned
    one.
    """
    file = "torch/distributed/pipelining/stage.py"
    monkeypatch.setitem(internals.DIGESTS["pipeline"], file, ("0" * 12,))
    for installed, remedy in {
        "2.11.0+cu130": "pip install --force-reinstall --no-deps torch==2.11.0; or ",
        "2.12.0": "pip install torch==2.13.0; or ",
    }.items():
        monkeypatch.setattr(internals.metadata, "version", lambda package, said=installed: said)
        with pytest.raises(UserError) as error:
            internals.require_known_internals(["pipeline"])
        assert str(error.value).startswith(f"torch {installed}: ")
        assert str(error.value).endswith(
            f"{file}; {remedy}continue at your own risk: MEGAGPT_ALLOW_UNKNOWN=1"
        )


def test_a_package_that_is_absent_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU image before its first run. Nobody goes on without it at any risk."""
    monkeypatch.setenv(internals.ALLOW_VARIABLE, "1")
    monkeypatch.setattr(
        internals,
        "find_spec",
        lambda package: None if package == "deepspeed" else find_spec(package),
    )

    def version(package: str) -> str:
        raise internals.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(internals.metadata, "version", version)
    with pytest.raises(
        UserError, match=r"^deepspeed is not installed; pip install deepspeed==0\.19\.8$"
    ):
        internals.require_known_internals(["engine"])
    monkeypatch.setattr(internals, "find_spec", find_spec)
    monkeypatch.setitem(internals.DIGESTS["engine"], STAGE3, ("0" * 12,))
    assert (internals.require_known_internals(["engine"]) or "").startswith(
        "deepspeed of unknown version: "
    )  # a vendored copy


def patched_deepspeed(directory: Path) -> Path:
    """A copy of the package, to stand before the installed one as a vendored one would; returns
    its stage3.py.
    """
    installed = find_spec("deepspeed")
    assert installed is not None
    assert installed.origin is not None
    shutil.copytree(Path(installed.origin).parent, directory / "deepspeed")
    stage3 = directory / STAGE3
    stage3.write_text(stage3.read_text() + "\n")
    return stage3


def train(tmp_path: Path, ranks: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Rank 1 of two, or one process, on the package in ``tmp_path``."""
    config, place = tmp_path / "config.json", {}
    config.write_text(
        json.dumps(run_config(write_dataset(tmp_path / "data"), 2, (1, "none", "none")))
    )
    if ranks > 1:
        place = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(free_port())
    return subprocess.run(
        [
            sys.executable,
            "launch/train.py",
            "--deepspeed_config",
            config,
            "--run_dir",
            tmp_path / "run",
        ],
        cwd=REPOSITORY,
        env=os.environ
        | place
        | {"PYTHONPATH": str(tmp_path), "DS_ACCELERATOR": "cpu"}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("fault", ["one line more", "a file less"])
def test_a_patched_deepspeed_is_refused(tmp_path: Path, fault: str) -> None:
    """By one rank of two, which does not wait for the other, which never comes."""
    stage3 = patched_deepspeed(tmp_path)
    if fault == "a file less":
        stage3.unlink()
    done = train(tmp_path, ranks=2)
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    said = (
        rf"{STAGE3}; pip install --force-reinstall --no-deps deepspeed==0\.19\.8; or "
        rf".*MEGAGPT_ALLOW_UNKNOWN=1$"
    )
    assert re.search(said, done.stderr.strip())
    assert not (tmp_path / "run").exists()


def test_an_unknown_deepspeed_runs_at_the_users_own_risk(tmp_path: Path) -> None:
    """It trains; the screen says it before anything else, and the run's record keeps it."""
    patched_deepspeed(tmp_path)
    done = train(tmp_path, ranks=1, MEGAGPT_ALLOW_UNKNOWN="1")
    assert done.returncode == ExitCode.DONE, done.stderr
    said = rf"{STAGE3}; the run continues at your own risk \(MEGAGPT_ALLOW_UNKNOWN=1\)"
    assert len(re.findall(f"WARNING megagpt.parallel.engine: deepspeed .*{said}", done.stderr)) == 1
    history = read_metrics(tmp_path / "run")
    (warning,) = history.events_named("warning")
    assert re.search(said, warning["message"])
    assert len(history.steps) == 2


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAGPT_ALLOW_UNKNOWN", "yes")
    with pytest.raises(
        UserError, match="MEGAGPT_ALLOW_UNKNOWN=yes: unknown value; set it to 0 or 1, or unset it"
    ):
        internals.require_known_internals(["engine"])


def test_collectives_have_the_names_of_this_torch() -> None:
    """2.11 has only the older ones, which 2.13 deprecates. On one rank they are copies."""
    older = torch.__version__.startswith("2.11.")
    assert hasattr(dist, "all_gather_single") != older
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            values, gathered, scattered = torch.arange(3.0), torch.zeros(3), torch.zeros(3)
            tensor_parallel.all_gather_single(gathered, values)
            tensor_parallel.reduce_scatter_single(scattered, values)
        finally:
            dist.destroy_process_group()
    assert torch.equal(gathered, values)
    assert torch.equal(scattered, values)


def test_the_tested_versions_are_those_that_are_installed_to_be_tested() -> None:
    """The first of each is pinned in requirements.txt, torch's other one in the Makefile."""
    pins = (REPOSITORY / "requirements.txt").read_text().split()
    assert {f"{package}=={versions[0]}" for package, versions in internals.TESTED.items()} <= set(
        pins
    )
    (older,) = internals.TESTED["torch"][1:]
    assert f"torch=={older}" in (REPOSITORY / "Makefile").read_text()
