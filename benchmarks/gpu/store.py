"""DIR/results.jsonl: one line for each finding, appended as soon as it is known. No torch.

Kinds of lines: ``identity`` (what numbers depend on, under a key), ``finding`` (one check or
measurement of a case) and ``end`` (a case's verdict). A line that a full disk or a kill cut short
is skipped, and does not damage the next one.
"""

import datetime
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "results.jsonl"


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line and flush it to the disk.

    Raises OSError if the file cannot be written or the disk is full.
    """
    line = json.dumps(
        record | {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    )
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        data = (("" if _ends_whole(descriptor) else "\n") + line + "\n").encode()
        if os.write(descriptor, data) != len(data):
            raise OSError(f"{path}: only a part of a line was written; is the disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_whole(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def size(path: Path) -> int:
    """Return the file's bytes so far."""
    return path.stat().st_size if path.is_file() else 0


def read(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """Return every whole line from an offset on; none if there is no such file."""
    return list(_lines(path.read_bytes()[offset:])) if path.is_file() else []


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record


@dataclass(frozen=True)
class Earlier:
    """What DIR holds of earlier calls under this identity, and the number of other cases."""

    ends: dict[tuple[str, str], dict[str, Any]]  # by (part, case): its last verdict
    findings: dict[tuple[str, str], dict[str, dict[str, Any]]]  # by (part, case), then by name
    others: dict[str, int]  # cases that ended under another identity, by its key
    identities: dict[str, dict[str, Any]]


def earlier(records: Sequence[dict[str, Any]], key: str) -> Earlier:
    """Sort the records by identity; a later line of a case or finding replaces an earlier one."""
    found = Earlier({}, {}, {}, {})
    for record in records:
        if record["kind"] == "identity":
            found.identities[record["key"]] = record["identity"]
        elif record["key"] != key:
            found.others[record["key"]] = found.others.get(record["key"], 0) + (
                record["kind"] == "end"
            )
        elif record["kind"] == "end":
            found.ends[record["part"], record["case"]] = record
        else:
            found.findings.setdefault((record["part"], record["case"]), {})[record["name"]] = record
    return found
