"""What a key does, its default, what it costs, and what it excludes.

All of it comes from elsewhere: the schema, the table of DeepSpeed's keys, the rules, and the
planner, which plans a configuration with other values of the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megagpt.common.text import text_table
from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.planning.plan import Plan
from megagpt.planning.rules import RULES, Rule
from megagpt.schema.deepspeed import (
    ZERO_KEY_STAGES,
    OffloadOptimizerConfig,
    OffloadParamConfig,
)
from megagpt.schema.errors import all_keys, models_in, shown, unknown_key
from megagpt.schema.foreign import FOREIGN
from megagpt.schema.idle import NOT_FROM_NVME
from megagpt.schema.reference import default_of, harmless, role_of, verdict
from megagpt.schema.synonyms import SYNONYMS
from megagpt.schema.written import fields_at
from megagpt.utils import UserError

MakePlan = Callable[[Sequence[str]], Plan]
ROLES = {
    "identity": "part of what is trained: a run continues with another value only if "
    "--allow_change names it",
    "execution": "how it is trained: a run may continue with another value",
}
MOST_VALUES = 8  # planned of one key
ELEMENTS = (10_000_000, 100_000_000, 1_000_000_000)  # tried for an absent number of elements


def explain(word: str, path: str, overrides: Sequence[str], plan: MakePlan) -> str:
    """Return the explanation of a key; `plan` plans the configuration with further `--set` items.

    Raises UserError with a suggestion if there is no such key.
    """
    key = full_key(word)
    names = tuple(key.split("."))
    if row := next((row for row in FOREIGN if row.key == key), None):
        return (
            (
                f"{key}: a key of DeepSpeed\n  changes nothing at: {harmless(row)}\n"
                f"  another value: {verdict(row)}"
            )
            .replace("`", "")
            .replace("**", "")
        )
    fields = fields_at(RunConfig, names)
    if any(models_in(field.annotation) and not role_of(field) for field in fields):
        return "\n".join(_section(key, fields))
    written = load_config(path, overrides, for_plan=True)
    lines = [line for field in fields for line in _meaning(key, field)]
    lines += [f"  in {path}: {shown(_value_at(written, names))}", *_acts(key)]
    lines += [*_excludes(key), *_costs(key, fields[0], _value_at(written, names), plan)]
    return "\n".join(dict.fromkeys(lines))


def full_key(word: str) -> str:
    """Return the whole key that a word means: itself, its last name, or another trainer's name."""
    if fields_at(RunConfig, tuple(word.split("."))) or any(row.key == word for row in FOREIGN):
        return word
    if word in SYNONYMS:
        return SYNONYMS[word]
    ending = [key for key in dict.fromkeys(all_keys(RunConfig)) if key.endswith(f".{word}")]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UserError(f"--explain {word}: several keys end so; give one of {', '.join(ending)}")
    raise UserError(f"--explain {word}: {unknown_key(tuple(word.split('.')), RunConfig)}")


def _section(key: str, fields: Sequence[FieldInfo]) -> Iterator[str]:
    yield f"{key}: {fields[0].description}"
    for field in fields:
        for member in models_in(field.annotation):
            for name, inner in member.model_fields.items():
                yield f"  {key}.{inner.alias or name}: {inner.description}"


def _meaning(key: str, field: FieldInfo) -> Iterator[str]:
    yield f"{key}: {field.description}"
    values = _values(field)
    default = default_of(key.rpartition(".")[2], field).replace("`", "") or "absent"
    yield f"  values: {values}; default: {default}" if values else f"  default: {default}"
    if role := role_of(field):
        yield f"  {role}: {ROLES[role]}"


