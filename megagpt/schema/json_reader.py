"""Strict JSON for configurations, and `--set` overrides.

Rejects duplicate keys and NaN; syntax errors show line and column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.schema.errors import ConfigError, KeyPath, NotFinite, Problem
from megagpt.utils import did_you_mean


class JsonObject(dict[str, Any]):
    """A parsed object that remembers which of its keys were written more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = sorted({name for name in names if names.count(name) > 1})


def read_text(path: Path) -> str:
    """Return a file's text; if it is missing, raise ConfigError that lists the files beside it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"]
        ) from error
    except FileNotFoundError as error:
        present = sorted(
            file.name for file in path.parent.glob("*.json") if file.name != "schema.json"
        )
        there = (
            f"{path.parent} holds {', '.join(present)}"
            if present
            else f"{path.parent} holds no *.json"
        )
        raise ConfigError(
            [f"{path}: no such file; {there}{did_you_mean(path.name, present)}"]
        ) from error
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error


def parse(text: str, source: str) -> tuple[dict[str, Any], list[Problem]]:
    """Parse the text; return the document and its duplicate keys and non-finite numbers.

    Raises ConfigError on a syntax error.
    """
    try:
        document = json.loads(
            text, object_pairs_hook=JsonObject, parse_constant=NotFinite, parse_float=_parse_float
        )
    except json.JSONDecodeError as error:
        message = (
            f"{source}: line {error.lineno}, column {error.colno}: "
            f"{error.msg}{_syntax_hint(text, error.pos)}"
        )
        raise ConfigError([message]) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError([f"{source}: not a usable JSON document: {error}"]) from error
    if not isinstance(document, dict):
        raise ConfigError([f"{source}: expected one JSON object, {{...}}, at the top level"])
    return document, hidden_problems(document)


def apply_overrides(
    document: dict[str, Any], overrides: Sequence[str]
) -> tuple[list[KeyPath], list[str]]:
    """Write `a.b=value` items into the document; the last one of a key wins.

    Return the keys that were set and the error lines. A value is JSON (`3`, `true`, `[1, 2]`,
    `"text"`); a word that is not JSON is a string. `null` stays in the document: `remove`
    deletes the key once it is known to exist.
    """
    keys_set: list[KeyPath] = []
    errors: list[str] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            errors.append(
                f"--set {item}: expected KEY.KEY=VALUE, for example megagpt.model.num_layers=24"
            )
            continue
        try:
            _put(document, path, _override_value(text.strip()))
            keys_set.append(path)
        except ConfigError as error:
            errors += [f"--set {item}: {line}" for line in error.errors]
    return keys_set, errors


def _put(document: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    here = document
    for depth, name in enumerate(path[:-1], start=1):
        inner = here.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                [f"{'.'.join(path[:depth])} is a value, not an object; set it as a whole"]
            )
        here = inner
    here[path[-1]] = value


def is_null(document: dict[str, Any], path: KeyPath) -> bool:
    """Return whether the value at a key is `null`."""
    here: Any = document
    for name in path:
        if not isinstance(here, dict) or name not in here:
            return False
        here = here[name]
    return here is None


def remove(document: dict[str, Any], path: KeyPath) -> None:
    """Delete an existing key from the document."""
    here: Any = document
    for name in path[:-1]:
        here = here[name]
    del here[path[-1]]


def _override_value(text: str) -> object:
    try:
        value = json.loads(
            text, object_pairs_hook=JsonObject, parse_constant=NotFinite, parse_float=_parse_float
        )
    except json.JSONDecodeError as error:
        if text.startswith(("{", "[", '"')):
            raise ConfigError([f"column {error.colno} of the value: {error.msg}"]) from error
        return text
    return value


def _parse_float(text: str) -> float | NotFinite:
    value = float(text)
    return value if math.isfinite(value) else NotFinite(text)


def hidden_problems(value: object, path: KeyPath = ()) -> list[Problem]:
    """Return the duplicate keys and non-finite numbers, which a plain dict would hide."""
    if isinstance(value, NotFinite):
        return [Problem(path, f"{value.spelling} is not a JSON number; write a finite one")]
    problems: list[Problem] = []
    children: list[tuple[str | int, object]] = []
    if isinstance(value, JsonObject):
        problems += [
            Problem((*path, name), "written more than once; keep one") for name in value.repeated
        ]
        children += value.items()
    elif isinstance(value, list):
        children += enumerate(value)
    for name, child in children:
        problems += hidden_problems(child, (*path, name))
    return problems


def _syntax_hint(text: str, position: int) -> str:
    """Return a hint for the most common mistakes in hand-written JSON."""
    rest = text[position : position + 2]
    before = text[:position].rstrip()
    if rest.startswith(("}", "]")) and before.endswith(","):
        return " (remove the comma before it)"
    if rest in ("//", "/*") or rest.startswith("#"):
        return " (JSON has no comments)"
    if rest.startswith("'"):
        return ' (strings take double quotes: ")'
    return ""
