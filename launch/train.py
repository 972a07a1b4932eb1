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
        description="Train a GPT; a run directory with checkpoints is continued."
    )
    add = parser.add_argument
    add(
        "--deepspeed_config",
        default="ds_configs/default.json",
        help="the run's JSON file [ds_configs/default.json]",
    )
    add("--run_dir", type=Path, help="where everything it writes goes [runs/NAME-OF-THE-CONFIG]")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the JSON file",
    )
    add("--resume", action="store_true", help="insist that there is a checkpoint to continue from")
    add(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # DeepSpeed's launcher passes it; the environment has it too
    return parser.parse_args()


if __name__ == "__main__":
    end_process(run_command(main))
