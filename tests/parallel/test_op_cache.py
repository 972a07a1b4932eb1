"""A compiled op is opened without a process, unless what it was made from has changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt.parallel import op_cache

pytestmark = pytest.mark.usefixtures("compiled_ops")

LOAD = """
import json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from megagpt.parallel import ops
started = []
watched = ("subprocess.Popen", "os.fork", "os.posix_spawn")
sys.addaudithook(lambda event, given: event in watched and started.append(str(given[0])))
if len(sys.argv) > 2:
    os.environ[ops.EXTENSIONS_VARIABLE] = sys.argv[2]
ops.use_private_extensions()
ops.build([sys.argv[1]])
from deepspeed.ops.adam import DeepSpeedCPUAdam
from megagpt.parallel.compat import vendor_without_processes
weight = torch.nn.Parameter(torch.ones(4))
weight.grad = torch.ones(4)
with vendor_without_processes():
    adam = DeepSpeedCPUAdam([weight], lr=0.25, weight_decay=0.0)
adam.step()
print(json.dumps([started, weight.tolist(), adam.cpu_vendor]))
"""


def load(*arguments: object) -> list[Any]:
    """The programs that a new process starts to load CPU Adam, the weights after one update of
    it, and the vendor that it was told.
    """
    command = [sys.executable, "-c", LOAD, "CPUAdamBuilder", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_compiled_op_is_opened_without_a_process() -> None:
    started, weights, vendor = load()
    assert started == []
    assert weights == pytest.approx([0.75] * 4)
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "vendor_id" in line]
    assert vendor == (named[0].split(": ")[1].lower() if named else "unknown")


class Builder:
    """What `op_cache` asks of a builder, with sources that a test may change."""

    name = "an_op"

    def __init__(self, place: Path) -> None:
        self.place = place
        self._loaded_ops: dict[str, Any] = {}

    def sources(self) -> list[str]:
        return ["csrc/op/source.cpp"]

    def deepspeed_src_path(self, path: str) -> str:
        return str(self.place / path)


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    for file in ("csrc/op/source.cpp", "csrc/op/header.h", "csrc/includes/common.h", "an_op.so"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    builder = Builder(tmp_path)
    builder._loaded_ops["an_op"] = "opened"
    op_cache.record(builder, tmp_path)
    assert op_cache.load(builder, tmp_path)
    return builder


@pytest.mark.parametrize(
    "file", ["csrc/op/source.cpp", "csrc/op/header.h", "csrc/includes/common.h"]
)
def test_changed_sources_are_compiled_again(builder: Builder, file: str) -> None:
    (builder.place / file).write_text("changed")
    assert not op_cache.load(builder, builder.place)


def test_a_changed_or_absent_library_is_not_opened(builder: Builder) -> None:
    (builder.place / "an_op.so").write_text("half of")
    assert not op_cache.load(builder, builder.place)
    (builder.place / "an_op.so").unlink()
    assert not op_cache.load(builder, builder.place)


@pytest.mark.parametrize("changed", ["torch", "CXXFLAGS", "processor"])
def test_another_torch_compiler_or_processor_compiles_again(
    builder: Builder, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed == "CXXFLAGS":
        monkeypatch.setenv(changed, "-O1")
    elif changed == "processor":
        monkeypatch.setattr(op_cache, "processor", lambda: "another")
    else:
        monkeypatch.setattr(op_cache.metadata, "version", lambda package: "0")
    assert not op_cache.load(builder, builder.place)


def test_an_op_without_a_stamp_is_not_trusted(builder: Builder) -> None:
    (builder.place / op_cache.STAMP).unlink()
    assert not op_cache.load(builder, builder.place)
    (builder.place / "an_op.so").unlink()
    assert not op_cache.load(builder, builder.place), "an op that was never compiled"


@pytest.mark.slow
def test_a_copied_cache_is_loaded_by_deepspeed_and_stamped(tmp_path: Path) -> None:
    """The library in it has another time; ninja finds it sound, or compiles it again."""
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or private_cache())
    shutil.copytree(cache / "cpu_adam", tmp_path / "cpu_adam")
    os.utime(tmp_path / "cpu_adam" / "cpu_adam.so")
    started, weights, _ = load(tmp_path)
    assert any("ninja" in program for program in started)
    assert weights == pytest.approx([0.75] * 4)
    assert load(tmp_path)[0] == []


def private_cache() -> str:
    code = "from megagpt.parallel import ops; ops.use_private_extensions(); import os; "
    code += "print(os.environ[ops.EXTENSIONS_VARIABLE])"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
