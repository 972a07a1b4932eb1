#!/usr/bin/env python3
"""Does every strategy train alike? python launch/parity.py here, or under a launcher: deepspeed launch/parity.py"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.arguments import non_negative, whole_number
from megagpt.config import load_config
from megagpt.hosts import read_hostfile
from megagpt.launch_command import hostfile_of_launcher
from megagpt.launchers import adopt_launch
from megagpt.parity_plan import Request, plan
from megagpt.utils import run_command


def main() -> int:
    arguments = parse_arguments()
    if (hostfile := hostfile_of_launcher()) is not None:
        read_hostfile(hostfile)  # DeepSpeed would have stayed on this machine without it
    together = any(os.environ.get(name) for name in ("RANK", "SLURM_STEP_NUM_TASKS"))
    launch = adopt_launch()
    request = Request(
        load_config(arguments.deepspeed_config),
        arguments.deepspeed_config,
        arguments.steps,
        arguments.precision,
        arguments.tolerance,
        arguments.nvme_path,
        arguments.own_only,
    )
    ranks = launch.world_size if together else arguments.ranks or devices_here()
    plan(request, ranks)  # what is impossible is said before any rank starts
    from megagpt.device import announce_to_deepspeed

    announce_to_deepspeed()
    from megagpt import local_ranks, parity

    if together:
        from megagpt.rendezvous import gathered_ranks

        with gathered_ranks():  # or who is missing
            return int(not local_ranks.joined(parity.run, request))
    return int(not local_ranks.start(ranks, parity.run, request))


def devices_here() -> int:
    """The ranks that this machine is for, which takes torch to know."""
    from megagpt import local_ranks

    return local_ranks.devices_here()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Train the same few steps of a small model under every strategy that these ranks can host and in one plain PyTorch
process; print the differences, exit 1 beyond tolerance. Under a launcher, its ranks are used.

The first row is what the file asks for: its mesh, schedule, ZeRO stage, offload and recomputation; sizes of its
zero_optimization section are made as much smaller as the model is. Then come all meshes of tensor x pipeline x data
(up to 16 ranks; beyond, a tensor axis of at most 8 or dividing the file's key-value heads, a pipeline of at most 8 or
the file's number of blocks), each with every ZeRO stage and offload, and every schedule at every ZeRO stage: some
40 strategies on 2 ranks, 85 on 4, 150 on 8, 230 on 16, at most 700 on 1,024, a few seconds each. NVMe adds up to a
third.""",
    )
    add = parser.add_argument
    add(
        "--deepspeed_config",
        default="ds_configs/default.json",
        help="strategy, kind of model and optimizer [ds_configs/default.json]",
    )
    add("--ranks", type=whole_number(1), help="processes to start on this machine [one a GPU; 4 without]")
    add("--steps", type=whole_number(1), default=3, help="optimizer steps of each strategy [3]")
    add("--own_only", action="store_true", help="only the strategy that the file asks for")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="compute in it; in bf16, compared with how far one plain process in bf16 strays from fp32 [fp32]",
    )
    add(
        "--tolerance",
        type=non_negative,
        help="in fp32: of losses and norms, relative; of weights 100 times that [1e-4]; in bf16: how many times as far "
        "as the plain process in bf16 a strategy may stray [2]",
    )
    add("--nvme_path", help="a directory on a fast local disk: offload to it is tried too [the file's, if it has one]")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it; the environment has it too
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
