"""Declaration of configuration keys: meaning, default, and role (identity or execution)."""

from __future__ import annotations

import os.path
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """An object of the file: frozen, strict types (true is not an integer), no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def identity(default: Any, meaning: str, **constraints: Any) -> Any:
    """Declare a key that says WHAT is trained; a run cannot continue with another value."""
    return _key("identity", default, meaning, constraints)


def later_identity(default: Any, meaning: str, **constraints: Any) -> Any:
    """Declare an identity key that came after version 0.1.0.

    At its default it is no part of the identity, so that older runs and checkpoints keep theirs.
    """
    return _key("identity", default, meaning, constraints, later=True)


def default_of(section: BaseModel, name: str) -> Any:
    """Return a key's default; a derived one follows from the section's other keys."""
    field = type(section).model_fields[name]
    return field.get_default(call_default_factory=True, validated_data=section.__dict__)


def at_default(section: BaseModel, name: str) -> bool:
    """Return whether a key has its default."""
    return bool(getattr(section, name) == default_of(section, name))


def is_later(field: FieldInfo) -> bool:
    """Return whether a key was declared with `later_identity`."""
    return isinstance(field.json_schema_extra, dict) and "added_after" in field.json_schema_extra


def execution(default: Any, meaning: str, **constraints: Any) -> Any:
    """Declare a key that says HOW the run is executed; a run may continue with another value."""
    return _key("execution", default, meaning, constraints)


def _key(
    role: str, default: Any, meaning: str, constraints: dict[str, Any], *, later: bool = False
) -> Any:
    extra: Any = {"role": role} | ({"added_after": "0.1.0"} if later else {})
    if callable(default):  # it gets the keys declared before it as a dict
        return Field(
            default_factory=default, description=meaning, json_schema_extra=extra, **constraints
        )
    return Field(default, description=meaning, json_schema_extra=extra, **constraints)


def section(default: Any, meaning: str) -> Any:
    """Declare a key that holds a section; `default` may be `None` or `...` as with `Field`.

    Each member of the section has its own role.
    """
    return Field(default, description=meaning)


def refuse(problems: Iterable[tuple[str, str]]) -> None:
    """Raise a validation error if there are problems: (dotted key below the section, message)."""
    found = list(problems)
    if found:
        raise PydanticCustomError("section_check", "section check", {"problems": found})


def _integral_float_to_int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# DeepSpeed's documentation writes these sizes as 5e8, which JSON reads as a float. 2.5 is an error.
ElementCount = Annotated[int, BeforeValidator(_integral_float_to_int)]

# A path on this machine; `~` is the home directory, as for a shell.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]

auto_or_value = Discriminator(lambda value: "auto" if value == "auto" else "value")
