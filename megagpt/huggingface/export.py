"""The trained model of a run as a directory that Hugging Face transformers loads.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json
    model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json

Tensors are read and written one after another, so memory holds two of ours and what they become.
The rows that pad our vocabulary are left out. A run that began with a published model gives its
files back: the same names, order, formats and keys (kept_model.py).
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.safetensors_file import (
    DTYPE_OF,
    Entry,
    as_bytes,
    header,
    tensor_bytes,
)
from megagpt.config import ModelConfig
from megagpt.data.byte_level_bpe import END_OF_DOCUMENT
from megagpt.data.chat.template import TEMPLATE_FILE
from megagpt.data.model_tokenizer.files import files_of_tokenizer, is_of_a_model
from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.opening import tokenizer_directory
from megagpt.data.tokenizer import TOKENIZER_FILE, TOKENIZER_FILES, Tokenizer
from megagpt.huggingface.architectures import (
    ARCHITECTURES,
    CONFIG,
    INDEX,
    WEIGHTS,
    Architecture,
    Part,
)
from megagpt.huggingface.kept_model import GENERATION, KeptModel
from megagpt.huggingface.whole_directory import flushed, whole_directory
from megagpt.inference.chat import ends_of_answers
from megagpt.inference.generate import allowed_tokens, open_tokenizer
from megagpt.inference.stored_model import open_weights
from megagpt.rundir.base import find_base
from megagpt.rundir.directory import read_config
from megagpt.utils import MIB, UserError, write_atomically

SHARD_BYTES = 5_000_000_000  # of tensors in one file, as transformers writes them
KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
NAMES = {kind: name for name, kind in KINDS.items()}
OF_AN_EXPORT = re.compile(
    rf"config\.json|generation_config\.json|{'|'.join(map(re.escape, TOKENIZER_FILES))}|"
    r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
)
NEAREST = 3  # architectures that a message names
SPARE_BYTES = 64 * MIB  # tokenizer and headers, in addition to the tensors


@dataclass(frozen=True)
class Exported:
    """What was written: architecture, step, formats, parameters without padding, bytes."""

    architecture: str
    step: int
    formats: str
    parameters: int
    bytes: int


def export(
    run_directory: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the model of a run's newest checkpoint, or of ``step``, into the directory ``output``.

    ``dtype`` is by default that of the published model that the run began with, else fp32. Raise
    UserError if there is no such checkpoint, if its model is not a published architecture, if
    ``dtype`` cannot hold a weight, and if the directory exists, unless it is an export that may be
    replaced.
    """
    config = read_config(run_directory)
    model = config.megagpt.model
    base = find_base(config, run_directory)
    kept = KeptModel.of(run_directory if base is None else base.run_directory)
    if kept is not None:
        kept.document(model)  # is that of the run, or raises
    architecture = kept.architecture if kept else require_architecture(model, run_directory)
    tokenizer = open_tokenizer(config.megagpt, run_directory)
    ends = ends_of_answers(config.megagpt.data, tokenizer)
    require_free(output, overwrite, OF_AN_EXPORT)
    found_step, weight = open_weights(run_directory, step)
    source = TrainedWeights(weight, model, list(architecture.parts(model)), kept)
    if kept is None:
        files = plan_files(source.parts, KINDS[dtype or "fp32"], shard_bytes)
    else:
        files = plan_kept_files(kept, source, dtype)
    size = sum(tensor_bytes(kind, shape) for file in files for _, kind, shape in file.entries)
    with whole_directory(
        output, option="--output", room_bytes=size + SPARE_BYTES, replace=overwrite
    ) as staging:
        if kept is None:
            _write_json(staging / CONFIG, _model_config(architecture, model, tokenizer, dtype))
            _write_json(staging / GENERATION, _generation_config(model, tokenizer, ends))
        else:
            _write_kept(staging, kept, model, dtype, size)
            _add_ends(staging / GENERATION, ends)
        data = Path(config.megagpt.data.sources[0].path)
        if directory := tokenizer_directory(data, Declared.by(config.megagpt)):
            _write_tokenizer(staging, directory, model)
        for file in files:
            _write_file(staging, file, source)
        if kept is None and len(files) > 1:
            _write_index(staging, files, size)
    return Exported(architecture.name, found_step, _formats(files), source.parameters, size)


