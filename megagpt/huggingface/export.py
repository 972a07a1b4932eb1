"""The trained model of a run as a directory that Hugging Face transformers loads.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json
    model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json

Tensors are read and written one after another, so memory holds one of ours and what it becomes. The
rows that pad our vocabulary are left out.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.safetensors_file import header, tensor_bytes
from megagpt.config import ModelConfig
from megagpt.data.byte_level_bpe import END_OF_DOCUMENT
from megagpt.data.model_tokenizer.files import files_of_tokenizer, is_of_a_model
from megagpt.data.tokenizer import TOKENIZER_FILE, TOKENIZER_FILES, Tokenizer
from megagpt.huggingface.architectures import (
    ARCHITECTURES,
    CONFIG,
    INDEX,
    WEIGHTS,
    Architecture,
    Part,
)
from megagpt.huggingface.whole_directory import flushed, whole_directory
from megagpt.inference.generate import allowed_tokens, open_tokenizer
from megagpt.inference.stored_model import open_weights
from megagpt.rundir.directory import read_config
from megagpt.utils import MIB, UserError, write_atomically

SHARD_BYTES = 5_000_000_000  # of tensors in one file, as transformers writes them
DTYPES = {
    "fp32": ("F32", torch.float32),
    "bf16": ("BF16", torch.bfloat16),
    "fp16": ("F16", torch.float16),
}
OF_AN_EXPORT = re.compile(
    rf"config\.json|generation_config\.json|{'|'.join(map(re.escape, TOKENIZER_FILES))}|"
    r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
)
SPARE_BYTES = 64 * MIB  # tokenizer and headers, in addition to the tensors


@dataclass(frozen=True)
class Exported:
    """What was written: the architecture, the step, and the parameters without padding."""

    architecture: str
    step: int
    parameters: int
    bytes: int


def export(
    run_directory: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: str = "fp32",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the model of a run's newest checkpoint, or of ``step``, into the directory ``output``.

    Raise UserError if there is no such checkpoint, if its model is not a published architecture, if
    ``dtype`` cannot hold a weight, and if the directory exists, unless it is an export that may be
    replaced.
    """
    config = read_config(run_directory)
    model = config.megagpt.model
    architecture = require_architecture(model, run_directory)
    tokenizer = open_tokenizer(config.megagpt, run_directory)
    _require_free(output, overwrite)
    found_step, weight = open_weights(run_directory, step)
    kind = DTYPES[dtype][0]
    shards = list(plan_shards(architecture, model, kind, shard_bytes))
    size = stored_bytes(architecture.parts(model), kind)
    with whole_directory(
        output, option="--output", room_bytes=size + SPARE_BYTES, replace=overwrite
    ) as staging:
        _write_json(staging / CONFIG, _model_config(architecture, model, tokenizer, dtype))
        _write_json(staging / "generation_config.json", _generation_config(model, tokenizer))
        _write_tokenizer(staging, Path(config.megagpt.data.sources[0].path), model)
        _write_weights(staging, shards, TrainedWeights(weight, model, dtype))
    return Exported(architecture.name, found_step, size // tensor_bytes(kind, []), size)


def require_architecture(model: ModelConfig, run_directory: Path) -> Architecture:
    """Return the published architecture of the model; raise UserError with what each needs."""
    misfits = {architecture.name: architecture.misfits(model) for architecture in ARCHITECTURES}
    for architecture in ARCHITECTURES:
        if not misfits[architecture.name]:
            return architecture
    listed = "\n".join(f"  {name} needs {', '.join(wanted)}" for name, wanted in misfits.items())
    raise UserError(
        f"{run_directory}: megagpt.model is not a published architecture, so transformers cannot "
        f"load it:\n{listed}\n"
        "train one of these, or load the checkpoint with megagpt/inference/stored_model.py"
    )


def _require_free(output: Path, overwrite: bool) -> None:
    """Raise UserError if the directory exists and may not be replaced.

    Only an export may be replaced, and only if asked for; anything else in the directory is
    somebody's work.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: exists already; add --overwrite, or choose another --output")
    kept = sorted(file.name for file in output.iterdir() if not OF_AN_EXPORT.fullmatch(file.name))
    if kept:
        raise UserError(
            f"{output}: holds {kept[0]}, which no export wrote; choose another --output, or move "
            f"it away"
        )


# ------------------------------------------------------------------------------------------ weights


def plan_shards(
    architecture: Architecture, model: ModelConfig, kind: str, shard_bytes: int
) -> Iterator[list[Part]]:
    """Yield the tensors of each file, at most ``shard_bytes`` unless one tensor alone has more."""
    shard: list[Part] = []
    held = 0
    for part in architecture.parts(model):
        size = stored_bytes([part], kind)
        if shard and held + size > shard_bytes:
            yield shard
            shard = []
            held = 0
        shard.append(part)
        held += size
    yield shard


def stored_bytes(parts: Iterable[Part], kind: str) -> int:
    """Return the bytes that tensors take in files."""
    return sum(tensor_bytes(kind, shape) for part in parts for shape in part.theirs.values())


@dataclass(frozen=True)
class TrainedWeights:
    """The source of the weights, and the type that they are converted to."""

    weight: Callable[[str], Tensor]
    model: ModelConfig
    dtype: str

    def theirs(self, part: Part) -> Sequence[Tensor]:
        """Return what a part becomes.

        Raise UserError if the weight has another shape or does not fit the type.
        """
        ours = self.weight(part.name) if part.stored else torch.zeros(part.shape)
        if ours.shape != part.shape:
            raise UserError(
                f"{part.name}: wrong shape in the checkpoint (found {tuple(ours.shape)}, "
                f"config.json needs {tuple(part.shape)}); restore the config.json that it was "
                "trained with"
            )
        if not all(extreme.isfinite() for extreme in ours.aminmax()):
            raise UserError(
                f"{part.name}: not finite in the checkpoint; choose the checkpoint of another "
                f"step with --step"
            )
        converted = ours.to(DTYPES[self.dtype][1])
        if not all(extreme.isfinite() for extreme in converted.aminmax()):
            raise UserError(
                f"{part.name}: {ours.abs().max():.3g} does not fit into {self.dtype}; use --dtype "
                f"bf16 or fp32"
            )
        return part.relation.split(converted, self.model)


def _write_weights(staging: Path, shards: Sequence[Sequence[Part]], source: TrainedWeights) -> None:
    """Write each file in one pass, flushed to the disk; with several, write their index too."""
    kind = DTYPES[source.dtype][0]
    places: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = (
            WEIGHTS if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        )
        entries = [(theirs, kind, shape) for part in shard for theirs, shape in part.theirs.items()]
        places |= {theirs: name for theirs, _, _ in entries}
        with flushed(staging / name) as file:
            # transformers refuses a file without this format.
            file.write(header(entries, {"format": "pt"}))
            for part in shard:
                for tensor in source.theirs(part):
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        size = stored_bytes((part for shard in shards for part in shard), kind)
        _write_json(staging / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


# ------------------------------------------------------------------------- configuration, tokenizer


def _model_config(
    architecture: Architecture, model: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> dict[str, Any]:
    """Return config.json."""
    return (
        architecture.config(model)
        | _ends(tokenizer)
        | {"torch_dtype": str(DTYPES[dtype][1]).removeprefix("torch.")}
    )


def _generation_config(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return generation_config.json; as in launch/generate.py, ids without text are suppressed."""
    silent = sorted(set(range(model.vocabulary)) - set(allowed_tokens(tokenizer).tolist()))
    return _ends(tokenizer) | ({"suppress_tokens": silent} if silent else {})


def _ends(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids that begin and end a text.

    Where none begins it, that of the end stands for an empty prompt.
    """
    first = (*tokenizer.start_of_document, tokenizer.end_of_document)[0]
    return {"bos_token_id": first, "eos_token_id": tokenizer.end_of_document}


def _write_tokenizer(staging: Path, data: Path, model: ModelConfig) -> None:
    """Write the data's tokenizer: a model's own files unchanged, ours with settings for it."""
    if is_of_a_model(data):
        for name in files_of_tokenizer(data):
            write_atomically(staging / name, (data / name).read_bytes())
        return
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "model_max_length": model.sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(staging / TOKENIZER_FILE, (data / TOKENIZER_FILE).read_bytes())
    _write_json(staging / "tokenizer_config.json", settings)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(document, indent=2) + "\n")
