"""What the device of this rank is and can do: its name, bf16, its peak."""

import math
import os
import resource
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from megagpt.accelerators import find
from megagpt.utils import GIB

_CPU_MATRIX = 1024
_CPU_MEASURING_S = 0.5


def announce_to_deepspeed() -> None:
    """Where torch sees no accelerator, say so to DeepSpeed before it is imported, unless the user chose one.

    It would find out itself, and print a warning on the user's screen (accelerator/real_accelerator.py:213).
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_cuda_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where there are GPUs, let torch's allocator grow its segments, unless the user chose any setting of it.

    ZeRO-3 allocates and frees parameters of all sizes: fixed segments leave gaps that none of them fits. Must be called
    before the first tensor on a GPU, which is when torch reads the variable.
    """
    if torch.cuda.is_available() and not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


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


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that this rank has held, in GiB. ``reserved`` is what torch's allocator took from a GPU, of which
    ``allocated`` was in use; the rest lies between blocks. None on a CPU, where the process's memory counts."""

    allocated: float
    reserved: float | None


def peak_memory(device: torch.device) -> PeakMemory:
    """Return the peak of this rank's GPU, or of the process where it computes on the CPU."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        return PeakMemory(allocated / GIB, torch.cuda.max_memory_reserved(device) / GIB)
    return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, None)


def _measured_product_flops(device: torch.device) -> float:
    left, right = (torch.randn(_CPU_MATRIX, _CPU_MATRIX, device=device) for _ in range(2))
    best_s = math.inf
    end_s = time.perf_counter() + _CPU_MEASURING_S
    while (started_s := time.perf_counter()) < end_s:
        left @ right
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * _CPU_MATRIX**3 / best_s
