"""The device's peak, and what DeepSpeed is told of it."""

import itertools

import pytest
import torch

from megagpt import device


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
