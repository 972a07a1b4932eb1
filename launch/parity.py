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
from megagpt.utils import run_command


def main() -> int:
    arguments = parse_arguments()
    if (hostfile := hostfile_of_launcher()) is not None:
        read_hostfile(hostfile)  # DeepSpeed would have stayed on this machine without it
    together = any(os.environ.get(name) for name in ("RANK", "SLURM_STEP_NUM_TASKS"))
    adopt_launch()
    config = load_config(arguments.deepspeed_config)
    from megagpt.device import announce_to_deepspeed

    announce_to_deepspeed()
    from megagpt import local_ranks, parity

    job = (config, arguments.steps, arguments.nvme_path, arguments.tolerance)
    if together:
        from megagpt.rendezvous import gathered_ranks

        with gathered_ranks():  # or who is missing
            return int(not local_ranks.joined(parity.run, *job))
    return int(not local_ranks.start(arguments.ranks or local_ranks.devices_here(), parity.run, *job))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the same few steps under every strategy that these ranks can host and in one plain PyTorch "
        "process; print the differences, exit 1 beyond tolerance. Under a launcher, its ranks are used."
    )
    add = parser.add_argument
    add("--deepspeed_config", default="ds_configs/default.json", help="kind of model and optimizer [default.json]")
    add("--ranks", type=whole_number(1), help="processes to start on this machine [one a GPU; 4 without]")
    add("--steps", type=whole_number(1), default=3, help="optimizer steps of each strategy [3]")
    add("--tolerance", type=non_negative, default=1e-4, help="of losses and norms, relative; weights: 100 times [1e-4]")
    add("--nvme_path", help="a directory on a fast local disk: offload to it is tried too")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it; the environment has it too
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
