"""How long Python takes over an operation before the GPU has it: what timing the kernels alone hides."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import kernels
from benchmarks.gpu import small
from benchmarks.gpu.case import NotRun
from benchmarks.gpu.child import Context
from kernels import dispatch, reference
from kernels.benchmark_run import DTYPES
from kernels.benchmark_timing import step
from kernels.costs import OPERATIONS

ROUNDS = 5


def measure(context: Context, repeats: int, dtype: str = "bf16", ops: list[str] | None = None) -> None:
    """Microseconds of the host for one call of each operation, forward alone and with its backward, beside plain
    torch's; and of the choice of an implementation. Inputs are so small that the GPU keeps up."""
    for op in ops or OPERATIONS:
        if op in context.done:
            continue
        with context.finding(op):
            case = small.case_of(op, context.device, DTYPES[dtype])
            explained = small.chosen(case)
            if context.device == "cuda" and explained.startswith(f"{op}: torch"):
                raise NotRun(explained)
            error = small.error_of(case)  # which also compiles
            figures: dict[str, Any] = {"explained": explained}
            arguments: dict[str, Any] = case.tensors | case.options
            choose = partial(dispatch.choose, op, **arguments)  # no more than each call does
            figures["choice_us"] = _microseconds(choose, repeats, context.device)
            for who, function in (("ours", getattr(kernels, op)), ("torch", getattr(reference, op))):
                for mode in ("fwd", "both"):
                    call = step(function, case, mode)
                    figures[f"{who}_{mode}_us"] = _microseconds(call, repeats, context.device)
            context.judge(op, error <= small.ALLOWED, f"error {error:.3g} times torch's own", **figures)


def _microseconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Of one call, the quickest of a few rounds; the device is waited for between rounds only."""
    best_s = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        best_s = min(best_s, time.perf_counter() - began)
        if device == "cuda":
            torch.cuda.synchronize()
    return round(1e6 * best_s / repeats, 1)
