"""One file of tokens: which format it is, the type of its ids, where they begin, how many.

* nanoGPT: ids as little-endian uint16 and nothing else (data/*/prepare.py).
* llm.c: 256 int32, of which the first three are a magic number, a version and the number of ids
  (dev/data/data_common.py); then the ids.
* Megatron-LM, Megatron-DeepSpeed, gpt-neox: ids and nothing else, beside an `.idx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.data.token_files.marks import FOREIGN
from megagpt.data.token_files.megatron_index import MARK, read_index
from megagpt.schema.model import GPT2_VOCABULARY
from megagpt.utils import UserError

LLM_C_HEADER = 256 * 4
# Magic number: version, type of the ids, tokenizer, its vocabulary.
LLM_C = {
    20240520: (1, "<u2", "GPT-2", GPT2_VOCABULARY),
    20240801: (7, "<u4", "Llama 3", 128256),
}
LLM_C_OTHERS = {20240522: "multiple-choice questions", 20240326: "a model", 20240327: "a state"}
# Other things that are called .bin: the mark at the beginning, and what it is.
NOT_TOKENS = {
    **{mark: what for mark, what, _ in FOREIGN if len(mark) > 3},
    b"PK\x03\x04": "a PyTorch checkpoint or another zip archive",
    b"\x80\x02": "a pickle",
    b"\x1f\x8b\x08": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"GGUF": "a model for llama.cpp",
    MARK: "an .idx of Megatron, not the .bin that belongs to it",
}


@dataclass(frozen=True)
class TokenFile:
    """A file of `tokens` ids of type `dtype` from byte `first_byte` on.

    `starts` are the first tokens of its documents, None if the file does not say. `vocabulary` is
    that of the format, None if it has none.
    """

    path: Path
    kind: str
    dtype: np.dtype
    tokens: int
    first_byte: int = 0
    starts: Sequence[int] | None = None
    index: Path | None = None
    vocabulary: int | None = None


def read_file(path: Path) -> TokenFile:
    """Return what a `.bin` holds; raise UserError if it is nothing that can be read."""
    try:
        index = path.with_suffix(".idx")
        return _indexed(path, index) if index.is_file() else _alone(path)
    except OSError as error:
        name = error.filename or path
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error


def _indexed(path: Path, index: Path) -> TokenFile:
    found = read_index(index, path)
    kind = "Megatron's indexed ids"
    return TokenFile(path, kind, found.dtype, found.tokens, starts=found.starts, index=index)


def _alone(path: Path) -> TokenFile:
    """Return a file without an index: llm.c's if it has the header, else nanoGPT's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(LLM_C_HEADER)
    for mark, what in NOT_TOKENS.items():
        if beginning.startswith(mark):
            raise UserError(f"{path}: is {what}, need ids of tokens")
    if len(beginning) == LLM_C_HEADER:
        header = np.frombuffer(beginning, "<i4")
        if int(header[0]) in LLM_C:
            return _of_llm_c(path, size, header)
        if int(header[0]) in LLM_C_OTHERS:
            raise UserError(
                f"{path}: llm.c's file of {LLM_C_OTHERS[int(header[0])]} (magic {header[0]}), need "
                f"its tokens ({' or '.join(map(str, LLM_C))})"
            )
    if size < 2 or size % 2:
        raise UserError(
            f"{path}: {size} bytes, need pairs: ids of 2 bytes without a header are nanoGPT's; "
            f"Megatron's and gpt-neox's have an .idx beside them (found none)"
        )
    return TokenFile(path, "nanoGPT's uint16 ids", np.dtype("<u2"), size // 2)


def _of_llm_c(path: Path, size: int, header: np.ndarray) -> TokenFile:
    magic, version, tokens = (int(number) for number in header[:3])
    wanted, dtype, tokenizer, vocabulary = LLM_C[magic]
    if version != wanted:
        raise UserError(f"{path}: llm.c's version {version} of magic {magic}, need {wanted}")
    need = LLM_C_HEADER + tokens * np.dtype(dtype).itemsize
    if size != need or not tokens:
        raise UserError(
            f"{path}: its header says {tokens} ids of {np.dtype(dtype).itemsize} bytes (found "
            f"{size} bytes in all, need {need}); copy it again"
        )
    return TokenFile(
        path,
        f"llm.c's {tokenizer} ids",
        np.dtype(dtype),
        tokens,
        first_byte=LLM_C_HEADER,
        vocabulary=vocabulary,
    )
