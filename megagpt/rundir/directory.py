"""A run directory: which run it belongs to, and whether this configuration may continue it."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from megagpt.config import ConfigError, ResolvedConfig, identity_differences
from megagpt.utils import UserError, write_atomically

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"


def directory_of_run(run_dir: Path | None, config_file: str | Path) -> Path:
    """The directory that was asked for; else `runs/` and the name of the configuration."""
    if run_dir is not None:
        return run_dir
    name = Path(config_file).stem
    if name.startswith("."):  # `...json` would lead out of runs/
        raise UserError(f"{config_file}: its name names no run; give --run_dir runs/NAME")
    return Path("runs") / name


def read_config(run_directory: Path) -> ResolvedConfig:
    """The configuration a run was started with; raises UserError where the directory is no run."""
    path = run_directory / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the directory of a run, --run_dir "
            f"runs/NAME"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); restore it, or choose another run"
        ) from error
    return ResolvedConfig.from_json(text, str(path))


def require_same_identity(run_directory: Path, config: ResolvedConfig) -> None:
    """Refuse a directory that holds another run: another model, other data, another optimizer ...

    A run may be continued under any execution: mesh, ZeRO stage, precision, length. Raises
    UserError listing the keys.
    """
    path = run_directory / CONFIG_FILE
    if not _exists(path):
        if _exists(run_directory / "checkpoints"):
            raise UserError(
                f"{path}: missing beside checkpoints; restore it, or choose another --run_dir"
            )
        return
    differences = identity_differences(read_config(run_directory).identity(), config.identity())
    if differences:
        remedy = (
            f"{run_directory} holds another run: choose another --run_dir, or take back "
            f"these differences"
        )
        raise ConfigError(
            [*(f"{run_directory}: {difference}" for difference in differences), remedy]
        )


def _exists(path: Path) -> bool:
    """Path.exists would take a file on the way for an absent path, and let the lack of a
    permission through.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); choose another --run_dir"
        ) from error
    return True


def record(run_directory: Path, config: ResolvedConfig) -> None:
    """Write down which run the directory holds; once ``check`` has agreed."""
    path = run_directory / CONFIG_FILE
    try:
        write_atomically(path, config.to_json())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another --run_dir"
        ) from error


def lock(run_directory: Path) -> TextIO:
    """Keep every other run out of the directory for as long as the file that is returned stays
    open.

    The system lets go of the lock when the process ends, however it ends. Raises UserError, having
    changed nothing, where another run holds it.
    """
    path = run_directory / LOCK_FILE
    try:
        run_directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(
            f"{run_directory}: cannot be written ({error.strerror}); choose another --run_dir"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{run_directory}: {_holder(file)}, or choose another --run_dir") from error
    except OSError as error:  # a file system without locks
        raise UserError(
            f"{path}: cannot be locked ({error.strerror}); choose another --run_dir"
        ) from error
    file.truncate(0)
    print(os.getpid(), socket.gethostname(), file=file, flush=True)
    return file


def _holder(file: TextIO) -> str:
    file.seek(0)
    match file.read().split():
        case [process, host]:
            return f"process {process} on {host} trains in it; end that run (kill {process})"
        case _:  # it has locked the file and not signed it yet
            return "another process begins to train in it; end that run"
