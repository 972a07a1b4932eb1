"""Describe the configuration file for editors (JSON Schema) and for readers (Markdown tables).

`python -m megagpt.schema.reference > ds_configs/schema.json` writes the schema; with `--tables` it
prints the last sections of docs/configuration.md: every key, and DeepSpeed's other keys.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from megagpt.common.arguments import command_parser
from megagpt.config import RunConfig
from megagpt.schema.errors import models_at, models_in, shown
from megagpt.schema.foreign import ALL_FALSE, FOREIGN, OFF, ForeignKey
from megagpt.schema.written import COMMENT_MARKS, fields_at

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
FOREIGN_HEAD = "| key | changes nothing at | other values |\n| --- | --- | --- |"
TABLE_HEAD = "| key | meaning | default | role |\n| --- | --- | --- | --- |"
SHORT_DEFAULTS = {  # of keys that follow from others; a longer one is in the key's meaning
    "num_kv_heads": "num_heads",
    "head_size": "hidden_size / num_heads",
    "alpha": "2 x rank",
    **{f"{place}_bias": "bias" for place in ("qkv", "output", "mlp", "norm")},
}


class _FileSchema(GenerateJsonSchema):
    """A schema generator without pydantic's titles, which repeat each key with a capital letter."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_text() -> str:
    """Return the JSON Schema of a whole file, as ds_configs/schema.json holds it."""
    schema = RunConfig.model_json_schema(by_alias=True, schema_generator=_FileSchema)
    # a preset gives these keys, so an editor must not ask for them
    schema["$defs"]["ModelSection"].pop("required")
    _accept_what_is_adopted(schema)
    document = {"$schema": SCHEMA_DIALECT, **schema, "title": "A megagpt run"}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def reference_text() -> str:
    """Return one Markdown table for each section: key, meaning, default and role."""
    return "\n\n".join([*_tables(RunConfig, "", "Top level"), _foreign_table()]) + "\n"


def _accept_what_is_adopted(schema: dict[str, Any]) -> None:
    """Add what `written.adopt` accepts: comments, absent values, DeepSpeed's other keys."""
    sections = {"RunConfig": schema, **schema["$defs"]}
    for name, section in sections.items():
        if "properties" not in section:
            continue
        section["patternProperties"] = {f"^({'|'.join(COMMENT_MARKS)})": {}}
        for key, field in section["properties"].items():
            if key not in section.get("required", ()):
                section["properties"][key] = _or_absent(key, field)
        if name == "OptimizerConfig":
            section["properties"]["type"] = {
                "anyOf": [section["properties"]["type"], {"pattern": "^(?i:adamw?)$"}]
            }
    for row in FOREIGN:
        *parents, last = row.path
        for section in _sections_at(sections, parents):
            section["properties"][last] = _schema_of(row)


def _or_absent(key: str, field: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that also takes what is absent in effect: "auto", or null for a section."""
    description = {"description": field.pop("description")} if "description" in field else {}
    is_section = "$ref" in json.dumps(field)
    absent: list[dict[str, Any]] = [{"const": None} if is_section else {"const": "auto"}]
    if key == "zero_optimization":
        absent.append({"type": "boolean"})
    if key == "warmup_num_steps":
        absent.append({"const": 1})
    return {"anyOf": [field, *absent], **description}


def _sections_at(sections: dict[str, Any], parents: list[str]) -> list[dict[str, Any]]:
    """Return the schemas of the sections that a foreign key may stand in."""
    if parents and not fields_at(RunConfig, tuple(parents)):  # a section of DeepSpeed's alone
        outer = sections["RunConfig"]["properties"]
        return [outer.setdefault(parents[0], {"type": "object", "properties": {}})]
    return [sections[model.__name__] for model in models_at(RunConfig, tuple(parents))]


def _schema_of(row: ForeignKey) -> dict[str, Any]:
    """Return what a foreign key accepts: anything, unless some values are refused."""
    if row.otherwise == "acts":
        return {"description": f"DeepSpeed's other name of {row.becomes}"}
    if row.path[0] == "aio":  # anything, where no offload goes to NVMe
        return {"description": f"refused with NVMe: {row.reason}"}
    if row.otherwise == "hint":
        return {"description": f"accepted without effect: {row.reason}"}
    values = [
        value
        for value in row.nothing_at
        if value not in (OFF, ALL_FALSE) and not isinstance(value, dict)
    ]
    accepted: list[dict[str, Any]] = [{"enum": [*values, None, "auto"]}]
    if len(values) < len(row.nothing_at):
        accepted.append({"type": "object"})
    return {"anyOf": accepted, "description": f"other values are refused: {row.reason}"}


def _foreign_table() -> str:
    """Return the Markdown table of DeepSpeed's keys that have no field here."""
    rows = [
        f"| `{row.key}` | {harmless(row)} | {verdict(row)} |"
        for row in sorted(FOREIGN, key=lambda row: row.key)
    ]
    return "\n".join([f"### DeepSpeed's other keys\n\n{FOREIGN_HEAD}", *rows])


def harmless(row: ForeignKey) -> str:
    """Return the values of a foreign key that change nothing."""
    words = {OFF: "not enabled", ALL_FALSE: "all false"}
    return ", ".join(
        words[value] if value in (OFF, ALL_FALSE) else f"`{json.dumps(value)}`"
        for value in row.nothing_at
    )


def verdict(row: ForeignKey) -> str:
    """Return what another value of a foreign key does."""
    if row.otherwise == "acts":
        value = f" {shown(row.value)}" if row.value else ""
        return f"**acts** as `{row.becomes}{value}`"
    return f"**{row.otherwise}**: {row.reason}"


def _tables(model: type[BaseModel], prefix: str, title: str, variant: str = "") -> list[str]:
    rows = []
    below = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        members = models_in(field.annotation)
        if role_of(field) or not members:
            rows.append(
                f"| `{key}` | {field.description} | {default_of(name, field)} | {role_of(field)} |"
            )
        for member in members:
            kind = f" ({member.__name__})" if len(members) > 1 else variant
            below += _tables(member, f"{prefix}{key}.", f"`{prefix}{key}`{kind}", kind)
    return ([f"### {title}\n\n{TABLE_HEAD}\n" + "\n".join(rows)] if rows else []) + below


def role_of(field: FieldInfo) -> str:
    """Return identity or execution; empty for a section."""
    extra = field.json_schema_extra
    return str(extra["role"]) if isinstance(extra, dict) else ""


def default_of(name: str, field: FieldInfo) -> str:
    """Return a field's default as Markdown; empty if the key is then absent."""
    if field.default_factory is not None:
        return SHORT_DEFAULTS.get(name, "see meaning")
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{shown(field.default)}`"


def main() -> None:
    """Print the schema, or the tables with `--tables`."""
    parser = command_parser(description="Describe the configuration file.")
    parser.add_argument(
        "--tables", action="store_true", help="Markdown tables of every key instead of JSON Schema"
    )
    sys.stdout.write(reference_text() if parser.parse_args().tables else schema_text())


if __name__ == "__main__":
    main()
