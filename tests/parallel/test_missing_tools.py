"""What keeps DeepSpeed's ops from being compiled is found before the compiler fails on it."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.async_io import AsyncIOBuilder
from deepspeed.ops.op_builder.builder import MissingCUDAException
from torch.utils import cpp_extension

from megagpt.config import RunConfig
from megagpt.parallel import ops
from megagpt.run import startup
from megagpt.utils import UserError
from tests.support.configurations import tiny, with_zero


def test_a_compiler_without_pythons_headers_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ops.EXTENSIONS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(ops.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    reason = "Python's own headers are missing (Debian, Ubuntu: apt install python3-dev)"
    assert ops.missing_tools("CPUAdamBuilder") == reason
    (tmp_path / "Python.h").touch()
    assert ops.missing_tools("CPUAdamBuilder") is None


@pytest.fixture
def cuda_without_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and torch's CUDA build, as pip installs it.

    DeepSpeed's builder is the one that it has for GPUs.
    """
    monkeypatch.setenv(ops.EXTENSIONS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cuda")
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: AsyncIOBuilder())
    monkeypatch.setattr(
        AsyncIOBuilder, "is_compatible", lambda builder, verbose: True
    )  # libaio is there
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)


@pytest.mark.usefixtures("cuda_without_a_toolkit")
def test_nvme_offload_without_a_cuda_toolkit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError):
        AsyncIOBuilder().include_paths()  # what DeepSpeed has to say
    with pytest.raises(MissingCUDAException):
        AsyncIOBuilder().nvcc_args()
    refused = (
        "offload to NVMe needs DeepSpeed's AsyncIO, but there is no CUDA toolkit; install "
        ".* 13.0 .*CUDA_HOME="
    )
    with pytest.raises(UserError, match=refused):
        ops.require_tools(["CPUAdamBuilder", "AsyncIOBuilder"])
    config = with_zero(tiny(), 3, "nvme")
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path)
    with pytest.raises(UserError, match=refused):
        startup._require_ops(
            RunConfig.from_json(json.dumps(config))
        )  # before this rank's peers wait for it
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    for needed in ("bin/nvcc", "include/cuda_runtime_api.h"):
        lacks = f"the CUDA toolkit in {tmp_path} has no {needed}; install"
        assert (ops.missing_tools("AsyncIOBuilder") or "").startswith(lacks)
        (tmp_path / needed).parent.mkdir()
        (tmp_path / needed).touch()
    assert ops.missing_tools("AsyncIOBuilder") is None
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: False
    )  # DeepSpeed compiles for the CPU then
    assert ops.missing_tools("AsyncIOBuilder") is None
