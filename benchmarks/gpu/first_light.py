"""The first minutes on a GPU: what is here, are the kernels right under each ptxas, what are the ceilings."""

import os
import platform
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu import assembler, machine, small
from benchmarks.gpu.case import NotRun
from benchmarks.gpu.child import Context
from kernels.benchmark_run import DTYPES
from kernels.benchmark_timing import copy_ceiling_gb_per_s, gemm_ceiling_tflops
from kernels.costs import OPERATIONS
from megagpt.accelerators import find


def environment(context: Context) -> None:
    """Device, driver, versions, every ptxas; right where torch computes on the device and triton names its ptxas."""
    here = machine.this_machine() if context.device == "cuda" else machine.Machine(context.device, platform.machine())
    x = torch.arange(8, device=context.device)
    figures: dict[str, Any] = {"device": here.name, "capability": here.capability, **here.versions}
    figures |= {"device_gib": round(here.device_gib, 1), "host_gib": round(machine.free_host_gib(), 1)}
    figures |= {"cores": here.cores, "python": platform.python_version()}
    context.judge("device", int((x * x).sum()) == 140, "torch computes wrongly on it", **figures)
    for found in assembler.available():
        context.judge(f"ptxas, {found.source}", not found.problem, found.problem, **asdict(found))
    with context.finding("the ptxas that triton calls"):
        used, expected = _triton_calls(), assembler.in_use()
        right = expected is not None and (os.path.samefile(used, expected.path) if os.path.exists(used) else False)
        context.judge("the ptxas that triton calls", right, f"triton calls {used}", path=used)


def _triton_calls() -> str:
    """The path that triton's own settings name."""
    import triton

    tool: Any = triton.knobs.nvidia.ptxas
    return str(tool.path)


def self_check(context: Context, checks: list[tuple[str, int, str]]) -> None:
    """Attention of each (dtype, head dimension, variant): which implementation the self-check lets through, and what
    that computes. WRONG where an implementation failed its check, or a result is off."""
    for dtype, head_dim, variant in checks:
        sizes = {"variant": variant, "head_dims": (head_dim,), "attention_width": 4 * head_dim}
        case = small.case_of("attention", context.device, DTYPES[dtype], **sizes)
        _check(context, f"attention, {dtype}, head_dim {head_dim}, {variant}", case)


def operations(context: Context, dtypes: list[str]) -> None:
    """The small case of every operation."""
    for op in OPERATIONS:
        for dtype in dtypes:
            _check(context, f"{op}, {dtype}", small.case_of(op, context.device, DTYPES[dtype]))


def _check(context: Context, name: str, case: Any) -> None:
    """Explained, run and compared. A GPU on which the plain twin runs is no proof of a kernel."""
    if name in context.done:
        return
    with context.finding(name):
        explained = small.chosen(case)
        failed = "self-check:" in explained and "impossible" not in explained and "no memory" not in explained
        if not failed and context.device == "cuda" and explained.startswith(f"{case.op}: torch"):
            raise NotRun(explained)
        error = small.error_of(case)
        reason = explained if failed else f"error {error:.3g} times torch's own, {small.ALLOWED} allowed"
        context.judge(name, not failed and error <= small.ALLOWED, reason, explained=explained, error=round(error, 3))


def ceilings(context: Context, dtype: str = "bf16") -> None:
    """The rates of a large matrix product and of a copy, with the share of the data sheet's; both results checked."""
    known = find(torch.cuda.get_device_name()) if context.device == "cuda" else None
    size = 1024
    # Sums of at most some hundred: exact in bf16, in which cuBLAS may add up the parts of a split product.
    a, b = (torch.randint(-1, 2, (size, size), device=context.device).to(DTYPES[dtype]) for _ in range(2))
    exact = (a.double().cpu() @ b.double().cpu()).to(DTYPES[dtype])
    tflops = gemm_ceiling_tflops(DTYPES[dtype], context.device)
    share = tflops / known.peak_tflops if known else None
    right = torch.equal((a @ b).cpu(), exact)
    context.judge("matrix product", right, "integers multiplied wrongly", tflops=tflops, of_data_sheet=share)
    rate = copy_ceiling_gb_per_s(context.device)
    share = rate / known.memory_gb_per_s if known else None
    copied = torch.empty_like(a).copy_(a)
    context.judge("copy", torch.equal(copied, a), "copied wrongly", gb_per_s=rate, of_data_sheet=share)
