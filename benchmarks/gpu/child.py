"""The process of one case: ``python -m benchmarks.gpu.child REQUEST``, a JSON object that
``run.py`` writes.

Every finding is appended to the results as soon as it is known, so that a killed case keeps what it
had found.
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
    """What a case's code is given: where it runs, where it may leave files, and how it tells
    what it finds.
    """

    part: str
    case: str
    key: str  # of the identity
    device: str  # cuda; the tests' stand-in is cpu
    directory: Path
    done: frozenset[str] = frozenset()  # findings of an earlier call under the same identity
    lost: list[str] = field(default_factory=list)  # verdicts that could not be written

    def report(self, name: str, verdict: str, reason: str = "", **figures: Any) -> None:
        """Keep one finding; one that cannot be written is remembered for the exit code."""
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
        """What goes wrong inside becomes this finding's verdict, and the case goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.report(name, *verdict_of(error))


def verdict_of(error: BaseException) -> tuple[str, str]:
    """What is absent did not run; anything else that fails is wrong."""
    told = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if isinstance(error, NotRun):
        return NOT_RUN, str(error)
    if isinstance(error, ModuleNotFoundError):
        return NOT_RUN, f"missing package {error.name}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return NOT_RUN, f"too little memory: {told}"
    if type(error).__name__ in (
        "UserError",
        "ConfigError",
    ):  # megagpt's: the machine or the installation, not the code
        return NOT_RUN, " ".join(str(error).split())
    return WRONG, told


def main() -> int:
    """Run the case; whatever it raises is a finding, so that an exit code other than 0 means a
    crash.
    """
    # No case outlives the command, however that ends: nobody would end it at its limit.
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
    os._exit(code)  # libraries' threads may not end, and all that matters is written
