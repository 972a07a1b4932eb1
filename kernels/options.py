"""One style of options for every command: underscores, and numbers as people write them.

Standard library only. It is in this package because `python -m kernels.benchmark` has options too,
and nothing here imports megagpt; `megagpt.common.arguments` builds on it.
"""

from __future__ import annotations

import argparse
import os.path
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

# Decimal as in 124M parameters; binary only where it is written out.
MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
# At most two digits of exponent: 1e999999999 would fill the memory.
WRITTEN_NUMBER = re.compile(
    r"(?P<number>[+-]?[0-9]+(?:[_,][0-9]{3})*(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,2})?)\s?"
    r"(?P<multiple>[kmgt]i|[kmbgt]|)",
    re.IGNORECASE,
)
MOST_CHARACTERS = 40


class OptionParser(argparse.ArgumentParser):
    """A parser of options that are declared with underscores.

    Hyphens in their names are accepted, and not shown. An error is one line, and exit code 2.
    """

    def parse_known_args(  # type: ignore[override]  # typeshed has overloads of one signature
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse, with hyphens in the names of options read as underscores."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(with_underscores(words), namespace)

    def parse_args(  # type: ignore[override]  # typeshed has overloads of one signature
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse; end the command with what to type if words are left over."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.advice(unknown))
        return parsed

    def advice(self, unknown: Sequence[str]) -> str:
        """Return what is wrong with words that are no options, for one line."""
        return f"unrecognized arguments: {' '.join(unknown)}"

    def error(self, message: str) -> NoReturn:
        """End the command with one line on stderr and exit code 2."""
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


def with_underscores(words: Iterable[str]) -> list[str]:
    """Return command-line words with `--max-tokens=5` as `--max_tokens=5`.

    Words after a lone `--` are another program's.
    """
    written: list[str] = []
    options_end = False
    for word in words:
        options_end = options_end or word == "--"
        name, equals, value = word.partition("=")
        is_option = not options_end and word.startswith("--")
        written.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else word)
    return written


def user_path(text: str) -> Path:
    """Parse a path; `~` is the home directory, which a shell does not expand after `=`."""
    return Path(os.path.expanduser(text))


def whole_number(minimum: int) -> Callable[[str], int]:
    """Return an argparse type for the numbers that ``count`` reads, from ``minimum`` up."""

    def parse(text: str) -> int:
        value = count(text)
        if value is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number (such as 4000, 4k, 1_000, 1e9 or 10B)"
            )
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        return value

    return parse


def count(text: str) -> int | None:
    """Return the whole number that a text writes: 1000, 1_000, 1,000, 1e9, 10B, 1.5M, 4k, 4Ki.

    None if it is no whole number.
    """
    match = WRITTEN_NUMBER.fullmatch(text.strip())
    if match is None or len(text) > MOST_CHARACTERS:
        return None
    number = re.sub("[_,]", "", match["number"])
    value = Decimal(number) * MULTIPLES[match["multiple"].lower()]
    return int(value) if value == value.to_integral_value() else None
