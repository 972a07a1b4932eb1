"""Safetensors files: the header of one that is written in one pass, and reading one in pieces.

Format: README of huggingface/safetensors.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_OF = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Entry = tuple[str, str, Sequence[int]]  # name, format (a key of DTYPE_OF), shape


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor takes in a file."""
    return DTYPE_OF[kind].itemsize * math.prod(shape)


def header(tensors: Iterable[Entry], metadata: dict[str, str] | None = None) -> bytes:
    """Return the header for tensors that follow one another in this order, without a gap."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, kind, shape in tensors:
        start = end
        end = start + tensor_bytes(kind, shape)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements as a file holds them."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class StoredSlice:
    """A tensor in a file: its format, its shape, and the bytes from ``start`` to ``end``."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own; raise SafetensorError if it cannot be read."""
        if self.kind not in DTYPE_OF:
            raise SafetensorError(f"{self.path}: a tensor of {self.kind} cannot be read")
        content = bytearray(self.end - self.start)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(content) != len(content):
                raise SafetensorError(f"{self.path}: short read at byte {self.start}")
        if not content:
            return torch.empty(self.shape, dtype=DTYPE_OF[self.kind])
        return torch.frombuffer(content, dtype=DTYPE_OF[self.kind]).view(self.shape)


def slices_of(path: Path, header: bytes) -> list[StoredSlice]:
    """Return the tensors of a file with this header, in the order of their bytes."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    slices = [
        StoredSlice(
            path,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            *(len(header) + offset for offset in entry["data_offsets"]),
        )
        for name, entry in entries.items()
    ]
    return sorted(slices, key=lambda piece: (piece.start, piece.end))


class StoredFile:
    """A file of any size: only the tensors that are asked for come into memory.

    ``safe_open`` for torch maps the whole file writable, which Linux refuses for a file that is
    larger than the memory. Here the library checks the header only.
    """

    def __init__(self, path: Path) -> None:
        """Raise SafetensorError or OSError if the file cannot be read."""
        with safe_open(str(path), framework="np"):  # checks names, sizes and the file's length
            pass
        self.size_bytes = path.stat().st_size
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            file.seek(0)
            self.header = file.read(8 + size)
        self.slices = slices_of(path, self.header)
        self._by_name = {piece.name: piece for piece in self.slices}

    def keys(self) -> Iterable[str]:
        return self._by_name.keys()

    def slice(self, name: str) -> StoredSlice:
        """Return a tensor's place; raise SafetensorError if the file does not have it."""
        if name not in self._by_name:
            raise SafetensorError(f"no tensor {name}")
        return self._by_name[name]
