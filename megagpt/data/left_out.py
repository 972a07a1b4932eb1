"""Count what a pass over a corpus leaves out, so that nothing is left out silently."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megagpt.data.columns import Columns, missing
from megagpt.utils import UserError

MOST_NAMED = 10
# A misspelt column should not take a pass over all of a large corpus to find.
ROWS_TO_FIND_THE_COLUMN = 10_000


@dataclass
class LeftOut:
    """What one pass has left out so far. `allowed` is the number of bad rows to skip."""

    dataset: str
    allowed: int = 0
    documents: int = 0
    bad_rows: int = 0
    without_text: int = 0
    empty: list[str] = field(default_factory=list)  # names of files
    unseparated: list[str] = field(default_factory=list)  # files with <|endoftext|> in their text
    _bad: list[str] = field(default_factory=list)
    _first_without: str = ""
    _column_seen: bool = False
    _names: dict[str, None] = field(default_factory=dict)
    _without_column: list[str] = field(default_factory=list)  # files, with what they have instead

    def bad_row(self, place: str, problem: str) -> None:
        """Count a bad row; raise UserError if it is one too many."""
        self.bad_rows += 1
        if self.bad_rows > self.allowed:
            skipped = f", after {self.allowed} that were skipped" if self.allowed else ""
            raise UserError(
                f"{place}: {problem}{skipped}; correct it, or accept up to N bad rows with "
                f"--skip_bad_rows N"
            )
        if len(self._bad) < MOST_NAMED:
            self._bad.append(f"{place}: {problem}")

    def begin_file(self) -> None:
        """Look for the column again: files of JSON have no header that must have it."""
        self._column_seen = False
        self._names = {}

    def file_without_text(self, path: str, column: Columns) -> None:
        """Note that a file had rows, and a text in none of them."""
        if not self._column_seen and self._names:
            self._without_column.append(
                f"{path}: {missing(column.written, self._names, column.option)}"
            )

    def row_without_text(self, place: str, row: Any, column: Columns) -> None:
        """Count a row without text; raise UserError if the column seems to be misspelt."""
        self.without_text += 1
        self._first_without = self._first_without or place
        if not self._column_seen:
            self._column_seen = not column.is_absent_from(row)
            self._names |= dict.fromkeys(row if isinstance(row, dict) else ())
        if self.documents == 0 and self.without_text == ROWS_TO_FIND_THE_COLUMN:
            self._require_column(column)

    def require_documents(self, column: Columns | None = None) -> None:
        """Raise UserError if a whole pass has found nothing."""
        if self.documents:
            return
        if column is not None and self.without_text:
            self._require_column(column)
        found = [
            *([f"{self.without_text} rows without text"] if self.without_text else []),
            *([f"{self.bad_rows} bad rows"] if self.bad_rows else []),
            *([f"{len(self.empty)} empty files"] if self.empty else []),
        ]
        raise UserError(
            f"--dataset {self.dataset}: no text found ({', '.join(found) or 'no rows'}); choose "
            f"another dataset or {'--column' if column is None else column.option}"
        )

    def _require_column(self, column: Columns) -> None:
        if not self._column_seen:
            raise UserError(
                f"--dataset {self.dataset}: none of its {self.without_text} rows up to here has a "
                f"text: {missing(column.written, self._names, column.option)}"
            )

    def lines(self) -> list[str]:
        """Return one line for each kind of thing that was left out, the bad rows by name."""
        lines = []
        if self.empty:
            named = ", ".join(self.empty[:MOST_NAMED])
            more = f" and {len(self.empty) - MOST_NAMED} more" if self.empty[MOST_NAMED:] else ""
            lines.append(f"empty files skipped: {named}{more}")
        if self.without_text:
            lines.append(
                f"{self.without_text} rows without text left out, the first is "
                f"{self._first_without}"
            )
        lines += [f"nothing read from {file}" for file in self._without_column[:MOST_NAMED]]
        if self._without_column[MOST_NAMED:]:
            lines.append(f"nor from {len(self._without_column) - MOST_NAMED} more files")
        if self.bad_rows:
            lines += [f"bad row skipped: {bad}" for bad in self._bad]
            lines.append(f"bad rows skipped: {self.bad_rows} of {self.allowed} allowed")
        if self.unseparated:
            more = f" and {len(self.unseparated) - 1} others" if self.unseparated[1:] else ""
            lines.append(
                f"{self.unseparated[0]}{more}: <|endoftext|> in it was read as text; to end a "
                "document there: --separator '<|endoftext|>'"
            )
        return lines

    def record(self) -> dict[str, int]:
        """Return the counts that the manifest keeps."""
        counts = {"rows_without_text": self.without_text, "skipped_bad_rows": self.bad_rows}
        return {name: count for name, count in counts.items() if count}
