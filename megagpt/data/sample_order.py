"""The order of samples: pure functions of integers, without a stored permutation.

`permute` shuffles an epoch by a small cipher over exactly `count` values. `Blend` interleaves
datasets so that every prefix of the run has the right share of each. Both compute any index
directly, in memory that does not grow with the number of samples, so a checkpoint stores one
integer.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megagpt.utils import UserError

# four suffice for large domains (Luby and Rackoff 1988); small ones need more
ROUNDS = 8
LONGEST_PERIOD = 65_536  # of a blend: takes 0.1 s to lay out and 0.4 MB


def permute(index: int, count: int, *, seed: int, epoch: int) -> int:
    """Return the `index`-th element of a permutation of range(count) that seed and epoch select.

    A Feistel network on the mixed radix (left, right), with addition modulo each radix instead
    of xor. It repeats (cycle walking) until the value is below `count`: Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002. The domain is less than sqrt(count) + 1
    larger than count, so a second walk is rare.
    """
    left_size = math.isqrt(count - 1) + 1
    right_size = -(-count // left_size)
    while True:
        left = index % left_size
        right = index // left_size
        for number in range(0, ROUNDS, 2):
            left = (left + _round_value(seed, epoch, number, right)) % left_size
            right = (right + _round_value(seed, epoch, number + 1, left)) % right_size
        index = right * left_size + left
        if index < count:
            return index


def _round_value(seed: int, epoch: int, number: int, half: int) -> int:
    digest = hashlib.blake2b(
        struct.pack("<qQQQ", seed, epoch, number, half), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little")


class Blend:
    """Which dataset each sample comes from; after n samples, dataset d has n x share(d), within 1.

    The shares are exact fractions of a common period, laid out once by earliest deadline first:
    item j of a dataset may come no earlier than floor(j / share) and must come before ceil((j +
    1) / share). On one processor that meets every deadline (Baruah et al., "Proportionate
    progress", Algorithmica 1996), which is the bound above.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Compute one period from positive `weights` of any sum.

        Raises UserError if their common period exceeds 65,536 samples.
        """
        self.shares = _shares(weights)
        self.period = math.lcm(*(share.denominator for share in self.shares))
        if self.period > LONGEST_PERIOD:
            nearest = [max(round(float(share), 4), 0.0001) for share in self.shares]
            raise UserError(
                f"megagpt.data.path: weights {list(weights)} repeat only after {self.period} "
                f"samples (limit {LONGEST_PERIOD}); write them as round decimals or whole numbers, "
                f"for example {nearest}"
            )
        self._counts = [int(share * self.period) for share in self.shares]
        self._dataset, self._rank = _lay_out(self._counts, self.period)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (dataset, how many of its samples came before) of the blend's sample `index`."""
        cycle, place = divmod(index, self.period)
        dataset = int(self._dataset[place])
        return dataset, cycle * self._counts[dataset] + int(self._rank[place])


def _shares(weights: Sequence[float]) -> list[Fraction]:
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(
            f"megagpt.data.path: weights {list(weights)}: each must be a positive number"
        )
    # 0.1 means one tenth, not the nearest binary fraction
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _lay_out(counts: list[int], period: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one period: the dataset of each place, and its rank among the dataset's own."""
    datasets = np.empty(period, np.uint16)
    ranks = np.empty(period, np.uint32)
    waiting = [(0, dataset, 0) for dataset in range(len(counts))]  # (earliest place, dataset, rank)
    ready: list[tuple[int, int, int]] = []  # (deadline, dataset, rank)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, dataset, rank = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(rank + 1) * period // counts[dataset]), dataset, rank))
        _, dataset, rank = heapq.heappop(ready)
        datasets[place], ranks[place] = dataset, rank
        heapq.heappush(waiting, ((rank + 1) * period // counts[dataset], dataset, rank + 1))
    return datasets, ranks
