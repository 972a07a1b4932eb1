"""Error messages for configurations: all problems at once, each with its key and the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megagpt.schema.synonyms import PRESET_SYNONYMS, SYNONYMS, WITHOUT_A_KEY
from megagpt.utils import UserError, did_you_mean

KeyPath = tuple[str | int, ...]

# Required keys of which files of other trainers leave the value to the command line, and the lines
# to paste into the file, or after --set.
TO_PASTE: dict[str, tuple[str, str]] = {
    "optimizer": (
        '"optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}}',
        "optimizer.type=AdamW optimizer.params.lr=3e-4 optimizer.params.weight_decay=0.1",
    ),
    "optimizer.type": ('"type": "AdamW"', "optimizer.type=AdamW"),
    "optimizer.params": ('"params": {"lr": 3e-4}', "optimizer.params.lr=3e-4"),
    "optimizer.params.lr": ('"lr": 3e-4', "optimizer.params.lr=3e-4"),
    "train_batch_size": (
        '"train_micro_batch_size_per_gpu": 8',
        "train_micro_batch_size_per_gpu=8",
    ),
    "megagpt": (
        '"megagpt": {"model": {"preset": "gpt2-124m"}, "training": {"total_steps": 1000}}',
        "megagpt.model.preset=gpt2-124m megagpt.training.total_steps=1000",
    ),
    "megagpt.model": ('"model": {"preset": "gpt2-124m"}', "megagpt.model.preset=gpt2-124m"),
    "megagpt.training": ('"training": {"total_steps": 1000}', "megagpt.training.total_steps=1000"),
}
EXPECTED_KIND = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "an object",
    "dict_type": "an object",
}
_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?([eE][+-]?\d{1,2})?")  # as JSON has them
BOUND_WORDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


class ConfigError(UserError):
    """A configuration that cannot be used.

    `errors` holds one line for each problem; `str(error)` joins them.
    """

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


class NotFinite:
    """A placeholder for NaN, Infinity or a number beyond a float; JSON has no such values."""

    def __init__(self, spelling: str) -> None:
        self.spelling = spelling


class Problem(NamedTuple):
    """One problem and the key it concerns (empty: the whole document)."""

    path: KeyPath
    message: str

    def line(self, source: str) -> str:
        """Return an error line: `x.json: zero_optimization.stage: must be at most 3, got 4`."""
        return ": ".join(part for part in (source, dotted(self.path), self.message) if part)


def dotted(path: KeyPath) -> str:
    """Return a key as the user types it: `megagpt.data.path[0].weight`."""
    text = ""
    for element in path:
        text += f"[{element}]" if isinstance(element, int) else f".{element}" if text else element
    return text


def shown(value: object) -> str:
    """Return a value as JSON, cut to 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def to_paste(key: str) -> str:
    """Return what to write for a required key: `; write "lr": 3e-4, or --set ...`, or nothing."""
    if key not in TO_PASTE:
        return ""
    line, items = TO_PASTE[key]
    return f"; write {line}, or --set {items}"


def problems_in(
    error: ValidationError,
    document: object,
    model: type[BaseModel],
    refused: Mapping[str, str],
    unsure: Container[KeyPath] = (),
) -> list[Problem]:
    """Translate pydantic's errors.

    `refused` maps the dotted keys that we reject on purpose to what to use instead. `unsure` has
    the sections whose checks of several keys say nothing, because some values are not the user's.
    """
    problems: list[Problem] = []
    for details in error.errors(include_url=False):
        found = _translate(details, document, model, refused)
        if details["type"] != "section_check" or _section_of(details, document) not in unsure:
            problems += found
    return problems


def _section_of(details: ErrorDetails, document: object) -> KeyPath:
    return _path_in_document(details["loc"], document, keep_last=False)


def _translate(
    details: ErrorDetails, document: object, model: type[BaseModel], refused: Mapping[str, str]
) -> list[Problem]:
    kind = details["type"]
    location = details["loc"]
    path = _path_in_document(location, document, keep_last=kind in ("missing", "extra_forbidden"))
    if kind == "default_factory_not_called" or isinstance(details["input"], NotFinite):
        # reported already, at the key that this default depends on, or as a non-finite number
        return []
    if kind == "section_check":
        found: Sequence[tuple[str, str]] = details["ctx"]["problems"]
        return [
            Problem((*path, *(key.split(".") if key else ())), message) for key, message in found
        ]
    if kind == "extra_forbidden":
        return [Problem(path, refused.get(dotted(path)) or _unknown_key(path, location, model))]
    return [Problem(path, _message(details, path, location, model))]


