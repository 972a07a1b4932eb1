"""The process of one case: ``python -m benchmarks.gpu.child REQUEST``, JSON from ``run.py``.

Every finding is appended to the results as soon as it is known, so a killed case keeps its earlier
findings.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import store
from benchmarks.gpu.case import NOT_RUN, RIGHT, WRONG, NotRun

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Context:
    """What a case's code gets: its names, its device, its directory, and how to report."""

    part: str
    case: str
    key: str  # of the identity
    device: str  # cuda; the tests' stand-in is cpu
    directory: Path
    done: frozenset[str] = frozenset()  # findings of an earlier call under the same identity
    lost: list[str] = field(default_factory=list)  # verdicts that could not be written

    def report(self, name: str, verdict: str, reason: str = "", **figures: Any) -> None:
        """Keep one finding.

        If it cannot be written, its verdict is kept for the exit code.
        """
        record: dict[str, Any] = {
            "kind": "finding",
            "key": self.key,
            "part": self.part,
            "case": self.case,
            "name": name,
        }
        record |= {"verdict": verdict, "reason": reason, "figures": figures}
        try:
            store.append(self.directory / store.FILE, record)
        except OSError:
            self.lost.append(verdict)
        told = ", ".join(
            f"{key} {value}" for key, value in figures.items() if value not in (None, "")
        )
        with suppress(OSError):  # the log is on the same full disk
            print(f"{name}: {verdict}{': ' * bool(reason)}{reason} {told}", flush=True)

    def judge(self, name: str, right: bool, reason: str, **figures: Any) -> None:
        """Keep one finding that is right, or WRONG for the reason."""
        self.report(name, RIGHT if right else WRONG, "" if right else reason, **figures)

    @contextmanager
    def finding(self, name: str) -> Iterator[None]:
        """Turn an error inside the block into this finding's verdict, and continue the case."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.report(name, *verdict_of(error))


def verdict_of(error: BaseException) -> tuple[str, str]:
    """Return verdict and reason of an error: not run if something is missing, else WRONG."""
    told = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if isinstance(error, NotRun):
        return NOT_RUN, str(error)
    if isinstance(error, ModuleNotFoundError):
        return NOT_RUN, f"missing package {error.name}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return NOT_RUN, f"too little memory: {told}"
    # These mean that the machine or the installation is at fault, not the code.
    if type(error).__name__ in ("UserError", "ConfigError"):
        return NOT_RUN, " ".join(str(error).split())
    return WRONG, told


def main() -> int:
    """Run the case and return the exit code.

    Whatever the case raises becomes a finding, so an exit code other than 0 means a crash, or
    findings that could not be written.
    """
    # The kernel kills this process when the command ends, which would have enforced its limit.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.loads(sys.argv[1])
    context = Context(
        **{name: request[name] for name in ("part", "case", "key", "device")},
        directory=Path(request["directory"]),
        done=frozenset(request["done"]),
    )
    module, _, function = request["call"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(context, **request["arguments"])
    except Exception as error:
        traceback.print_exc()
        context.report("case", *verdict_of(error))
    if context.lost:
        return 1 if WRONG in context.lost else os.EX_IOERR
    return 0


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)  # threads of libraries may never end; the findings are written
