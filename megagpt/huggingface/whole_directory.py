"""A directory that exists whole or not at all: filled under another name, then renamed once."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megagpt.common.atomic_directory import AtomicDirectory, DirectoryHeldError
from megagpt.common.disk import WRITE_ERRORS
from megagpt.utils import UserError, human_bytes


@contextmanager
def whole_directory(
    final: Path, *, option: str, room_bytes: int, replace: bool = False
) -> Iterator[Path]:
    """Yield a directory to fill, which becomes ``final`` at the end; on failure nothing is left.

    What a killed command left is removed by the next one for the same directory. Raise UserError if
    ``final`` exists and is not empty, unless ``replace`` is true, if another process is filling it,
    and if the disk has too little room. ``option`` is the command line's option for the directory.
    """
    final = final.resolve()
    try:
        if final.exists() and not (final.is_dir() and (replace or not any(final.iterdir()))):
            raise UserError(f"{final}: exists already; choose another {option}")
        place = AtomicDirectory.beside(final)
        missing = [parent for parent in final.parents if not parent.exists()]  # the innermost first
        try:
            with place.locked(wait=False) as staging:
                try:
                    _empty(staging)
                    _require_room(final.parent, room_bytes, option)
                    yield staging
                    place.commit()
                except BaseException:
                    shutil.rmtree(staging, ignore_errors=True)
                    raise
        except BaseException:
            _remove_if_empty(missing)
            raise
    except DirectoryHeldError as error:
        raise UserError(
            f"{final}: another process is writing it; wait for it, or choose another {option}"
        ) from error
    except OSError as error:
        if not _is_of_the_output(error, final):
            raise UserError(
                f"{error.filename or final}: {error.strerror}; {final} is unchanged; check the "
                "disk that was read"
            ) from error
        raise UserError(
            f"{error.filename or final}: {error.strerror}; {final} is unchanged; make room, or "
            f"choose another {option}"
        ) from error


def _is_of_the_output(error: OSError, final: Path) -> bool:
    """Return whether an error belongs to the output, by its kind or its file.

    What is read may be on the same disk, and an error during a read or write names no file.
    """
    if error.errno in WRITE_ERRORS or error.filename is None:
        return error.errno in WRITE_ERRORS
    path = Path(str(error.filename))
    above = (final, *final.parents)
    return path in above or any(
        top in (path, *path.parents) for top in (final, AtomicDirectory.beside(final).staging)
    )


def _remove_if_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def _empty(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            with suppress(FileNotFoundError):
                path.unlink()


def _require_room(parent: Path, room_bytes: int, option: str) -> None:
    free = shutil.disk_usage(parent).free
    if room_bytes > free:
        raise UserError(
            f"{parent}: too little room (found {human_bytes(free)}, need "
            f"{human_bytes(room_bytes)}); make room, or choose another {option}"
        )


@contextmanager
def flushed(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file, which is on the disk when the block ends; an OSError names it."""
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
