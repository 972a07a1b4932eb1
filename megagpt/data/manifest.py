"""The manifest of a dataset: what the directory holds.

`manifest.json` is written last, so a directory that has one is complete. It lists each file with
its size, its sha256 and digests of some blocks (probes: megagpt/data/integrity.py). File names must
match a fixed pattern, so a manifest cannot name a file outside its directory or name code.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from megagpt.utils import UserError, human_count

MANIFEST_FILE = "manifest.json"
OFFSET_DTYPE = np.dtype("<u8")
FRACTION_OF_MANY = 0.01  # of the documents are held out for validation, where there are many
TOKENIZER_FILE = "tokenizer.json"
# Beside it, those that a model has: what transformers, and llama.cpp's converter, look for.
MODEL_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)

Split = Literal["train", "val"]
_TOKENIZER_NAMES = "|".join(map(re.escape, (TOKENIZER_FILE, *MODEL_TOKENIZER_FILES)))
FileName = Annotated[
    str, Field(pattern=rf"^((train|val)-\d{{5}}\.(bin|offsets|targets)|{_TOKENIZER_NAMES})$")
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """One file as it was when the dataset was prepared."""

    file: FileName
    bytes: Count
    sha256: Sha256
    probes: tuple[str, ...] = Field(strict=False)  # JSON has lists only


class TokenShard(FileRecord):
    """One `.bin` of tokens, and its `.offsets`: the position in it of each document's start.

    Of conversations also its `.targets`: the bounds of the runs of tokens to learn from.
    """

    tokens: Annotated[int, Field(ge=1)]
    documents: Count  # documents that begin in this shard
    max_token: Count
    offsets: FileRecord
    targets: FileRecord | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        """Leave `targets` out of text, as before there were any: fingerprints stay."""
        return _without(serialize(self), "targets", present=self.targets is not None)

    @property
    def beside(self) -> tuple[FileRecord, ...]:
        """The files that belong to this one."""
        return (self.offsets, *(() if self.targets is None else (self.targets,)))


class TokenizerRecord(FileRecord):
    """`tokenizer.json`, and the files that a model has beside it."""

    name: str
    beside: tuple[FileRecord, ...] = Field(default=(), strict=False)

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        """Leave `beside` out where there is none, as before there were any: fingerprints stay."""
        return _without(serialize(self), "beside", present=bool(self.beside))

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return (self, *self.beside)


def _without(content: dict[str, JsonValue], key: str, *, present: bool) -> dict[str, JsonValue]:
    """Return what a record is stored as, without a key that says nothing."""
    return content if present else {name: v for name, v in content.items() if name != key}


class DatasetManifest(_Record):
    """What a dataset directory holds.

    `vocabulary` is the number of token ids, `source` where the text is from.
    """

    format_version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocabulary: Annotated[int, Field(ge=1, le=2**32)]
    end_of_document: Count
    documents: Count
    tokenizer: TokenizerRecord
    splits: dict[Split, Annotated[tuple[TokenShard, ...], Field(strict=False)]]
    source: dict[str, JsonValue]

    @model_validator(mode="after")
    def _vocabulary_fits_dtype(self) -> Self:
        if self.vocabulary > 2**16 and self.dtype == "uint16":
            raise ValueError(f"a vocabulary of {self.vocabulary} does not fit into uint16")
        return self

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def has_documents(self) -> bool:
        """Whether the starts of documents are known; of token files they may not be."""
        return True

    @property
    def ids(self) -> tuple[str, int]:
        """What decides the meaning of a token: the tokenizer's hash, and the end of a document."""
        return self.tokenizer.sha256, self.end_of_document

    @property
    def fingerprint(self) -> str:
        """A hash of tokens, documents and tokenizer, independent of the directory's name."""
        contents = self.model_dump(mode="json", exclude={"source"})
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def shards(self, split: Split) -> tuple[TokenShard, ...]:
        return self.splits.get(split, ())

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards(split))

    @property
    def has_conversations(self) -> bool:
        """Whether only some tokens are targets: those of the assistant."""
        return any(s.targets is not None for shards in self.splits.values() for s in shards)

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def summary(self) -> str:
        """Return a summary: `8.1M training and 430k validation tokens of 453 documents, ...`."""
        train, val = human_count(self.tokens("train")), human_count(self.tokens("val"))
        return (
            f"{train} training and {val} validation tokens of {self.documents} documents, "
            f"vocabulary {self.vocabulary}"
        )


def dtype_for(vocabulary: int) -> Literal["uint16", "uint32"]:
    """Return the smaller type that holds every id below `vocabulary`."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def read_dataset_manifest(directory: Path) -> DatasetManifest:
    """Read and check `directory/manifest.json`; raise UserError if it is missing or invalid."""
    path = Path(directory) / MANIFEST_FILE
    try:
        return DatasetManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(_missing(Path(directory))) from None
    except NotADirectoryError:
        raise UserError(
            f"{directory}: is a file; a dataset is a directory made by launch/download_data.py"
        ) from None
    except ValidationError as error:
        lines = (
            f"{path}: {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
        )
        raise UserError("\n".join((*lines, remedy(Path(directory))))) from None


def dataset_staging_directory(directory: Path) -> Path:
    """Return the directory in which a dataset is built until it is complete."""
    return directory.with_name(f"{directory.name}.partial")


def remedy(directory: Path) -> str:
    """Return the last line of an error about a damaged dataset."""
    return (
        f"{directory}: restore it from a copy, or prepare it again: "
        f"python launch/download_data.py --dataset ... --output {directory} --force"
    )


def _missing(directory: Path) -> str:
    command = f"python launch/download_data.py --dataset stdlib --output {directory}"
    if dataset_staging_directory(directory).is_dir():
        return (
            f"{directory}: its preparation has not finished; rerun the same command to continue: "
            f"{command}"
        )
    if directory.is_dir():
        return (
            f"{directory}: not a dataset (no {MANIFEST_FILE}); name another directory, "
            f"or make one: {command}"
        )
    return f"{directory}: no dataset here; prepare one: {command} (--help lists other sources)"
