"""Train a model.

deepspeed launch/train.py, or for one process: python launch/train.py
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from megagpt.common.arguments import (
    add_config_option,
    add_launcher_options,
    add_set_option,
    command_parser,
    user_path,
)
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import end_process, run_command


def main() -> int:
    arguments = parse_arguments()
    from megagpt.run.startup import main as start

    return start(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Train a GPT. A run directory with checkpoints continues from the newest."
    )
    add = parser.add_argument
    add_config_option(parser)
    add_set_option(parser, SYNONYMS)
    add(
        "--run_dir",
        type=user_path,
        help="directory for everything the run writes [runs/NAME-OF-THE-CONFIG]",
    )
    add("--resume", action="store_true", help="fail if there is no checkpoint to continue from")
    add(
        "--allow_change",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="continue a run with another value of these keys: optimizer, scheduler, "
        "gradient_clipping, train_batch_size, megagpt.model.dropout, megagpt.data",
    )
    add_launcher_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    end_process(run_command(main))
