"""What the device of this rank is and can do: its name, bf16, its peak."""

import math
import os
import time

import torch

from megagpt.accelerators import find

_CPU_MATRIX = 1024
_CPU_MEASURING_S = 0.5


def announce_to_deepspeed() -> None:
    """Where torch sees no accelerator, say so to DeepSpeed before it is imported, unless the user chose one.

    It would find out itself, and print a warning on the user's screen (accelerator/real_accelerator.py:213).
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def describe(device: torch.device) -> str:
    """For a log line: `NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def multiplies_bf16_natively(device: torch.device) -> bool:
    """Whether bf16 matrix products beat fp32: on GPUs since Ampere. On CPUs they were seen 85 times slower."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak that MFU is a fraction of, in FLOP/s; None where it is unknown.

    On GPUs the data sheet's, as published MFUs use. On a CPU, whose sheet says no such thing, the speed of torch's
    own fp32 matrix product on this machine, measured now: the fastest of those that fit in half a second, as others on
    the machine only slow it down. Where they do so all the time, the peak is what they leave, and a run that outlives
    them may exceed it.
    """
    if device.type == "cpu":
        return _measured_product_flops(device)
    if device.type == "cuda" and dtype != torch.float32:
        known = find(torch.cuda.get_device_name(device))
        return 1e12 * known.peak_tflops if known else None
    return None


def _measured_product_flops(device: torch.device) -> float:
    left, right = (torch.randn(_CPU_MATRIX, _CPU_MATRIX, device=device) for _ in range(2))
    best_s = math.inf
    end_s = time.perf_counter() + _CPU_MEASURING_S
    while (started_s := time.perf_counter()) < end_s:
        left @ right
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * _CPU_MATRIX**3 / best_s
