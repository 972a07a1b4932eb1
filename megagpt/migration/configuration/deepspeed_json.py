"""DeepSpeed's own keys, one by one, as megagpt/schema/foreign.py classes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megagpt.config import ConfigError, RunConfig
from megagpt.migration.configuration.ledger import Ledger
from megagpt.schema.errors import KeyPath, dotted
from megagpt.schema.foreign import FOREIGN, ForeignKey
from megagpt.schema.json_reader import ABSENT, Document, put, remove, value_at
from megagpt.schema.synonyms import SYNONYMS, WITHOUT_A_KEY
from megagpt.schema.written import COMMENT_MARKS, adopt, fields_at, takes_auto
from megagpt.utils import did_you_mean

BY_PROGRAM = "absent to DeepSpeed too; here the trainer decides it, or asks for it"
AS_IT_IS = "as it is"


def take_deepspeed(document: Document, ledger: Ledger, source: str) -> None:
    """Move a DeepSpeed configuration into the ledger's document, with a verdict for each key."""
    for row in FOREIGN:
        if (value := value_at(document, row.path)) is not ABSENT:
            _judge(row, value, document, ledger)
    for path, value in list(_leaves(document)):
        _judge_own(path, value, document, ledger)
    document.setdefault("megagpt", {})  # where steps_per_print goes
    taken = adopt(document, RunConfig)
    if taken.problems:
        raise ConfigError(problem.line(source) for problem in taken.problems)
    for path, value in _leaves(document):
        if path != ("megagpt",):
            put(ledger.document, path, value)


def _judge(row: ForeignKey, value: Any, document: Document, ledger: Ledger) -> None:
    """Record what becomes of a key that this trainer has no field for; remove it if it is left."""
    if value == {}:  # its keys had rows of their own
        remove(document, row.path)
    elif row.changes_nothing(value):
        ledger.nothing(row.key, value, row.reason or "at this value")
        remove(document, row.path)
    elif row.otherwise == "acts":
        ledger.took(row.key, value, f"as {row.becomes}")
    elif row.otherwise == "hint":
        ledger.nothing(row.key, value, row.reason)
        remove(document, row.path)
    else:
        ledger.drop(row.key, value, row.reason.removesuffix("; delete it"))
        remove(document, row.path)


def _judge_own(path: KeyPath, value: Any, document: Document, ledger: Ledger) -> None:
    """Record what becomes of any other key: one of ours, a comment, or nobody's."""
    key = dotted(path)
    if any(path[: len(row.path)] == row.path for row in FOREIGN):
        return
    if any(str(name).startswith(COMMENT_MARKS) for name in path):
        ledger.nothing(key, value, "a comment")
    elif not (fields := fields_at(RunConfig, path)):
        ledger.drop(key, value, _unknown(str(path[-1])))
        remove(document, path)
    elif value is None or (value == "auto" and not any(map(takes_auto, fields))):
        ledger.nothing(key, value, BY_PROGRAM)
    else:
        ledger.took(key, value, AS_IT_IS)


def _unknown(name: str) -> str:
    """Return what is said of a key that neither DeepSpeed nor this trainer reads."""
    if name in WITHOUT_A_KEY:
        return WITHOUT_A_KEY[name]
    if name in SYNONYMS:
        return f"no key of DeepSpeed; here it is {SYNONYMS[name]}"
    known = sorted({str(row.path[-1]) for row in FOREIGN} | set(RunConfig.model_fields))
    return f"neither DeepSpeed nor this trainer reads it{did_you_mean(name, known)}"


def _leaves(section: Document, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each key that holds a value or an empty section."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value
