"""What is wrong with a kernel: errors that end it, findings that are collected."""

from dataclasses import dataclass


class EmulatorError(RuntimeError):
    """The kernel cannot be run, or cannot go on. The message names the line of the PTX."""


class UnknownInstructionError(EmulatorError):
    """An instruction, or a form of one, whose meaning the emulator does not have."""


@dataclass(frozen=True)
class Finding:
    """A rule of the PTX manual that a kernel broke, though its numbers may be right."""

    kind: str
    line: int
    detail: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.kind} ({self.detail})"


class Findings:
    """The first finding of each kind on each line."""

    def __init__(self) -> None:
        self._by_place: dict[tuple[str, int], Finding] = {}

    def add(self, kind: str, line: int, detail: str) -> None:
        """Keep a finding, unless its line has one of its kind."""
        self._by_place.setdefault((kind, line), Finding(kind, line, detail))

    def all(self) -> list[Finding]:
        """Return them in the order of lines."""
        return sorted(self._by_place.values(), key=lambda finding: (finding.line, finding.kind))
