"""Compare the fused operations with other implementations, in speed and accuracy.

    python -m kernels.benchmark [attention layernorm ...] --dtype bf16 --mode both --output DIR

Without a GPU it times torch's implementations, and only checks our kernels, under Triton's
interpreter.
"""

import argparse
import sys

from kernels.costs import OPERATIONS
from kernels.options import OptionParser, user_path, whole_number


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns an exit code: 1 if one of our own kernels is wrong or fails, else 0.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    # Imports torch, which takes seconds: only after the command line has been accepted.
    from kernels.bench import run as benchmark_run

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
    parser = OptionParser(
        prog="python -m kernels.benchmark",
        description="Speed and accuracy of the fused operations and other implementations.",
    )
    names = ", ".join(OPERATIONS)
    parser.add_argument(
        "ops", nargs="*", type=_operation, metavar="OP", help=f"operations [all]: {names}"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, else fp32"
    )
    parser.add_argument(
        "--head_dim",
        type=whole_number(1),
        nargs="+",
        help="head dimensions of attention and rotary",
    )
    parser.add_argument(
        "--lengths",
        type=whole_number(1),
        nargs="+",
        help="sequence lengths of attention and rotary",
    )
    parser.add_argument(
        "--widths", type=whole_number(1), nargs="+", help="hidden sizes of the other operations"
    )
    parser.add_argument(
        "--tokens", type=whole_number(1), help="rows of every case: batch times length"
    )
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
        help="only these, by name or its first words, such as torch or sdpa",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        required=True,
        metavar="DIR",
        help="for results.csv, results.md, plots",
    )
    return parser


def _operation(text: str) -> str:
    """Return the operation of this name; underscores and hyphens are optional."""
    for name in OPERATIONS:
        if name.replace("_", "") == text.lower().replace("_", "").replace("-", ""):
            return name
    raise argparse.ArgumentTypeError(
        f"{text}: unknown operation; choose from {', '.join(OPERATIONS)}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
