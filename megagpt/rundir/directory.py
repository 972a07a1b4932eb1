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
    """Return the directory that was asked for, else `runs/` and the name of the configuration."""
    if run_dir is not None:
        return run_dir
    name = Path(config_file).stem
    if name.startswith("."):  # `...json` would give a directory outside runs/
        raise UserError(f"{config_file}: has no usable name; pass --run_dir runs/NAME")
    return Path("runs") / name


def read_config(run_directory: Path) -> ResolvedConfig:
    """Return the configuration that a run was started with; raise UserError if it is not a run."""
    path = run_directory / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{run_directory}: not a run directory ({CONFIG_FILE}: {error.strerror}); pass "
            f"--run_dir runs/NAME"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); restore it, or choose another run"
        ) from error
    return ResolvedConfig.from_json(text, str(path))


def require_same_identity(run_directory: Path, config: ResolvedConfig) -> None:
    """Raise UserError, listing the keys, if the directory holds another run.

    Another run is another model, other data or another optimizer. A run may be continued with
    another mesh, ZeRO stage, precision or length.
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
            f"{run_directory}: holds another run; choose another --run_dir, or undo these "
            f"differences"
        )
        raise ConfigError(
            [*(f"{run_directory}: {difference}" for difference in differences), remedy]
        )


def _exists(path: Path) -> bool:
    """Return whether a path exists; raise UserError if that cannot be told.

    Path.exists would call a path below a file absent, and would not say which permission is
    missing.
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
    """Write the configuration into the directory; ``require_same_identity`` must have passed."""
    path = run_directory / CONFIG_FILE
    try:
        write_atomically(path, config.to_json())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another --run_dir"
        ) from error


def lock(run_directory: Path) -> TextIO:
    """Lock the directory against other runs while the returned file stays open.

    The system releases the lock when the process ends, however it ends. Raise UserError, having
    changed nothing, if another run holds it.
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
        case _:  # it has locked the file but not written its id yet
            return "another process is starting to train in it; end that run"
