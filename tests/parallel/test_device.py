"""The device's peak, and what DeepSpeed is told of it."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megagpt import train
from megagpt.checkpoint.format import TrainState
from megagpt.config import ModelConfig
from megagpt.monitoring.metrics import read_metrics
from megagpt.parallel import device, pipeline
from megagpt.planning.cost.accelerators import ACCELERATORS, find
from megagpt.planning.flops import model_flops_per_token
from megagpt.utils import GIB
from tests.support.monitoring import open_monitor


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *[
            ("NVIDIA H200", "H200"),
            ("NVIDIA H200 NVL", "H200 NVL"),
            ("h100", "H100"),
            ("NVIDIA L4", "L4"),
        ],
        *[
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA H100 PCIe", "H100 PCIe"),
            ("NVIDIA A100-SXM4-80GB", "A100"),
        ],
        *[(f"NVIDIA {name}", None) for name in ("GH200 480GB", "RTX A1000", "A2")],
        *[(f"NVIDIA GeForce RTX {name}", None) for name in ("4090 Laptop GPU", "4090 D")],
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_device_is_known_by_whole_words(name: str, known: str | None) -> None:
    assert find(name) is (ACCELERATORS[known] if known else None)


def test_what_the_user_chose_for_cuda_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    for available, given, added in (
        (False, {}, {}),
        (True, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (True, chosen, {}),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        environment = dict(given)
        device.set_cuda_defaults(environment)
        assert environment == given | added


def test_reserved_memory_is_a_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.peak_memory(torch.device("cpu")).reserved is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda of: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda of: 4 * GIB)
    assert device.peak_memory(torch.device("cuda")) == device.PeakMemory(3, 4)


def test_reserved_memory_is_recorded_when_it_grows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peaks = iter([device.PeakMemory(3, 4), device.PeakMemory(3, 4.01), device.PeakMemory(5, 6)])
    monkeypatch.setattr(train, "peak_memory", lambda of: next(peaks))
    with open_monitor(tmp_path) as monitor:
        engine = SimpleNamespace(device=None)
        run: Any = SimpleNamespace(engine=engine, monitor=monitor, state=TrainState(step=9))
        meter = train.Meter(run)
        for _ in range(3):
            meter._report_reserved()
    seen = [
        (event["allocated_gib"], event["reserved_gib"])
        for event in read_metrics(tmp_path).events_named("memory")
    ]
    assert seen == [(3, 4), (5, 6)]


def test_the_peak_of_a_cpu_is_that_of_its_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products in the time there is: a cold one, a good one, and one that another program
    held up.
    """
    reading_s = itertools.accumulate([0.0, 0.0, 0.2, 0.0, 0.1, 0.0, 0.3, 0.0])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(reading_s))
    assert device.peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 0.1)


def test_a_cpu_s_mfu_uses_the_highest_peak_measured_and_is_never_above_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A start on a busy machine measured 1 FLOP/s; a measurement fits into 1 % of every 10 s."""
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=8, vocabulary=8)
    monitor_config, training = (
        SimpleNamespace(log_interval_steps=1),
        SimpleNamespace(total_steps=9, lora=None),
    )
    sections = SimpleNamespace(model=model, monitor=monitor_config, training=training)
    computed = model_flops_per_token(model) * 100  # FLOP/s, at 100 tokens in steps of 1 s
    clock_s, peaks = [0.0], iter([4 * computed, 2 * computed])
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock_s[0])

    def measured(of: torch.device, seconds: float) -> float:
        clock_s[0] += seconds
        return next(peaks)

    monkeypatch.setattr(device, "_measured_product_flops", measured)
    result = pipeline.StepResult(loss=1.0, grad_norm=1.0, learning_rate=0.1, applied=True)
    with open_monitor(tmp_path) as monitor:
        run: Any = SimpleNamespace(
            config=SimpleNamespace(megagpt=sections, tokens_per_step=100),
            engine=SimpleNamespace(device=torch.device("cpu"), mesh=SimpleNamespace(world_size=1)),
            monitor=monitor,
            peak_flops=1.0,
        )
        meter = train.Meter(run)
        for step, step_time_s in enumerate([1, 1, 9, 1, 10], start=1):
            run.state = TrainState(step=step)
            clock_s[0] += step_time_s
            meter.after_step(result)
    utilisation = [record.mfu for record in read_metrics(tmp_path).steps]
    # Too low a peak twice; a quarter, at a ninth of the speed; a quarter; a lower peak is not kept.
    assert utilisation == [None, None, *map(pytest.approx, [1 / 36, 1 / 4, 1 / 40])]
    assert list(peaks) == []


@pytest.mark.parametrize(
    ("available", "chosen", "told"),
    [(False, {}, "cpu"), (True, {}, None), (False, {"DS_ACCELERATOR": "xpu"}, "xpu")],
)
def test_deepspeed_is_told_of_a_missing_accelerator_only(
    available: bool, chosen: dict[str, str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    with patch.dict(os.environ, chosen):
        if not chosen:
            os.environ.pop("DS_ACCELERATOR", None)
        device.announce_to_deepspeed()
        assert os.environ.get("DS_ACCELERATOR") == told
