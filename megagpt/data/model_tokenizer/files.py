"""The files of a model's tokenizer, and what they say.

`tokenizer.json` says how text becomes ids, `tokenizer_config.json` (or `special_tokens_map.json`)
which token ends a document. The second is also how a directory shows that its tokenizer is of a
model and not ours. tokenizers is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagpt.common.disk import sha256_of
from megagpt.data.manifest import MODEL_TOKENIZER_FILES, TOKENIZER_FILE
from megagpt.utils import UserError

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def is_of_a_model(directory: Path) -> bool:
    """Return whether a directory holds a model's tokenizer, and not one of ours."""
    return any((directory / name).is_file() for name in SETTINGS_FILES)


def files_of_tokenizer(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model's tokenizer."""
    names = (TOKENIZER_FILE, *MODEL_TOKENIZER_FILES)
    return {name: sha256_of(directory / name) for name in names if (directory / name).is_file()}


def open_backend(path: Path, content: bytes | None) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer, and its file's parts."""
    from tokenizers import Tokenizer

    try:
        text = (path.read_bytes() if content is None else content).decode()
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode("a")  # finds what reading does not
        return tokenizer, json.loads(text)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no tokenizer here; prepare the dataset with launch/download_data.py"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); download it again") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises no narrower one; its panics are these
        raise UserError(
            f"{path}: Hugging Face tokenizers cannot read it ({error}); download it again, or pip "
            "install -U tokenizers"
        ) from error


def read_settings(directory: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with what special_tokens_map.json alone names."""
    settings: dict[str, Any] = {}
    for name in reversed(SETTINGS_FILES):
        path = directory / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); download it again") from error
        if not isinstance(found, dict):
            raise UserError(f"{path}: not a JSON object; download it again")
        settings |= {key: value for key, value in found.items() if value is not None}
    return settings


def text_of(token: Any) -> str | None:
    """Return a token's text: it is a string, or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def end_of_document(directory: Path, settings: Mapping[str, Any], ids: Mapping[str, int]) -> int:
    name = text_of(settings.get("eos_token"))
    path = directory / SETTINGS_FILES[0]
    if name is None:
        raise UserError(
            f"{path}: no eos_token, the token that ends a document; write it there, such as "
            '{"eos_token": "</s>"}'
        )
    if name not in ids:
        raise UserError(
            f"{path}: eos_token: {name!r} is not among the tokens of {TOKENIZER_FILE}; name one "
            "that is, or download both again"
        )
    return ids[name]
