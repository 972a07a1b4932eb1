#!/usr/bin/env python3
"""Turn another trainer's configuration into one of this trainer.

python launch/import_config.py FILE --output ours.json
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import add_set_option, command_parser, user_path
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import UserError, run_command, write_atomically


def main() -> None:
    arguments, theirs = parse_arguments()
    from megagpt.migration.configuration.importing import import_config

    output = arguments.output
    if output is not None and output.exists():
        raise UserError(f"{output}: exists already; choose another --output, or remove it")
    made = import_config(arguments.files, theirs, arguments.set)
    for verdict in made.verdicts:
        print(verdict.line(), file=sys.stderr)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    if output is None:
        print(made.text, end="")
        return
    write_atomically(output, made.text)
    print(f"next: python launch/plan.py --deepspeed_config {output} --ranks N", file=sys.stderr)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return our options, and the words after a lone `--`, which are the other trainer's."""
    parser = command_parser(
        description="Turn a DeepSpeed JSON, gpt-neox YAML files, nanoGPT's config/*.py or its "
        "arguments, or Megatron-DeepSpeed's arguments into a configuration, and say on stderr what "
        "became of each key. Nothing in the files is run.",
        epilog="Arguments of the other trainer's command follow after --, for instance "
        "config/train_gpt2.py -- --n_layer=24, or ds_config.json -- --num-layers 24 --lr 1e-4.",
    )
    add = parser.add_argument
    add(
        "files",
        nargs="*",
        type=user_path,
        metavar="FILE",
        help="one .json, one .py, or several .yml",
    )
    add("--output", type=user_path, help="JSON file to write [standard output]")
    add_set_option(parser, SYNONYMS)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end]), words[end + 1 :]


if __name__ == "__main__":
    sys.exit(run_command(main))
