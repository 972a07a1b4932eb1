"""The device of this rank: its name, whether bf16 is fast on it, its peak FLOP/s and memory."""

import math
import os
import resource
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from megagpt.planning.cost.accelerators import find
from megagpt.utils import GIB

_CPU_MATRIX = 1024
_CPU_MEASURING_S = 0.5
CPU_REMEASURING_S = 0.1


def announce_to_deepspeed() -> None:
    """Tell DeepSpeed to use the CPU if torch sees no accelerator, unless the user chose one.

    Call it before DeepSpeed is imported. DeepSpeed would find out by itself, but print a warning on
    the user's screen (accelerator/real_accelerator.py:213).
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# torch's names of the allocator's settings, of which a user may have set any.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_cuda_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's allocator grow its segments, if there are GPUs and the user set nothing.

    ZeRO-3 allocates and frees parameters of all sizes; with fixed segments that fragments memory.
    Call it before the first tensor on a GPU, which is when torch reads the variable.
    """
    if torch.cuda.is_available() and not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def describe_device(device: torch.device) -> str:
    """Return the device for a log line: `NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def multiplies_bf16_natively(device: torch.device) -> bool:
    """Return whether bf16 matrix products are faster than fp32: on GPUs since Ampere.

    On CPUs they were measured 85 times slower.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def multiplies_fp16_natively(device: torch.device) -> bool:
    """Return whether fp16 matrix products are faster than fp32: on GPUs."""
    return device.type == "cuda"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak that MFU is a fraction of, in FLOP/s; None if unknown.

    A GPU's is the data sheet's, as in published MFUs. A CPU's data sheet has none, so the speed of
    torch's fp32 matrix product on this machine is measured now: the fastest of those that fit in
    half a second, because other programs can only slow it down. If they do so all the time, the
    peak is too low; ``remeasured_peak_flops`` may correct it later.
    """
    if device.type == "cpu":
        return _measured_product_flops(device, _CPU_MEASURING_S)
    if device.type == "cuda" and dtype != torch.float32:
        known = find(torch.cuda.get_device_name(device))
        return 1e12 * known.peak_tflops if known else None
    return None


def remeasured_peak_flops(device: torch.device, known: float) -> float:
    """Return the higher of ``known`` and a CPU's peak measured again, in FLOP/s.

    Measuring takes ``CPU_REMEASURING_S``.
    """
    return max(known, _measured_product_flops(device, CPU_REMEASURING_S))


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that this rank has held, in GiB.

    ``reserved`` is what torch's allocator took from a GPU; ``allocated`` is the part in use. On a
    CPU ``reserved`` is None and ``allocated`` is the process's peak resident memory.
    """

    allocated: float
    reserved: float | None


def peak_memory(device: torch.device) -> PeakMemory:
    """Return this rank's peak GPU memory, or the process's peak if it computes on the CPU."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        return PeakMemory(allocated / GIB, torch.cuda.max_memory_reserved(device) / GIB)
    return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, None)


def _measured_product_flops(device: torch.device, seconds: float) -> float:
    left, right = (torch.randn(_CPU_MATRIX, _CPU_MATRIX, device=device) for _ in range(2))
    best_s = math.inf
    end_s = time.perf_counter() + seconds
    while (started_s := time.perf_counter()) < end_s:
        left @ right
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * _CPU_MATRIX**3 / best_s
