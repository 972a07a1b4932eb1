#!/usr/bin/env python3
"""Start a run from a published Hugging Face model.

python launch/import_hf.py --model DIR --deepspeed_config F --run_dir runs/NAME
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
    from megagpt.huggingface.importing import import_model  # imports DeepSpeed

    made = import_model(arguments.model, config, arguments.run_dir, ignored=arguments.ignore_keys)
    print(
        f"{arguments.run_dir}: step 0, {human_count(made.parameters)} parameters of "
        f"{made.architecture}"
    )
    if made.given_way:
        print(f"replaced in {arguments.deepspeed_config}: {', '.join(made.given_way)}")
    if not made.tokenizer_compared:
        print(
            f"{arguments.model}: no tokenizer.json; make sure that the data were prepared with "
            f"the tokenizer of this model"
        )
    trained_in = f"{arguments.run_dir}{'-lora' if made.trains_adapters else ''}"
    print(
        f"next: deepspeed launch/train.py --deepspeed_config "
        f"{shlex.quote(str(made.configuration))} --run_dir {shlex.quote(trained_in)}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Create a run directory from a model that Hugging Face transformers saved "
        "(config.json and safetensors). Training continues from its weights, with the data, "
        "optimizer and ranks of the configuration."
    )
    add = parser.add_argument
    add("--model", type=user_path, required=True, help="directory of the model")
    add_config_option(parser, "JSON file of the run; --model replaces its model", required=True)
    add(
        "--run_dir",
        type=user_path,
        required=True,
        help="run directory to create, such as runs/NAME",
    )
    add_set_option(parser, SYNONYMS)
    add(
        "--ignore_keys",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="unknown keys of the model's config.json that change no result",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
