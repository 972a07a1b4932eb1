#!/usr/bin/env python3
"""Export the trained model for Hugging Face transformers.

python launch/export.py --run_dir runs/NAME --output DIR
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import command_parser, user_path, whole_number
from megagpt.utils import UserError, human_bytes, human_count, run_command


def main() -> None:
    arguments = parse_arguments()
    # after the arguments, so that --help and a wrong value answer at once
    if arguments.adapters:
        export_adapters(arguments)
        return
    if arguments.base_model is not None:
        raise UserError("--base_model: is for adapters only; add --adapters, or leave it out")
    from megagpt.huggingface.export import export

    written = export(
        arguments.run_dir,
        arguments.output,
        step=arguments.step,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    print(
        f"{arguments.output}: step {written.step} as {written.architecture}, "
        f"{human_count(written.parameters)} "
        f"parameters in {written.formats}, {human_bytes(written.bytes)}\n"
        f"next: transformers.AutoModelForCausalLM.from_pretrained"
        f"({json.dumps(str(arguments.output), ensure_ascii=False)})"
    )


def export_adapters(arguments: argparse.Namespace) -> None:
    from megagpt.huggingface.adapters import export_adapters

    written = export_adapters(
        arguments.run_dir,
        arguments.output,
        step=arguments.step,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        base_model=arguments.base_model,
    )
    print(
        f"{arguments.output}: step {written.step}, adapters of {written.architecture}, "
        f"{human_count(written.parameters)} parameters in {written.formats}, "
        f"{human_bytes(written.bytes)}\n"
        f"next: peft.PeftModel.from_pretrained(model, "
        f"{json.dumps(str(arguments.output), ensure_ascii=False)})"
    )


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Write the trained model of a run, with its tokenizer, as a directory that "
        "Hugging Face transformers loads: safetensors, without the padding rows of the embedding."
    )
    add = parser.add_argument
    add("--run_dir", type=user_path, required=True, help="run directory, such as runs/NAME")
    add("--output", type=user_path, required=True, help="directory to create")
    add("--step", type=whole_number(0), help="step of the checkpoint [newest]")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="number format of the weights [the imported model's, else fp32]",
    )
    add(
        "--adapters",
        action="store_true",
        help="write the adapters alone, in peft's format [merged into the base's weights]",
    )
    add("--base_model", metavar="NAME", help="model that adapters name as their base [none]")
    add("--overwrite", action="store_true", help="replace an earlier export in --output")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
