"""Stand-ins for values that a file lacks or has wrong.

A plan needs no learning rate. And where some values are wrong, the others must be checked beside
stand-ins, so that all errors of a file come at once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from megagpt.schema.errors import KeyPath, Problem, dotted, problems_in, to_paste
from megagpt.schema.foreign import REFUSED
from megagpt.schema.json_reader import ABSENT, Document, has, put, remove, value_at
from megagpt.schema.megagpt import LENGTHS
from megagpt.schema.written import Note, fields_at

_MOST_ROUNDS = 4
_ASKED_FOR = ("train_batch_size", "megagpt.training.total_steps")  # unless another key has it
_RATE = 3e-4  # of no consequence: nothing is trained with it


def stand_in_for_plan(document: Document) -> list[Note]:
    """Give the document an optimizer and a batch where it has none; return a note for each."""
    notes = []
    optimizer = document.get("optimizer")
    if optimizer is None:
        document["optimizer"] = {"type": "AdamW", "params": {"lr": _peak_rate(document)}}
        notes.append(_note("optimizer", "not given, planned with AdamW"))
    elif value_at(document, ("optimizer", "params", "lr")) in (ABSENT, "auto"):
        put(document, ("optimizer", "params", "lr"), _peak_rate(document))
        notes.append(_note("optimizer.params.lr", "not given, and not needed for a plan"))
    if not document.keys() & {"train_batch_size", "train_micro_batch_size_per_gpu"}:
        document["train_micro_batch_size_per_gpu"] = 1
        notes.append(_note("train_batch_size", "not given, planned with micro-batches of 1"))
    return notes


def _note(key: str, what: str) -> Note:
    return key, f"{what}; to train{to_paste(key).removeprefix(';')}"


def _peak_rate(document: Document) -> float:
    """Return a learning rate that the schedule's own maximum does not contradict."""
    maximum = value_at(document, ("scheduler", "params", "warmup_max_lr"))
    is_number = isinstance(maximum, int | float) and not isinstance(maximum, bool) and maximum >= 0
    return float(maximum) if is_number else _RATE


def all_problems(
    error: ValidationError, document: Document, model: type[BaseModel]
) -> list[Problem]:
    """Return the problems of a document, also those that a first check does not reach.

    A check of several keys waits until each of them is valid. So wrong values are replaced and the
    rest is checked again; what contradicts only a replacement is left out.
    """
    problems = found = problems_in(error, document, model, REFUSED)
    mended = copy.deepcopy(document)
    unsure: set[KeyPath] = set()
    for _ in range(_MOST_ROUNDS):
        for problem in found:
            _mend(mended, problem.path, model)
            if problem.path[-1:] and problem.path[-1] not in LENGTHS:  # checked with no other key
                unsure.add(problem.path[:-1])
        try:
            model.model_validate(mended)
            break
        except ValidationError as again:
            later = problems_in(again, mended, model, REFUSED, unsure - {()})
            found = [problem for problem in later if not _concerns(problem, problems)]
        if not found:
            break
        problems = [*problems, *found]
    return problems


def _concerns(problem: Problem, reported: Sequence[Problem]) -> bool:
    """Return whether a problem is at, above or below the key of one that is reported."""
    return any(
        problem.path[: len(other.path)] == other.path[: len(problem.path)] for other in reported
    )


def _mend(document: Document, path: KeyPath, model: type[BaseModel]) -> None:
    """Replace what is wrong at a key by a stand-in, or remove it if the key is optional.

    If an optional key is asked for, its section is replaced.
    """
    names = tuple(name for name in path if isinstance(name, str))
    if not names:
        return
    was_there = has(document, names)
    remove(document, names)
    if dotted(names) == "scheduler.type":
        remove(document, ("scheduler",))
    elif dotted(names) in _ASKED_FOR or any(f.is_required() for f in fields_at(model, names)):
        put(document, names, _stand_in(document, dotted(names)))
    elif not was_there:
        _mend(document, names[:-1], model)


def _stand_in(document: Document, key: str) -> Any:
    heads = value_at(document, ("megagpt", "model", "num_heads"))
    is_number = isinstance(heads, int) and not isinstance(heads, bool) and heads > 0
    optimizer = {"type": "AdamW", "params": {"lr": _peak_rate(document)}}
    model = {"num_layers": 1, "hidden_size": 2 * heads if is_number else 2, "num_heads": 1}
    training = {"total_steps": 1}
    whole = {
        "train_batch_size": 1,
        "optimizer": optimizer,
        "megagpt": {"model": model, "training": training},
    }
    found = value_at(whole, tuple(key.split(".")))
    return 1 if found is ABSENT else found
