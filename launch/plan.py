#!/usr/bin/env python3
"""Check whether a configuration is legal, fits and how fast it would be, without torch.

python launch/plan.py --deepspeed_config F --hostfile hosts
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import (
    add_config_option,
    add_set_option,
    command_parser,
    non_negative,
    positive,
    probability,
    user_path,
    whole_number,
)
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import ExitCode, abandon, run_command

if TYPE_CHECKING:
    from megagpt.planning.cost.accelerators import Accelerator

RATES = {
    "peak_tflops": "TFLOP/s of a device in 16 bit",
    "link_gb_per_s": "GB/s per direction between the devices of a host",
    "network_gb_per_s": "GB/s per direction from a device to other hosts",
    "host_gb_per_s": "GB/s per direction between a device and its host",
    "host_memory_gb_per_s": "GB/s of a host's memory",
    "nvme_gb_per_s": "GB/s of a host's NVMe",
}


def main() -> int:
    arguments = parse_arguments()
    from megagpt.cluster.hosts import read_hostfile
    from megagpt.planning.placement import hosts_of
    from megagpt.planning.plan import Limits, as_json, assume, make_plan
    from megagpt.planning.report import text

    device = arguments.device
    ranks = arguments.ranks or stated_world_size(arguments)
    hosts = (
        read_hostfile(arguments.hostfile)
        if arguments.hostfile
        else hosts_of(ranks, arguments.slots)
    )
    limits = Limits(
        arguments.device_memory_gib or device.memory_gib,
        arguments.host_memory_gib,
        arguments.reserve_gib,
    )
    rates = {name: getattr(arguments, name) for name in ("efficiency", *RATES)}
    assumed = assume(device, max(host.slots for host in hosts), **rates)
    plan = make_plan(
        arguments.deepspeed_config,
        arguments.set,
        hosts,
        limits,
        assumed,
        bf16_native=device.bf16_native,
    )
    try:
        print(json.dumps(as_json(plan), indent=2) if arguments.json else text(plan), flush=True)
    except BrokenPipeError:  # `| head`: the exit code has the verdict too
        abandon(sys.stdout)
    return ExitCode.DONE if plan.good else ExitCode.BAD_INPUT


def stated_world_size(arguments: argparse.Namespace) -> int:
    """Return the configuration's `megagpt.parallel.world_size`.

    Raises UserError if neither it nor an option gives the number of ranks.
    """
    from megagpt.config import load_config
    from megagpt.utils import UserError

    config = load_config(arguments.deepspeed_config, arguments.set, for_plan=True)
    stated = config.megagpt.parallel.world_size
    if stated is None and not arguments.hostfile:
        raise UserError(
            f"{arguments.deepspeed_config}: the number of ranks is unknown (no "
            "megagpt.parallel.world_size); give --hostfile hosts or --ranks 8"
        )
    return stated or 0


def accelerator(name: str) -> "Accelerator":
    """Parse the name of a device."""
    from megagpt.planning.cost.accelerators import ACCELERATORS, find

    if (found := find(name)) is None:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not known ({', '.join(ACCELERATORS)}); for another device, name the "
            "nearest of these and give its figures: --peak_tflops X --device_memory_gib X "
            "--link_gb_per_s X --host_gb_per_s X"
        )
    return found


def parse_arguments() -> argparse.Namespace:
    from megagpt.planning.cost.accelerators import ACCELERATORS
    from megagpt.planning.plan import EFFICIENCY, HOST_MEMORY_GIB, RESERVE_GIB

    parser = command_parser(
        description="Show whether a configuration is legal and fits, where every rank runs, how "
        "fast a step would be at given or assumed rates, and what would fit instead. Exit code "
        "0: legal and fits; 2: not.",
    )
    add = parser.add_argument
    add_config_option(parser)
    add_set_option(parser, SYNONYMS)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=user_path, help="hostfile, as the launcher reads it")
    where.add_argument(
        "--ranks",
        type=whole_number(1),
        metavar="N",
        help="number of ranks [megagpt.parallel.world_size]",
    )
    add(
        "--slots",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="ranks per host without a hostfile [8]",
    )
    add(
        "--device",
        type=accelerator,
        default="h100",
        metavar="NAME",
        help=f"kind of GPU, also as its driver names it [h100]: {', '.join(ACCELERATORS)}",
    )
    add(
        "--device_memory_gib",
        type=positive,
        metavar="GIB",
        help="memory of a device [from the data sheet]",
    )
    for name, default, what in (
        ("host_memory_gib", HOST_MEMORY_GIB, "memory of a host"),
        ("reserve_gib", RESERVE_GIB, "device memory not for us: CUDA context, NCCL, fragments"),
    ):
        add(
            f"--{name}",
            type=non_negative,
            default=default,
            metavar="GIB",
            help=f"{what} [{default:g}]",
        )
    add(
        "--efficiency",
        type=probability,
        metavar="SHARE",
        help=f"share of the peak that matrix products reach [{EFFICIENCY}]",
    )
    for name, what in RATES.items():
        add(
            f"--{name}",
            type=positive,
            metavar="X",
            help=f"{what} [data sheet or assumption; printed]",
        )
    add("--json", action="store_true", help="print the plan as one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
