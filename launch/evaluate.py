#!/usr/bin/env python3
"""Evaluate a trained model on the validation split: loss, perplexity and bits per byte.

python launch/evaluate.py --run_dir runs/NAME
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import command_parser, user_path, whole_number
from megagpt.utils import run_command


def main() -> None:
    arguments = parse_arguments()
    import torch  # after the arguments, so that --help and a wrong value answer at once

    from megagpt.data.tokenizer import load_tokenizer
    from megagpt.inference.evaluate import evaluate, model_loss, open_validation
    from megagpt.inference.stored_model import load_model
    from megagpt.rundir.tokenizer_hash import require_tokenizer

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model, config, step = load_model(arguments.run_dir, step=arguments.step, device=device)
    for directory, stream in open_validation(config.megagpt):
        require_tokenizer(arguments.run_dir, directory)
        result = evaluate(
            model_loss(model, device),
            stream,
            load_tokenizer(directory),
            batch_size=arguments.batch_size,
            batches=arguments.batches,
        )
        print(f"step {step}, {directory}: {result}", file=sys.stderr)
        print(json.dumps({"step": step, "data": str(directory), **result.as_json()}), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Compute loss (nats a token), perplexity and bits per byte on the validation "
        "split of each dataset of a run. Print a sentence on stderr and one JSON object per line "
        "on stdout."
    )
    add = parser.add_argument
    add("--run_dir", type=user_path, required=True, help="run directory, such as runs/NAME")
    add("--batch_size", type=whole_number(1), default=8, help="sequences per batch [8]")
    add(
        "--batches",
        type=whole_number(1),
        help="evaluate only this many batches, a fixed random choice from the split [all]",
    )
    add("--step", type=whole_number(0), help="step of the checkpoint [newest]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
