"""Make text for a terminal: tables, and text from a model or a machine made safe to show."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

MASK = "[secret]"

# WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, AWS_ACCESS_KEY_ID, PGPASSWORD, PIP_BASIC_AUTH,
# GOOGLE_APPLICATION_CREDENTIALS ... AUTH counts, but not GIT_AUTHOR_NAME and XAUTHORITY.
_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH(?!OR)|AUTHORI[SZ]", re.IGNORECASE
)
# Shorter values are settings (TOKENIZERS_PARALLELISM=false), and masking them would garble ordinary
# text.
_SHORTEST_SECRET = 8


def names_secret(variable: str) -> bool:
    """Return whether an environment variable of this name is likely to hold a secret."""
    return _SECRET_NAME.search(variable) is not None


def redacted(text: str) -> str:
    """Return `text` with the values of secret-looking environment variables replaced by `MASK`."""
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return text


def _secrets() -> list[str]:
    """Return the values to hide, longest first, so that one that contains another goes whole."""
    values = {value for name, value in os.environ.items() if names_secret(name)}
    return sorted(
        (value for value in values if len(value) >= _SHORTEST_SECRET), key=len, reverse=True
    )


def without_control_characters(text: str) -> str:
    r"""Return `text` with control characters as `\x1b`, so that it cannot control a terminal.

    Newlines and tabs stay. The C1 range is included, since 0x9b begins a command on some
    terminals.
    """
    return "".join(
        character
        if character in "\n\t" or not _is_control(character)
        else f"\\x{ord(character):02x}"
        for character in text
    )


def _is_control(character: str) -> bool:
    return ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0


def text_table(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Return the lines of a table whose first row is the headings.

    A column is as wide as its widest entry. The first column is aligned to the left, the others to
    the right if they hold `numbers`.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = (
        [(row[0], *map(str.rjust, row[1:], widths[1:])) for row in rows] if numbers else rows
    )
    return [aligned(row, widths) for row in to_the_right]


def aligned(cells: Iterable[str], widths: Iterable[int]) -> str:
    """Return one line of a table whose columns have these widths, cells to the left."""
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()
