"""Train as `launch/train.py` does, under the faults of the variable MEGAGPT_FAULTS."""

import sys
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.train import parse_arguments
from megagpt.utils import end_process, run_command
from tests.support import faults


def main() -> int:
    """Train as the command line says, under the faults that the variable names."""
    arguments = parse_arguments()
    from megagpt.run.startup import main as start

    return start(arguments, partial(faults.sabotage, faults=faults.from_environment()))


if __name__ == "__main__":
    end_process(run_command(main))
