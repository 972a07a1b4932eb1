"""The device's peak, and what DeepSpeed is told of it."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megagpt import device, train
from megagpt.accelerators import ACCELERATORS, find
from megagpt.checkpoint_format import TrainState
from megagpt.metrics import read_metrics
from megagpt.utils import GIB
from tests.monitoring import open_monitor


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *[("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"), ("h100", "H100"), ("NVIDIA L4", "L4")],
        *[("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA A100-SXM4-80GB", "A100")],
        *[(f"NVIDIA {name}", None) for name in ("GH200 480GB", "GB200", "L40", "RTX A1000", "A10")],
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


def test_reserved_memory_is_recorded_when_it_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peaks = iter([device.PeakMemory(3, 4), device.PeakMemory(3, 4.01), device.PeakMemory(5, 6)])
    monkeypatch.setattr(train, "peak_memory", lambda of: next(peaks))
    with open_monitor(tmp_path) as monitor:
        engine = SimpleNamespace(device=None)
        run: Any = SimpleNamespace(engine=engine, monitor=monitor, state=TrainState(step=9))
        meter = train.Meter(run)
        for _ in range(3):
            meter._report_reserved()
    seen = [(event["allocated_gib"], event["reserved_gib"]) for event in read_metrics(tmp_path).events_named("memory")]
    assert seen == [(3, 4), (5, 6)]


def test_the_peak_of_a_cpu_is_that_of_its_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products in the time there is: a cold one, a good one, and one that another program held up."""
    reading_s = itertools.accumulate([0.0, 0.0, 0.2, 0.0, 0.1, 0.0, 0.3, 0.0])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(reading_s))
    assert device.peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 0.1)


@pytest.mark.parametrize(
    ("available", "chosen", "told"), [(False, {}, "cpu"), (True, {}, None), (False, {"DS_ACCELERATOR": "xpu"}, "xpu")]
)
def test_deepspeed_is_told_of_a_missing_accelerator_only(
    available: bool, chosen: dict[str, str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(chosen)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(device.os, "environ", environment)
    device.announce_to_deepspeed()
    assert environment.get("DS_ACCELERATOR") == told
