"""`samples.txt`: what the model wrote during training, for reading from top to bottom."""

from __future__ import annotations

from pathlib import Path

from megagpt.common.text import without_control_characters
from megagpt.monitoring.metrics import Line, read_metrics
from megagpt.utils import write_atomically

SAMPLES_FILE = "samples.txt"


class SamplesFile:
    """The outlet to `samples.txt`, a view of the sample events in `metrics.jsonl`.

    Opening rewrites it from them.
    """

    name = SAMPLES_FILE
    retried = True

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / SAMPLES_FILE
        samples = read_metrics(run_directory).events_named("sample")
        write_atomically(self._path, b"".join(map(_entry, samples)))

    def write(self, line: Line) -> None:
        if line.get("event") == "sample":
            with self._path.open("ab") as file:
                file.write(_entry(line))

    def close(self) -> None:
        """Do nothing: no file stays open between samples."""


def _entry(sample: Line) -> bytes:
    text = without_control_characters(sample["prompt"] + sample["text"])
    return f"=== step {sample['step']}, prompt {sample['prompt']!r} ===\n{text}\n\n".encode(
        errors="backslashreplace"
    )
