"""A run directory: which run it belongs to, and whether this configuration may continue it."""

import fcntl
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from megagpt.config import ResolvedConfig
from megagpt.rundir.changes import Changes, permitted
from megagpt.utils import UserError, write_atomically

CONFIG_FILE = "config.json"
CHANGES = "changes"  # the key of config.json that no configuration has
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
    """Return the configuration of a run's last start; raise UserError if it is not a run."""
    return _read(run_directory)[0]


def _read(run_directory: Path) -> tuple[ResolvedConfig, tuple[dict[str, Any], ...]]:
    """Return what config.json holds: the configuration and the recorded changes."""
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
    entries: list[dict[str, Any]] = []
    if f'"{CHANGES}"' in text:
        document = json.loads(text)
        entries = document.pop(CHANGES)
        text = json.dumps(document)
    return ResolvedConfig.from_json(text, str(path)), tuple(entries)


def changes_of(
    run_directory: Path, config: ResolvedConfig, prefixes: Sequence[str] = ()
) -> Changes:
    """Return what changes if this configuration continues the run in the directory.

    Raise UserError, listing the keys, if the directory holds another run: another model, other
    data or another optimizer, in keys that ``prefixes`` (of `--allow_change`) do not cover. A run
    may always be continued with another mesh, ZeRO stage, precision or length.
    """
    path = run_directory / CONFIG_FILE
    if not _exists(path):
        if _exists(run_directory / "checkpoints"):
            raise UserError(
                f"{path}: missing beside checkpoints; restore it, or choose another --run_dir"
            )
        return Changes()
    recorded, entries = _read(run_directory)
    _require_same_kind(run_directory, recorded, config)
    now = permitted(str(run_directory), recorded.identity(), config.identity(), prefixes)
    return Changes(entries, now)


def _require_same_kind(
    run_directory: Path, recorded: ResolvedConfig, config: ResolvedConfig
) -> None:
    """Raise UserError if one trains adapters and the other the whole model."""
    kinds = [bool(run.megagpt.training.lora) for run in (recorded, config)]
    if kinds == [False, True]:
        raise UserError(
            f"{run_directory}: holds a run that trains the whole model, so megagpt.training.lora "
            "cannot continue it; train the adapters in another --run_dir with --set "
            f"megagpt.training.lora.base={run_directory}"
        )
    if kinds == [True, False]:
        raise UserError(
            f"{run_directory}: holds a run that trains adapters, and megagpt.training.lora is "
            "missing; give it as in its config.json, or choose another --run_dir"
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


def record(
    run_directory: Path, config: ResolvedConfig, changes: Changes | None = None, step: int = 0
) -> None:
    """Write the configuration into the directory, with the changes up to ``step``, in one move.

    ``changes`` are those of ``changes_of``, which must have passed.
    """
    path = run_directory / CONFIG_FILE
    text = config.to_json()
    if changes is not None and (entries := changes.entries(step)):
        document = json.loads(text) | {CHANGES: entries}
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, text)
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
