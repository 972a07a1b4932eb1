"""The last text a failed run shows: what happened, where, what is safe, and what to type."""

from __future__ import annotations

import textwrap
import traceback
from pathlib import Path

from megagpt.common.text import redacted, without_control_characters

PAGE_WIDTH = 80
MESSAGE_LINES = 6
FRAMES = 4
PATH_PARTS = 3


def crash_page(
    error: BaseException,
    *,
    rank_name: str,
    last_step: int | None,
    last_checkpoint: Path | None,
    resume_command: str | None,
    log_path: Path | None = None,
) -> str:
    """Return one screen of plain text about a fatal `error`.

    It has 24 lines of 80 columns, longer where a path or a command is. It shows the innermost
    frames only; write the whole traceback to the rank's log before printing it. None stands for
    "there is none yet": no step done, no checkpoint written, nothing to resume.
    """
    rule = "─" * PAGE_WIDTH
    facts = [
        ("last step", "none" if last_step is None else str(last_step)),
        ("last checkpoint", "none" if last_checkpoint is None else str(last_checkpoint)),
        ("full log", "none" if log_path is None else str(log_path)),
        (
            "to resume",
            "nothing was saved: start again" if resume_command is None else resume_command,
        ),
    ]
    lines = [
        rule,
        f"  {type(error).__name__} on {rank_name}",
        "",
        *_message(error),
        "",
        *(f"  {label:<16}  {value}" for label, value in facts),
        "",
        "  where, innermost last",
        *_frames(error),
        rule,
    ]
    return without_control_characters(redacted("\n".join(lines)))


def _message(error: BaseException) -> list[str]:
    """Return the error's text, wrapped, and cut to leave room for the rest of the page."""
    lines = []
    for line in (str(error).strip() or "(no message)").splitlines():
        lines += textwrap.wrap(line, PAGE_WIDTH - 4) or [""]
    if len(lines) > MESSAGE_LINES:
        lines = [*lines[: MESSAGE_LINES - 1], "... (the rest is in the log)"]
    return [f"  {line}".rstrip() for line in lines]


def _frames(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    if not frames:
        return ["    (no traceback)"]
    places = [f"{_short_path(frame.filename)}:{frame.lineno}" for frame in frames]
    width = max(map(len, places))
    return [
        f"    {place:<{width}}  {frame.name}"[:PAGE_WIDTH]
        for place, frame in zip(places, frames, strict=True)
    ]


def _short_path(filename: str) -> str:
    """Return the end of a path: `megagpt/train.py`, `torch/nn/functional.py`."""
    return "/".join(Path(filename).parts[-PATH_PARTS:])
