"""Which compiled ops a run needs, where they are built, and what becomes of builds that were
killed.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ResolvedConfig, RunConfig
from megagpt.parallel import ops
from megagpt.utils import UserError
from tests.support.configurations import tiny, with_zero


def resolved(zero: tuple[int, str, str], **optimizer: Any) -> ResolvedConfig:
    config = with_zero(tiny(), *zero)
    for section in ("offload_optimizer", "offload_param"):
        if config["zero_optimization"].get(section, {}).get("device") == "nvme":
            config["zero_optimization"][section]["nvme_path"] = "swap"
    config["optimizer"]["params"] |= optimizer
    return RunConfig.from_json(json.dumps(config)).resolved(
        world_size=1, vocabulary=128, bf16_native=False
    )


@pytest.mark.parametrize(
    ("zero", "device_type", "needed"),
    [
        ((0, "none", "none"), "cpu", []),
        ((0, "none", "none"), "cuda", ["FusedAdamBuilder"]),
        ((2, "cpu", "none"), "cpu", ["CPUAdamBuilder"]),
        ((2, "cpu", "none"), "cuda", ["CPUAdamBuilder"]),
        ((3, "none", "cpu"), "cuda", ["FusedAdamBuilder"]),
        ((3, "nvme", "none"), "cpu", ["CPUAdamBuilder", "AsyncIOBuilder"]),
        ((3, "cpu", "nvme"), "cuda", ["CPUAdamBuilder", "AsyncIOBuilder"]),
    ],
)
def test_each_offload_needs_its_ops(
    zero: tuple[int, str, str], device_type: str, needed: list[str]
) -> None:
    assert ops.needed_ops(resolved(zero), device_type) == needed


def test_torchs_adam_needs_none() -> None:
    assert ops.needed_ops(resolved((2, "cpu", "none"), torch_adam=True), "cuda") == []


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the user's own, in which CPUAdam lies unbuilt."""
    monkeypatch.setenv(ops.EXTENSIONS_VARIABLE, str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam"


def test_a_cache_that_the_user_chose_is_used(extensions: Path) -> None:
    ops.use_private_extensions()
    assert os.environ[ops.EXTENSIONS_VARIABLE] == str(extensions.parent)


def test_else_the_cache_belongs_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.EXTENSIONS_VARIABLE, raising=False)
    ops.use_private_extensions()
    assert Path(os.environ[ops.EXTENSIONS_VARIABLE]).is_relative_to(sys.prefix)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.delenv(ops.EXTENSIONS_VARIABLE)
    ops.use_private_extensions()
    assert Path(os.environ[ops.EXTENSIONS_VARIABLE]).is_relative_to(
        Path.home() / ".cache" / "megagpt"
    )


def test_the_environments_own_ninja_comes_first(
    monkeypatch: pytest.MonkeyPatch, extensions: Path
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    ops.use_private_extensions()
    ops.use_private_extensions()
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/usr/bin"


def test_a_missing_compiler_is_named_and_matters_only_to_what_is_not_built(
    extensions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "there is no C++ compiler (Debian, Ubuntu: apt install g++)" in (
        ops.missing_tools("CPUAdamBuilder") or ""
    )
    (extensions / "cpu_adam.so").touch()
    assert ops.missing_tools("CPUAdamBuilder") is None


def test_a_lock_of_a_killed_build_is_removed_when_it_is_old(extensions: Path) -> None:
    lock = extensions / "lock"
    lock.touch()
    long_ago = time.time() - ops.STALE_LOCK_AGE_S - 60
    os.utime(lock, (long_ago, long_ago))
    with ops._one_builder("CPUAdamBuilder"):
        assert not lock.exists()


def test_a_young_lock_in_a_shared_cache_is_named_instead_of_waited_for(extensions: Path) -> None:
    (extensions / "lock").touch()
    with (
        pytest.raises(
            UserError, match=rf"another process has been compiling .*: rm {extensions}/lock"
        ),
        ops._one_builder("CPUAdamBuilder"),
    ):
        pass
    assert (extensions / "lock").exists()


HOLDING = (
    "import fcntl, os, sys, time; lock = open(sys.argv[1], 'a+'); fcntl.flock(lock, "
    "fcntl.LOCK_EX); "
)
HOLDING += "print(os.getpid(), file=lock, flush=True); print('held', flush=True); time.sleep(1000)"


def test_a_process_that_compiles_without_end_is_named(
    extensions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run's rank, say, that was stopped in the middle of a build: to be ended, as it is
    here.
    """
    monkeypatch.setattr(ops, "NOTICE_S", 0.0)
    command = [sys.executable, "-c", HOLDING, str(extensions / ".megagpt_lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(ops, "_say", lambda text: (print(text), holder.kill()))
        with ops._one_builder("CPUAdamBuilder"):
            assert (extensions / ".megagpt_lock").read_text() == f"{os.getpid()}\n"
    said = (
        f"waiting for process {holder.pid}, which is compiling DeepSpeed's CPUAdam (to stop it: "
        f"kill {holder.pid})\n"
    )
    assert capsys.readouterr().out == said


def test_in_our_own_cache_any_lock_is_left_over(
    monkeypatch: pytest.MonkeyPatch, extensions: Path
) -> None:
    monkeypatch.setattr(ops, "_private_directory", lambda: extensions.parent)
    (extensions / "lock").touch()
    with ops._one_builder("CPUAdamBuilder"):
        assert not (extensions / "lock").exists()
