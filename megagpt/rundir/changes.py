"""Changing one's mind: what a run directory may be continued with, and the record of it.

    runs/NAME/config.json
        ... "changes": [{"step": 500, "keys": {"optimizer.params.lr": [0.001, 0.0003]}}]

Each entry says from which step on which identity keys had other values: [before, after]. A
checkpoint may have any value that its key has had in the directory, because the newest one was
saved before the change, and an older one may be needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megagpt.config import ConfigError, RunConfig, identity_changes, identity_line
from megagpt.schema.errors import all_keys, shown
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import UserError, did_you_mean

DATA = "megagpt.data"
# The checkpoint fits under any value of these keys, and of the keys below them.
MAY_CHANGE = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "train_batch_size",
    "megagpt.model.dropout",
    "megagpt.model.sequence_length",  # of rotary positions
    "megagpt.model.rope_base",
    "megagpt.model.rope_scaling",
    DATA,
)
SHORT_NAMES = {
    "schedule": "scheduler",
    "batch": "train_batch_size",
    "dropout": "megagpt.model.dropout",
    "data": DATA,
}
LORA = "megagpt.training.lora"
SEQUENCE_LENGTH = "megagpt.model.sequence_length"
DATA_FINGERPRINT = "data_fingerprint"  # not a key: the tokens themselves, as a checkpoint has them
REASONS = {
    "megagpt.model.vocabulary": "the data have another vocabulary: prepare them with the tokenizer "
    "of the run",
    SEQUENCE_LENGTH: "learned positions are a table of this length; rotary ones may change",
    "megagpt.training.seed": "the initial weights follow from it",
    "megagpt.model.init_std": "the initial weights follow from it",
}
OTHERWISE = "the checkpoint is of another model"

Pair = tuple[Any, Any]  # the values before and after


@dataclass(frozen=True)
class Changes:
    """What was changed in a run directory: the ``recorded`` entries, and ``now`` by this start."""

    recorded: tuple[Mapping[str, Any], ...] = ()
    now: Mapping[str, Pair] = field(default_factory=dict)

    def known(self) -> dict[str, list[Any]]:
        """Return every value that each changed key has had."""
        values: dict[str, list[Any]] = {}
        for keys in (*(entry["keys"] for entry in self.recorded), self.now):
            for key, pair in keys.items():
                values.setdefault(key, []).extend(pair)
        return values

    def entries(self, step: int) -> list[Mapping[str, Any]]:
        """Return what config.json holds once this start continues from ``step``."""
        made = [{"step": step, "keys": {key: list(pair) for key, pair in self.now.items()}}]
        return [*self.recorded, *(made if self.now else [])]

    def with_data(self, before: str, after: str) -> Changes:
        """Return the changes with other tokens from now on."""
        return Changes(self.recorded, {**self.now, DATA_FINGERPRINT: (before, after)})

    def lines(self) -> list[str]:
        """Return a line for each key that this start changes."""
        return [f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in self.now.items()]

    def as_text(self) -> str:
        """Return a text that is equal on ranks that agree."""
        return json.dumps([*self.recorded, dict(self.now)])


UNCHANGED = Changes()


def allowed_prefixes(words: Iterable[str]) -> list[str]:
    """Return the keys that `--allow_change` names; raise UserError for one that cannot change."""
    prefixes = [SHORT_NAMES.get(word, word) for word in words]
    for word in prefixes:
        if not _is_below(word, MAY_CHANGE):
            raise UserError(
                f"--allow_change {word}: {_why_not(word)}; it takes: {', '.join(MAY_CHANGE)}"
            )
    return prefixes


def _why_not(word: str) -> str:
    """Return why `--allow_change` does not take a word."""
    adapters = _is_below(word, [LORA]) and word != f"{LORA}.base"
    if word in REASONS or adapters or _is_below(word, ["megagpt.model"]):
        return f"cannot change within a run: {REASONS.get(word, OTHERWISE)}"
    if word in all_keys(RunConfig):
        return "may change without it; leave it out"
    synonym = SYNONYMS.get(word, "")
    meant = f', did you mean "{synonym}"?' if _is_below(synonym, MAY_CHANGE) else ""
    return f"unknown key{meant or did_you_mean(word, (*MAY_CHANGE, *SHORT_NAMES))}"


def allows_data(prefixes: Sequence[str]) -> bool:
    """Return whether other tokens are allowed."""
    return _is_below(f"{DATA}.path", prefixes)


def permitted(
    source: str, recorded: Mapping[str, Any], requested: Mapping[str, Any], prefixes: Sequence[str]
) -> dict[str, Pair]:
    """Return the identity keys that change; raise ConfigError unless all of them are allowed.

    The last line names what to type.
    """
    changed = identity_changes(recorded, requested)
    if all(_is_below(key, prefixes) and not _is_fixed(key, requested) for key in changed):
        return changed
    fixed = [key for key in changed if _is_fixed(key, requested)]
    lines = [
        f"{source}: {identity_line(key, *pair)}"
        + (f" (cannot change: {REASONS.get(key, OTHERWISE)})" if key in fixed else "")
        for key, pair in changed.items()
    ]
    way_on = ""
    if not fixed:
        way_on = f"to continue with them: --allow_change {' '.join(_shortest(changed))}; or "
    raise ConfigError(
        [
            *lines,
            f"{source}: holds another run; {way_on}choose another --run_dir, or undo these "
            f"differences",
        ]
    )


def _is_fixed(key: str, requested: Mapping[str, Any]) -> bool:
    """Return whether a key of this run can never change."""
    learned = requested.get("megagpt.model.position") == "learned"
    return not _is_below(key, MAY_CHANGE) or (key == SEQUENCE_LENGTH and learned)


def _shortest(keys: Iterable[str]) -> list[str]:
    """Return words for `--allow_change`: a key that changes alone in its section, else these."""
    words: dict[str, list[str]] = {}
    for key in keys:
        section = next(prefix for prefix in MAY_CHANGE if _is_below(key, [prefix]))
        words.setdefault(section, []).append(key)
    return [below[0] if len(below) == 1 else section for section, below in words.items()]


def _is_below(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