def _values(field: FieldInfo) -> str:
    """Return the values that a field takes, with its bounds."""
    kinds = _kinds(field.annotation)
    words = [shown(value) for kind in kinds for value in _choices(kind)]
    if not words:
        names = {bool: "true, false", int: "a whole number", float: "a number", str: "text"}
        words = [names[kind] for kind in kinds if kind in names]
    bounds = [
        f"{word} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([*dict.fromkeys(words), *bounds])


def _kinds(annotation: Any) -> list[Any]:
    """Return the types in an annotation, without what wraps them."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds(part)]


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _acts(key: str) -> Iterator[str]:
    """Yield where DeepSpeed reads the key, if not everywhere."""
    section, _, name = key.rpartition(".")
    if section == "zero_optimization" and name in ZERO_KEY_STAGES:
        stages = ", ".join(map(str, ZERO_KEY_STAGES[name]))
        yield f"  acts at ZeRO {stages}; elsewhere it is dropped, and a note says so"
    if name in NOT_FROM_NVME:
        yield f"  no effect with parameters on NVMe: {NOT_FROM_NVME[name]}"
    for part, model in (
        ("offload_optimizer", OffloadOptimizerConfig),
        ("offload_param", OffloadParamConfig),
    ):
        if section == f"zero_optimization.{part}" and name in model.nvme_only():
            yield '  acts with device "nvme" only'


def _excludes(key: str) -> Iterator[str]:
    """Yield the rules that refuse some of its values, or for which it is a remedy."""
    own = [rule for rule in RULES if rule.key == key]
    others = [rule for rule in RULES if rule.key != key and _mentions(rule, key)]
    if own or others:
        yield "  excludes:"
    yield from (f"    some of its values: {rule.reason}" for rule in own)
    yield from (f"    some of {rule.key}: {rule.reason}" for rule in others)


def _mentions(rule: Rule, key: str) -> bool:
    remedies = rule.remedies if isinstance(rule.remedies, tuple) else ()
    items = [item for remedy in remedies for item in remedy.split()]
    return key in rule.reason or any(item.startswith(f"{key}=") for item in items)


def _costs(key: str, field: FieldInfo, now: Any, plan: MakePlan) -> Iterator[str]:
    """Yield a table of step time and memory with other values of the key."""
    rows = [
        (shown(value), *_cost([f"{key}={json.dumps(value)}"], plan))
        for value in _others(field, now)
    ]
    figures = {row[1:4] for row in rows if row[1]}
    if len(figures) < 2 and not any(row[4] for row in rows):
        yield "  cost: none that the planner counts"
        return
    yield "  cost here (--deepspeed_config, --ranks and --device plan another run):"
    head = ("value", "step, s", "GiB a device", "GiB a host", "")
    yield from (f"    {line.rstrip()}" for line in text_table([head, *rows]))


def _cost(items: Sequence[str], plan: MakePlan) -> tuple[str, str, str, str]:
    """Return step time, device and host memory, and what is wrong if the value is refused."""
    try:
        found = plan(items)
    except ConfigError as error:
        return "", "", "", error.errors[0]
    wrong = found.refusals[0] if found.refusals else "" if found.good else "does not fit"
    memory = (f"{found.device_gib:.2f}", f"{found.host_gib:.2f}")
    return f"{found.estimate.step_s:.4g}", *memory, wrong


def _others(field: FieldInfo, now: Any) -> list[Any]:
    """Return the values to plan: every one of a few, else the present one, its half and double."""
    kinds = _kinds(field.annotation)
    choices = [value for kind in kinds for value in _choices(kind) if value != "auto"]
    if choices:
        return choices[:MOST_VALUES]
    if bool in kinds:
        return [False, True]
    if int not in kinds and float not in kinds:
        return []
    least, most = (_bound(field, name) for name in ("ge", "le"))
    if least is not None and most is not None and most - least < MOST_VALUES:
        return list(range(int(least), int(most) + 1))
    if isinstance(now, int) and not isinstance(now, bool):
        return sorted({max(now // 2, int(least or 1)), now, 2 * now})
    if isinstance(now, float):
        return sorted({now / 2, now, 2 * now})
    first = int(least or 1)
    return list(ELEMENTS) if "elements" in (field.description or "") else [first, 2 * first]


def _bound(field: FieldInfo, name: str) -> float | None:
    """Return a bound of the field's numbers: `ge` or `le`."""
    return next((getattr(rule, name) for rule in field.metadata if hasattr(rule, name)), None)


def _value_at(config: BaseModel, names: Sequence[str]) -> Any:
    value: Any = config
    for name in names:
        value = getattr(value, name, None)
    return value
