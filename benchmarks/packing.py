"""Measure how full samples of packed conversations are, and how long packing takes.

    python -m benchmarks.packing

The lengths are drawn from a log-normal distribution, as those of chat data are skewed: a median of
245 places, a mean of 404, cut at the length of a sample. Beside packing by best fit stand one
conversation a sample, and the fewest samples that could hold all places.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.machine import write_table
from megagpt.common.arguments import command_parser, whole_number
from megagpt.data.chat.packing import pack

MEDIAN = 245.0
SIGMA = 1.0
SAMPLES = (2048, 4096, 8192)  # lengths of a sample


def skewed(count: int, longest: int, seed: int = 0) -> np.ndarray:
    """Return the places of `count` conversations, int64, at most `longest` each."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, size=count)
    return np.clip(drawn.astype(np.int64), 1, longest)


def measure(count: int, length: int) -> dict[str, Any]:
    """Return a row: shares of the places that are filled, in percent, and seconds."""
    lengths = skewed(count, length)
    started = time.process_time()
    packs = pack(lengths, length, seed=0)
    seconds = time.process_time() - started
    places = int(lengths.sum())
    return {
        "conversations": count,
        "sample_length": length,
        "samples": len(packs),
        "fewest_possible": -(-places // length),
        "filled_percent": f"{100 * places / (len(packs) * length):.2f}",
        "one_per_row_percent": f"{100 * places / (count * length):.2f}",
        "processor_s": f"{seconds:.2f}",
    }


def main() -> None:
    """Write the table."""
    parser = command_parser(description="Measure the packing of conversations.")
    parser.add_argument(
        "--conversations",
        nargs="+",
        type=whole_number(1),
        default=[1_000, 100_000, 2_000_000],
        help="numbers of conversations [%(default)s]",
    )
    counts = parser.parse_args().conversations
    write_table("packing", "benchmarks.packing", [measure(n, s) for n in counts for s in SAMPLES])


if __name__ == "__main__":
    main()
