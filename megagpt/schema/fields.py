"""How a configuration key is declared: its meaning, its default, and whether it is identity or
execution.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """An object of the file: frozen, unknown keys refused, no type converted into another (true
    is no integer).
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def identity(default: Any, meaning: str, **constraints: Any) -> Any:
    """A key that says WHAT is trained: a run directory is never continued under another value."""
    return _key("identity", default, meaning, constraints)


def execution(default: Any, meaning: str, **constraints: Any) -> Any:
    """A key that says HOW it is executed: a run may be continued under another value."""
    return _key("execution", default, meaning, constraints)


def _key(role: str, default: Any, meaning: str, constraints: dict[str, Any]) -> Any:
    if callable(default):  # it follows from the keys declared before it, given as a dict
        return Field(
            default_factory=default,
            description=meaning,
            json_schema_extra={"role": role},
            **constraints,
        )
    return Field(default, description=meaning, json_schema_extra={"role": role}, **constraints)


def section(default: Any, meaning: str) -> Any:
    """A key that holds a section; each member has its own role. `None` or `...` as with `Field`."""
    return Field(default, description=meaning)


def refuse(problems: Iterable[tuple[str, str]]) -> None:
    """Raise what a section's own check found: (dotted key below the section, message); nothing
    found, no error.
    """
    found = list(problems)
    if found:
        raise PydanticCustomError("section_check", "section check", {"problems": found})


def _integral_float_to_int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# DeepSpeed's own documentation writes these sizes as 5e8, which JSON reads as a float; 2.5 stays an
# error.
ElementCount = Annotated[int, BeforeValidator(_integral_float_to_int)]

auto_or_value = Discriminator(lambda value: "auto" if value == "auto" else "value")
