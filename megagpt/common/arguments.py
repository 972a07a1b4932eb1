"""Options that several commands share, and types that check their range.

If a type raises, argparse exits with code 2. `kernels.options` has the style of options.
"""

import argparse
import math
import os.path
import platform
import shlex
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import Any

from kernels.options import OptionParser
from kernels.options import user_path as user_path
from kernels.options import whole_number as whole_number
from megagpt import __version__
from megagpt.utils import REPOSITORY, closest

PACKAGES = ("torch", "deepspeed", "triton", "numpy")
DEFAULT_CONFIG = "ds_configs/default.json"
# What options of other trainers are here, besides those that set a key (`add_set_option`).
OF_OTHER_TRAINERS = {
    **dict.fromkeys(
        (
            *("config", "config_file", "config_path", "conf", "conf_file"),
            *("ds_config", "deepscale_config"),
        ),
        "--deepspeed_config",
    ),
    **dict.fromkeys(("out_dir", "output_dir", "save", "save_dir", "logdir"), "--run_dir"),
    **dict.fromkeys(("world_size", "num_gpus", "gpus", "nproc_per_node"), "--ranks"),
    **dict.fromkeys(("num_proc", "num_workers", "preprocessing_num_workers"), "--workers"),
}
# Keys that are typed as options, and whose last name alone does not lead there.
KEYS_AS_OPTIONS = {
    **dict.fromkeys(("num_steps", "total_steps", "steps"), "megagpt.training.total_steps"),
    **dict.fromkeys(("epoch", "epochs", "num_epochs"), "megagpt.training.total_epochs"),
    "weight_decay": "optimizer.params.weight_decay",
    "train_batch_size": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_layers": "megagpt.model.num_layers",
    "hidden_size": "megagpt.model.hidden_size",
    **dict.fromkeys(("zero_stage", "stage"), "zero_optimization.stage"),
    "seed": "megagpt.training.seed",
    "data_dir": "megagpt.data.path",
    **dict.fromkeys(("model", "model_name", "model_name_or_path"), "megagpt.model.preset"),
}
# Switches elsewhere, sections here.
SWITCHES = {"fp16": "fp16.enabled", "bf16": "bf16.enabled", "wandb": "wandb.enabled"}
# Options of launchers, which stand before the script.
OF_LAUNCHERS = (
    *("hostfile", "num_gpus", "num_nodes", "num_accelerators", "include", "exclude"),
    *("master_port", "master_addr", "nproc_per_node", "nnodes", "node_rank", "bind_cores_to_rank"),
)


