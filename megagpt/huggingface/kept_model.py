"""What a run keeps of the published model that it began with, so that an export gives it back.

runs/NAME/published/config.json          as it was, and so generation_config.json and
                                         model.safetensors.index.json where the model has them
runs/NAME/published/FILE.header          of each tensor file: names, formats, order
runs/NAME/published/buffers.safetensors  tensors that are no parameters, such as old masks

The weights themselves are in the checkpoints.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from megagpt.checkpoint.safetensors_file import (
    Entry,
    StoredFile,
    StoredSlice,
    as_bytes,
    header,
    slices_of,
)
from megagpt.config import ModelConfig
from megagpt.huggingface.architectures import CONFIG, INDEX
from megagpt.huggingface.published_config import PublishedConfig, read_json
from megagpt.huggingface.published_model import PublishedModel
from megagpt.huggingface.whole_directory import flushed
from megagpt.utils import UserError

PUBLISHED = "published"  # in the run directory
GENERATION = "generation_config.json"
HEADER = ".header"
BUFFERS = "buffers.safetensors"


def keep(published: PublishedModel, model: ModelConfig, run_directory: Path) -> None:
    """Write what an export needs of the published model into a run directory."""
    directory = run_directory / PUBLISHED
    directory.mkdir()
    for name in (CONFIG, GENERATION, INDEX):
        if (published.directory / name).is_file():
            with flushed(directory / name) as file:
                file.write((published.directory / name).read_bytes())
    for name, stored in published.files.items():
        with flushed(directory / f"{name}{HEADER}") as file:
            file.write(stored.header)
    buffers = published.buffers()
    if buffers:
        with flushed(directory / BUFFERS) as file:
            file.write(header((piece.name, piece.kind, piece.shape) for piece in buffers))
            for piece in buffers:
                file.write(as_bytes(piece.read()))


class KeptModel:
    """The published model of a run; ``files`` are the tensors of each file in their order."""

    def __init__(self, run_directory: Path) -> None:
        """Raise UserError if something of it is missing or damaged."""
        self.directory = run_directory / PUBLISHED
        self.config = PublishedConfig(self.directory / CONFIG)
        self.architecture = self.config.architecture
        paths = sorted(self.directory.glob(f"*{HEADER}"))
        self.headers = {path.name.removesuffix(HEADER): path.read_bytes() for path in paths}
        try:
            self.files = {
                name: slices_of(self.directory / name, content)
                for name, content in self.headers.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.directory}: a {HEADER} file is damaged ({error}); import the model again"
            ) from error

    @staticmethod
    def of(run_directory: Path) -> "KeptModel | None":
        """Return what a run has kept, None if it did not begin with a published model."""
        return KeptModel(run_directory) if (run_directory / PUBLISHED).is_dir() else None

    def require_tensors(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise UserError if the files do not have these tensors, of these shapes."""
        stored = self.tensors
        for name, shape in shapes.items():
            found = stored[name].shape if name in stored else None
            if found != tuple(shape):
                raise UserError(
                    f"{self.directory}: {name}: the {HEADER} files are not those of the run's "
                    f"model (found {found}, need {tuple(shape)}); import the model again"
                )

    @property
    def tensors(self) -> dict[str, StoredSlice]:
        """Every tensor of the files by its name."""
        return {piece.name: piece for pieces in self.files.values() for piece in pieces}

    def document(self, model: ModelConfig) -> dict[str, Any]:
        """Return config.json of the run's model: as it was, but for positions that were changed.

        A run may continue with longer sequences, and so with another rotary base or scaling. Raise
        UserError if anything else differs.
        """
        document = self.config.document
        longest = self.config.longest(model)
        longer = longest is not None and model.sequence_length > longest
        if longer or self.architecture.differences(document, model):
            document = self.architecture.with_positions(document, model)
        differences = self.architecture.differences(document, model)
        if differences:
            raise UserError(
                f"{self.config.path}: not the run's model (needs {', '.join(differences)}); "
                "restore both config.json, or import the model again"
            )
        return document

    def config_in(self, model: ModelConfig, dtype: str | None) -> bytes:
        """Return config.json; its bytes are those that it had if the run changed nothing in it."""
        document = self.document(model)
        if dtype is not None:
            names = [key for key in ("torch_dtype", "dtype") if key in document]
            document = document | dict.fromkeys(names or ["torch_dtype"], dtype)
        unchanged = document == self.config.document
        return self.config.path.read_bytes() if unchanged else _json(document)

    def index_in(self, total_size: int) -> bytes | None:
        """Return the index with this size of all tensors, None if one file had none.

        Raise UserError if it is not that of the files.
        """
        path = self.directory / INDEX
        if not path.is_file() and len(self.files) == 1:
            return None
        index = read_json(path)
        places = {piece.name: file for file, pieces in self.files.items() for piece in pieces}
        if index.get("weight_map") != places:
            raise UserError(f"{path}: does not name the tensors that were; import the model again")
        metadata = index.get("metadata")
        if not isinstance(metadata, dict) or metadata.get("total_size") in (None, total_size):
            return path.read_bytes()
        return _json(index | {"metadata": metadata | {"total_size": total_size}})

    def header_of(self, name: str, entries: list[Entry]) -> bytes:
        """Return a file's header: as it was, unless its tensors have another format now."""
        kept = [(piece.name, piece.kind, piece.shape) for piece in self.files[name]]
        if entries == kept:
            return self.headers[name]
        metadata = json.loads(self.headers[name][8:]).get("__metadata__")
        return header(entries, metadata)

    def buffer(self, name: str) -> Tensor:
        """Return a tensor that is no parameter."""
        path = self.directory / BUFFERS
        try:
            return StoredFile(path).slice(name).read()
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: {name} cannot be read ({error}); import the model again"
            ) from error


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