def _message(
    details: ErrorDetails, path: KeyPath, location: KeyPath, model: type[BaseModel]
) -> str:
    kind = details["type"]
    value = details["input"]
    context = details.get("ctx", {})
    if kind == "missing":
        return _missing_key(path, location, model)
    if value == "auto":
        return f'"auto" is decided by other programs, not here{to_paste(dotted(path))}' + (
            "" if dotted(path) in TO_PASTE else "; write the value"
        )
    if kind in EXPECTED_KIND:
        hint = "; write one, or remove the key" if value is None else _without_quotes(kind, value)
        return f"expected {EXPECTED_KIND[kind]}, got {shown(value)}{hint}"
    if kind in BOUND_WORDS:
        key, words = BOUND_WORDS[kind]
        return f"must be {words} {context[key]:g}, got {shown(value)}"
    if kind == "literal_error":
        return _not_a_choice(
            value, re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        )
    if kind == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", context["expected_tags"])
        return f'"type": {_not_a_choice(context["tag"], choices)}'
    return f"{details['msg'][0].lower()}{details['msg'][1:]}, got {shown(value)}"


def _not_a_choice(value: object, choices: list[str]) -> str:
    expected = ", ".join(f'"{choice}"' for choice in choices)
    meant = PRESET_SYNONYMS.get(str(value).lower())
    suggestion = f', did you mean "{meant}"?' if meant in choices else ""
    return (
        f"expected one of {expected}; got {shown(value)}"
        f"{suggestion or did_you_mean(str(value), choices)}"
    )


def _without_quotes(kind: str, value: object) -> str:
    """Return what to write where a number or a truth value stands in quotes, else nothing."""
    if kind == "bool_type" and value in ("true", "false"):
        return f"; write {value} without quotes"
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return ""
    if kind == "int_type" and float(value).is_integer():
        return f"; write {int(float(value))} without quotes"
    return f"; write {value} without quotes" if kind == "float_type" else ""


def _missing_key(path: KeyPath, location: KeyPath, model: type[BaseModel]) -> str:
    for parent in models_at(model, location[:-1]):
        field = parent.model_fields.get(str(location[-1]))
        if field is not None and field.description:
            return f"required key is missing ({field.description}){to_paste(dotted(path))}"
    return "required key is missing"


def _unknown_key(path: KeyPath, location: KeyPath, model: type[BaseModel]) -> str:
    """Suggest the key that has another name elsewhere, or a similar one of the same section."""
    word = str(path[-1])
    if word in WITHOUT_A_KEY:
        return f"unknown key: {WITHOUT_A_KEY[word]}"
    siblings = [key for parent in models_at(model, location[:-1]) for key in keys_of(parent)]
    section = "".join(f"{name}." for name in path[:-1])
    if (meant := SYNONYMS.get(word)) is not None:
        return f'unknown key, did you mean "{meant.removeprefix(section)}"?'
    if word.startswith("_"):
        return "unknown key; a comment begins with _comment, // or #"
    suggestion = did_you_mean(word, siblings)
    if not suggestion:
        elsewhere = [key for key in all_keys(model) if key.rsplit(".", 1)[-1] == word]
        suggestion = f', did you mean "{elsewhere[0]}"?' if elsewhere else ""
    return f"unknown key{suggestion}"


def unknown_key(path: KeyPath, model: type[BaseModel]) -> str:
    """Return the message on an unknown key by its whole path, such as one of `--set`."""
    word = str(path[-1])
    if word in SYNONYMS or word in WITHOUT_A_KEY or len(path) == 1:
        return _unknown_key(path, path, model)
    keys = all_keys(model)
    ending = f".{dotted(path)}"
    same = [key for key in keys if key.endswith(ending)]
    return f"unknown key{did_you_mean(dotted(path), same or keys)}"


def _path_in_document(location: KeyPath, document: object, *, keep_last: bool) -> KeyPath:
    """Return pydantic's location without its union tags: only keys and indices of the document."""
    path: list[str | int] = []
    here = document
    for position, element in enumerate(location):
        last = keep_last and position == len(location) - 1
        if isinstance(here, dict) and (element in here or last):
            path.append(element)
            here = here.get(element)
        elif isinstance(here, list | tuple) and isinstance(element, int):
            path.append(element)
            here = here[element] if element < len(here) else None
    return tuple(path)


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return the keys that a section accepts, as written in the file."""
    return [field.alias or name for name, field in model.model_fields.items()]


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every accepted key at any depth, dotted, once; sections come before their members."""
    found: dict[str, None] = {}
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        found[key] = None
        for member in models_in(field.annotation):
            found.update(dict.fromkeys(all_keys(member, f"{key}.")))
    return list(found)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes in a type annotation, through unions, tuples and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def models_at(root: type[BaseModel], location: KeyPath) -> list[type[BaseModel]]:
    """Return the section classes that a location may name.

    A class name in the location is the tag of a union's member.
    """
    models = [root]
    for element in location:
        tagged = [model for model in models if model.__name__ == element]
        fields = [
            field for model in models if (field := model.model_fields.get(str(element))) is not None
        ]
        if tagged:
            models = tagged
        elif fields:
            models = [member for field in fields for member in models_in(field.annotation)]
    return models