def require_architecture(model: ModelConfig, run_directory: Path) -> Architecture:
    """Return the published architecture of the model.

    Raise UserError with what the nearest ones need.
    """
    misfits = {architecture.name: architecture.misfits(model) for architecture in ARCHITECTURES}
    for architecture in ARCHITECTURES:
        if not misfits[architecture.name]:
            return architecture
    nearest = sorted(misfits.items(), key=lambda item: len(item[1]))[:NEAREST]
    listed = "\n".join(f"  {name} needs {', '.join(wanted)}" for name, wanted in nearest)
    raise UserError(
        f"{run_directory}: megagpt.model is not a published architecture, so transformers cannot "
        f"load it:\n{listed}\n"
        "train one of these, or load the checkpoint with megagpt/inference/stored_model.py"
    )


def require_free(output: Path, overwrite: bool, ours: re.Pattern[str]) -> None:
    """Raise UserError if the directory exists and may not be replaced.

    Only an export, of files whose names match ``ours``, may be replaced, and only if asked for;
    anything else in the directory is somebody's work.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: exists already; add --overwrite, or choose another --output")
    kept = sorted(file.name for file in output.iterdir() if not ours.fullmatch(file.name))
    if kept:
        raise UserError(
            f"{output}: holds {kept[0]}, which no export wrote; choose another --output, or move "
            f"it away"
        )


# ------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class PlannedFile:
    """A file of tensors, one after another: names, formats, shapes."""

    name: str
    header: bytes
    entries: Sequence[Entry]


def plan_files(parts: Iterable[Part], kind: str, shard_bytes: int) -> list[PlannedFile]:
    """Return the files, at most ``shard_bytes`` each unless one of our tensors alone has more."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for part in parts:
        entries = [(name, kind, shape) for name, shape in part.theirs.items()]
        size = sum(tensor_bytes(*entry[1:]) for entry in entries)
        if held and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1] += entries
        held += size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return [
        # transformers refuses a file without this format.
        PlannedFile(name, header(entries, {"format": "pt"}), entries)
        for name, entries in zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True)
    ]


def plan_kept_files(
    kept: KeptModel, source: "TrainedWeights", dtype: str | None
) -> list[PlannedFile]:
    """Return the files of the published model, with weights in ``dtype`` if it is given."""
    kept.require_tensors({name: source.shape(name) for name in source.places})
    files = []
    for name, pieces in kept.files.items():
        entries: list[Entry] = [
            (p.name, KINDS[dtype] if dtype and p.name in source.places else p.kind, p.shape)
            for p in pieces
        ]
        files.append(PlannedFile(name, kept.header_of(name, entries), entries))
    return files


class TrainedWeights:
    """A run's weights by the names that they have in files."""

    def __init__(
        self,
        weight: Callable[[str], Tensor],
        model: ModelConfig,
        parts: Sequence[Part],
        kept: KeptModel | None,
    ) -> None:
        self.parts = parts
        self._weight = weight
        self._model = model
        self._kept = kept
        self._split = lru_cache(maxsize=2)(self._split_part)  # q, k and v are not beside each other
        theirs = {
            name: (index, place)
            for index, part in enumerate(parts)
            for place, name in enumerate(part.theirs)
        }
        self.places = theirs if kept is None else self._in_kept_files(theirs, kept)

    def _in_kept_files(
        self, theirs: dict[str, tuple[int, int]], kept: KeptModel
    ) -> dict[str, tuple[int, int]]:
        stored = kept.tensors
        places = {kept.architecture.stored_name(n, stored): place for n, place in theirs.items()}
        head, embedding = kept.architecture.head_and_embedding()
        copy = kept.architecture.stored_name(head, stored)
        if self._model.tie_embeddings and copy in stored:  # the tied weight, stored a second time
            places[copy] = theirs[embedding]
        return places

    def shape(self, name: str) -> torch.Size:
        """Return the shape of one of the weights."""
        index, place = self.places[name]
        return list(self.parts[index].theirs.values())[place]

    @property
    def parameters(self) -> int:
        """The number of parameters, without padding."""
        return sum(shape.numel() for part in self.parts for shape in part.theirs.values())

    def tensor(self, name: str, kind: str) -> Tensor:
        """Return a tensor of a file in the format ``kind``.

        Raise UserError if the weight has another shape, is not finite or does not fit the format.
        """
        if name not in self.places and self._kept is not None:
            return self._kept.buffer(name)
        index, place = self.places[name]
        theirs = self._split(index)[place]
        converted = theirs.to(DTYPE_OF[kind])
        if not all(extreme.isfinite() for extreme in converted.aminmax()):
            raise UserError(
                f"{self.parts[index].name}: {theirs.abs().max():.3g} does not fit into "
                f"{NAMES.get(kind, kind)}; use "
                "--dtype bf16 or fp32"
            )
        return converted

    def _split_part(self, index: int) -> Sequence[Tensor]:
        """Return what one of our tensors becomes, in fp32."""
        part = self.parts[index]
        ours = self._weight(part.name) if part.stored else torch.zeros(part.shape)
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
        return part.relation.split(ours, self._model)


