"""Run compiled kernels on a CPU: the PTX that Triton emits for sm_80 to sm_90, thread by thread.

Triton's interpreter shows that a kernel's source is right. This package shows what the compiler
made of it: it executes the PTX, with warps interleaved at random and with asynchronous work done as
early and as late as the manual allows. It finds races, missing fences, accesses out of bounds and
deadlocks.

    python -m kernels.emulator FILE.ptx
    python -m pytest -p kernels.emulator.plugin tests/kernels/test_norms.py

Section titles in this package are those of NVIDIA's manual "PTX ISA".
"""

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
