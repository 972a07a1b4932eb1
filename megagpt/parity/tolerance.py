"""How far a run on a mesh may differ from one plain process in fp32.

In fp32 it differs only by sums in another order: by nothing, within a tolerance well above the
rounding of fp32.

In bf16 it may lose no more than a plain process loses by computing in bf16. That process is the
reference in fp32 with one change: every matrix product, norm and activation sees weights and hidden
states rounded to bf16; master weights and Adam stay in fp32. Its distance from fp32 is bf16's own
rounding, R. A mesh rounds as often, and once more wherever partial results meet (micro-batches,
data replicas, tensor shards): few roundings compared with the dozens of a forward and backward, so
2 R is allowed. R of a single number may be small by chance, so it counts as one rounding at least:
for a norm 2^-9, for a loss that over the square root of its number of tokens. After the first step
both also differ through the weights: by R of the weights times the change of the loss, or of the
norm, over the run. (Measured: a second norm was off by 4.7e-3, and by 8e-4 at a learning rate so
small that the weights stay the same.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from megagpt.parity.plain import WEIGHT, PlainRun

FP32_TOLERANCE = 1e-4  # of a loss or norm; sums in another order differed by 1e-6 when measured
# Times that, of a parameter's largest change: Adam divides small differences by small numbers.
OF_WEIGHTS = 100
BF16_TOLERANCE = 2.0  # times R
ROUNDING = 2.0**-9  # the largest relative error of one rounding to bf16's 8 bits


@dataclass(frozen=True)
class Straying:
    """Differences from the plain process in fp32: the largest of a loss, of a norm, of the weights.

    All are relative. For weights in fp32: the largest of an element, as a share of the largest
    change of its parameter. In bf16: the norm of all differences, as a share of the norm of all
    changes.
    """

    loss: float
    norm: float
    weights: float

    def within(self, limit: Self) -> bool:
        """Return whether all differences are within the limit; False for NaN."""
        return self.loss <= limit.loss and self.norm <= limit.norm and self.weights <= limit.weights


def limit_in_fp32(tolerance: float) -> Straying:
    """Return how far a mesh may differ in fp32."""
    return Straying(tolerance, tolerance, OF_WEIGHTS * tolerance)


def limit_in_bf16(
    rounding: Straying, exact: PlainRun, tokens_per_step: int, tolerance: float
) -> Straying:
    """Return how far a mesh may differ in bf16, given the ``rounding`` of the plain process."""
    fall, change = (
        largest_difference(numbers[-1:], numbers[:1]) for numbers in (exact.losses, exact.norms)
    )
    loss = max(rounding.loss, ROUNDING / math.sqrt(tokens_per_step), rounding.weights * fall)
    norm = max(rounding.norm, ROUNDING, rounding.weights * change)
    return Straying(tolerance * loss, tolerance * norm, tolerance * rounding.weights)


def straying(
    losses: Sequence[float], norms: Sequence[float], weights: Mapping[str, Tensor], exact: PlainRun
) -> Straying:
    """Return how far a run in bf16 differs; ``weights`` are flat, by name."""
    squares = sum(
        squared_distance(weights[name], exact.state[WEIGHT][name]) for name in exact.start
    )
    return Straying(
        largest_difference(losses, exact.losses),
        largest_difference(norms, exact.norms),
        share_of_changes(squares, exact),
    )


def largest_difference(found: Sequence[float], exact: Sequence[float]) -> float:
    """Return the largest relative difference of a step's number; infinite if one is NaN."""
    differences = [
        abs(value - expected) / abs(expected) for value, expected in zip(found, exact, strict=True)
    ]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def squared_distance(found: Tensor, exact: Tensor) -> float:
    """Return the square of the norm of a difference."""
    return float((found - exact).double().square().sum())


def share_of_changes(squares: float, exact: PlainRun) -> float:
    """Return the norm of the weights' differences as a share of the norm of their changes.

    ``squares`` is the square of the first norm.
    """
    changes = sum(
        squared_distance(exact.state[WEIGHT][name], before) for name, before in exact.start.items()
    )
    return math.sqrt(squares / changes)
