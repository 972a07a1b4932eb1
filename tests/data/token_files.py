"""Token files of other trainers, written as their own programs write them, byte for byte.

nanoGPT: data/openwebtext/prepare.py (`np.uint16`, nothing else). llm.c: dev/data/data_common.py,
`write_datafile`. Megatron: the layout of megatron/core/datasets/indexed_dataset.py, which a test
compares with what megatron-core itself writes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

GPT2_MAGIC = 20240520
LLAMA3_MAGIC = 20240801


def write_nanogpt(path: Path, ids: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(ids, "<u2").tofile(path)
    return path


def write_llm_c(path: Path, ids: list[int], magic: int = GPT2_MAGIC, **changes: int) -> Path:
    header = np.zeros(256, "<i4")
    header[0] = magic
    header[1] = changes.get("version", 1 if magic == GPT2_MAGIC else 7)
    header[2] = changes.get("tokens", len(ids))
    dtype = "<u2" if magic == GPT2_MAGIC else "<u4"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())
    return path


def write_megatron(prefix: Path, documents: list[list[list[int]]], code: int = 8) -> Path:
    """Documents of sequences of ids; `code` is of the type: 4 is int32, 8 uint16."""
    dtype = {1: "<u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    size = np.dtype(dtype).itemsize
    pointers = np.cumsum([0, *lengths[:-1]]).astype("<i8") * size
    indices = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    ids = np.concatenate([np.asarray(sequence, dtype) for sequence in sequences])
    prefix.with_name(f"{prefix.name}.bin").write_bytes(ids.tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(indices))
    prefix.with_name(f"{prefix.name}.idx").write_bytes(
        header + lengths.tobytes() + pointers.tobytes() + indices.tobytes()
    )
    return prefix
