"""How a run ended, in its own words: ``end.json``, whole or absent.

DeepSpeed's launcher may turn a rank's exit code into one of its own, and one that is killed tells
nothing. Whoever started the run reads this record; where there is none although the run has ended,
it was killed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from megagpt.utils import UserError, write_atomically

END_FILE = "end.json"
DONE, PREEMPTED, STOPPED, FAILED = "done", "pre-empted", "stopped by a guard", "failed"
HUNG, ENDED_AT_ONCE = "hung", "ended at once"


@dataclass(frozen=True)
class EndRecord:
    """``step`` is the last one that was trained, None where there was none; ``rank`` the rank
    that says so.
    """

    reason: str
    exit_code: int
    step: int | None
    rank: int
    detail: str = ""
    time: str = ""

    def write(self, run_directory: Path) -> None:
        """Put the record, with the present time, where ``read`` finds it. Raises OSError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomically(
            run_directory / END_FILE, json.dumps(asdict(self) | {"time": now}, indent=1) + "\n"
        )

    @classmethod
    def read(cls, run_directory: Path) -> Self | None:
        """The record, or None where there is none.

        Raises UserError where the file holds something else.
        """
        path = run_directory / END_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: no end record ({error}); remove it") from error


def clear(run_directory: Path) -> None:
    """A run that begins has not ended."""
    (run_directory / END_FILE).unlink(missing_ok=True)
