"""Timing and accuracy of one function, and the machine's own ceilings."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.bench.cases import Case

_L2_BYTES = 256 * 2**20  # more than any GPU's second-level cache
_BUDGET_S = 0.3  # of timed repetitions for one measurement
_CYCLES_PER_S = 2_000_000_000  # about the fastest clock of any GPU
_LONGEST_HEAD_START_S = 0.01


@dataclass(frozen=True)
class Measured:
    """Quantiles over repetitions, and the memory of one repetition beyond its arguments.

    ``peak_mib`` is None on a CPU.
    """

    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_mib: float | None


def step(function: Callable[..., Any], case: Case, mode: str) -> Callable[[], Any]:
    """Return a call without arguments of what ``mode`` names: fwd, bwd or both.

    Forward runs without autograd; backward alone uses the graph of a forward outside the timing.
    The leaves are copies.
    """
    if mode == "fwd":
        return lambda: _without_autograd(function, case)
    leaves = {
        name: x.detach().requires_grad_() if x.is_floating_point() else x
        for name, x in case.tensors.items()
    }
    wanted = [x for x in leaves.values() if x.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        result = function(**leaves, **case.options)
        return result if isinstance(result, tuple) else (result,)

    if mode == "both":
        seeds = _output_gradients(forward())
        return lambda: torch.autograd.grad(forward(), wanted, seeds)
    outputs = forward()
    seeds = _output_gradients(outputs)
    return lambda: torch.autograd.grad(outputs, wanted, seeds, retain_graph=True)


def _output_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs]


def _without_autograd(function: Callable[..., Any], case: Case) -> Any:
    with torch.no_grad():
        return function(**case.tensors, **case.options)


def measure(run: Callable[[], Any], device: str) -> Measured:
    """Time a call until ``_BUDGET_S`` is spent, and at least five times.

    On a GPU the second-level cache is cold.
    """
    once_ms = _repeat(run, 2, device)[-1]
    count = max(5, min(200, int(1000 * _BUDGET_S / max(once_ms, 1e-3))))
    times = _repeat(run, count, device)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Measured(fifths[0], statistics.median(times), fifths[3], _peak_mib(run, device))


def _peak_mib(run: Callable[[], Any], device: str) -> float | None:
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _repeat(run: Callable[[], Any], count: int, device: str) -> list[float]:
    """Return the milliseconds of each repetition."""
    if device == "cpu":
        times = []
        for _ in range(count):
            began = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - began))
        return times
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device=device)
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    head_start = _head_start_cycles(run)
    for start, end in marks:
        flush.zero_()
        # The GPU waits until Python has launched the whole call; otherwise small shapes would
        # measure Python.
        torch.cuda._sleep(head_start)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _head_start_cycles(run: Callable[[], Any]) -> int:
    """Return twice the time of Python's part of a call, in cycles; the fastest of three."""
    host_s = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        host_s.append(time.perf_counter() - began)
    return int(_CYCLES_PER_S * min(2 * min(host_s), _LONGEST_HEAD_START_S))


Expected = list[tuple[Tensor, float]]


def expected(case: Case, mode: str) -> Expected:
    """Return each exact output, and the error that torch's own has.

    With gradients too, unless ``mode`` is fwd. Exact is the result of the plain-torch twin in the
    next wider dtype. The error of rounding it to the dtype is added to torch's own, so that by
    chance a small error of torch does not make all others look wrong.
    """
    twin = getattr(reference, case.op)
    wide = (
        torch.float64 if next(iter(case.tensors.values())).dtype == torch.float32 else torch.float32
    )
    tensors = {name: x.to(wide) if x.is_floating_point() else x for name, x in case.tensors.items()}
    truth = _results(twin, dataclasses.replace(case, tensors=tensors), mode)
    found = []
    for theirs, exact in zip(_results(twin, case, mode), truth, strict=True):
        rounded = (exact.to(theirs.dtype) + 0.3 - 0.3).to(wide)
        allowed = _largest(theirs, exact) + _largest(rounded, exact)
        allowed += torch.finfo(theirs.dtype).eps * _largest(exact, torch.zeros_like(exact))
        found.append((exact, max(allowed, torch.finfo(wide).tiny)))
    return found


def errors(
    function: Callable[..., Any], case: Case, mode: str, against: Expected | None = None
) -> float:
    """Return the largest error of the results as a multiple of torch's own.

    2 or less passes, as in the tests.
    """
    against = expected(case, mode) if against is None else against
    results = zip(_results(function, case, mode), against, strict=True)
    return max((_largest(ours, exact) / allowed for ours, (exact, allowed) in results), default=0.0)


def _results(function: Callable[..., Any], case: Case, mode: str) -> list[Tensor]:
    outputs = step(function, case, "fwd")()
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return outputs if mode == "fwd" else [*outputs, *step(function, case, "both")()]


def _largest(value: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference; infinite if a value is NaN."""
    difference = (value.to(truth.dtype) - truth).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def gemm_ceiling_tflops(dtype: torch.dtype, device: str) -> float:
    """Return the rate of one large matrix product of random numbers.

    No fused kernel here exceeds it.
    """
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / measure(lambda: a @ b, device).p50_ms / 1e9)


def copy_ceiling_gb_per_s(device: str) -> float:
    """Return the rate of a copy far larger than the caches, reads and writes counted."""
    source = torch.randn((2**30 if device == "cuda" else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    return float(
        2 * 4 * source.numel() / measure(lambda: target.copy_(source), device).p50_ms / 1e6
    )
