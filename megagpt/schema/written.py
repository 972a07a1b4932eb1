"""From what a file says to the trainer's own keys, before the strict check.

`adopt` removes comments, and keys that are absent in effect ("auto", a section of null), and deals
with DeepSpeed's keys that have no field here, as `foreign.py` classes them. What it leaves is
checked without exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megagpt.schema.errors import KeyPath, Problem, dotted, models_at, models_in, shown
from megagpt.schema.foreign import FOREIGN, ForeignKey, same_value
from megagpt.schema.json_reader import ABSENT, Document, put, remove, value_at

Note = tuple[str, str]  # a key, and why it does nothing

WARM_UP = ("scheduler", "params", "warmup_num_steps")
COMMENT_MARKS = ("_comment", "__comment", "//", "#")


@dataclass
class Adopted:
    """What `adopt` has to say: a note for each key that was dropped with a reason, and problems."""

    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def adopt(document: Document, model: type[BaseModel]) -> Adopted:
    """Change the document into one that has only the trainer's own keys, as far as that is right.

    Keys that are refused or unknown stay, for the strict check to name.
    """
    result = Adopted()
    _drop_comments(document)
    if isinstance(enabled := document.get("zero_optimization"), bool):
        document["zero_optimization"] = {"stage": int(enabled)}  # as DeepSpeed reads it
    for row in sorted(FOREIGN, key=lambda row: row.otherwise != "acts"):
        if (value := value_at(document, row.path)) is ABSENT:
            continue
        is_idle = row.path[0] == "aio" and not _offloads_to_nvme(document)
        if is_idle and not row.changes_nothing(value):
            remove(document, row.path)  # nothing reads the section, which `idle_keys` says
        else:
            _adopt_foreign(document, row, value, result)
    _drop_absent(document, model)
    if same_value(value_at(document, WARM_UP), 1):
        put(document, WARM_UP, 2)
        result.notes.append((dotted(WARM_UP), "1 is 2 to DeepSpeed, its shortest warm-up"))
    if _is_adam(kind := value_at(document, ("optimizer", "type"))):
        document["optimizer"]["type"] = {"adam": "Adam", "adamw": "AdamW"}[kind.lower()]
    return result


def _offloads_to_nvme(document: Document) -> bool:
    sections = ("offload_optimizer", "offload_param")
    return any(
        value_at(document, ("zero_optimization", name, "device")) == "nvme" for name in sections
    )


def _is_adam(kind: Any) -> bool:
    """Return whether DeepSpeed takes this name for Adam or AdamW; case does not matter to it."""
    return isinstance(kind, str) and kind.lower() in ("adam", "adamw")


def _drop_comments(section: Any) -> None:
    """Delete keys such as `_comment` and `//`, at any depth."""
    if not isinstance(section, dict):
        return
    for name in [name for name in section if name.startswith(COMMENT_MARKS)]:
        del section[name]
    for value in section.values():
        _drop_comments(value)


def _adopt_foreign(document: Document, row: ForeignKey, value: Any, result: Adopted) -> None:
    if row.changes_nothing(value):
        _drop_with_empty_section(document, row.path)
    elif row.otherwise == "hint":
        result.notes.append((row.key, f"not handed to DeepSpeed: {row.reason}"))
        _drop_with_empty_section(document, row.path)
    elif row.otherwise == "acts":
        problem = _move(document, row, value)
        remove(document, row.path)
        if problem is not None:
            result.problems.append(problem)
        elif row.reason:
            result.notes.append((row.key, row.reason))


def _drop_with_empty_section(document: Document, path: KeyPath) -> None:
    """Delete a key, and its section if that holds nothing else and would mean nothing."""
    remove(document, path)
    if path[0] in ("aio", "checkpoint") and document.get(path[0]) == {}:
        del document[path[0]]


def _move(document: Document, row: ForeignKey, value: Any) -> Problem | None:
    """Put the value where it belongs; return the problem if another value is there."""
    target = tuple(row.becomes.split("."))
    meant = value if row.value is None else dict(row.value)
    if row.key == "steps_per_print":
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            return Problem(row.path, f"expected an integer, got {shown(value)}")
        meant = int(value)
        if "megagpt" not in document:
            return None  # which is an error of its own
    there = value_at(document, target)
    if there in (ABSENT, None, "auto"):
        put(document, target, meant)
    elif not row.yields and not same_value(there, meant):
        return Problem(row.path, f"given with {row.becomes} {shown(there)}; keep only that")
    return None


def _drop_absent(document: Document, model: type[BaseModel]) -> None:
    """Delete optional keys that are "auto" where that is no value of theirs, and null sections."""
    absent = [(path, value) for path, value in _items(document) if value in (None, "auto")]
    for path, value in absent:
        fields = fields_at(model, path)
        if not fields or any(found.is_required() for found in fields):
            continue
        is_section = any(models_in(found.annotation) for found in fields)
        if value is None and is_section:
            remove(document, path)
        if value == "auto" and not is_section and not any(map(takes_auto, fields)):
            remove(document, path)


def _items(section: Document, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key below a section with its value, sections before their members."""
    for name, value in section.items():
        yield (*prefix, name), value
        if isinstance(value, dict):
            yield from _items(value, (*prefix, name))


def fields_at(model: type[BaseModel], path: KeyPath) -> list[FieldInfo]:
    """Return the fields that a key may be; several below the scheduler, none of an unknown key."""
    return [
        found
        for parent in models_at(model, path[:-1])
        for name, found in parent.model_fields.items()
        if path[-1] == (found.alias or name)
    ]


def takes_auto(found: FieldInfo) -> bool:
    """Return whether a key has "auto" among its values."""
    return any(kind is str or kind == Literal["auto"] for kind in _kinds(found.annotation))


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _kinds(argument)


def lines_of(notes: list[Note]) -> list[str]:
    """Return a line for each reason, which names its keys: `a, b: why`."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in notes:
        by_reason.setdefault(reason, []).append(key)
    return [f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items()]
