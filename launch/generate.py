#!/usr/bin/env python3
"""Continue prompts with a trained model, or converse with it.

python launch/generate.py --run_dir runs/NAME --prompt "import os"
python launch/generate.py --run_dir runs/NAME --chat
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import (
    command_parser,
    non_negative,
    probability,
    user_path,
    whole_number,
)
from megagpt.utils import run_command

if TYPE_CHECKING:
    from megagpt.inference.chat import Chat

Continue = Callable[..., list[str]]


def main() -> None:
    arguments = parse_arguments()
    import torch  # after the arguments, so that --help and a wrong value answer at once

    from megagpt.inference.generate import generate, open_tokenizer
    from megagpt.inference.stored_model import load_model

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model, config, _ = load_model(arguments.run_dir, step=arguments.step, device=device)
    tokenizer = open_tokenizer(config.megagpt, arguments.run_dir)
    continued: Continue = partial(
        generate,
        lambda tokens, cache: model(tokens.to(device), cache=cache),
        tokenizer,
        sequence_length=config.megagpt.model.sequence_length,
        reread_after=config.megagpt.model.reread_after,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        on_text=lambda _, piece: print(piece, end="", flush=True),
    )
    if arguments.chat:
        from megagpt.inference.chat import open_chat

        chat = open_chat(config.megagpt.data, tokenizer, arguments.chat_template)
        converse(chat, continued, arguments.prompt, arguments.system)
        return
    for prompt in arguments.prompt:
        print(prompt, end="", flush=True)
        continued([prompt])
        print("\n")


def converse(chat: "Chat", continued: Continue, prompts: Sequence[str], system: str | None) -> None:
    """Answer each prompt on its own; without prompts, one conversation with the terminal."""
    first = [{"role": "system", "content": system}] if system is not None else []
    messages = list(first)
    for prompt in prompts or spoken():
        if prompts:
            print(f"> {prompt}")
            messages = list(first)
        messages.append({"role": "user", "content": prompt})
        (answer,) = continued([chat.prompt(messages)], end_tokens=chat.end_tokens)
        messages.append({"role": "assistant", "content": answer})
        print("\n")


def spoken() -> Iterator[str]:
    """Yield the lines that are typed, until the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(description="Continue prompts with a trained model.")
    add = parser.add_argument
    add("--run_dir", type=user_path, required=True, help="run directory, such as runs/NAME")
    add(
        "--prompt",
        nargs="+",
        action="extend",
        default=[],
        help="texts to continue; write one that begins with a dash as --prompt=-x",
    )
    add(
        "--chat",
        action="store_true",
        help="answer each prompt with the chat template; without --prompt, converse line by line",
    )
    add("--system", metavar="TEXT", help="system message of a chat [none]")
    add(
        "--chat_template",
        metavar="NAME",
        help="another chat template than that of the run's data",
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
    arguments = parser.parse_args()
    if not arguments.prompt and not arguments.chat:
        parser.error("--prompt: give a text to continue, or --chat to converse")
    for option in () if arguments.chat else ("system", "chat_template"):
        if getattr(arguments, option) is not None:
            parser.error(f"--{option}: for chats only; add --chat")
    return arguments


if __name__ == "__main__":
    sys.exit(run_command(main))
