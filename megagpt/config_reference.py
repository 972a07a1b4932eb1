"""What a configuration file may hold, for editors (JSON Schema) and for readers (Markdown tables)."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megagpt.config import RunConfig
from megagpt.config_errors import models_in, shown

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_text() -> str:
    """The JSON Schema of a whole file, as ds_configs/schema.json holds it."""
    schema = RunConfig.model_json_schema(by_alias=True, mode="validation")
    document = {
        "$schema": SCHEMA_DIALECT,
        "title": "A megagpt run",
        **{k: v for k, v in schema.items() if k != "title"},
    }
    return json.dumps(_without_required_that_presets_give(document), indent=2, ensure_ascii=False) + "\n"


def _without_required_that_presets_give(schema: dict[str, Any]) -> dict[str, Any]:
    """A file with a preset need not repeat the preset's keys, so an editor must not ask for them."""
    schema["$defs"]["ModelSection"].pop("required")
    return schema


def reference_text() -> str:
    """One Markdown table a section: every key with its meaning, its default and its role."""
    return "\n\n".join(_tables(RunConfig, "", "Top level"))


def _tables(model: type[BaseModel], prefix: str, title: str) -> list[str]:
    rows, below = ["| key | meaning | default | role |", "| --- | --- | --- | --- |"], []
    for name, field in model.model_fields.items():
        key = field.alias or name
        members = models_in(field.annotation)
        if _role(field) or not members:
            rows.append(f"| `{key}` | {field.description} | {_default(field)} | {_role(field)} |")
        for member in members:
            variant = f" ({member.__name__})" if len(members) > 1 else ""
            below += _tables(member, f"{prefix}{key}.", f"`{prefix}{key}`{variant}")
    table = [f"### {title}\n\n" + "\n".join(rows)] if len(rows) > 2 else []
    return table + below


def _role(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["role"]) if isinstance(extra, dict) else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default is PydanticUndefined:
        return ""
    return f"`{shown(field.default)}`"


def main() -> None:
    """Print the schema, or with `--reference` the tables."""
    parser = argparse.ArgumentParser(prog="python -m megagpt.config", description="Describe the configuration file.")
    parser.add_argument("--reference", action="store_true", help="Markdown tables of every key instead of JSON Schema")
    sys.stdout.write(reference_text() + "\n" if parser.parse_args().reference else schema_text())
