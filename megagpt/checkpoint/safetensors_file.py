"""The header of a safetensors file, for files that are written in one pass.

Format: README of huggingface/safetensors.
"""

import json
import math
from collections.abc import Iterable, Sequence

BYTES_OF = {"F32": 4, "BF16": 2, "F16": 2}

Entry = tuple[str, str, Sequence[int]]  # name, format (a key of BYTES_OF), shape


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor takes in a file."""
    return BYTES_OF[kind] * math.prod(shape)


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
