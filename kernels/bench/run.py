"""The benchmark's loop: every case, mode and provider of the chosen operations."""

import datetime
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Without a GPU our kernels are only checked, by the interpreter, which must be selected before
    # triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kernels
from kernels.bench.cases import CHECK_SIZES, CPU_SIZES, GPU_SIZES, Case, Sizes, cases
from kernels.bench.machine import device_name, versions
from kernels.bench.providers import Provider, UnavailableError, providers
from kernels.bench.report import BenchmarkRow, Heading, write_report, write_tables
from kernels.bench.timing import (
    Expected,
    Measured,
    copy_ceiling_gb_per_s,
    errors,
    expected,
    gemm_ceiling_tflops,
    measure,
    step,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS = "megagpt"
INTERPRETED = "megagpt (interpreter)"


@dataclass
class BenchmarkRun:
    """The conditions of a whole run, and the rows and notes that it collects."""

    device: str
    machine: str
    versions: str
    dtype: str
    gemm_tflops: float
    copy_gb_per_s: float
    rows: list[BenchmarkRow] = field(default_factory=list)
    stopped: bool = False
    # Providers, by name or its first words; empty: all.
    only: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    # Called with each new row.
    keep: Callable[[BenchmarkRow], object] = lambda row: None
    # Called with what did not run.
    absent: Callable[[Case, str, str, str], None] = lambda case, provider, mode, reason: None
    # Returns whether a provider and mode were measured before.
    skip: Callable[[str, str], bool] = lambda provider, mode: False

    def note(self, text: str) -> None:
        """Print and keep a note, once."""
        if text not in self.notes:
            print(text, flush=True)
            self.notes.append(text)

    def add(
        self, case: Case, provider: str, mode: str, measured: Measured | None, error: float
    ) -> None:
        """Keep and print one measurement; ``measured`` None is a check of accuracy alone."""
        row = self._row(case, provider, mode, measured, error)
        self.rows.append(row)
        self.keep(row)
        speed = (
            "not timed" if row.rate is None else f"{row.p50_ms:.3f} ms, {row.rate:.4g} {row.unit}"
        )
        verdict = "" if row.correct else ", WRONG"
        print(
            f"{case.op} {mode}, {provider}, {case.shape}: {speed}, error {error:.2f}{verdict}",
            flush=True,
        )

    def fail(self, case: Case, provider: str, mode: str, failure: str) -> None:
        """Keep and print a failure of one of our own kernels: a row that counts as wrong."""
        row = replace(
            self._row(case, provider, mode, None, float("inf")), failure=failure.replace("|", "/")
        )
        self.rows.append(row)
        self.keep(row)
        print(f"{case.op} {mode}, {provider}, {case.shape}: FAILED: {failure}", flush=True)

    def leave(self, case: Case, provider: str, mode: str, reason: str) -> None:
        """Note another implementation that did not run, once for each operation and reason."""
        self.note(f"{case.op}: {provider} not run: {reason}")
        self.absent(case, provider, mode, reason)

    def wants(self, provider: str, mode: str) -> bool:
        """Return whether a provider was requested and not measured before."""
        asked = not self.only or any(f"{provider} ".startswith(f"{name} ") for name in self.only)
        return asked and not self.skip(provider, mode)

    def _row(
        self, case: Case, provider: str, mode: str, measured: Measured | None, error: float
    ) -> BenchmarkRow:
        row = BenchmarkRow(
            op=case.op,
            provider=provider,
            mode=mode,
            shape=case.shape,
            size=case.size,
            dtype=self.dtype,
            error_vs_torch=error,
            correct=error <= 2.0,
            device=self.machine,
            versions=self.versions,
        )
        if measured is None:
            return row
        row = replace(row, **asdict(measured))
        if case.bound == "gemm":
            tflops = case.cost(mode).flops / measured.p50_ms / 1e9
            return replace(
                row, tflops=tflops, fraction_of_ceiling=self.fraction(tflops, self.gemm_tflops)
            )
        gb_per_s = case.cost(mode).bytes / measured.p50_ms / 1e6
        return replace(
            row, gb_per_s=gb_per_s, fraction_of_ceiling=self.fraction(gb_per_s, self.copy_gb_per_s)
        )

    def fraction(self, rate: float, ceiling: float) -> float | None:
        """Return the fraction of this GPU's ceiling.

        None on a CPU: its caches hold the small cases, which run faster than the ceiling.
        """
        return rate / ceiling if self.device == "cuda" else None


def sizes(
    lengths: list[int] | None,
    head_dims: list[int] | None,
    widths: list[int] | None,
    tokens: int | None,
) -> Sizes:
    """Return this device's sizes, replaced by what is given."""
    given = {"lengths": lengths, "head_dims": head_dims, "widths": widths}
    changes: dict[str, Any] = {name: tuple(values) for name, values in given.items() if values}
    if tokens:
        changes["tokens"] = tokens
    return replace(GPU_SIZES if torch.cuda.is_available() else CPU_SIZES, **changes)


def run(
    ops: tuple[str, ...],
    sizes: Sizes,
    dtype: str | None,
    modes: tuple[str, ...],
    output: Path,
    command: str,
    only: tuple[str, ...] = (),
) -> int:
    """Measure; write the tables after each row and the plots after each operation.

    Returns 1 if one of our own kernels is wrong or fails, else 0.
    """
    this = this_machine(dtype)
    this.only = only
    this.keep = lambda row: write_tables(output, _heading(this, command), this.rows)
    written: list[Path] = []
    for op in ops:
        try:
            if importlib.util.find_spec("matplotlib") is None:
                this.note("No plots: the package matplotlib is not installed.")
            for case in cases(op, sizes, DTYPES[this.dtype], this.device):
                measure_case(this, case, modes)
            if this.device == "cpu":
                _check_interpreted(this, op, modes)
        except Exception as error:  # even the reference failed; keep what was measured before
            this.note(f"{op}: STOPPED: {_told(error)}")
            this.stopped = True
        written = write_report(output, _heading(this, command), this.rows)
    print(*written, sep="\n")
    return (
        0
        if not this.stopped
        and all(row.correct for row in this.rows if row.provider.startswith(OURS))
        else 1
    )


def _told(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _heading(this: BenchmarkRun, command: str) -> Heading:
    today = datetime.date.today().isoformat()
    return Heading(
        command, today, f"{this.machine} ({this.versions})", _ceilings(this), tuple(this.notes)
    )


def _ceilings(this: BenchmarkRun) -> str:
    return (
        f"Measured ceilings: {this.gemm_tflops:.3g} TFLOP/s in a {this.dtype} matrix product, "
        f"{this.copy_gb_per_s:.3g} GB/s in a copy."
        if this.device == "cuda"
        else ""
    )


def measure_case(this: BenchmarkRun, case: Case, modes: tuple[str, ...]) -> None:
    """Measure every mode of a case with every requested provider."""
    for mode in modes:
        if case.op == "linear_cross_entropy" and mode == "bwd":
            this.note(
                "linear_cross_entropy has no bwd rows: ours computes its gradients in the "
                "forward; see both."
            )
            continue
        wanted = [
            provider
            for provider in providers(case.op, this.device)
            if this.wants(provider.name, mode)
        ]
        if wanted:
            against = expected(case, mode)
        for provider in wanted:
            _measure_one(this, case, mode, provider, against)


def _measure_one(
    this: BenchmarkRun, case: Case, mode: str, provider: Provider, against: Expected
) -> None:
    """Add one row.

    Whatever another implementation raises (no such backend, out of memory, a changed API) becomes a
    note. An error of ours is a failure.
    """
    try:
        function = provider.prepare(case)
        measured = measure(step(function, case, mode), this.device)
        this.add(
            case,
            provider.name,
            mode,
            measured,
            _error(this, case, mode, provider, function, against),
        )
    except UnavailableError as error:
        this.leave(case, provider.name, mode, str(error))
    except Exception as error:
        if provider.name.startswith(OURS):
            this.fail(case, provider.name, mode, _told(error))
        else:
            this.leave(case, provider.name, mode, _told(error))


def _error(
    this: BenchmarkRun,
    case: Case,
    mode: str,
    provider: Provider,
    function: Callable[..., Any],
    against: Expected,
) -> float:
    """Return the error against the expected results.

    A provider that drops other elements than ours is checked without dropout.
    """
    if not provider.own_masks or "dropout" not in case.options:
        return errors(function, case, mode, against)
    this.note(
        f"{case.op}: {provider.name} draws dropout masks of its own; its results were checked "
        f"without dropout."
    )
    options = {
        name: value for name, value in case.options.items() if not name.startswith("dropout")
    }
    return errors(function, replace(case, options=options), mode)


def _check_interpreted(this: BenchmarkRun, op: str, modes: tuple[str, ...]) -> None:
    """Check our kernel's accuracy on small shapes, under the interpreter."""
    this.note(
        "No GPU found: torch's implementations were timed on the CPU; our kernels were checked by "
        "the interpreter, not timed."
    )
    if importlib.util.find_spec("triton") is None:
        this.note("Our kernels were not checked: the package triton is not installed.")
        return
    with _forced("interpret"):
        for case in cases(op, CHECK_SIZES, DTYPES[this.dtype], "cpu"):
            for mode in modes:
                try:
                    this.add(
                        case, INTERPRETED, mode, None, errors(getattr(kernels, op), case, mode)
                    )
                except Exception as error:
                    this.fail(case, INTERPRETED, mode, _told(error))


@contextmanager
def _forced(mode: str) -> Iterator[None]:
    before = os.environ.get("MEGAGPT_KERNELS")
    os.environ["MEGAGPT_KERNELS"] = mode
    try:
        yield
    finally:
        del os.environ["MEGAGPT_KERNELS"]
        if before is not None:
            os.environ["MEGAGPT_KERNELS"] = before


def this_machine(dtype: str | None) -> BenchmarkRun:
    """Return a run on this device, with its ceilings measured now.

    ``dtype`` None is bf16 on a GPU, else fp32.
    """
    device, dtype = (
        ("cuda", dtype or "bf16") if torch.cuda.is_available() else ("cpu", dtype or "fp32")
    )
    gemm = gemm_ceiling_tflops(DTYPES[dtype], device)
    copy = copy_ceiling_gb_per_s(device)
    return BenchmarkRun(device, device_name(), versions(), dtype, gemm, copy)
