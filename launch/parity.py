#!/usr/bin/env python3
"""Check that every parallel strategy trains like one plain process.

python launch/parity.py on this machine, or under a launcher: deepspeed launch/parity.py
"""

import argparse
import os.path
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.cluster.hosts import read_hostfile
from megagpt.cluster.launch_command import hostfile_of_launcher
from megagpt.cluster.launchers import Launch, adopt_launch, signs_of_launcher
from megagpt.common.arguments import (
    add_config_option,
    add_launcher_options,
    command_parser,
    non_negative,
    whole_number,
)
from megagpt.config import load_config
from megagpt.parity.cases import ParityRequest, plan, require_devices, require_launched
from megagpt.utils import run_command


def main() -> int:
    arguments = parse_arguments()
    if (hostfile := hostfile_of_launcher()) is not None:
        read_hostfile(hostfile)  # without it DeepSpeed would use this machine only
    signs = signs_of_launcher()
    launch = adopt_launch()
    request = ParityRequest(
        load_config(arguments.deepspeed_config),
        arguments.deepspeed_config,
        arguments.steps,
        arguments.precision,
        arguments.tolerance,
        arguments.nvme_path,
        arguments.own_only,
    )
    return (
        together(request, arguments.ranks, signs, launch)
        if signs
        else here(request, arguments.ranks)
    )


def together(request: ParityRequest, asked: int | None, signs: list[str], launch: Launch) -> int:
    """Run the comparison on this rank of a launcher."""
    require_launched(request, asked, signs, launch.world_size)
    plan(request, launch.world_size)  # errors appear before the ranks wait for each other
    from megagpt.parallel.device import announce_to_deepspeed

    announce_to_deepspeed()
    from megagpt.cluster.rendezvous import gathered_ranks
    from megagpt.parity import compare as parity
    from megagpt.parity import local_ranks

    with gathered_ranks():  # raises an error that names missing ranks
        return int(not local_ranks.joined(parity.run, request))


def here(request: ParityRequest, asked: int | None) -> int:
    """Run the comparison on ranks that are started on this machine."""
    from megagpt.parallel.device import announce_to_deepspeed
    from megagpt.parity import local_ranks

    request = replace(request, gpus=local_ranks.gpus_here())
    ranks = asked or request.gpus or local_ranks.CPU_RANKS
    require_devices(request, ranks)
    plan(request, ranks)  # errors appear before any rank starts
    announce_to_deepspeed()
    from megagpt.parity import compare as parity

    return int(not local_ranks.start(ranks, parity.run, request))


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Train the same few steps of a small model under every strategy below that fits these ranks, and
in one plain PyTorch process. Print the differences; exit with code 1 if one exceeds the
tolerance. Under a launcher, use its ranks. --ranks, or else megagpt.parallel.world_size, gives
their expected number, so that a missing host is an error.

The first row is the file's own strategy: its mesh, schedule, ZeRO stage, offload and
recomputation. The sizes in its zero_optimization section shrink with the model. Then come all
meshes of tensor x pipeline x data (up to 16 ranks; beyond, a tensor axis of at most 8 or dividing
the file's key-value heads, a pipeline of at most 8 or the file's number of blocks). Each mesh is
tried with every ZeRO stage and offload. At every ZeRO stage, without offload, one setting at a
time is changed: the schedule (gpipe, interleaved with virtual_stages 2), gradient_reduction,
sequence. That makes some 45 strategies on 2 ranks, 95 on 4, 160 on 8, 245 on 16 and at most 710
on 1,024; each takes a few seconds. NVMe adds up to a third.""",
    )
    add = parser.add_argument
    add_config_option(parser, "JSON file with the strategy, model and optimizer")
    add(
        "--ranks",
        type=whole_number(1),
        help="processes to start on this machine [one per GPU; 4 without GPUs]; under a launcher, "
        "the number that it must have started [megagpt.parallel.world_size]",
    )
    add("--steps", type=whole_number(1), default=3, help="optimizer steps per strategy [3]")
    add("--own_only", action="store_true", help="run only the file's own strategy")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="number format; bf16 is judged by how far one plain process in bf16 deviates from "
        "fp32 [fp32]",
    )
    add(
        "--tolerance",
        type=non_negative,
        help="fp32: relative tolerance of losses and norms; weights 100 times that [1e-4]. bf16: "
        "allowed deviation, as a multiple of the plain bf16 process's [2]",
    )
    add(
        "--nvme_path",
        type=os.path.expanduser,
        help="directory on a fast local disk; also test offload to it [the file's nvme_path]",
    )
    add_launcher_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
