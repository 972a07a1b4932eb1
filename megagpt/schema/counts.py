"""Whole numbers in `--set` as people write them: `megagpt.training.total_tokens=10B`.

Only where a key takes whole numbers: a directory may be named 10B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from kernels.options import count
from megagpt.schema.errors import models_in


def with_whole_numbers(overrides: Sequence[str], model: type[BaseModel]) -> list[str]:
    """Return `KEY=VALUE` items with 4k, 1_000, 1e9 or 10B written out for keys that count."""
    return [_written_out(item, model) for item in overrides]


def _written_out(item: str, model: type[BaseModel]) -> str:
    key, equals, text = item.partition("=")
    number = count(text)
    if number is None or not _counts(model, key.strip().split(".")):
        return item
    return f"{key}{equals}{number}"


def _counts(model: type[BaseModel], path: list[str]) -> bool:
    """Return whether a key takes whole numbers and nothing else but words of its own."""
    name, *below = path
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if name not in fields:
        return False
    annotation = fields[name].annotation
    if below:
        return any(_counts(inner, below) for inner in models_in(annotation))
    types = set(_types(annotation))
    return int in types and not types & {str, float, bool}


def _types(annotation: Any) -> Iterator[Any]:
    """Yield the classes in an annotation, inside unions and `Annotated` too."""
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)
