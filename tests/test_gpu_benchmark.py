"""The script that measures our kernels on a GPU: what of it can be shown without one."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_kernels, machine
from kernels import benchmark
from kernels.benchmark_report import Row, as_csv, from_csv
from megagpt.config import RunConfig
from tests.configurations import tiny, with_zero

ROW = Row(
    "attention", "megagpt triton", "fwd", "batch 1, length 4096, head_dim 64, causal", 4096, "bf16", 0.5, True, "a GPU",
    "torch", 1.0, 1.0, 1.0, tflops=345.0, fraction_of_ceiling=0.5, peak_mib=10.0,
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_kernels.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu_kernels: no CUDA device")
    assert "python -m kernels.compile_ahead" in error


def lines(*rows: Row, measured: str = "megagpt triton", of: str = "") -> list[dict[str, Any]]:
    """The targets' lines about the operation and mode of the first row, or of another shape."""
    operation = f"{rows[0].op} {rows[0].mode}"
    found = [line for line in gpu_kernels.compare(rows) if line["operation"] == operation]
    return [line for line in found if line["measured"].startswith(measured) and of in line["measured"]]


def test_a_ratio_to_the_rival_of_the_same_shape() -> None:
    rival = replace(ROW, provider="sdpa flash", tflops=300.0)
    elsewhere = replace(rival, shape="another", tflops=1.0)
    line, other = lines(ROW, rival, elsewhere)
    assert (line["ratio"], line["wanted"], line["met"]) == ("1.15", 1.15, "yes")
    assert (line["ours_ms"], line["rival_ms"]) == ("1.0000", "1.0000")
    assert (other["shape"], other["ratio"], other["met"]) == ("another", "not run", "no")
    (line,) = lines(ROW, replace(rival, tflops=301.0))
    assert line["met"] == "no"
    (line,) = lines(replace(ROW, correct=False), rival)
    assert line["met"] == "no"
    (line,) = lines(ROW)
    assert (line["ratio"], line["met"]) == ("not run", "no")


def test_a_target_never_disappears() -> None:
    """Ours failed, ours was not there, nothing was measured at all: each is a line that is not met."""
    rival = replace(ROW, provider="sdpa flash", tflops=300.0)
    failed = replace(ROW, correct=False, tflops=None, p50_ms=None, failure="OutOfResources")
    for rows, ratio in (((rival, failed), "FAILED"), ((rival,), "not run")):
        (line,) = lines(*rows)
        assert (line["shape"], line["ratio"], line["met"]) == (ROW.shape, ratio, "no")
    assert len(gpu_kernels.compare([])) == len(gpu_kernels.TARGETS)
    assert {line["met"] for line in gpu_kernels.compare([])} == {"no"}


def test_the_hopper_kernel_is_held_against_cudnn_by_head_dimension() -> None:
    hopper = replace(ROW, provider="megagpt hopper")
    cudnn = replace(ROW, provider="sdpa cudnn 91900", tflops=350.0)
    line, nothing = lines(hopper, cudnn, measured="megagpt hopper")
    assert (line["ratio"], line["wanted"], line["met"]) == ("0.99", 1.0, "no")
    assert (nothing["shape"], nothing["ratio"]) == ("head_dim 128", "not run")
    wide = {"shape": "batch 1, length 4096, head_dim 128, causal"}
    _, line = lines(replace(hopper, **wide), replace(cudnn, **wide), measured="megagpt hopper")
    assert (line["wanted"], line["met"]) == (0.9, "yes")


def test_bandwidth_and_memory() -> None:
    norm = replace(ROW, op="layer_norm", tflops=None, gb_per_s=3900.0, fraction_of_ceiling=0.91)
    (line,) = lines(norm)
    assert (line["ratio"], line["wanted"], line["met"]) == ("0.91", 0.9, "yes")
    loss = replace(ROW, op="linear_cross_entropy", mode="both", shape="rows 16384, width 768, vocabulary 50304")
    faster, smaller = lines(loss, replace(loss, provider="torch", peak_mib=99.0))
    assert (faster["ratio"], faster["met"]) == ("1.00", "yes")
    assert (smaller["ratio"], smaller["met"]) == ("9.90", "no")
    wide = replace(loss, shape="rows 16384, width 4096, vocabulary 50304")
    assert [line["shape"] for line in lines(loss, wide, of="smallness")] == [loss.shape]