def _formats(files: Iterable[PlannedFile]) -> str:
    kinds = dict.fromkeys(kind for file in files for _, kind, _ in file.entries)
    return ", ".join(NAMES.get(kind, kind) for kind in kinds)


def _write_file(staging: Path, planned: PlannedFile, source: TrainedWeights) -> None:
    """Write a file in one pass, flushed to the disk."""
    with flushed(staging / planned.name) as file:
        file.write(planned.header)
        for name, kind, _ in planned.entries:
            file.write(as_bytes(source.tensor(name, kind)))


def _write_index(staging: Path, files: Sequence[PlannedFile], size: int) -> None:
    places = {name: file.name for file in files for name, _, _ in file.entries}
    _write_json(staging / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


# ------------------------------------------------------------------------- configuration, tokenizer


def _write_kept(
    staging: Path, kept: KeptModel, model: ModelConfig, dtype: str | None, total_size: int
) -> None:
    """Write what the published model has beside its weights and its tokenizer."""
    name = str(DTYPE_OF[KINDS[dtype]]).removeprefix("torch.") if dtype else None
    write_atomically(staging / CONFIG, kept.config_in(model, name))
    if (index := kept.index_in(total_size)) is not None:
        write_atomically(staging / INDEX, index)
    if (kept.directory / GENERATION).is_file():
        write_atomically(staging / GENERATION, (kept.directory / GENERATION).read_bytes())


def _model_config(
    architecture: Architecture, model: ModelConfig, tokenizer: Tokenizer, dtype: str | None
) -> dict[str, Any]:
    """Return config.json.

    No token pads: Phi-3's default would be beyond a small vocabulary.
    """
    return (
        architecture.config(model)
        | _ends(tokenizer)
        | {"pad_token_id": None}
        | {"torch_dtype": str(DTYPE_OF[KINDS[dtype or "fp32"]]).removeprefix("torch.")}
    )


def _generation_config(
    model: ModelConfig, tokenizer: Tokenizer, ends: Sequence[int]
) -> dict[str, Any]:
    """Return generation_config.json; as in launch/generate.py, ids without text are suppressed.

    ``ends`` are those of a chat's answers.
    """
    silent = sorted(set(range(model.vocabulary)) - set(allowed_tokens(tokenizer, ends).tolist()))
    every = {"eos_token_id": [tokenizer.end_of_document, *ends]} if ends else {}
    return _ends(tokenizer) | every | ({"suppress_tokens": silent} if silent else {})


def _add_ends(path: Path, ends: Sequence[int]) -> None:
    """Add the ends of a chat's answers to a published model's own, or leave its file as it is."""
    if not path.is_file():
        return
    document = json.loads(path.read_bytes())
    known = document.get("eos_token_id") or []
    known = [known] if isinstance(known, int) else known
    if more := [end for end in ends if end not in known]:
        _write_json(path, document | {"eos_token_id": [*known, *more]})


def _ends(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids that begin and end a text.

    Where none begins it, that of the end stands for an empty prompt.
    """
    if tokenizer.end_of_document < 0:  # ids without a tokenizer
        return {}
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
    if (data / TEMPLATE_FILE).is_file():
        write_atomically(staging / TEMPLATE_FILE, (data / TEMPLATE_FILE).read_bytes())


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(document, indent=2) + "\n")
