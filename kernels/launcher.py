"""The one place that launches Triton functions, and counts them.

A test that compares a fused operation with its twin proves nothing if the twin ran instead;
``launches`` tells.
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
# constant, because the interpreter multiplies the bit patterns of bf16 operands
# (triton-lang/triton#11584): they upcast them instead.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Run a Triton function on the device of ``like``, and count it under its own name.

    ``arguments`` and ``constants`` are the function's, with launch options such as num_warps among
    the latter.
    """
    _COUNTS[kernel.fn.__name__] += 1
    if like.device.type != "cuda" or like.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(like.device):
        kernel[grid](*arguments, **constants)


def launches() -> dict[str, int]:
    """How often each Triton function was launched in this process since the last
    ``reset_launches``.
    """
    return dict(_COUNTS)


def reset_launches() -> None:
    """Start counting from zero."""
    _COUNTS.clear()


@contextmanager
def uncounted() -> Iterator[None]:
    """Forget the launches made meanwhile, by any thread: backward launches from threads of
    autograd's own.
    """
    before = dict(_COUNTS)
    try:
        yield
    finally:
        _COUNTS.clear()
        _COUNTS.update(before)
