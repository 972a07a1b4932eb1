"""JSON Schema, as much of it as pydantic writes: an outside reader of ds_configs/schema.json."""

from __future__ import annotations

import re
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether an editor that checks with this schema accepts the value."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and not any(fits(value, choice, root) for choice in choices):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema and not _is_kind(value, schema["type"]):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, dict) and not _members_fit(value, schema, root):
        return False
    return _in_bounds(value, schema)


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, KINDS[kind])


def _members_fit(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> bool:
    properties = schema.get("properties", {})
    patterns = schema.get("patternProperties", {})
    if not set(schema.get("required", ())) <= value.keys():
        return False
    for key, member in value.items():
        if key in properties:
            if not fits(member, properties[key], root):
                return False
        elif schema.get("additionalProperties") is False and not any(
            re.search(pattern, key) for pattern in patterns
        ):
            return False
    return True


def _in_bounds(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1)
        and value < schema.get("exclusiveMaximum", value + 1)
    )
