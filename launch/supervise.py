"""Restart a run after each crash; it resumes from its last checkpoint.

python launch/supervise.py --restarts 5 -- deepspeed launch/train.py ...
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from megagpt.common.arguments import command_parser
from megagpt.utils import run_command


def main() -> int:
    arguments = parse_arguments()
    from megagpt.run.supervise import (
        supervise,
    )  # after the arguments, so that --help answers at once

    return supervise(arguments.command, arguments.restarts)


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Run a training command and start it again after a crash, as often as "
        "allowed; not where it was "
        "done (0), had bad input (2), was pre-empted and saved (3) or stopped by a guard (4), nor "
        "after two crashes at "
        "the same step without a new checkpoint. SIGTERM and Ctrl-C save and end, SIGUSR1 saves. "
        "Exits with the run's "
        "code."
    )
    parser.add_argument(
        "--restarts", type=int, default=5, help="the most starts after the first [5]"
    )
    parser.add_argument(
        "command", nargs="+", help="after --: the command, such as deepspeed launch/train.py ..."
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
