"""Performance targets of this project, beside what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.case import MET, NOT_MET, NOT_RUN


@dataclass(frozen=True)
class Target:
    """A figure that ours must reach in every matching row: ``least`` times the other's.

    ``rival`` names the other; without one the figure itself must reach ``least``. Larger is better
    in every ``quantity``. ``shape`` are parts of the shape's name.
    """

    op: str
    mode: str
    ours: str
    rival: str
    least: float
    shape: tuple[str, ...] = ()
    quantity: str = "rate"


CAUSAL = ("causal",)
# With rows of 768 numbers, fewer than 64 Ki rows keep a GPU busy too briefly: starting and ending
# the kernel takes as long.
REACHABLE = ("rows 65536",)
TARGETS = (
    Target("attention", "fwd", "megagpt triton", "sdpa flash", 1.15, CAUSAL),
    Target("attention", "fwd", "megagpt hopper", "sdpa cudnn", 1.0, ("head_dim 64", "causal")),
    Target("attention", "fwd", "megagpt hopper", "sdpa cudnn", 0.9, ("head_dim 128", "causal")),
    Target("attention", "bwd", "megagpt triton", "sdpa flash", 1.1, CAUSAL),
    # Forward and backward together decide in training; torch uses cuDNN on a Hopper GPU.
    Target("attention", "both", "megagpt hopper", "sdpa cudnn", 1.0, CAUSAL),
    Target("attention", "both", "megagpt hopper", "flex_attention", 1.0, CAUSAL),
    Target("attention", "both", "megagpt triton", "flex_attention", 1.0, CAUSAL),
    Target("layer_norm", "fwd", "megagpt triton", "", 0.9, REACHABLE, "fraction_of_ceiling"),
    Target("layer_norm", "bwd", "megagpt triton", "", 0.8, REACHABLE, "fraction_of_ceiling"),
    Target("layer_norm", "bwd", "megagpt triton", "torch", 2.0),
    Target("linear_cross_entropy", "both", "megagpt triton", "torch", 1.0),
    # Of 29 ms on an H200 at this size the products take 25; the rest moves the logits and the
    # weight's gradient (estimate).
    Target(
        "linear_cross_entropy",
        "both",
        "megagpt triton",
        "",
        0.8,
        ("width 4096,",),
        "fraction_of_ceiling",
    ),
    # From width 4096 on, most of the memory is the weight's fp32 gradient, which both hold.
    Target(
        "linear_cross_entropy",
        "both",
        "megagpt triton",
        "torch",
        10.0,
        ("width 768,",),
        "smallness",
    ),
)


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line for each target and measured shape; a target without one is not run.

    A row has the fields of kernels.bench.report.BenchmarkRow.
    """
    found = {
        (row["op"], row["mode"], _without_version(row["provider"]), row["shape"]): row
        for row in rows
    }
    lines = []
    for target in TARGETS:
        measured = {
            shape: None for op, mode, _, shape in found if (op, mode) == (target.op, target.mode)
        }
        shapes = [shape for shape in measured if all(part in shape for part in target.shape)]
        for shape in shapes or [", ".join(target.shape).rstrip(",") or "any"]:
            ours, rival = (
                found.get((target.op, target.mode, who, shape))
                for who in (target.ours, target.rival)
            )
            lines.append(_line(target, shape, ours, rival))
    return lines


def _line(
    target: Target, shape: str, ours: dict[str, Any] | None, rival: dict[str, Any] | None
) -> dict[str, Any]:
    figure = _figure(ours, target.quantity)
    other = _figure(rival, target.quantity) if target.rival else 1.0
    ratio = None if figure is None or not other else figure / other
    return {
        "operation": f"{target.op} {target.mode}",
        "shape": shape,
        "measured": f"{target.ours}, {target.quantity.replace('_', ' ')}"
        + (f" / {target.rival}" * bool(target.rival)),
        "ours_ms": _milliseconds(ours),
        "rival_ms": _milliseconds(rival),
        "ratio": "" if ratio is None else f"{ratio:.2f}",
        "wanted": target.least,
        "verdict": _verdict(target, ours, rival, ratio),
    }


def _verdict(
    target: Target, ours: dict[str, Any] | None, rival: dict[str, Any] | None, ratio: float | None
) -> str:
    """Return the verdict; a kernel that is wrong or failed does not meet its target."""
    if ours is not None and (ours["failure"] or not ours["correct"]):
        return f"{NOT_MET}: {ours['failure'] or 'its result is wrong'}"
    if ratio is None:
        absent = (
            target.ours
            if ours is None
            else target.rival
            if target.rival and rival is None
            else "its figure"
        )
        return f"{NOT_RUN}: no row of {absent}"
    return MET if ratio >= target.least else NOT_MET


def _milliseconds(row: dict[str, Any] | None) -> str:
    return "" if row is None or row["p50_ms"] is None else f"{row['p50_ms']:.4f}"


def _figure(row: dict[str, Any] | None, quantity: str) -> float | None:
    if row is None:
        return None
    if quantity == "smallness":
        return 1.0 / row["peak_mib"] if row["peak_mib"] else None
    if quantity == "rate":
        quantity = "gb_per_s" if row["tflops"] is None else "tflops"
    value: float | None = row[quantity]
    return value


def _without_version(provider: str) -> str:
    """Return the provider without its version: ``sdpa cudnn`` for ``sdpa cudnn 91900``."""
    return provider.rstrip("0123456789 ") if provider.startswith("sdpa") else provider
