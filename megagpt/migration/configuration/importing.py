"""Read another trainer's files, write ours, and say of each key what became of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config import ConfigError, RunConfig
from megagpt.migration.configuration.deepspeed_json import take_deepspeed
from megagpt.migration.configuration.gpt_neox import take_gpt_neox
from megagpt.migration.configuration.ledger import Ledger, Verdict
from megagpt.migration.configuration.megatron_arguments import read_words, take_megatron
from megagpt.migration.configuration.nanogpt import (
    read_arguments,
    read_assignments,
    take_nanogpt,
)
from megagpt.planning.legality import ANY_VOCABULARY, World, require_legal
from megagpt.schema import json_reader
from megagpt.utils import UserError

YAML = (".yml", ".yaml")
ACCEPTED = "need one DeepSpeed .json, one or more gpt-neox .yml, or nanoGPT's .py"


@dataclass(frozen=True)
class ImportedConfig:
    """The configuration as text, what became of each key, and what it says without effect."""

    text: str
    verdicts: list[Verdict]
    notes: tuple[str, ...]


def import_config(
    files: Sequence[Path], arguments: Sequence[str], overrides: Sequence[str]
) -> ImportedConfig:
    """Turn files of one other trainer, and arguments of its command, into a configuration of ours.

    Several YAML files are merged as gpt-neox does. ``overrides`` are `--set` items, for what the
    files do not have. Raise UserError for a file that is none of these trainers', and with one line
    for each key that must be given.
    """
    ledger = Ledger()
    source = str(files[0]) if files else "arguments"
    _take(list(files), list(arguments), ledger)
    keys_set, errors = json_reader.apply_overrides(ledger.document, overrides, lambda path: False)
    given = {".".join(map(str, path)) for path in keys_set}
    errors += [
        f"{source}: {key}: must be given: {why}; --set {key}=VALUE"
        for key, why in ledger.needed.items()
        if key not in given
    ]
    config = _checked(ledger, source, errors)
    text = json.dumps(ledger.document, indent=2, ensure_ascii=False) + "\n"
    return ImportedConfig(text, ledger.verdicts, config.notes)


def _take(files: list[Path], arguments: list[str], ledger: Ledger) -> None:
    """Let the right reader take the files, by their suffix."""
    if not files and not arguments:
        raise UserError(f"no file is named; {ACCEPTED}")
    kinds = {file.suffix for file in files}
    if kinds and kinds <= set(YAML):
        if arguments:
            raise UserError(f"{arguments[0]}: gpt-neox has its arguments in its files; add a file")
        take_gpt_neox(_read_yaml(files), ledger, str(files[0]))
    elif kinds == {".py"} or not kinds:
        path = files[0] if files else None
        assigned = [read_assignments(file, json_reader.read_text(file)) for file in files]
        given: dict[str, Any] = {}
        for options in (*assigned, read_arguments(arguments)):
            given |= options
        take_nanogpt(path, given, ledger)
    elif kinds == {".json"} and len(files) == 1:
        document, _ = json_reader.parse(json_reader.read_text(files[0]), str(files[0]))
        if arguments:
            take_megatron(document, read_words(arguments), ledger, str(files[0]))
        else:
            take_deepspeed(document, ledger, str(files[0]))
    else:
        named = ", ".join(str(file) for file in files)
        raise UserError(f"{named}: {ACCEPTED}")


def _read_yaml(files: list[Path]) -> dict[str, Any]:
    """Return the keys of several files; raise UserError if two have the same."""
    import yaml  # comes with datasets and transformers

    merged: dict[str, Any] = {}
    for file in files:
        try:
            content = yaml.safe_load(json_reader.read_text(file))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            place = getattr(error, "problem_mark", None)
            line = f":{place.line + 1}" if place else ""
            what = getattr(error, "problem", None) or type(error).__name__
            raise UserError(f"{file}{line}: not YAML that can be read ({what})") from error
        if not isinstance(content, dict):
            raise UserError(f"{file}: holds no keys; need a configuration of gpt-neox")
        if twice := sorted(map(str, merged.keys() & content.keys())):
            raise UserError(f"{file}: {twice[0]} is in another of the files too; keep one")
        merged |= content
    return merged


def _checked(ledger: Ledger, source: str, errors: list[str]) -> RunConfig:
    """Return the configuration, legal on the fewest ranks; raise ConfigError with every problem."""
    try:
        written = RunConfig.from_json(json.dumps(ledger.document), source)
    except ConfigError as error:
        raise ConfigError(dict.fromkeys([*errors, *error.errors])) from error
    if errors:
        raise ConfigError(errors)
    require_legal(written, source, World(_ranks(written), ANY_VOCABULARY))
    return written


def _ranks(config: RunConfig) -> int:
    """Return the ranks that the batch tells, else those of one replica."""
    replica = config.megagpt.parallel.model_parallel_size
    micro, steps = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    if config.megagpt.parallel.world_size:
        return config.megagpt.parallel.world_size
    if config.train_batch_size and micro and steps:
        return max(config.train_batch_size // (micro * steps), 1) * replica
    return replica
