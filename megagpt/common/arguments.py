"""Options that all commands share: `--version`, and types that check their range.

If a type raises, argparse exits with code 2.
"""

import argparse
import math
import platform
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Callable
from importlib import metadata
from typing import Any

from megagpt import __version__
from megagpt.utils import REPOSITORY

PACKAGES = ("torch", "deepspeed", "triton", "numpy")


def command_parser(**options: Any) -> argparse.ArgumentParser:
    """Return a parser with the options of every command: `--help` and `--version`."""
    parser = argparse.ArgumentParser(**options)
    parser.add_argument("--version", action=_Version, help="show versions and the commit, and exit")
    return parser


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


def whole_number(minimum: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return parse


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
