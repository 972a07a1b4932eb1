"""Check and measure everything on this GPU, in parts of bounded time.

    python -m benchmarks.gpu [first-light|tests|targets|attention|training|offload|long|all] --minutes 10 --output DIR

The same command again goes on where the last one stopped: it takes over what the same commit measured with the same
versions, ptxas and device. DIR/results.jsonl has a line a finding, DIR/report.md the tables, DIR/logs what each case
said. Exit code: 0 where all that ran was right, 1 where something ran and was wrong, 2 where nothing could run.
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

MINUTES = 10.0


def main(
    arguments: list[str] | None = None,
    machine: Machine | None = None,
    parts: Sequence[tuple[str, Sequence[Case]]] | None = None,
) -> int:
    """Run the parts that were asked for; returns the exit code. ``machine`` and ``parts`` stand for what is found."""
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
            print("interrupted: what follows was done before", file=sys.stderr)
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
        (name, [case for case in PARTS[name](machine.cores) if not words or any(word in case.name for word in words)])
        for name in names
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__.splitlines()[0],
        epilog=" ".join(__doc__.split("\n\n")[2].split()),
    )
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all", help="default: all, in this order")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for this call [{MINUTES:.0f}]")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR", help="[runs/gpu]")
    parser.add_argument(
        "--cases", nargs="+", default=(), metavar="WORD", help="only cases with one of these in the name"
    )
    parser.add_argument("--again", action="store_true", help="take nothing over from earlier calls")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
