"""Compile the DeepSpeed ops that a configuration needs.

python launch/build_ops.py
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from megagpt.common.arguments import add_config_option, command_parser
from megagpt.utils import run_command

LOST = {"AsyncIOBuilder": "offload to NVMe needs it"}
LOST_ADAM = "training works without it, but uses torch's Adam, whose optimizer step is slower"


def main() -> None:
    arguments = parse_arguments()
    from megagpt.config import load_config  # after the arguments, so that --help answers at once

    config = load_config(arguments.deepspeed_config)
    from megagpt.parallel.device import announce_to_deepspeed

    announce_to_deepspeed()

    # after the configuration, so that its errors appear at once
    from deepspeed.accelerator import get_accelerator

    from megagpt.parallel import ops

    ops.use_private_extensions()
    for op in ops.needed_ops(config, get_accelerator().device_name()):
        if reason := ops.missing_tools(op):
            print(
                f"DeepSpeed's {op.removesuffix('Builder')} cannot be built: {reason}",
                file=sys.stderr,
            )
            print(LOST.get(op, LOST_ADAM), file=sys.stderr)
        else:
            ops.build([op])


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Compile the DeepSpeed ops that a configuration needs, into the cache that "
        "its runs use. A run compiles them itself if you do not."
    )
    add_config_option(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