def test_rows_survive_the_csv() -> None:
    failed = replace(ROW, p20_ms=None, error_vs_torch=float("inf"), correct=False, failure='a "quoted", failure')
    assert from_csv(as_csv([ROW, failed])) == [ROW, failed]


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    path = machine.write_table("name", "module", [{"a": 1, "b": "x, y"}])
    comment, header, line = path.read_text().splitlines()
    assert comment.startswith("# 20")
    assert f"torch {torch.__version__}, triton " in comment
    assert (header, line) == ("a,b", '1,"x, y"')
    monkeypatch.setattr(machine, "provenance", lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        machine.write_table("name", "module", [{"a": 2}])
    assert path.read_text().splitlines()[2] == line
    monkeypatch.undo()
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert machine.write_table("empty", "module", []).read_text().startswith("# 20")


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = sys.modules["pydantic"] = sys.modules["matplotlib"] = None
sys.argv[1:] = ["--an", "argument"]
from benchmarks import gpu_kernels, machine
from kernels import benchmark
from benchmarks.machine import provenance
print(provenance("benchmarks.gpu_kernels"))
gpu_kernels.training()
import pytest
files = [f"tests/{name}.py" for name in gpu_kernels.KERNEL_TESTS]
raise SystemExit(pytest.main(["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *files]))
"""


def test_it_needs_no_deepspeed() -> None:
    """Nor anything else that only training needs: torch and triton, and pytest and hypothesis for the tests."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED],
        cwd=gpu_kernels.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "deepspeed" not in done.stdout.splitlines()[0]
    assert "training: skipped, the package deepspeed is not installed" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_large_tensors.py::test_attention" in done.stdout


def test_every_file_with_tests_of_the_gpu_is_named() -> None:
    """Each that asks for ``fused_device`` or marks a test with gpu, unless it trains."""
    training = {*gpu_kernels.MODEL_TESTS, "test_device", "test_guard", "test_gpu_benchmark", "test_working_memory"}
    training |= {"test_offload_devices"}
    folder = gpu_kernels.REPOSITORY / "tests"
    found = {
        path.stem
        for path in folder.glob("test_*.py")
        if "mark.gpu" in (text := path.read_text()) or "fused_device:" in text
    }
    assert found - training == set(gpu_kernels.KERNEL_TESTS)


def test_phases_run_one_by_one_and_any_may_be_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_kernels, "missing", lambda: None)
    for name, right in {"accuracy": True, "targets": False, "training": True}.items():
        monkeypatch.setattr(gpu_kernels, name, lambda right=right: right)
    assert gpu_kernels.main(["--only", "training", "tests"]) == 0
    assert gpu_kernels.main(["--only", "tests", "targets"]) == 1
    assert "| targets | WRONG |" in capsys.readouterr().out
    asked: list[Any] = []
    monkeypatch.setattr(gpu_kernels, "_run", lambda *arguments: asked.append(arguments[1]) or len(asked) - 1)
    assert gpu_kernels.main(["--only", "benchmark", "--ops", "dropout", "rotary"]) == 1
    assert asked == ["dropout", "rotary"]


def test_targets_are_read_from_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_kernels, "RESULTS", tmp_path)
    directory = tmp_path / "gpu_kernels_targets"
    directory.mkdir()
    asked: list[str] = []

    def run(*arguments: str) -> int:
        asked.extend(arguments)
        (directory / "results.csv").write_text(as_csv([ROW, replace(ROW, provider="sdpa flash", tflops=300.0)]))
        return 1

    monkeypatch.setattr(gpu_kernels, "_run", run)
    assert gpu_kernels.targets() is False
    benchmark._parser().parse_args(asked[1:])
    monkeypatch.setattr(gpu_kernels, "_run", lambda *arguments: 139)
    text = (tmp_path / "gpu_kernels_targets.csv").read_text().splitlines()
    assert {line["met"] for line in csv.DictReader(text[1:])} == {"yes", "no"}
    assert gpu_kernels.targets() is False  # a process that ended without a row leaves none of an earlier one
    text = (tmp_path / "gpu_kernels_targets.csv").read_text().splitlines()
    assert {line["ratio"] for line in csv.DictReader(text[1:])} == {"not run"}


def die(config: Any, kernels: str | None, connection: Connection) -> None:
    """A contender whose process ends when it is first asked; another answers."""
    for _ in iter(connection.recv, 0):
        if kernels == "dies":
            raise SystemExit(7)
        connection.send((1.0, 2.0, 3.0))


def test_a_contender_that_dies_ends_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "serve", die)
    with pytest.raises(RuntimeError, match="second: its process ended early, with exit code 7"):
        gpu_kernels.training_step(gpu_kernels.configuration(), {"first": None, "second": "dies"})


def test_the_training_step_is_gpt2_124m_under_zero_3() -> None:
    config = gpu_kernels.configuration()
    model = config.megagpt.model
    assert (model.num_layers, model.hidden_size, config.zero_optimization.stage) == (12, 768, 3)
    assert config.bf16.enabled is True


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in for a GPU here")
def test_contenders_train_in_turns(compiled_ops: None) -> None:
    """The same steps on the same data, through ZeRO-3: both contenders end at the same loss."""
    text = json.dumps(with_zero(tiny(), 3))
    config = RunConfig.from_json(text).resolved(world_size=1, vocabulary=128, bf16_native=False)
    rows = gpu_kernels.training_step(config, {"ours": None, "torch": "torch"}, rounds=1, steps=2)
    assert [row["kernels"] for row in rows] == ["ours", "torch"]
    assert rows[0]["last_loss"] == rows[1]["last_loss"]
    assert all(row["tokens_per_s"] > 0 for row in rows)
