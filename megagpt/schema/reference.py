"""Describe the configuration file for editors (JSON Schema) and for readers (Markdown tables).

`python -m megagpt.schema.reference > ds_configs/schema.json` writes the schema; with `--tables` it
prints the last section of docs/configuration.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from megagpt.config import RunConfig
from megagpt.schema.errors import models_in, shown

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
TABLE_HEAD = "| key | meaning | default | role |\n| --- | --- | --- | --- |"
SHORT_DEFAULTS = {  # of keys that follow from others; a longer one is in the key's meaning
    "num_kv_heads": "num_heads",
    "head_size": "hidden_size / num_heads",
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
    document = {"$schema": SCHEMA_DIALECT, **schema, "title": "A megagpt run"}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def reference_text() -> str:
    """Return one Markdown table for each section: key, meaning, default and role."""
    return "\n\n".join(_tables(RunConfig, "", "Top level")) + "\n"


def _tables(model: type[BaseModel], prefix: str, title: str, variant: str = "") -> list[str]:
    rows = []
    below = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        members = models_in(field.annotation)
        if _role(field) or not members:
            rows.append(
                f"| `{key}` | {field.description} | {_default(name, field)} | {_role(field)} |"
            )
        for member in members:
            kind = f" ({member.__name__})" if len(members) > 1 else variant
            below += _tables(member, f"{prefix}{key}.", f"`{prefix}{key}`{kind}", kind)
    return ([f"### {title}\n\n{TABLE_HEAD}\n" + "\n".join(rows)] if rows else []) + below


def _role(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["role"]) if isinstance(extra, dict) else ""


def _default(name: str, field: FieldInfo) -> str:
    if field.default_factory is not None:
        return SHORT_DEFAULTS.get(name, "see meaning")
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{shown(field.default)}`"


def main() -> None:
    """Print the schema, or the tables with `--tables`."""
    parser = argparse.ArgumentParser(description="Describe the configuration file.")
    parser.add_argument(
        "--tables", action="store_true", help="Markdown tables of every key instead of JSON Schema"
    )
    sys.stdout.write(reference_text() if parser.parse_args().tables else schema_text())


if __name__ == "__main__":
    main()
