r"""Choose the text of a row: `text`, `meta.body`, `messages.content` or `{title}\n\n{text}`.

A dot leads into an object, and into each object of a list, whose texts come one below the other.
A column whose own name has a dot is found first. Braces make a template of several columns.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from textwrap import shorten
from typing import Any, Protocol

from megagpt.utils import UserError, did_you_mean

DEFAULT_COLUMN = "text"
ABSENT = object()
MOST_NAMED = 20
MOST_CHARACTERS = 60  # of one name
ESCAPES = {"\\n": "\n", "\\t": "\t"}  # a shell hands "\n" over as two characters


class BadRowError(ValueError):
    """What is wrong with one row; it has no place in it yet."""


class Columns(Protocol):
    """What of a row is read: its text (`Column`), or its conversation (chat/records.py)."""

    written: str
    option: str  # of the command, which names it

    def sources(self, names: Iterable[str]) -> list[str]:
        """Return the columns of a table that are read; raise BadRowError if one is absent."""

    def is_absent_from(self, row: Any) -> bool:
        """Return whether a row has not even the name of one of the columns."""


class Column:
    """The text of a row, as `--column` names it."""

    def __init__(self, written: str = DEFAULT_COLUMN, option: str = "--column") -> None:
        """Raise UserError if a template cannot be read."""
        self.written = written
        self.option = option
        self._template: list[tuple[str, str | None]] | None = None
        self.paths: tuple[str, ...] = (written,)
        if "{" in written or "}" in written:
            self._template = _parsed(written, option)
            self.paths = tuple(path for _, path in self._template if path is not None)
        if not all(self.paths) or not self.paths:
            raise UserError(
                f'{option} {written!r}: name a column, for example text or "{{title}}: {{text}}"'
            )

    def text(self, row: Any) -> str | None:
        """Return the text of a row, None if it has none; raise BadRowError.

        A row that is a string is its own text.
        """
        if isinstance(row, str) and self.written == DEFAULT_COLUMN:
            return row
        if not isinstance(row, dict):
            raise BadRowError(
                f"holds {kind_of(row)}, need an object with column {self.written!r}"
                if row is not None
                else "is null"
            )
        if self._template is None:
            found = row.get(self.written, ABSENT)
            if type(found) is str:
                return found
            return _text(value_at(row, self.written), self.written)
        return self._filled(row, self._template)

    def is_absent_from(self, row: Any) -> bool:
        """Return whether a row has not even the name of one of the columns."""
        return isinstance(row, dict) and any(value_at(row, path) is ABSENT for path in self.paths)

    def sources(self, names: Iterable[str]) -> list[str]:
        """Return the columns of a table that the text is in; raise BadRowError if one is absent."""
        known = list(names)
        found = []
        for path in self.paths:
            parts = path.split(".")
            prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
            name = next((prefix for prefix in prefixes if prefix in known), None)
            if name is None:
                raise BadRowError(missing(path, known, self.option))
            found.append(name)
        return list(dict.fromkeys(found))

    def _filled(self, row: dict[str, Any], template: list[tuple[str, str | None]]) -> str | None:
        """Return the template with the row's texts, None if it has none of them."""
        texts = {path: _text(value_at(row, path), path, in_template=True) for path in self.paths}
        if not any(texts.values()):
            return None
        return "".join(
            literal + ((texts[path] or "") if path is not None else "")
            for literal, path in template
        )


def missing(path: str, known: Iterable[str], option: str = "--column") -> str:
    """Return what to say where a column is absent."""
    names = list(known)
    return (
        f"no column {path!r}{did_you_mean(path, names)}; choose one with {option}: "
        f"{listed(names) or 'there is none'}"
    )


def listed(names: Iterable[Any]) -> str:
    """Return the first names; a table may have thousands, or a text in place of its header."""
    known = [shorten(str(name), MOST_CHARACTERS, placeholder="...") for name in names]
    more = f" and {len(known) - MOST_NAMED} more" if known[MOST_NAMED:] else ""
    return ", ".join(known[:MOST_NAMED]) + more


def _parsed(written: str, option: str) -> list[tuple[str, str | None]]:
    """Return (literal, path of the column that follows it) of a template."""
    text = written
    for escape, character in ESCAPES.items():
        text = text.replace(escape, character)
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{option} {written!r}: {error}; write a brace as {{{{ or }}}}") from None
    for _, path, form, conversion in parts:
        if path is not None and (not path or form or conversion):
            raise UserError(f"{option} {written!r}: put only a column's name between braces")
    return [(literal, path) for literal, path, _, _ in parts]


def value_at(row: Any, path: str) -> Any:
    """Return what lies at a dotted path, ABSENT if nothing does; a list gives a list."""
    if isinstance(row, list):
        values = [value_at(item, path) for item in row]
        return [value for value in values if value is not ABSENT] or ABSENT
    if not isinstance(row, dict):
        return ABSENT
    if path in row:
        return row[path]
    name, dot, rest = path.partition(".")
    return value_at(row[name], rest) if dot and name in row else ABSENT


def _text(value: Any, path: str, *, in_template: bool = False) -> str | None:
    if isinstance(value, str):
        return value
    if value is None or value is ABSENT:
        return None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadRowError(f"column {path!r}: not UTF-8 ({error.reason})") from None
    if isinstance(value, list):
        texts = [_text(item, path, in_template=in_template) for item in value]
        return "\n".join(text for text in texts if text is not None) if any(texts) else None
    if isinstance(value, dict):
        first = str(next(iter(value), "NAME"))
        if first.isdigit():  # pandas' to_json() without an orientation
            raise BadRowError(
                f"column {path!r} holds an object with a number for each row; write it row by row "
                'instead, in pandas with to_json(FILE, orient="records", lines=True)'
            )
        likely = max(value, key=lambda name: _length(value[name]), default=first)
        raise BadRowError(
            f"column {path!r} holds an object ({listed(value)}); choose one with --column, for "
            f"example {path}.{likely}"
        )
    if in_template and isinstance(value, int | float):
        return str(value)
    raise BadRowError(
        f"column {path!r} holds {kind_of(value)}, not text; choose another with --column"
    )


def _length(value: Any) -> int:
    """Return the length of a text; -1 of anything else."""
    return len(value) if isinstance(value, str) else -1


def kind_of(value: Any) -> str:
    """Return what a value of JSON is called in a message."""
    return "an array" if isinstance(value, list) else type(value).__name__
