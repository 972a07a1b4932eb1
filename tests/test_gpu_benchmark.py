"""The script that measures our kernels on a GPU: what of it can be shown without one."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_kernels
from kernels.benchmark_report import Row
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


def test_a_ratio_to_the_rival_of_the_same_shape() -> None:
    rival = replace(ROW, provider="sdpa flash", tflops=300.0)
    elsewhere = replace(rival, shape="another", tflops=1.0)
    (line,) = gpu_kernels.compare([ROW, rival, elsewhere])
    assert (line["ratio"], line["wanted"], line["met"]) == ("1.15", 1.15, "yes")
    (line,) = gpu_kernels.compare([ROW, replace(rival, tflops=301.0)])
    assert line["met"] == "no"
    (line,) = gpu_kernels.compare([replace(ROW, correct=False), rival])
    assert line["met"] == "no"
    (line,) = gpu_kernels.compare([ROW])
    assert (line["ratio"], line["met"]) == ("not run", "no")


def test_the_hopper_kernel_is_held_against_cudnn_by_head_dimension() -> None:
    hopper = replace(ROW, provider="megagpt hopper")
    cudnn = replace(ROW, provider="sdpa cudnn 91900", tflops=350.0)
    (line,) = gpu_kernels.compare([hopper, cudnn])
    assert (line["ratio"], line["wanted"], line["met"]) == ("0.99", 1.0, "no")
    wide = {"shape": "batch 1, length 4096, head_dim 128, causal"}
    (line,) = gpu_kernels.compare([replace(hopper, **wide), replace(cudnn, **wide)])
    assert (line["wanted"], line["met"]) == (0.9, "yes")


def test_bandwidth_and_memory() -> None:
    norm = replace(ROW, op="layer_norm", tflops=None, gb_per_s=3900.0, fraction_of_ceiling=0.91)
    (line,) = gpu_kernels.compare([norm])
    assert (line["ratio"], line["wanted"], line["met"]) == ("0.91", 0.9, "yes")
    loss = replace(ROW, op="linear_cross_entropy", mode="both")
    faster, smaller = gpu_kernels.compare([loss, replace(loss, provider="torch", peak_mib=99.0)])
    assert (faster["ratio"], faster["met"]) == ("1.00", "yes")
    assert (smaller["ratio"], smaller["met"]) == ("9.90", "no")


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
