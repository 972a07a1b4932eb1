"""The benchmark's rows as a CSV file, a Markdown table, and a plot for each operation and mode."""

import csv
import importlib.util
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BenchmarkRow:
    """One measurement; times and rates are None if a provider was checked but not timed."""

    op: str
    provider: str
    mode: str
    shape: str
    size: int
    dtype: str
    error_vs_torch: float  # 2 or less passes
    correct: bool
    device: str
    versions: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None  # of operations bound by matrix products
    gb_per_s: float | None = None  # of the others: the bytes that must move, over the time
    fraction_of_ceiling: float | None = None
    peak_mib: float | None = None  # on a GPU, beyond the arguments
    failure: str = ""  # why one of our own kernels gave no result

    @property
    def rate(self) -> float | None:
        return self.gb_per_s if self.tflops is None else self.tflops

    @property
    def unit(self) -> str:
        return "GB/s" if self.tflops is None else "TFLOP/s"


_FIGURES = ("p20_ms", "p50_ms", "p80_ms", "tflops", "gb_per_s", "fraction_of_ceiling", "peak_mib")


@dataclass(frozen=True)
class Heading:
    """The conditions of every number."""

    command: str
    date: str
    machine: str
    ceilings: str
    notes: tuple[str, ...]


def write_report(directory: Path, heading: Heading, rows: Sequence[BenchmarkRow]) -> list[Path]:
    """Write results.csv, results.md and, if matplotlib is installed, the plots.

    Returns their paths.
    """
    written = write_tables(directory, heading, rows)
    if importlib.util.find_spec("matplotlib") is None:
        return written
    return written + [
        path for group in _grouped(rows) if (path := _plot(directory, group)) is not None
    ]


def write_tables(directory: Path, heading: Heading, rows: Sequence[BenchmarkRow]) -> list[Path]:
    """Write results.csv and results.md, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "results.csv", directory / "results.md"]
    _replace(written[0], as_csv(rows))
    _replace(written[1], as_markdown(heading, rows))
    return written


def as_csv(rows: Iterable[BenchmarkRow]) -> str:
    """Return a header and one line for each row; a field is empty if not timed."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [field.name for field in fields(BenchmarkRow)], lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()}
        )
    return text.getvalue()


def from_csv(text: str) -> list[BenchmarkRow]:
    """Return the rows that ``as_csv`` wrote."""
    read: dict[str, Callable[[str], object]] = {
        "size": int,
        "correct": lambda word: word == "True",
        "error_vs_torch": float,
        **dict.fromkeys(_FIGURES, lambda word: float(word) if word else None),
    }
    lines = csv.DictReader(io.StringIO(text))
    rows: list[dict[str, Any]] = [
        {name: read.get(name, str)(word) for name, word in line.items()} for line in lines
    ]
    return [BenchmarkRow(**row) for row in rows]


def as_markdown(heading: Heading, rows: Sequence[BenchmarkRow]) -> str:
    """Return the conditions, then a table for each operation and mode."""
    lines = [
        "# Kernel benchmark",
        "",
        f"`{heading.command}`, {heading.date}, on {heading.machine}. {heading.ceilings}",
        "",
        "Error is a multiple of plain torch's own in the same dtype, both measured against the "
        "next wider dtype; 2 or less passes.",
        *(["", *(f"* {note}" for note in heading.notes)] if heading.notes else []),
    ]
    for group in _grouped(rows):
        lines += ["", f"## {group[0].op}, {group[0].mode}", ""]
        lines += [
            "| shape | dtype | provider | p20 / p50 / p80 ms | rate | of ceiling | peak MiB | "
            "error |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_markdown_row(row) for row in group]
    return "\n".join(lines) + "\n"


def _markdown_row(row: BenchmarkRow) -> str:
    if row.failure:
        return f"| {row.shape} | {row.dtype} | {row.provider} | **FAILED**: {row.failure} | | | | |"
    error = f"{row.error_vs_torch:.2f}" if row.correct else f"**WRONG** ({row.error_vs_torch:.3g})"
    if row.p50_ms is None or row.rate is None:
        return f"| {row.shape} | {row.dtype} | {row.provider} | not timed | | | | {error} |"
    times = f"{row.p20_ms:.3f} / {row.p50_ms:.3f} / {row.p80_ms:.3f}"
    fraction = "" if row.fraction_of_ceiling is None else f"{row.fraction_of_ceiling:.0%}"
    rate = f"{row.rate:.4g} {row.unit} | {fraction}"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return f"| {row.shape} | {row.dtype} | {row.provider} | {times} | {rate} | {peak} | {error} |"


def _grouped(rows: Iterable[BenchmarkRow]) -> list[list[BenchmarkRow]]:
    """Return the rows in groups of one operation and mode, in their first order."""
    groups: dict[tuple[str, str], list[BenchmarkRow]] = {}
    for row in rows:
        groups.setdefault((row.op, row.mode), []).append(row)
    return list(groups.values())


def _plot(directory: Path, rows: Sequence[BenchmarkRow]) -> Path | None:
    """Plot the rate by size, with a line for each provider and variant.

    Returns None if nothing was timed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.rate is not None:  # timed, not only checked
            label = row.provider + _variant(row) + ("" if row.correct else " WRONG")
            lines.setdefault(label, []).append((row.size, row.rate))
    if not lines:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(
        title=f"{rows[0].op}, {rows[0].mode}, {rows[0].dtype}, {rows[0].device}",
        xlabel=_axis(rows[0]),
    )
    axes.set(ylabel=rows[0].unit, xscale="log", ylim=(0, None))
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    path = directory / f"{rows[0].op}_{rows[0].mode}.png"
    figure.savefig(path, dpi=120)
    return path


def _axis(row: BenchmarkRow) -> str:
    """Return the name of the size within the shape: ``width`` in ``rows 512, width 768``."""
    return next(
        part for part in reversed(row.shape.split(", ")) if part.endswith(f" {row.size}")
    ).split()[0]


def _variant(row: BenchmarkRow) -> str:
    """Return what distinguishes shapes of one size: the head dimension, or a residual."""
    parts = [part for part in row.shape.split(", ") if part.startswith(("head_dim", "residual"))]
    return f" ({', '.join(parts)})" if parts else ""


def _replace(path: Path, text: str) -> None:
    """Write a new file, then rename it: a killed benchmark leaves the previous report whole."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text)
    os.replace(aside, path)
