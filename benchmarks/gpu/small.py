"""One small case of each kernel, checked against plain torch; as a program, launched once and no more, for a tool that
watches it: ``python -m benchmarks.gpu.small OP DEVICE``."""

import sys
from dataclasses import replace
from typing import Any

import torch

import kernels
from kernels.benchmark_cases import Case, Sizes, cases
from kernels.benchmark_timing import errors, step

SIZES = Sizes(lengths=(200,), head_dims=(64,), widths=(768,), tokens=200, vocabulary=1000, attention_width=128)
ALLOWED = 2.0  # times the error of torch's own


def case_of(op: str, device: str, dtype: torch.dtype, **sizes: Any) -> Case:
    """The first case of an operation at small sizes, none of which a block divides."""
    return next(cases(op, replace(SIZES, **sizes), dtype, device))


def error_of(case: Case) -> float:
    """The error of ``kernels.<op>``, forward and every gradient, as a multiple of torch's own."""
    return errors(getattr(kernels, case.op), case, "both")


def chosen(case: Case) -> str:
    """Which implementation runs the case, and why: on a GPU this asks the self-check."""
    arguments: dict[str, Any] = case.tensors | case.options
    return kernels.explain(case.op, **arguments)


if __name__ == "__main__":
    torch.manual_seed(0)
    one = case_of(sys.argv[1], sys.argv[2], torch.bfloat16 if sys.argv[2] == "cuda" else torch.float32)
    implementation = chosen(one)
    print(implementation)
    if sys.argv[2] == "cuda" and implementation.startswith(f"{one.op}: torch"):
        sys.exit(implementation)  # torch's kernels are not what is watched
    step(getattr(kernels, one.op), one, "both")()
    if sys.argv[2] == "cuda":
        torch.cuda.synchronize()
