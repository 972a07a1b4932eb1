"""Check and measure everything on this GPU, in parts of bounded time.

    python -m benchmarks.gpu [PART ...] --minutes 10 --output DIR

Parts: first-light, tests, targets, attention, training, offload, long, all.

The same command again continues where the last one stopped. It reuses what the same commit measured
with the same versions, ptxas and device. DIR/results.jsonl has one line for each finding,
DIR/report.md the tables, DIR/logs the output of each case. Exit code: 0 if all that ran was right,
1 if something that ran was wrong, 2 if nothing could run.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import Case
from benchmarks.gpu.machine import Machine, identity_of, this_machine
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report import Report
from benchmarks.gpu.run import Flow, Outcome, writable
from megagpt.common.arguments import command_parser, positive, user_path

MINUTES = 10.0


def main(
    arguments: list[str] | None = None,
    machine: Machine | None = None,
    parts: Sequence[tuple[str, Sequence[Case]]] | None = None,
) -> int:
    """Run the requested parts and return the exit code.

    ``machine`` and ``parts`` replace what would be found.
    """
    began = time.monotonic()
    options = _parser().parse_args(arguments)
    machine = this_machine() if machine is None else machine
    problem = writable(options.output)
    if problem:
        machine = replace(machine, lack=problem)
    chosen = _chosen(machine, options) if parts is None else parts
    identity = identity_of(machine)
    offset = 0
    if problem:
        outcome = Outcome.impossible(problem, chosen)
    else:
        flow = Flow(machine, identity, options.output, began + 60 * options.minutes, options.again)
        offset = flow.offset
        # `timeout` ends a command by SIGTERM; the case that runs must end with it.
        before = signal.signal(signal.SIGTERM, _interrupted)
        try:
            outcome = flow.run(chosen)
        except KeyboardInterrupt:
            outcome = flow.outcome
            print("interrupted; the report covers what was done before", file=sys.stderr)
        finally:
            signal.signal(signal.SIGTERM, before)
    report = Report.of(identity, outcome, options.output, offset)
    unwritten = "" if problem else report.write()
    if unwritten:
        outcome.unwritten.append(unwritten)
    print(*report.screen(), sep="\n")
    return outcome.exit_code


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def _chosen(machine: Machine, options: argparse.Namespace) -> list[tuple[str, list[Case]]]:
    names = list(PARTS) if options.part == "all" else [options.part]
    words: Sequence[str] = options.cases
    return [
        (
            name,
            [
                case
                for case in PARTS[name](machine.cores)
                if not words or any(word in case.name for word in words)
            ],
        )
        for name in names
    ]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        prog="python -m benchmarks.gpu",
        description=__doc__.splitlines()[0],
        epilog=" ".join(__doc__.split("\n\n")[2].split()),
    )
    parser.add_argument(
        "part",
        nargs="?",
        choices=[*PARTS, "all"],
        default="all",
        help="default: all, in this order",
    )
    parser.add_argument(
        "--minutes", type=positive, default=MINUTES, help=f"time for this call [{MINUTES:.0f}]"
    )
    parser.add_argument(
        "--output", type=user_path, default=Path("runs/gpu"), metavar="DIR", help="[runs/gpu]"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=(),
        metavar="WORD",
        help="only cases whose name contains one of these",
    )
    parser.add_argument("--again", action="store_true", help="reuse nothing from earlier calls")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
