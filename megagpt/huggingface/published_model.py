"""Reads a model as Hugging Face stores it: config.json as `megagpt.model`, tensors by our names.

Only safetensors and JSON are read; nothing is executed. Tensors come into memory one by one.
"""

import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megagpt.checkpoint.format import DamagedCheckpointError
from megagpt.checkpoint.reader import require_small_header
from megagpt.checkpoint.safetensors_file import StoredFile, StoredSlice
from megagpt.config import ConfigError, ModelConfig, RunConfig
from megagpt.data.model_tokenizer.storing import difference_of_tokenizers
from megagpt.data.token_files.declared import Declared
from megagpt.data.token_files.opening import manifest_of, tokenizer_directory
from megagpt.huggingface.architectures import (
    BIASES,
    CONFIG,
    INDEX,
    WEIGHTS,
    Architecture,
    Part,
)
from megagpt.huggingface.published_config import PublishedConfig, read_json
from megagpt.utils import UserError

FORMATS = ("F64", "F32", "BF16", "F16")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MOST_LISTED = 10  # problems of tensors


class PublishedModel:
    """A directory with config.json and safetensors.

    ``ignored`` are keys of config.json that the user says change nothing. Raises UserError if there
    is no config.json, or another architecture in it.
    """

    def __init__(self, directory: Path, ignored: Collection[str] = ()) -> None:
        self.directory = directory
        self.config = PublishedConfig(directory / CONFIG, ignored)
        self.architecture = self.config.architecture

    @property
    def steps(self) -> int:
        """Updates that Adam's moments have seen: 0, a published model has no moments."""
        return 0

    def moment(self, part: Part, model: ModelConfig, moment: str) -> Tensor:
        """Return a moment of a tensor of ours: zeros."""
        return torch.zeros(part.shape)

    def run_config(self, written: RunConfig) -> RunConfig:
        """Return the configuration with this model in it.

        Raise ConfigError with everything that the model has and ours has not.
        """
        return self.config.run_config(written, self._stored_bytes)

    def require_tensors(self, model: ModelConfig) -> None:
        """Raise ConfigError if tensors are missing, left over, or of other shapes or formats."""
        expected = {
            self._name(name): tuple(shape)
            for part in self.architecture.parts(model)
            for name, shape in part.theirs.items()
        }
        problems = [
            f"{self._index}: {name}: missing{self._remedy(name)}"
            for name in expected
            if name not in self._places
        ]
        for name, file in self._places.items():
            stored = self._stored(name)
            where = f"{self.directory / file}: {name}"
            if name not in expected:
                if not self._is_ignored(name, model):
                    problems.append(f"{where}: megagpt has no such tensor")
            elif stored.shape != expected[name] or stored.kind not in FORMATS:
                wanted = f"{expected[name]} in {', '.join(FORMATS)}"
                problems.append(
                    f"{where}: {stored.kind} of shape {stored.shape}, the model's is {wanted}"
                )
        for file, opened in self.files.items():
            problems += [
                f"{self._index}: weight_map: does not name {piece.name} of {file}; download both "
                "again"
                for piece in opened.slices
                if self._places.get(piece.name) != file
            ]
        if problems:
            more = len(problems) - MOST_LISTED
            hidden = [f"{self.directory}: and {more} more"] if more > 0 else []
            raise ConfigError([*problems[:MOST_LISTED], *hidden])

    def _remedy(self, name: str) -> str:
        """Return what to type if the head is missing, as in files of the class without one."""
        if name != self.architecture.head_and_embedding()[0]:
            return "; download the model again"
        return (
            "; it was saved without its head: save it with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )

    def _is_ignored(self, name: str, model: ModelConfig) -> bool:
        """Return whether a tensor is no parameter, or the tied head's weight, stored again."""
        head = self._name(self.architecture.head_and_embedding()[0])
        return self._is_buffer(name) or (
            model.tie_embeddings and name == head and self._is_tied_copy(name)
        )

    def _is_buffer(self, name: str) -> bool:
        """Return whether a tensor is no parameter: a mask, or frequencies."""
        return re.fullmatch(self.architecture.buffers, name) is not None

    def buffers(self) -> list[StoredSlice]:
        """Return the tensors that are no parameters."""
        return [self._stored(name) for name in self._places if self._is_buffer(name)]

    def _is_tied_copy(self, name: str) -> bool:
        embedding = self._name(self.architecture.head_and_embedding()[1])
        if embedding not in self._places:
            return False
        copy = self._tensor(name)
        tied = self._tensor(embedding)
        return copy.dtype == tied.dtype and torch.equal(copy, tied)

    def ours(self, part: Part, model: ModelConfig) -> Tensor | None:
        """Return a tensor of ours in fp32; None for a bias that our model does not have.

        Raise UserError if it is corrupt.
        """
        theirs = [self._tensor(self._name(name)) for name in part.theirs]
        return as_ours(part, theirs, model, self.architecture, str(self.directory))

    def _name(self, name: str) -> str:
        """Return a tensor's name in these files."""
        return self.architecture.stored_name(name, self._places)

    @property
    def _index(self) -> Path:
        """The file that says which tensors there are."""
        index = self.directory / INDEX
        return index if index.is_file() else self.directory / WEIGHTS

    @cached_property
    def _places(self) -> dict[str, str]:
        """The file of each tensor."""
        if (self.directory / INDEX).is_file():
            places = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(places, dict) or not all(map(is_file_name, places.values())):
                raise UserError(
                    f"{self.directory / INDEX}: weight_map: not a map to file names; download it "
                    f"again"
                )
            return places
        if not (self.directory / WEIGHTS).is_file():
            pickled = sorted(
                path.name for path in self.directory.iterdir() if path.suffix in PICKLED
            )
            found = f" (found {pickled[0]}, which can run code and is not read)" if pickled else ""
            raise UserError(
                f"{self.directory / WEIGHTS}: not found; if the weights are in another format, "
                f"such as pickle{found}, save them again with transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        return dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)

    @cached_property
    def files(self) -> dict[str, StoredFile]:
        """The tensor files by name."""
        return {file: self._open(file) for file in dict.fromkeys(self._places.values())}

    @cached_property
    def _stored_bytes(self) -> int:
        """The size of all its files together."""
        return sum(file.size_bytes for file in self.files.values())

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._stored(name).read()
        except SafetensorError as error:
            raise UserError(f"{self.directory}: {name}: {error}; download it again") from error

    def _stored(self, tensor: str) -> StoredSlice:
        """Return where a tensor lies, with its shape and format; nothing of it is read yet."""
        file = self._places[tensor]
        try:
            return self._open(file).slice(tensor)
        except SafetensorError as error:
            raise UserError(
                f"{self.directory / INDEX}: weight_map: {tensor} is not in {file} ({error}); "
                f"download both again"
            ) from error

    def _open(self, file: str) -> StoredFile:
        if file not in self._opened:
            try:
                require_small_header(self.directory, file)
                self._opened[file] = StoredFile(self.directory / file)
            except (SafetensorError, DamagedCheckpointError, OSError) as error:
                raise UserError(
                    f"{self.directory / file}: cannot be read ({error}); download it again"
                ) from error
        return self._opened[file]

    @cached_property
    def _opened(self) -> dict[str, StoredFile]:
        return {}

    def require_tokenizer(self, data: Path, declared: Declared) -> bool:
        """Raise UserError if the data's tokenizer gives other ids than the model's.

        Return False if the model, or the data, have no tokenizer to compare.
        """
        directory = tokenizer_directory(data, declared)
        if directory is None:
            return False
        difference = difference_of_tokenizers(directory, self.directory)
        if difference:
            raise UserError(
                f"{data}: its tokenizer is not that of {self.directory}: {difference}; prepare the "
                f"data with the model's tokenizer: {preparation(self.directory, data)}"
            )
        return difference is not None

    def require_rows(self, data: Path, config: RunConfig) -> None:
        """Raise UserError if the data have ids beyond the model's embedding."""
        vocabulary = manifest_of(data, Declared.by(config.megagpt)).vocabulary
        rows = config.megagpt.model.vocab_size
        if rows is not None and vocabulary > rows:
            raise UserError(
                f"{data}: its tokenizer has ids beyond the embedding of {self.directory} (found "
                f"{vocabulary} tokens, need at most {rows}); prepare the data with the model's "
                f"tokenizer: {preparation(self.directory, data)}"
            )


def as_ours(
    part: Part, theirs: list[Tensor], model: ModelConfig, architecture: Architecture, where: str
) -> Tensor | None:
    """Return a tensor of ours in fp32, made of theirs; None for a bias that our model has not.

    Raise UserError if a value is not finite, or that bias is not zero.
    """
    if not all(extreme.isfinite() for tensor in theirs for extreme in tensor.aminmax()):
        raise UserError(f"{where}: {', '.join(part.theirs)}: not finite; download the model again")
    if part.stored:
        return part.relation.join(theirs, model).to(torch.float32).contiguous()
    if any(tensor.any() for tensor in theirs):
        named = ", ".join(part.theirs)
        place = next(place for place, ends in BIASES.items() if part.name.endswith(ends))
        key = place if architecture.free_biases != tuple(BIASES) else "bias"
        raise UserError(
            f"{where}: {named}: not zero, so biases are needed; --set megagpt.model.{key}=true"
        )
    return None


def preparation(model: Path, data: Path) -> str:
    """Return the command that prepares data with a model's tokenizer."""
    return (
        f"python launch/download_data.py --dataset ... --tokenizer {model} --output {data} --force"
    )


def is_file_name(value: Any) -> bool:
    """Return whether a value names a safetensors file in the same directory."""
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", value) is not None
