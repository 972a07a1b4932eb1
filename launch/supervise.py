"""Restart a run after each crash; it resumes from its last checkpoint.

python launch/supervise.py --restarts 5 -- deepspeed launch/train.py ...
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from megagpt.common.arguments import command_parser, whole_number
from megagpt.utils import run_command


def main() -> int:
    arguments = parse_arguments()
    # after the arguments, so that --help answers at once
    from megagpt.run.supervise import supervise

    return supervise(arguments.command, arguments.restarts)


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Run a training command and restart it after each crash. Do not restart it "
        "after success (0), bad input (2), preemption with a save (3) or a stop by a guard (4), "
        "nor after two crashes at the same step without a new checkpoint. SIGTERM and Ctrl-C "
        "save and end, SIGUSR1 saves. Exit with the run's code."
    )
    parser.add_argument(
        "--restarts", type=whole_number(0), default=5, help="maximum number of restarts [5]"
    )
    parser.add_argument(
        "command", nargs="+", help="the command, after --, such as deepspeed launch/train.py ..."
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
