"""The tokenizer of a run that began with a published model, known by its hash.

runs/NAME/tokenizer.sha256, written by the import. A dataset of another tokenizer with as many ids
would otherwise train or continue text with ids that mean something else.
"""

from pathlib import Path

from megagpt.common.disk import sha256_of
from megagpt.data.manifest import TOKENIZER_FILE
from megagpt.data.token_files.declared import NOTHING, Declared
from megagpt.data.token_files.opening import tokenizer_directory
from megagpt.utils import UserError, write_atomically

HASH_FILE = "tokenizer.sha256"


def record_tokenizer(run_directory: Path, data: Path) -> None:
    """Write the hash of the tokenizer of the data, which is the model's."""
    write_atomically(run_directory / HASH_FILE, sha256_of(data / TOKENIZER_FILE) + "\n")


def require_tokenizer(run_directory: Path, data: Path, declared: Declared = NOTHING) -> None:
    """Raise UserError if the data have another tokenizer than the model that the run began with.

    Of ids without a tokenizer nothing is known, so nothing is refused.
    """
    path = run_directory / HASH_FILE
    if not path.is_file():
        return  # it did not begin with a published model, or with one without a tokenizer
    directory = tokenizer_directory(data, declared)
    if directory is None:
        return
    need = path.read_text().strip()
    found = sha256_of(directory / TOKENIZER_FILE)
    if found != need:
        raise UserError(
            f"{data}: its tokenizer is not that of the model in {run_directory} (found sha256 "
            f"{found[:16]}, need {need[:16]}); prepare it again with the model's: python "
            f"launch/download_data.py --dataset ... --tokenizer DIR --output {data} --force"
        )
