"""Train a model.

deepspeed launch/train.py, or for one process: python launch/train.py
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from megagpt.common.arguments import command_parser
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
    add(
        "--deepspeed_config",
        default="ds_configs/default.json",
        help="JSON file of the run [ds_configs/default.json]",
    )
    add(
        "--run_dir",
        type=Path,
        help="directory for everything the run writes [runs/NAME-OF-THE-CONFIG]",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the JSON file",
    )
    add("--resume", action="store_true", help="fail if there is no checkpoint to continue from")
    # DeepSpeed's launcher passes it; the environment has it too
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    end_process(run_command(main))
