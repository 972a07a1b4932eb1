"""The flow: cases one after another, each in its own process, within the time there is; what is done is not done again.

No torch.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import process, store
from benchmarks.gpu.case import NOT_RUN, RIGHT, WRONG, Case, Verdict
from benchmarks.gpu.machine import REPOSITORY, Identity, Machine

FORGOTTEN = ("MEGAGPT_KERNELS", "MEGAGPT_HOPPER")  # the table chooses, unless a case says otherwise
NO_TIME = "no time left"


@dataclass
class Outcome:
    """What a call did, in order: a verdict a case, the cases that it had no time for, what could not be written."""

    verdicts: list[Verdict] = field(default_factory=list)
    left: list[Case] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)

    @classmethod
    def impossible(cls, reason: str, parts: Sequence[tuple[str, Sequence[Case]]]) -> "Outcome":
        """No case can run, for one reason."""
        return cls([Verdict(case, NOT_RUN, reason) for _, cases in parts for case in cases])

    @property
    def exit_code(self) -> int:
        """1 where something ran and was wrong, 2 where nothing ran, else 0."""
        if any(verdict.verdict == WRONG for verdict in self.verdicts):
            return 1
        return 0 if any(verdict.verdict == RIGHT for verdict in self.verdicts) else 2


class Flow:
    """One call of the command."""

    def __init__(self, machine: Machine, identity: Identity, directory: Path, end: float, again: bool = False) -> None:
        self.machine, self.identity, self.directory = machine, identity, directory
        self.end = end  # by the monotonic clock
        self.outcome = Outcome()
        self.file = directory / store.FILE
        self.offset = 0 if identity.reusable else store.size(self.file)  # where what counts begins
        self.earlier = store.earlier(store.read(self.file), identity.key)
        if again or not identity.reusable:
            self.earlier.ends.clear()
            self.earlier.findings.clear()
        self.write({"kind": "identity", "key": identity.key, "identity": asdict(identity)})

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; where that is impossible, say so and go on."""
        try:
            store.append(self.file, dict(record))
        except OSError as error:
            reason = f"{self.file}: {error.strerror or error}"
            if reason not in self.outcome.unwritten:
                self.outcome.unwritten.append(reason)

    def left_s(self) -> float:
        """Seconds of this call's time that are left."""
        return self.end - time.monotonic()

    def run(self, parts: Sequence[tuple[str, Sequence[Case]]]) -> Outcome:
        """Every part in turn; each may use an equal share of what is left, or what its next case should take."""
        open_parts = {name: [case for case in cases if not self._settled(case)] for name, cases in parts}
        for index, (name, cases) in enumerate(parts):
            waiting = len([other for other, _ in parts[index:] if open_parts[other]])
            share = self.left_s() / max(1, waiting)
            first = open_parts[name][0].expected_s if open_parts[name] else 0.0
            self._part(cases, time.monotonic() + min(self.left_s(), max(share, 1.2 * first)))
        return self.outcome

    def _settled(self, case: Case) -> bool:
        """Whether a case takes no time: done before, or impossible here."""
        return self._taken_over(case) is not None or bool(self.machine.refusal(case))

    def _taken_over(self, case: Case) -> Verdict | None:
        """Only what ran; what did not may run now."""
        record = self.earlier.ends.get((case.part, case.name))
        if record is None or record["verdict"] == NOT_RUN:
            return None
        return Verdict(case, record["verdict"], record["reason"], record["seconds"], taken_over=True)

    def _part(self, cases: Sequence[Case], end: float) -> None:
        for case in cases:
            verdict = self._taken_over(case)
            if verdict is None:
                refusal = self.machine.refusal(case)
                left_s = end - time.monotonic()
                if not refusal and left_s < case.expected_s:
                    self.outcome.left.append(case)
                    continue
                verdict = Verdict(case, NOT_RUN, refusal) if refusal else self._run(case, left_s)
                if verdict.reason == NO_TIME:
                    self.outcome.left.append(case)
                self._keep(verdict)
            self.outcome.verdicts.append(verdict)
            self._tell(verdict)

    def _keep(self, verdict: Verdict) -> None:
        case = verdict.case
        record = {"kind": "end", "key": self.identity.key, "part": case.part, "case": case.name}
        self.write(
            record | {"verdict": verdict.verdict, "reason": verdict.reason, "seconds": round(verdict.seconds, 1)}
        )

    def _tell(self, verdict: Verdict) -> None:
        told = f"{verdict.verdict}{': ' * bool(verdict.reason)}{verdict.reason}"
        how = "taken over" if verdict.taken_over else f"{verdict.seconds:.0f} s"
        print(f"[{verdict.case.part}] {verdict.case.name}: {told} ({how})", file=sys.stderr, flush=True)

    def _run(self, case: Case, left_s: float) -> Verdict:
        """One case in its process; its verdict from what it found and how it ended."""
        place = self.directory
        request = {
            "part": case.part,
            "case": case.name,
            "call": case.call,
            "arguments": case.arguments,
            "key": self.identity.key,
            "device": self.machine.device,
            "directory": str(place.resolve()),
            "done": sorted(name for name, f in self._found_before(case).items() if f["verdict"] != NOT_RUN),
        }
        offset = store.size(self.file)
        log_path = place / "logs" / f"{case.part}.{case.name}.log".replace("/", "-").replace(" ", "_")
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("wb") as log:
                command = [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(request)]
                limit_s = min(case.limit_s, left_s)
                ended = process.run(command, self._environment(case), REPOSITORY, log, limit_s)
        except OSError as error:
            return Verdict(case, NOT_RUN, f"{place}: {error.strerror or error}")
        verdict, reason = self._verdict(case, ended, left_s, log_path, self._found(case, offset))
        return Verdict(case, verdict, reason, ended.seconds)

    def _environment(self, case: Case) -> dict[str, str]:
        """Caches of compiled kernels lie in DIR and serve every call, those of another ptxas apart."""
        kept = {name: value for name, value in os.environ.items() if name not in FORGOTTEN}
        cache = (self.directory / "cache").resolve()
        kept["TRITON_CACHE_DIR"] = str(cache / "triton" / (case.cache or self.identity.ptxas).replace("/", "-"))
        kept["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
        return kept | case.environment

    def _found_before(self, case: Case) -> dict[str, dict[str, Any]]:
        return self.earlier.findings.get((case.part, case.name), {})

    def _found(self, case: Case, offset: int) -> list[dict[str, Any]]:
        """The findings that count: of this call, which the file holds from the offset on, and those taken over."""
        now = store.earlier(store.read(self.file, offset), self.identity.key).findings.get((case.part, case.name), {})
        return [*(self._found_before(case) | now).values()]

    def _verdict(
        self, case: Case, ended: process.Ended, left_s: float, log: Path, found: list[dict[str, Any]]
    ) -> tuple[str, str]:
        """WRONG where any finding is, or where it crashed or hung; not run where nothing was found to be right."""
        wrong = [f"{f['name']}: {f['reason']}" for f in found if f["verdict"] == WRONG]
        if wrong:
            return WRONG, wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        if ended.killed and left_s < case.limit_s:
            return NOT_RUN, NO_TIME
        if ended.killed:
            return WRONG, f"no end within {case.limit_s:.0f} s; see {log}"
        if ended.code == -signal.SIGKILL:
            return NOT_RUN, f"killed by the system, usually for want of host memory; see {log}"
        if ended.code == os.EX_IOERR:
            return NOT_RUN, f"what it found could not be written to {self.file}"
        if ended.code != 0:
            return WRONG, f"crashed, {_how(ended.code)}; see {log}"
        absent = [f["reason"] for f in found if f["verdict"] == NOT_RUN]
        if any(f["verdict"] == RIGHT for f in found):
            return RIGHT, f"but {len(absent)} not run: {absent[0]}" if absent else ""
        return NOT_RUN, absent[0] if absent else f"it found nothing; see {log}"


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def writable(directory: Path) -> str:
    """Why nothing can be written to the directory, which is made where it is missing; empty where it can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable.{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        return f"--output {directory}: {error.strerror or error}" + _remedy(error)
    return ""


def _remedy(error: OSError) -> str:
    return "; free some space or give another DIR" if error.errno == errno.ENOSPC else "; give another DIR"
