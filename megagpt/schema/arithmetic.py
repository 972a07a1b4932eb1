"""Integer arithmetic of a run: divisibility, and the closest values that divide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def nearest_multiples(value: int, unit: int) -> str:
    """Return the multiples of `unit` below and above `value` for an error message: `510 or 513`."""
    below, above = value // unit * unit, round_up(value, unit)
    return f"{below} or {above}" if 0 < below < above else f"{above}"


def nearest_divisors(value: int, whole: int) -> str:
    """Return the divisors of `whole` below and above `value` for an error message: `8 or 16`."""
    small = [candidate for candidate in range(1, isqrt(whole) + 1) if whole % candidate == 0]
    divisors = sorted({*small, *(whole // divisor for divisor in small)})
    below = [divisor for divisor in divisors if divisor <= value][-1:]
    above = [divisor for divisor in divisors if divisor >= value][:1]
    return " or ".join(str(divisor) for divisor in dict.fromkeys(below + above))


def nearest_first(value: int, among: Iterable[int]) -> list[int]:
    """Return the integers sorted by distance from `value`; the smaller first if equally near."""
    return sorted(among, key=lambda other: (abs(other - value), other))


@dataclass(frozen=True)
class BatchSizes:
    """DeepSpeed's three batch sizes, in sequences.

    `train_batch = micro_batch * accumulation_steps * data_parallel_size`.
    """

    train_batch: int
    micro_batch: int
    accumulation_steps: int


def solve_batch(
    train_batch: int | None,
    micro_batch: int | None,
    accumulation_steps: int | None,
    data_parallel_size: int,
) -> BatchSizes | str:
    """Compute the absent batch sizes as DeepSpeed does, but never round.

    Return a string with the reason if no integers fit.
    """
    ranks = data_parallel_size
    if train_batch is None:
        if micro_batch is None:
            return "give train_batch_size or train_micro_batch_size_per_gpu"
        steps = accumulation_steps or 1
        return BatchSizes(micro_batch * steps * ranks, micro_batch, steps)
    if micro_batch is None:
        steps = accumulation_steps or 1
        if train_batch % (steps * ranks):
            by = f"{_ranks(ranks)} x {steps} accumulation steps" if steps > 1 else _ranks(ranks)
            return _does_not_divide(train_batch, steps * ranks, by)
        return BatchSizes(train_batch, train_batch // (steps * ranks), steps)
    if train_batch % (micro_batch * ranks):
        return _does_not_divide(
            train_batch, micro_batch * ranks, f"{_ranks(ranks)} x micro-batches of {micro_batch}"
        )
    steps = train_batch // (micro_batch * ranks)
    if accumulation_steps not in (None, steps):
        return (
            f"{train_batch} is not {accumulation_steps} accumulation steps x {micro_batch} x "
            f"{_ranks(ranks)}: use gradient_accumulation_steps {steps}, or train_batch_size "
            f"{accumulation_steps * micro_batch * ranks}"
        )
    return BatchSizes(train_batch, micro_batch, steps)


def _does_not_divide(train_batch: int, unit: int, by: str) -> str:
    return f"{train_batch} on {by}: use {nearest_multiples(train_batch, unit)}"


def _ranks(count: int) -> str:
    return f"{count} data-parallel rank{'s' if count != 1 else ''}"
