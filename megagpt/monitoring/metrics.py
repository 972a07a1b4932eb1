"""The record of a run: `metrics.jsonl`, one JSON object per logged step or event.

Each step has one line. A line reaches the file by one `write`, so a killed process leaves at most a
partial last line, which the next opening cuts off. Numbers that JSON cannot hold (a loss of NaN)
are written as null.
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
    """The measurements of one logged step; the field names are the keys in `metrics.jsonl`.

    `tokens` counts from the start of the run. `step_time_s` and the two rates are means over the
    steps since the previous record. `mfu` is a fraction of the device's peak, None if that is
    unknown: a CPU's is measured, and unknown while training is faster than measured. `memory_gib`
    is the peak of what this rank allocated (events `memory` say what its GPU's allocator reserved).
    `skipped_steps` counts from the start of the run.
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
        """Return the record on a line without `event`; null stands for NaN.

        Raise TypeError on other keys.
        """
        values: dict[str, Any] = {
            key: math.nan if line[key] is None and key != "mfu" else line[key] for key in line
        }
        return cls(**values)


# Of the event `eval`, before the name of a further validation set and of a source of a blend.
LOSS_OF_VALIDATION_SET = "validation/"
LOSS_OF_SOURCE = "source/"


def named_losses(event: Line) -> dict[str, float | None]:
    """Return the losses of further validation sets and of sources in an event `eval`, by key."""
    named = (LOSS_OF_VALIDATION_SET, LOSS_OF_SOURCE)
    return {key: value for key, value in event.items() if key.startswith(named)}


_STEP_KEYS = {field.name for field in fields(StepRecord)}


@dataclass
class History:
    """The content of a `metrics.jsonl`, in file order.

    `unreadable_lines` counts the lines that are neither an event nor a step record.
    """

    steps: list[StepRecord]
    events: list[Line]
    unreadable_lines: int = 0

    def events_named(self, name: str) -> list[Line]:
        return [event for event in self.events if event["event"] == name]

    def time_in_steps_s(self, after_step: int = 0) -> float:
        """Return the sum of the step times.

        A record's mean stands for all steps since the record before it.
        """
        previous = after_step
        total_s = 0.0
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
        """Open for appending after `start_step`.

        Later lines, whose steps this run repeats, move to `REPLACED_FILE`.
        """
        self.path = run_directory / METRICS_FILE
        try:
            run_directory.mkdir(parents=True, exist_ok=True)
            self._open_after(start_step)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); "
                "make it writable, or choose another --run_dir runs/NAME"
            ) from error

    def write(self, line: Line) -> None:
        """Append one whole line, or nothing; raise OSError if the disk refuses it.

        After a `rewind` the steps that follow it are repeated.
        """
        if line.get("event") == "rewind":
            self.close()
            self._open_after(line["step"])
        content = encode_line(line)
        size_before = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, content)
        # A nearly full disk takes a part of the line; the next one must not follow on it.
        if written < len(content):
            os.ftruncate(self._descriptor, size_before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _open_after(self, step: int) -> None:
        _set_aside_after(self.path, step)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, DEFAULT_FILE_MODE)

    def close(self) -> None:
        os.close(self._descriptor)


def plain(value: Any) -> Any:
    """Return `value` as every outlet receives it.

    NaN and infinities become null, paths become text, secrets are masked.
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
    """Return one line of strict JSON in UTF-8 with its newline."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    # JSON escapes characters below 0x20; the other control characters would reach a terminal
    # through `cat`.
    text = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)
    # A sample that was cut inside a character may hold a lone surrogate; backslashreplace writes it
    # as JSON's own \udXXX.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def read_metrics(run_directory: Path) -> History:
    """Read a run's record, also while it is being written.

    A partial last line is left out, other damage is counted. Raise UserError if the directory holds
    no record.
    """
    path = run_directory / METRICS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{run_directory}: not a run directory with a record ({METRICS_FILE}: "
            f"{error.strerror}); pass --run_dir runs/NAME"
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
    """Keep the lines of steps up to `last_step`; append the others to `REPLACED_FILE`.

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
    """Return the complete lines, without what a kill left after the last newline."""
    return content.split(b"\n")[:-1]


def _joined(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _decode_line(raw_line: bytes) -> Line | None:
    """Return the object on a line, or None if it is neither an event nor a step record."""
    try:
        line = json.loads(raw_line)
    except ValueError:
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return line if "event" in line or line.keys() == _STEP_KEYS else None
