"""The record of a run: `metrics.jsonl`, one JSON object a logged step or event, each step once.

A line reaches the file by one `write`, so a killed process leaves at most a torn last line, which
the next opening cuts away. Numbers that JSON cannot hold (a loss of NaN) are written as null.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megagpt.common.text import redacted
from megagpt.utils import DEFAULT_FILE_MODE, UserError, write_atomically

METRICS_FILE = "metrics.jsonl"
REPLACED_FILE = "metrics.replaced.jsonl"

Line = dict[str, Any]


@dataclass(frozen=True)
class StepRecord:
    """What one logged step measured; the field names are the keys in `metrics.jsonl`.

    `tokens` counts from the start of the run; `step_time_s` and the two rates are means over the
    steps since the previous record; `mfu` is a fraction of the device's peak, None where that peak
    is unknown: a CPU's is measured, and unknown while training is faster than what was measured;
    `memory_gib` is the peak of what this rank allocated (events `memory` say what its GPU's
    allocator reserved); `skipped_steps` counts from the start of the run.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    learning_rate: float
    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float | None
    memory_gib: float
    skipped_steps: int

    def as_line(self) -> Line:
        return asdict(self)

    @classmethod
    def from_line(cls, line: Line) -> StepRecord:
        """The record on a line without `event`; null stands for NaN.

        Raises TypeError on other keys.
        """
        values: dict[str, Any] = {
            key: math.nan if line[key] is None and key != "mfu" else line[key] for key in line
        }
        return cls(**values)


_STEP_KEYS = {field.name for field in fields(StepRecord)}


@dataclass
class History:
    """What a `metrics.jsonl` holds, in file order; `unreadable_lines` counts those that no run
    of ours writes.
    """

    steps: list[StepRecord]
    events: list[Line]
    unreadable_lines: int = 0

    def events_named(self, name: str) -> list[Line]:
        return [event for event in self.events if event["event"] == name]

    def time_in_steps_s(self, after_step: int = 0) -> float:
        """The step times summed up; a record's mean stands for all steps since the record before
        it.
        """
        previous, total_s = after_step, 0.0
        for record in self.steps:
            if record.step > after_step:
                total_s += record.step_time_s * (record.step - previous)
                previous = record.step
        return total_s


class MetricsFile:
    """The outlet to `metrics.jsonl`; only one process of a run may hold it."""

    name = METRICS_FILE
    retried = True

    def __init__(self, run_directory: Path, *, start_step: int) -> None:
        """Open for appending after `start_step`: later lines, which this run makes anew, move to
        `REPLACED_FILE`.
        """
        self.path = run_directory / METRICS_FILE
        try:
            run_directory.mkdir(parents=True, exist_ok=True)
            self._open_after(start_step)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); "
                "free it, or choose another directory with --run_dir runs/NAME"
            ) from error

    def write(self, line: Line) -> None:
        """Add one line whole or not at all; raises OSError where the disk does not take it.

        After a `rewind` the steps that follow it are made anew.
        """
        if line.get("event") == "rewind":
            self.close()
            self._open_after(line["step"])
        content = encode_line(line)
        size_before = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, content)
        if written < len(
            content
        ):  # a nearly full disk takes a part: the next line must not be glued to it
            os.ftruncate(self._descriptor, size_before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _open_after(self, step: int) -> None:
        _set_aside_after(self.path, step)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, DEFAULT_FILE_MODE)

    def close(self) -> None:
        os.close(self._descriptor)


def plain(value: Any) -> Any:
    """`value` as every outlet receives it: null for NaN and infinities, text for paths, secrets
    masked.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | Path):
        return redacted(str(value))
    if value is None or isinstance(value, int):
        return value
    raise TypeError(
        f"a metrics line cannot hold {value!r} ({type(value).__name__}); pass a number or a string"
    )


def encode_line(line: Line) -> bytes:
    """One line of strict JSON in UTF-8 with its newline."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    # JSON itself escapes what is below 0x20; the rest of the control characters would reach a
    # terminal through `cat`.
    text = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)
    # A sample cut inside a character may hold a lone surrogate; backslashreplace writes it as
    # JSON's own \udXXX.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def read_metrics(run_directory: Path) -> History:
    """Read a run's record, also while it is being written: a torn last line is left out, other
    damage is counted.

    Raises UserError where the directory holds no record.
    """
    path = run_directory / METRICS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the directory of a run, --run_dir "
            f"runs/NAME"
        ) from error
    history = History([], [])
    for raw_line in _whole_lines(content):
        line = _decode_line(raw_line)
        if line is None:
            history.unreadable_lines += 1
        elif "event" in line:
            history.events.append(line)
        else:
            history.steps.append(StepRecord.from_line(line))
    return history


def _set_aside_after(path: Path, last_step: int) -> None:
    """Leave in `path` the lines of steps up to `last_step`; append the others to `REPLACED_FILE`,
    so nothing is lost.

    A kill between the two writes leaves the lines in both files, never in none.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    kept: list[bytes] = []
    replaced: list[bytes] = []
    for raw_line in _whole_lines(content):
        line = _decode_line(raw_line)
        (kept if line is not None and line["step"] <= last_step else replaced).append(raw_line)
    if replaced:
        _append_durably(path.with_name(REPLACED_FILE), replaced)
    if _joined(kept) != content:
        write_atomically(path, _joined(kept))


def _append_durably(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("ab") as file:
        file.write(_joined(lines))
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines that end; what a kill left after the last newline is dropped."""
    return content.split(b"\n")[:-1]


def _joined(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _decode_line(raw_line: bytes) -> Line | None:
    """The object on a line, or None where it is neither an event nor a step record."""
    try:
        line = json.loads(raw_line)
    except ValueError:
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return line if "event" in line or line.keys() == _STEP_KEYS else None
