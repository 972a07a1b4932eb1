#!/usr/bin/env python3
"""Evaluate a trained model: loss, perplexity and bits per byte, or tasks of lm-evaluation-harness.

python launch/evaluate.py --run_dir runs/NAME, or on ranks that share the model:
deepspeed launch/evaluate.py --run_dir runs/NAME
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.cluster.hosts import read_hostfile
from megagpt.cluster.launch_command import hostfile_of_launcher
from megagpt.cluster.launchers import adopt_launch
from megagpt.common.arguments import (
    add_launcher_options,
    command_parser,
    user_path,
    whole_number,
)
from megagpt.data.columns import DEFAULT_COLUMN
from megagpt.utils import RankEnvironment, UserError, end_process, run_command

# The other ranks of a host wait while its first rank reports an error; the launcher ends them.
TURN_S = 2.0
HARNESS = "lm_eval==0.4.13"
IMPORTED_BY_THE_HARNESS = ("lm_eval", "sacrebleu")


def main() -> None:
    arguments = parse_arguments()
    if arguments.tasks:
        require_harness()
    if (hostfile := hostfile_of_launcher()) is not None:
        read_hostfile(hostfile)  # without it DeepSpeed would use this machine only
    if adopt_launch().world_size == 1:
        from megagpt.inference.evaluation_command import evaluate_run

        evaluate_run(arguments)
        return
    if RankEnvironment.read().rank:
        os.environ["TQDM_DISABLE"] = "1"  # one progress bar is enough; read when tqdm is imported
    from megagpt.parallel.device import announce_to_deepspeed

    announce_to_deepspeed()
    from megagpt.cluster.rendezvous import gathered_ranks
    from megagpt.inference.evaluation_command import evaluate_run
    from megagpt.parity import local_ranks

    try:
        with gathered_ranks():  # raises an error that names missing ranks
            local_ranks.joined(evaluate_run, arguments)
    except UserError:
        if not RankEnvironment.read().is_first_of_host:
            time.sleep(TURN_S)
        raise


def require_harness() -> None:
    """Raise UserError if lm-evaluation-harness is not installed."""
    for package in IMPORTED_BY_THE_HARNESS:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--tasks: needs lm-evaluation-harness, which is not installed (no {package}); "
                f"python -m pip install {HARNESS}"
            )


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Compute loss (nats a token), perplexity and bits per byte on the validation "
        "sets of a run or on any text, or run tasks of lm-evaluation-harness. Print a sentence on "
        "stderr and one JSON object per line on stdout. Under a launcher, ranks share the model."
    )
    add = parser.add_argument
    add("--run_dir", type=user_path, required=True, help="run directory, such as runs/NAME")
    add("--step", type=whole_number(0), help="step of the checkpoint [newest]")
    add("--batch_size", type=whole_number(1), default=8, help="sequences per batch [8]")
    add(
        "--batches",
        type=whole_number(1),
        help="evaluate only this many batches: of a validation set a fixed random choice, of a "
        "text the first [all]",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dataset",
        nargs="+",
        type=os.path.expanduser,
        metavar="FILE",
        help="texts to evaluate on: whatever download_data.py reads [the validation sets]",
    )
    what.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-evaluation-harness: names, patterns or YAML files",
    )
    text = parser.add_argument_group("with --dataset")
    text.add_argument(
        "--stride",
        type=whole_number(1),
        help="tokens between the beginnings of windows; each scores what none before it has "
        "[half the window]",
    )
    text.add_argument(
        "--window",
        type=whole_number(2),
        help="tokens of a window, the last of them only predicted [megagpt.model.sequence_length]",
    )
    text.add_argument(
        "--column",
        default=DEFAULT_COLUMN,
        help='column of rows with the text, or a template such as "{title}: {text}" [text]',
    )
    text.add_argument("--separator", help="text between two documents of a file of text")
    text.add_argument(
        "--skip_bad_rows", type=whole_number(0), default=0, help="bad rows to leave out [0]"
    )
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument(
        "--num_fewshot", type=whole_number(0), help="examples in the prompt [the task's]"
    )
    tasks.add_argument("--limit", type=whole_number(1), help="documents of each task [all]")
    tasks.add_argument("--include_path", type=user_path, help="directory with YAML files of tasks")
    mesh = parser.add_argument_group("under a launcher")
    mesh.add_argument(
        "--tensor", type=whole_number(1), help="ranks that share each layer [the run's]"
    )
    mesh.add_argument("--pipeline", type=whole_number(1), help="pipeline stages [the run's]")
    add_launcher_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    code = run_command(main)
    if RankEnvironment.read().world_size == 1:
        sys.exit(code)
    end_process(code)
