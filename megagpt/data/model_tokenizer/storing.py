"""A model's tokenizer on its way into a dataset, and compared with the model's at an import.

A dataset holds the model's own files unchanged, so an export gives them back. transformers is
needed for one thing only, and imported there: to convert a sentencepiece file.
"""

from __future__ import annotations

import json
from pathlib import Path

from megagpt.common.disk import sha256_of
from megagpt.data.manifest import TOKENIZER_FILE
from megagpt.data.model_tokenizer.encoding import ModelTokenizer
from megagpt.data.model_tokenizer.files import (
    SETTINGS_FILES,
    files_of_tokenizer,
    is_of_a_model,
    open_backend,
)
from megagpt.utils import UserError, write_atomically

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
SENTENCEPIECE_PROBE = (
    "The quick brown fox jumps over the lazy dog, and it is said that they've been there for the "
    "other 12345 times; def f(x):\n    return naïve café, Русский текст, 日本語 🙂"
)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a model's tokenizer byte for byte; a sentencepiece file alone is also converted.

    Raises UserError if it cannot be used; then nothing is written.
    """
    contents = {name: (source / name).read_bytes() for name in files_of_tokenizer(source)}
    if TOKENIZER_FILE not in contents:
        contents[TOKENIZER_FILE] = _converted(source)
    ModelTokenizer(source, contents[TOKENIZER_FILE])
    # tokenizer.json last: alone it would read as a tokenizer of ours.
    for name in sorted(contents, key=lambda name: name == TOKENIZER_FILE):
        write_atomically(directory / name, contents[name])


def _converted(source: Path) -> bytes:
    """Return the tokenizer.json that transformers makes from a sentencepiece file.

    Raises UserError if the ids of a probe are not those of sentencepiece itself: transformers
    takes `tokenizer_class` of the settings for what the file holds.
    """
    files = [source / name for name in SENTENCEPIECE_FILES if (source / name).is_file()]
    if not files:
        raise UserError(
            f"{source}: no {TOKENIZER_FILE} here, and no sentencepiece tokenizer.model; give the "
            "directory of a model, made with hf download NAME --local-dir DIR"
        )
    try:
        from sentencepiece import SentencePieceProcessor
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"{files[0]}: a sentencepiece file without {TOKENIZER_FILE}, and {error.name} is not "
            "installed to convert it; pip install transformers sentencepiece protobuf, then give "
            "the same command again"
        ) from None
    try:
        made = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        ids = made(SENTENCEPIECE_PROBE, add_special_tokens=False)["input_ids"]
        expected = SentencePieceProcessor(model_file=str(files[0])).encode(SENTENCEPIECE_PROBE)
        content: bytes = made.backend_tokenizer.to_str(pretty=True).encode()
    except Exception as error:  # whatever a damaged file makes them raise
        raise UserError(
            f"{files[0]}: transformers cannot convert it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); download it again, or a {TOKENIZER_FILE}"
        ) from error
    if ids != expected:
        raise UserError(
            f"{files[0]}: transformers converts it as {type(made).__name__}, which gives other ids "
            f"than sentencepiece; correct tokenizer_class in {source / SETTINGS_FILES[0]}, or "
            f"download a {TOKENIZER_FILE}"
        )
    return content


def difference_of_tokenizers(data: Path, model: Path) -> str | None:
    """Return how the tokenizer of a dataset differs from a model's; empty if it does not.

    None if the model has none to compare. One of ours is compared by its ids alone.
    """
    for name in SENTENCEPIECE_FILES if not (model / TOKENIZER_FILE).is_file() else ():
        if (model / name).is_file() and (data / name).is_file():
            same = sha256_of(model / name) == sha256_of(data / name)
            return "" if same else f"another {name}"
    if not (model / TOKENIZER_FILE).is_file():
        return None
    if sha256_of(data / TOKENIZER_FILE) == sha256_of(model / TOKENIZER_FILE):
        return ""
    here, there = (open_backend(place / TOKENIZER_FILE, None)[0] for place in (data, model))
    ids = there.get_vocab(with_added_tokens=True)
    ours = here.get_vocab(with_added_tokens=True)  # in another order each time
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if ids.get(token) != number:
            return f"{token!r} is {number} here, {ids.get(token, 'unknown')} there"
    if is_of_a_model(data):  # written again by another version of the library, files differ
        parts, their_parts = (json.loads(tokenizer.to_str()) for tokenizer in (here, there))
        for part in ("normalizer", "pre_tokenizer", "model", "added_tokens"):
            if parts[part] != their_parts[part]:
                return f"another {part} in {TOKENIZER_FILE}"
    return ""
