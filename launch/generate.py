#!/usr/bin/env python3
"""Continue prompts with a trained model.

python launch/generate.py --run_dir runs/NAME --prompt "import os"
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import (
    command_parser,
    non_negative,
    probability,
    user_path,
    whole_number,
)
from megagpt.utils import run_command


def main() -> None:
    arguments = parse_arguments()
    import torch  # after the arguments, so that --help and a wrong value answer at once

    from megagpt.inference.generate import generate, open_tokenizer
    from megagpt.inference.stored_model import load_model

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model, config, _ = load_model(arguments.run_dir, step=arguments.step, device=device)
    tokenizer = open_tokenizer(config.megagpt, arguments.run_dir)
    for prompt in arguments.prompt:
        print(prompt, end="", flush=True)
        generate(
            lambda tokens, cache: model(tokens.to(device), cache=cache),
            tokenizer,
            [prompt],
            sequence_length=config.megagpt.model.sequence_length,
            reread_after=config.megagpt.model.reread_after,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            on_text=lambda _, piece: print(piece, end="", flush=True),
        )
        print("\n")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(description="Continue prompts with a trained model.")
    add = parser.add_argument
    add("--run_dir", type=user_path, required=True, help="run directory, such as runs/NAME")
    add(
        "--prompt",
        nargs="+",
        action="extend",
        required=True,
        help="texts to continue; write one that begins with a dash as --prompt=-x",
    )
    add(
        "--max_new_tokens",
        type=whole_number(0),
        default=256,
        help="maximum number of new tokens; the model may end the document earlier [256]",
    )
    add(
        "--temperature",
        type=non_negative,
        default=0.8,
        help="0: always the most likely token; 1: the model's distribution [0.8]",
    )
    add("--top_k", type=whole_number(1), help="sample from the k most likely tokens [all]")
    add(
        "--top_p",
        type=probability,
        default=1.0,
        help="sample from the most likely tokens with this total probability [1]",
    )
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        help="seed of the sampling; no effect at temperature 0 [0]",
    )
    add("--step", type=whole_number(0), help="step of the checkpoint [newest]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
