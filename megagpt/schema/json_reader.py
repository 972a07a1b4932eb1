"""Strict JSON for configurations, and `--set` overrides.

Rejects duplicate keys and NaN; syntax errors show line and column.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megagpt.schema.errors import ConfigError, KeyPath, NotFinite, Problem, dotted
from megagpt.utils import did_you_mean

Document = dict[str, Any]
ABSENT = object()


class JsonObject(dict[str, Any]):
    """A parsed object that remembers which of its keys were written more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = sorted({name for name in names if names.count(name) > 1})


def read_text(path: Path) -> str:
    """Return a file's text without a byte-order mark.

    If it is missing, raise ConfigError that lists the files beside it.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")  # without the mark that Windows writes first
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            remedy = f"iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > utf8.json"
            raise ConfigError([f"{path}: UTF-16, need UTF-8; {remedy}"]) from error
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
    if not text.strip():
        raise ConfigError(
            [f"{source}: empty; need one JSON object, such as ds_configs/default.json"]
        )
    try:
        document = json.loads(
            text, object_pairs_hook=JsonObject, parse_constant=NotFinite, parse_float=_parse_float
        )
    except json.JSONDecodeError as error:
        if _is_yaml(text):
            raise ConfigError([f"{source}: this is YAML, need JSON; {_FROM_YAML}"]) from error
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
    document: Document, overrides: Sequence[str], is_known: Callable[[KeyPath], bool]
) -> tuple[list[KeyPath], list[str]]:
    """Write `a.b=value` items into the document; the last one of a key wins.

    Return the keys that were set and the error lines. A value is JSON (`3`, `true`, `[1, 2]`,
    `"text"`); a word that is not JSON is a string. `null` removes whatever stands at the key.
    Where nothing stands there and the key is not known, it is written, for the check to name.
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
            value = _override_value(text.strip())
        except ConfigError as error:
            errors += [f"--set {item}: {line}" for line in error.errors]
            continue
        if value is None and (has(document, path) or is_known(path)):
            remove(document, path)
            continue
        if (section := _value_in_the_way(document, path)) is not None:
            errors.append(f"--set {item}: {section} is a value, not an object; set it as a whole")
            continue
        put(document, path, value)
        keys_set.append(path)
    return keys_set, errors


def _value_in_the_way(document: Document, path: KeyPath) -> str | None:
    """Return the key of a value where the path needs a section, or None."""
    for depth in range(1, len(path)):
        there = value_at(document, path[:depth])
        if there not in (ABSENT, None) and not isinstance(there, dict):
            return dotted(path[:depth])
    return None


def value_at(document: Document, path: KeyPath) -> Any:
    """Return the value at a key, or `ABSENT`, which no value equals."""
    here: Any = document
    for name in path:
        if not isinstance(here, dict) or name not in here:
            return ABSENT
        here = here[name]
    return here


def has(document: Document, path: KeyPath) -> bool:
    """Return whether the document has the key."""
    return value_at(document, path) is not ABSENT


def remove(document: Document, path: KeyPath) -> None:
    """Delete a key; do nothing if it is not there."""
    parent = value_at(document, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def put(document: Document, path: KeyPath, value: Any) -> None:
    """Set a key, making the sections above it; a value in the place of one stays as it is."""
    here = document
    for name in path[:-1]:
        if here.get(str(name)) is None:
            here[str(name)] = {}
        here = here[str(name)]
        if not isinstance(here, dict):
            return
    here[str(path[-1])] = value


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


# PyYAML comes with datasets.
_FROM_YAML = (
    "to convert it: python -c 'import json, sys, yaml; "
    "print(json.dumps(yaml.safe_load(sys.stdin)))' < IN.yml > OUT.json"
)


def _is_yaml(text: str) -> bool:
    """Return whether the first line that is no comment is `---`, or `key:` without quotes."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return re.fullmatch(r"---|[\w.-]+:(\s.*)?", first) is not None


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
