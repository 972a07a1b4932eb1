"""Measure the fused operations beside everything else that computes the same, speed and accuracy in
every row.

    python -m kernels.benchmark [attention layernorm ...] --dtype bf16 --mode both --output DIR

On a machine without a GPU it times torch's providers and checks our kernels under Triton's
interpreter, untimed.
"""

import argparse
import sys
from pathlib import Path

from kernels.costs import OPERATIONS


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns an exit code, 1 where one of our own kernels
    is wrong or fails.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    from kernels.bench import (
        run as benchmark_run,
    )  # torch: only once the command line is known to be right

    command = " ".join(["python -m kernels.benchmark", *arguments])
    return benchmark_run.run(
        tuple(options.ops or OPERATIONS),
        benchmark_run.sizes(options.lengths, options.head_dim, options.widths, options.tokens),
        options.dtype,
        tuple(options.mode),
        options.output,
        command,
        tuple(options.providers),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark",
        description="Speed and accuracy of the fused operations and their rivals.",
    )
    names = ", ".join(OPERATIONS)
    parser.add_argument(
        "ops", nargs="*", type=_operation, metavar="OP", help=f"operations, all by default: {names}"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, else fp32"
    )
    parser.add_argument(
        "--head-dim", type=int, nargs="+", help="head dimensions of attention and rotary"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="sequence lengths of attention and rotary"
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", help="hidden sizes of the other operations"
    )
    parser.add_argument("--tokens", type=int, help="rows of every case: batch times length")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=("fwd", "bwd", "both"),
        default=("fwd", "both"),
        help="default: fwd both",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        default=(),
        metavar="NAME",
        help="only these, by name or its first words: torch, sdpa",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="for results.csv, results.md, plots",
    )
    return parser


def _operation(text: str) -> str:
    """An operation by its name, with or without underscores: layernorm is layer_norm."""
    for name in OPERATIONS:
        if name.replace("_", "") == text.lower().replace("_", "").replace("-", ""):
            return name
    raise argparse.ArgumentTypeError(
        f"{text}: no such operation; choose from {', '.join(OPERATIONS)}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
