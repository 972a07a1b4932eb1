#!/usr/bin/env python3
"""Start a run from a checkpoint of DeepSpeed, Megatron-DeepSpeed or gpt-neox.

python launch/import_checkpoint.py --checkpoint DIR --deepspeed_config F --run_dir runs/NAME
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import add_config_option, add_set_option, command_parser, user_path
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import human_count, run_command


def main() -> None:
    arguments = parse_arguments()
    from megagpt.config import load_config

    config = load_config(arguments.deepspeed_config, arguments.set)
    from megagpt.parallel.device import announce_to_deepspeed

    announce_to_deepspeed()
    from megagpt.migration.checkpoint.importing import import_checkpoint  # imports DeepSpeed

    made = import_checkpoint(arguments.checkpoint, config, arguments.run_dir)
    print(
        f"{arguments.run_dir}: step {made.step}, {human_count(made.parameters)} parameters of "
        f"{made.description}"
    )
    print(
        f"next: deepspeed launch/train.py --deepspeed_config "
        f"{shlex.quote(str(made.configuration))} --run_dir {shlex.quote(str(arguments.run_dir))}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Create a run directory from the weights of a universal checkpoint of "
        "DeepSpeed, or of the layer_* or mp_rank_* files of Megatron-DeepSpeed and gpt-neox. "
        "Objects in them that are no tensors are refused. Adam's moments are those of a universal "
        "checkpoint that has them, and the run goes on at its step; else they begin at zero."
    )
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, help="directory of the checkpoint")
    add_config_option(parser, "JSON file of the run, with the checkpoint's model", required=True)
    add(
        "--run_dir",
        type=user_path,
        required=True,
        help="run directory to create, such as runs/NAME",
    )
    add_set_option(parser, SYNONYMS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
