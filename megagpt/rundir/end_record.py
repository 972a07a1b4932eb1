"""How a run ended: ``end.json``, whole or absent.

DeepSpeed's launcher may replace a rank's exit code by its own, and a killed rank reports nothing.
Whoever started the run reads this record; if there is none although the run has ended, the run was
killed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from megagpt.utils import UserError, write_atomically

END_FILE = "end.json"
DONE = "done"
PREEMPTED = "pre-empted"
STOPPED = "stopped by a guard"
FAILED = "failed"
HUNG = "hung"
ENDED_AT_ONCE = "ended at once"


@dataclass(frozen=True)
class EndRecord:
    """How a run ended.

    ``step`` is the last trained step, None if there was none; ``rank`` is the rank that wrote the
    record.
    """

    reason: str
    exit_code: int
    step: int | None
    rank: int
    detail: str = ""
    time: str = ""

    def write(self, run_directory: Path) -> None:
        """Write the record with the present time where ``read`` finds it. Raise OSError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomically(
            run_directory / END_FILE, json.dumps(asdict(self) | {"time": now}, indent=1) + "\n"
        )

    @classmethod
    def read(cls, run_directory: Path) -> Self | None:
        """Return the record, or None if there is none.

        Raise UserError if the file holds something else.
        """
        path = run_directory / END_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not an end record ({error}); remove it") from error


def clear(run_directory: Path) -> None:
    """Remove the record of an earlier start."""
    (run_directory / END_FILE).unlink(missing_ok=True)
