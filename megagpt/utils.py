"""Helpers that need only the standard library: ranks, atomic files, suggestions, exit codes."""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from typing import NoReturn, Self, TextIO

KIB = 1024
MIB = 1024**2
GIB = 1024**3
IGNORED = -100  # a target without loss, as in torch.nn.functional.cross_entropy
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_FILE_MODE = 0o644
LOCAL_SIZE_VARIABLES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")  # DeepSpeed's and ours, torchrun's


class ExitCode(IntEnum):
    """The exit code of a command or a rank; any other failure exits with 1."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    PREEMPTED_AND_SAVED = 3
    STOPPED_BY_GUARD = 4


class UserError(Exception):
    """Bad input: the message says what happened, where, and what to type.

    Commands exit with code 2.
    """


class TransientError(UserError):
    """The input is good and the same command may succeed later; commands exit with code 1."""


@dataclass(frozen=True)
class RankEnvironment:
    """Which rank of how many this process is, by the variables that launchers set and torch reads.

    One rank alone where they are absent. A value that is no whole number counts as absent:
    `megagpt.cluster.launchers.adopt_launch` judges the values, before anything depends on them.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks of this host

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return what the variables say now."""

        def number(default: int, *names: str) -> int:
            text = next((environment[name] for name in names if environment.get(name)), "")
            return int(text) if text.isascii() and text.isdigit() else default

        return cls(
            rank=number(cls.rank, "RANK"),
            world_size=number(cls.world_size, "WORLD_SIZE"),
            local_rank=number(cls.local_rank, "LOCAL_RANK"),
            local_size=number(cls.local_size, *LOCAL_SIZE_VARIABLES),
        )

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank speaks for the ranks of its host."""
        return self.local_rank == 0


def tell_of_other_kernels() -> None:
    """Warn if Hugging Face's distribution `kernels` is installed, which our package hides."""
    if not RankEnvironment.read().is_first_of_host:
        return
    with suppress(metadata.PackageNotFoundError):
        version = metadata.version("kernels")
        print(
            f"the package kernels {version} (Hugging Face's) is installed, and megagpt's own "
            "package of that name hides it: transformers may fail to import; to remove it: "
            "pip uninstall kernels",
            file=sys.stderr,
        )


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; print a `UserError` on stderr and return 2, without a traceback.

    A reader that closes early (`| head -1`) or a closed terminal does not change the exit code.
    """
    tell_of_other_kernels()
    try:
        code = main() or ExitCode.DONE
    except UserError as error:
        with suppress(OSError), abandoned_on_failure(sys.stderr):
            print(error, file=sys.stderr, flush=True)
        code = ExitCode.FAILED if isinstance(error, TransientError) else ExitCode.BAD_INPUT
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        abandon(sys.stdout)
    return code


def end_process(code: int) -> NoReturn:
    """End a rank with an exit code; if it is not 0, end at once.

    Python would first wait for threads of libraries (gloo, DeepSpeed: 1 to 5 s were measured),
    while peers wait for this rank and its launcher waits to end them. Nothing is lost: a
    failing rank has already written its messages.
    """
    if code == ExitCode.DONE:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def abandon(stream: TextIO) -> None:
    """Redirect a stream to nowhere, because its reader has gone.

    A failed flush keeps its text. Python flushes stdout again at exit; if that fails too, it
    exits with code 120.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


@contextmanager
def abandoned_on_failure(stream: TextIO) -> Iterator[None]:
    """Abandon the stream if writing to it raises OSError, and pass the error on."""
    try:
        yield
    except OSError:
        abandon(stream)
        raise


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`; a reader sees the old file or the new one.

    The file is written beside its destination, flushed to disk and renamed. The directory entry
    is flushed too, so that the new name survives a power cut. Missing parent directories are
    made. On any error the old file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    descriptor, aside = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # mkstemp makes files that only their owner can read
            os.fchmod(file.fileno(), DEFAULT_FILE_MODE)
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries; only then is a rename or a new file in it durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `word` probably means, or None if none is similar."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.6)
    return by_lower_case[near[0]] if near else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return `, did you mean "stage"?` for the end of an error line, or an empty string."""
    suggestion = closest(word, candidates)
    return f', did you mean "{suggestion}"?' if suggestion else ""


def human_count(count: float) -> str:
    """Return a count with a decimal prefix and three digits: 124M, 1.56B, 13.0B."""
    for divisor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= divisor:
            scaled = count / divisor
            return f"{scaled:.0f}{suffix}" if abs(scaled) >= 100 else f"{scaled:.3g}{suffix}"
    return f"{count:.0f}"


def human_bytes(size: float) -> str:
    """Return a size in binary units with two digits: 1.50 GiB."""
    for divisor, suffix in ((1024 * GIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= divisor:
            return f"{size / divisor:.2f} {suffix}"
    return f"{size:.0f} B"


def human_duration(duration_s: float) -> str:
    """Return a duration in its two largest units: 42 s, 3 min 05 s, 2 h 07 min, 5 d 03 h."""
    total = round(duration_s)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600:02d} h"
