"""Time an operation beside others' and check every row: the kernel benchmark, row by row."""

from dataclasses import asdict
from typing import Any

from benchmarks.gpu.case import NOT_RUN, RIGHT, WRONG
from benchmarks.gpu.child import Context
from kernels.bench import run as benchmark_run
from kernels.bench.cases import GPU_SIZES, Case, Sizes, cases
from kernels.bench.report import BenchmarkRow


def measure(
    context: Context,
    op: str,
    modes: list[str],
    dtype: str = "bf16",
    providers: list[str] | None = None,
    **sizes: Any,
) -> None:
    """Report rows of one operation, each as one finding.

    Modes are fwd, bwd, both; ``providers`` are as in ``python -m kernels.benchmark``; ``sizes`` are
    fields of ``kernels.bench.cases.Sizes`` that differ from those of a GPU.
    """
    chosen = asdict(GPU_SIZES) | {
        name: tuple(x) if isinstance(x, list) else x for name, x in sizes.items()
    }
    this = benchmark_run.this_machine(dtype)
    this.only = tuple(providers or ())
    for case in cases(op, Sizes(**chosen), benchmark_run.DTYPES[dtype], context.device):
        _measure(context, this, case, tuple(modes))


def _measure(
    context: Context, this: benchmark_run.BenchmarkRun, case: Case, modes: tuple[str, ...]
) -> None:
    def name(provider: str, mode: str) -> str:
        return f"{mode}, {provider}, {case.shape}"

    def keep(row: BenchmarkRow) -> None:
        finding = name(row.provider, row.mode)
        reason = row.failure or f"error {row.error_vs_torch:.3g} times torch's own, 2 allowed"
        if row.correct:
            context.report(finding, RIGHT, **asdict(row))
        elif row.failure.startswith("OutOfMemoryError"):
            context.report(finding, NOT_RUN, f"too little memory: {reason}")
        elif row.provider.startswith(benchmark_run.OURS):
            context.report(finding, WRONG, reason, **asdict(row))
        else:
            context.report(
                finding, NOT_RUN, f"its result is wrong, so its time is not compared: {reason}"
            )

    this.keep = keep
    this.absent = lambda case, provider, mode, reason: context.report(
        name(provider, mode), NOT_RUN, reason
    )
    this.skip = lambda provider, mode: name(provider, mode) in context.done
    benchmark_run.measure_case(this, case, modes)
