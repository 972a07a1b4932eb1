"""One log file per rank, which also takes libraries' messages.

Only rank 0's warnings reach the screen.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megagpt.common.text import redacted

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# Python warnings address developers: they belong in the file, not above the live table.
PYTHON_WARNINGS = "py.warnings"


def rank_log_path(run_directory: Path, rank: int) -> Path:
    return run_directory / "logs" / f"rank_{rank:05d}.log"


def open_rank_log(run_directory: Path, rank: int) -> Path:
    """Send this process's logging to `logs/rank_00000.log` (appending) and return that path.

    Call it after `import deepspeed`, whose logger prints to the screen of every rank until it is
    taken over here. Calling it again replaces the earlier log.
    """
    path = rank_log_path(run_directory, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    _remove_own_handlers(root)
    root.addHandler(_RankLogFile(path))
    if rank == 0:
        root.addHandler(_RankLogScreen())
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    _take_over_deepspeed()
    return path


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _RankLogFile(logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_RedactingFormatter(LOG_FORMAT))


class _RankLogScreen(logging.Handler):
    """Warnings on stderr, looked up at each record: the live table replaces `sys.stderr`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(_RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
        self.addFilter(lambda record: record.name != PYTHON_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except OSError:  # the terminal is gone, as after a lost ssh session; the file has it
            self.setLevel(logging.CRITICAL + 1)


def _remove_own_handlers(logger: logging.Logger) -> None:
    for handler in [
        handler for handler in logger.handlers if isinstance(handler, _RankLogFile | _RankLogScreen)
    ]:
        logger.removeHandler(handler)
        handler.close()


def _take_over_deepspeed() -> None:
    """Route DeepSpeed's loggers to the root's handlers.

    They do not propagate, and have a handler on stdout.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.lower().split(".")[0] == "deepspeed":
            library = logging.getLogger(name)
            library.handlers.clear()
            library.propagate = True
            library.setLevel(logging.INFO)
