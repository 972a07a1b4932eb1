"""The one place that launches Triton functions, and counts them.

A test that compares a fused operation with its twin proves nothing if the twin ran instead;
``launches`` shows what ran.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_COUNTS: Counter[str] = Counter()

# Under the interpreter a kernel is plain Python on CPU tensors. Kernels take this as a compile-time
# constant and then convert bf16 operands to fp32, because the interpreter multiplies their bit
# patterns (triton-lang/triton#11584).
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def cdiv(count: int, block: int) -> int:
    """Return how many blocks hold ``count``; triton's own takes a microsecond longer."""
    return -(-count // block)


def power_of_2(least: int) -> int:
    """Return the smallest power of two that is at least ``least``, and at least 1."""
    return 1 << max(least - 1, 0).bit_length()


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Run a Triton function on the device of ``like``, and count it under its own name.

    ``arguments`` and ``constants`` are the function's; ``constants`` also holds launch options such
    as num_warps.
    """
    _COUNTS[kernel.fn.__name__] += 1
    if like.device.type != "cuda" or like.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(like.device):
        kernel[grid](*arguments, **constants)


def launches() -> dict[str, int]:
    """Return how often each Triton function was launched since ``reset_launches``."""
    return dict(_COUNTS)


def reset_launches() -> None:
    """Start counting from zero."""
    _COUNTS.clear()


@contextmanager
def uncounted() -> Iterator[None]:
    """Drop the counts of launches within the block, by any thread.

    Autograd runs backward in threads of its own.
    """
    before = dict(_COUNTS)
    try:
        yield
    finally:
        _COUNTS.clear()
        _COUNTS.update(before)
