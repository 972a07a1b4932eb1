"""One small case of each kernel, checked against plain torch.

As a program it launches one kernel once, for a tool that watches it: ``python -m
benchmarks.gpu.small OP DEVICE``.
"""

import sys
from dataclasses import replace
from typing import Any

import torch

import kernels
from kernels.bench.cases import Case, Sizes, cases
from kernels.bench.timing import errors, step

SIZES = Sizes(
    lengths=(200,), head_dims=(64,), widths=(768,), tokens=200, vocabulary=1000, attention_width=128
)
ALLOWED = 2.0  # times the error of torch's own


def case_of(op: str, device: str, dtype: torch.dtype, **sizes: Any) -> Case:
    """Return the first case of an operation at small sizes, which no block size divides."""
    return next(cases(op, replace(SIZES, **sizes), dtype, device))


def error_of(case: Case) -> float:
    """Return the error of ``kernels.<op>`` as a multiple of torch's own, all gradients included."""
    return errors(getattr(kernels, case.op), case, "both")


def chosen(case: Case) -> str:
    """Return which implementation runs the case, and why; on a GPU this runs the self-check."""
    arguments: dict[str, Any] = case.tensors | case.options
    return kernels.explain(case.op, **arguments)


if __name__ == "__main__":
    torch.manual_seed(0)
    one = case_of(
        sys.argv[1], sys.argv[2], torch.bfloat16 if sys.argv[2] == "cuda" else torch.float32
    )
    implementation = chosen(one)
    print(implementation)
    if sys.argv[2] == "cuda" and implementation.startswith(f"{one.op}: torch"):
        sys.exit(implementation)  # the tool would watch torch's kernels
    step(getattr(kernels, one.op), one, "both")()
    if sys.argv[2] == "cuda":
        torch.cuda.synchronize()
