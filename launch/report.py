"""Write one HTML page with the curves of a run.

python launch/report.py --run_dir runs/NAME
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from megagpt.common.arguments import command_parser, user_path
from megagpt.utils import run_command


def main() -> None:
    arguments = parse_arguments()
    # after the arguments, so that --help answers at once
    from megagpt.monitoring.report import write_report

    print(write_report(arguments.run_dir))


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Write report.html into a run directory and print its path: loss, gradient "
        "norm, learning rate, speed, memory, samples and events, in one file that needs no "
        "network. Works during the run."
    )
    parser.add_argument(
        "--run_dir",
        type=user_path,
        required=True,
        metavar="DIR",
        help="run directory, such as runs/NAME",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