class CommandParser(OptionParser):
    """A parser that says what to type instead of an option of another program.

    ``keys_of_others``: the key of the configuration for names that other trainers have for it.
    """

    keys_of_others: Mapping[str, str] = MappingProxyType({})

    def parse_known_args(  # type: ignore[override]  # typeshed has overloads of one signature
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; `--deepspeed F` is `--deepspeed_config F`."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if file := getattr(parsed, "deepspeed", None):
            if parsed.deepspeed_config not in (DEFAULT_CONFIG, file):
                self.error(
                    f"--deepspeed {file} and --deepspeed_config {parsed.deepspeed_config}: name "
                    f"one file"
                )
            parsed.deepspeed_config = file
        return parsed, unknown

    def advice(self, unknown: Sequence[str]) -> str:
        """Return what to type instead of each word that is no option, one a line."""
        lines = []
        words = [*unknown]
        while words:
            word = words.pop(0)
            is_option = word.startswith("-")
            given = word.partition("=")[2]
            if is_option and not given and words and not words[0].startswith("-"):
                given = words.pop(0)
            lines.append(self._instead_of(word, shlex.quote(given) if given else ""))
        return f"\n{self.prog}: ".join(lines)

    def _instead_of(self, word: str, value: str) -> str:
        if not word.startswith("-"):
            option = self._option_of_path(word)
            remedy = f"{option} {shlex.quote(word)}" if self._takes(option) else ""
            wrong = "belongs to no option"
        else:
            wrong = "no such option"
            name = word.partition("=")[0].lstrip("-")
            remedy = self._remedy(name, value)
        return f"{word}: {wrong}; {f'type {remedy}' if remedy else 'remove it'}"

    def _option_of_path(self, word: str) -> str:
        """Return the option that a path without one probably belongs to."""
        if word.endswith(".json"):
            return "--deepspeed_config"
        if os.path.isdir(word):
            return "--run_dir"
        return "--hostfile" if os.path.isfile(word) else ""

    def _remedy(self, name: str, value: str) -> str:
        """Return the option of this command that does what an unknown one does elsewhere."""
        if self._takes(option := OF_OTHER_TRAINERS.get(name, "")):
            return f"{option} {value}".rstrip()
        if name in SWITCHES and not value and self._takes("--set"):
            return f"--set {SWITCHES[name]}=true"
        key = name if "." in name else self.keys_of_others.get(name)
        if key and self._takes("--set"):
            return f"--set {key}={value or 'VALUE'}"
        if name in OF_LAUNCHERS and self._takes("--local_rank"):
            return f"deepspeed --{name} {value} launch/{self.prog} ... (an option of the launcher)"
        near = closest(f"--{name}", self._shown_options())
        return f"{near} {value}".rstrip() if near else ""

    def _takes(self, option: str) -> bool:
        return option in self._option_string_actions

    def _shown_options(self) -> list[str]:
        return [
            option
            for option, action in self._option_string_actions.items()
            if option.startswith("--")
            and action.help != argparse.SUPPRESS
            and option not in ("--help", "--version")
        ]


def command_parser(**options: Any) -> CommandParser:
    """Return a parser with the options of every command: `--help` and `--version`."""
    parser = CommandParser(**options)
    parser.add_argument("--version", action=_Version, help="show versions and the commit, and exit")
    return parser


def add_config_option(
    parser: argparse.ArgumentParser, what: str = "JSON file of the run", *, required: bool = False
) -> None:
    """Add `--deepspeed_config`, with a default unless it is ``required``."""
    parser.add_argument(
        "--deepspeed_config",
        type=os.path.expanduser,
        metavar="FILE",
        required=required,
        default=None if required else DEFAULT_CONFIG,
        help=what if required else f"{what} [{DEFAULT_CONFIG}]",
    )


def add_set_option(parser: CommandParser, synonyms: Mapping[str, str]) -> None:
    """Add `--set KEY=VALUE ...`; ``synonyms`` are what other trainers call the keys."""
    parser.keys_of_others = {**synonyms, **KEYS_AS_OPTIONS}
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the JSON file",
    )


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Add what launchers and scripts for DeepSpeed pass: `--local_rank N`, `--deepspeed`."""
    # The environment has the local rank too. `--deepspeed` alone is the switch that
    # `deepspeed.add_config_arguments` adds; Hugging Face's scripts pass the file with it.
    parser.add_argument("--local_rank", type=whole_number(-1), help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", nargs="?", type=os.path.expanduser, help=argparse.SUPPRESS)


class _Version(argparse.Action):
    """Print ``version_text`` and exit; the text is computed only on request."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_text())
        parser.exit()


def version_text() -> str:
    """Return the versions of megagpt, Python and the main packages, with the commit."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} absent")
    return f"megagpt {__version__}{_commit()}\n{', '.join(found)}"


def _commit() -> str:
    """Return the commit of the checkout and whether it is modified; empty outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return ""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" (commit {done.stdout.strip()})"


def non_negative(text: str) -> float:
    """Parse a number of at least 0."""
    value = _finite(text)
    if value < 0:
        raise ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> float:
    """Parse a number above 0."""
    value = _finite(text)
    if value <= 0:
        raise ArgumentTypeError(f"{text} is not above 0")
    return value


def probability(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    value = _finite(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} is not a finite number")
    return value
