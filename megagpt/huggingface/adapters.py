"""The adapters of a run in peft's format: adapter_config.json and adapter_model.safetensors.

peft has one adapter for each module of the published model; ours are of projections, several of
which may lie in one module, or one in several. Both are exact: a module with the rows of several
adapters gets their A one above the other and their B side by side, with a rank and an alpha that
are as many times larger; modules that share an adapter get the same A and their rows of B.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagpt.checkpoint.safetensors_file import DTYPE_OF, as_bytes, header, tensor_bytes
from megagpt.config import ModelConfig, ResolvedConfig
from megagpt.huggingface.architectures import Architecture
from megagpt.huggingface.export import (
    KINDS,
    SPARE_BYTES,
    Exported,
    require_architecture,
    require_free,
)
from megagpt.huggingface.kept_model import KeptModel
from megagpt.huggingface.tensors import TURNED, TURNED_QUERY_KEY_VALUE
from megagpt.huggingface.whole_directory import flushed, whole_directory
from megagpt.inference.stored_model import Weights, open_trained
from megagpt.lora import ADAPTERS, joined
from megagpt.rundir.base import find_base
from megagpt.rundir.directory import read_config
from megagpt.schema.lora import LoraConfig, Projection, projection
from megagpt.utils import UserError, write_atomically

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OF_AN_EXPORT = re.compile(rf"{re.escape(CONFIG)}|{re.escape(WEIGHTS)}")
PREFIX = "base_model.model."  # peft wraps the model in two modules of these names
# Layers of a block that can have adapters, as the table of architectures names them.
LAYERS = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")


class PublishedAdapter(NamedTuple):
    """The adapter of one module: its path in a published model, (rank, inputs), (outputs, rank)."""

    module: str
    a: Tensor
    b: Tensor


def export_adapters(
    run_directory: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    base_model: str | None = None,
) -> Exported:
    """Write the adapters of a run's newest checkpoint, or of ``step``, into a directory.

    ``base_model`` is the name or the path of the published model that peft loads them on. Raise
    UserError if the run trains no adapters, if its model is not a published architecture, if
    ``dtype`` cannot hold a value, and if the directory exists, unless it is an export of adapters
    that may be replaced.
    """
    config = read_config(run_directory)
    lora = config.megagpt.training.lora
    place = find_base(config, run_directory)
    if lora is None or place is None:
        raise UserError(
            f"{run_directory}: trains the whole model and has no adapters; leave out --adapters"
        )
    model = config.megagpt.model
    kept = KeptModel.of(place.run_directory)
    architecture = kept.architecture if kept else require_architecture(model, run_directory)
    require_free(output, overwrite, OF_AN_EXPORT)
    found_step, weight, _ = open_trained(run_directory, step)
    adapters = list(published_adapters(architecture, config, weight))
    kind = KINDS[dtype or "fp32"]
    document = peft_config(architecture, lora, adapters, base_model)
    entries = [(name, kind, tuple(value.shape)) for name, value in _tensors(adapters)]
    size = sum(tensor_bytes(kind, shape) for _, kind, shape in entries)
    with whole_directory(
        output, option="--output", room_bytes=size + SPARE_BYTES, replace=overwrite
    ) as staging:
        write_atomically(staging / CONFIG, json.dumps(document, indent=2) + "\n")
        with flushed(staging / WEIGHTS) as file:
            file.write(header(entries, {"format": "pt"}))
            for name, value in _tensors(adapters):
                file.write(as_bytes(_in_format(name, value, kind)))
    elements = sum(value.numel() for _, value in _tensors(adapters))
    return Exported(architecture.name, found_step, dtype or "fp32", elements, size)


def published_adapters(
    architecture: Architecture, config: ResolvedConfig, weight: Weights
) -> Iterator[PublishedAdapter]:
    """Yield the adapter of each module of the published model that has one."""
    model = config.megagpt.model
    lora = config.megagpt.training.lora
    assert lora is not None
    targets = [projection(name, model) for name in lora.projections(model)]
    for block in range(model.num_layers):
        for layer in LAYERS:
            ours = [target for target in targets if target.layer == layer]
            paths, _ = architecture.modules[f"blocks.*.{layer}"]
            prefix = f"blocks.{block}.{layer}{ADAPTERS}"
            for index, path in enumerate(paths):
                found = [t for t in ours if _rows(architecture, model, t, index).any()]
                if found:
                    yield PublishedAdapter(
                        path.replace("*", str(block)),
                        torch.cat([weight(f"{prefix}{t.name}.a") for t in found]),
                        torch.cat(
                            [
                                _rows(architecture, model, t, index, weight(f"{prefix}{t.name}.b"))
                                for t in found
                            ],
                            dim=1,
                        ),
                    )


def _rows(
    architecture: Architecture,
    model: ModelConfig,
    target: Projection,
    index: int,
    b: Tensor | None = None,
) -> Tensor:
    """Return B (outputs, rank) at the rows of one of the modules that a layer of ours becomes.

    Rows of other projections are 0. Without ``b``, the result is 1 where the projection has rows.
    """
    _, relation = architecture.modules[f"blocks.*.{target.layer}"]
    values = torch.ones(target.outputs, 1) if b is None else b
    ours = joined({target.part: values.T}, target.widths).T  # (rows of our layer, rank)
    theirs = relation.split(ours, model)[index]
    # GPT-2 stores a weight (inputs, outputs); peft has B of such a layer like any other.
    return theirs.T if relation in (TURNED, TURNED_QUERY_KEY_VALUE) else theirs


def peft_config(
    architecture: Architecture,
    lora: LoraConfig,
    adapters: Sequence[PublishedAdapter],
    base_model: str | None,
) -> dict[str, Any]:
    """Return adapter_config.json."""
    names = _short_names(architecture, adapters)
    ranks = {names[adapter.module]: adapter.a.shape[0] for adapter in adapters}
    larger = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    turned = architecture.modules["blocks.*.attention.output"][1] is TURNED
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": larger,
        "alpha_pattern": {
            name: _number(lora.alpha * rank / lora.rank) for name, rank in larger.items()
        },
        "fan_in_fan_out": turned,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _short_names(
    architecture: Architecture, adapters: Iterable[PublishedAdapter]
) -> dict[str, str]:
    """Return the name in target_modules of each module: the last part of its path, if that is it.

    GPT-2 has a c_proj in attention and in the MLP; if only one has adapters, its name is longer.
    """
    paths = [path for layer in LAYERS for path in architecture.modules[f"blocks.*.{layer}"][0]]
    modules = {adapter.module: _generic(adapter.module) for adapter in adapters}
    left_out = {path.rpartition(".")[2] for path in paths if path not in modules.values()}
    return {
        module: (last if (last := path.rpartition(".")[2]) not in left_out else path.split("*.")[1])
        for module, path in modules.items()
    }


def _generic(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _tensors(adapters: Iterable[PublishedAdapter]) -> Iterator[tuple[str, Tensor]]:
    for adapter in adapters:
        yield f"{PREFIX}{adapter.module}.lora_A.weight", adapter.a
        yield f"{PREFIX}{adapter.module}.lora_B.weight", adapter.b


def _in_format(name: str, value: Tensor, kind: str) -> Tensor:
    converted = value.to(DTYPE_OF[kind])
    if not converted.isfinite().all():
        raise UserError(f"{name}: a value does not fit; use --dtype bf16 or fp32")
    return converted
