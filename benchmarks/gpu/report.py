"""The results of a call: forty lines on the screen, and all of DIR in DIR/report.md. No torch."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import store, targets
from benchmarks.gpu.case import MET, NOT_MET, NOT_RUN, RIGHT, WRONG, Verdict, in_words
from benchmarks.gpu.machine import Identity
from benchmarks.gpu.run import Outcome
from benchmarks.machine import markdown
from megagpt.utils import human_duration, write_atomically

SCREEN_LINES = 40
LINE_LENGTH = 160
# The figures of training on the screen.
FIGURES = ("mfu", "tokens_per_s", "step_ms", "first_step_s", "planned_gib", "allocated_gib")
TIMED = (
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "tflops",
    "gb_per_s",
    "fraction_of_ceiling",
    "peak_mib",
    "error_vs_torch",
)


@dataclass(frozen=True)
class Report:
    """What a call did, and the lines of DIR that count now, by case."""

    identity: Identity
    outcome: Outcome
    directory: Path
    found: dict[tuple[str, str], dict[str, dict[str, Any]]]
    others: dict[str, int]
    others_identity: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, identity: Identity, outcome: Outcome, directory: Path, offset: int = 0) -> "Report":
        """Read what DIR holds, from an offset in its file on."""
        seen = store.earlier(store.read(directory / store.FILE, offset), identity.key)
        return cls(identity, outcome, directory, seen.findings, seen.others, seen.identities)

    @property
    def compared(self) -> list[dict[str, Any]]:
        """Return the targets' lines for every timed row; none if nothing was timed."""
        rows = [
            f["figures"]
            for findings in self.found.values()
            for f in findings.values()
            if "p50_ms" in f["figures"]
        ]
        return targets.compare(rows) if rows else []

    def screen(self) -> list[str]:
        """Return at most forty lines.

        Counts, what is wrong, targets, training, what is left, and the files.
        """
        head = [
            f"{self.identity.device}; commit {self.identity.commit}, {self.identity.tree}; "
            f"{self.identity.ptxas}"
        ]
        head += [
            _counts(part, verdicts) for part, verdicts in _by_part(self.outcome.verdicts).items()
        ]
        wrong = [v for v in self.outcome.verdicts if v.verdict == WRONG]
        absent = Counter(v.reason for v in self.outcome.verdicts if v.verdict == NOT_RUN)
        body = [f"WRONG: [{v.case.part}] {v.case.name}: {v.reason}" for v in wrong]
        body += [f"not run: {count} cases: {reason}" for reason, count in absent.most_common()]
        body += self._targets() + self._training()
        tail = [f"not written: {reason}" for reason in self.outcome.unwritten]
        tail += [
            *self._others(),
            *self._left(),
            f"written: {self.directory / store.FILE}, {self.directory / 'report.md'}",
        ]
        room = SCREEN_LINES - len(head) - len(tail)
        if len(body) > room:
            body = [*body[: room - 1], f"and {len(body) - room + 1} more lines: see report.md"]
        return [
            line if len(line) <= LINE_LENGTH else line[: LINE_LENGTH - 3] + "..."
            for line in [*head, *body, *tail]
        ]

    def _targets(self) -> list[str]:
        verdicts = Counter(line["verdict"].partition(":")[0] for line in self.compared)
        if not verdicts:
            return []
        missed = [line for line in self.compared if line["verdict"].startswith(NOT_MET)]
        head = "targets: " + ", ".join(
            f"{verdicts[word]} {word}" for word in (MET, NOT_MET, NOT_RUN)
        )
        return [head, *(f"{line['verdict']}: {_target(line)}" for line in missed)]

    def _training(self) -> list[str]:
        lines = []
        for (part, case), findings in self.found.items():
            for finding in findings.values():
                figures = finding["figures"]
                if finding["verdict"] == RIGHT and "tokens_per_s" in figures:
                    told = ", ".join(
                        f"{name} {figures[name]}"
                        for name in FIGURES
                        if figures.get(name) is not None
                    )
                    lines.append(f"[{part}] {case}: {told}")
        return lines

    def _others(self) -> list[str]:
        total = sum(self.others.values())
        commits = sorted(
            {
                str(self.others_identity.get(key, {}).get("commit", key))
                for key, n in self.others.items()
                if n
            }
        )
        return (
            [
                f"not taken over: {total} cases of another commit, versions or device "
                f"({', '.join(commits)})"
            ]
            if total
            else []
        )

    def _left(self) -> list[str]:
        left = self.outcome.left
        if not left:
            return []
        parts = ", ".join(
            f"{count} of {part}" for part, count in Counter(case.part for case in left).items()
        )
        longest = human_duration(sum(case.expected_s for case in left))
        return [
            f"left: {len(left)} cases ({parts}), about {longest}; run the same command to continue"
        ]

    def markdown(self) -> str:
        """Return everything that counts now."""
        given = {
            "commit": self.identity.commit,
            "tree": self.identity.tree,
            "ptxas": self.identity.ptxas,
        }
        given |= {"python": self.identity.python, **self.identity.versions}
        lines = [
            f"# On {self.identity.device}",
            "",
            ", ".join(f"{name} {value}" for name, value in given.items()),
            "",
        ]
        lines += [*self._others(), *self._left(), ""]
        for part, verdicts in _by_part(self.outcome.verdicts).items():
            rows = [
                {
                    "case": v.case.name,
                    "verdict": in_words(v.verdict, v.reason).replace("|", "/"),
                    "s": f"{v.seconds:.0f}",
                    "taken over": "yes" if v.taken_over else "",
                }
                for v in verdicts
            ]
            lines += [f"## {part}", "", markdown(list(rows[0]), rows), ""]
        if self.compared:
            lines += ["## Targets", "", markdown(list(self.compared[0]), self.compared), ""]
        for (part, case), findings in self.found.items():
            lines += [f"## {part}: {case}", "", *_findings(findings.values()), ""]
        return "\n".join(lines)

    def write(self) -> str:
        """Write DIR/report.md; return why that was impossible, or an empty string."""
        try:
            write_atomically(self.directory / "report.md", self.markdown())
        except OSError as error:
            return f"{self.directory / 'report.md'}: {error.strerror or error}"
        return ""


def _by_part(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.case.part, []).append(verdict)
    return found


def _counts(part: str, verdicts: Sequence[Verdict]) -> str:
    count = Counter(verdict.verdict for verdict in verdicts)
    taken = sum(verdict.taken_over for verdict in verdicts)
    told = ", ".join(f"{count[word]} {word}" for word in (RIGHT, WRONG, NOT_RUN))
    return f"{part}: {told}{f' ({taken} taken over)' if taken else ''}"


def _target(line: dict[str, Any]) -> str:
    return (
        f"{line['operation']}, {line['shape']}: {line['measured']}: {line['ratio']}, wanted "
        f"{line['wanted']}"
    )


def _findings(findings: Iterable[dict[str, Any]]) -> list[str]:
    """Return one bullet for each finding; of a timed row only what differs between rows."""
    lines = []
    for finding in findings:
        figures = finding["figures"]
        shown = {name: figures[name] for name in TIMED} if "p50_ms" in figures else figures
        told = ", ".join(
            f"{name} {_number(value)}" for name, value in shown.items() if value not in (None, "")
        )
        verdict = in_words(finding["verdict"], finding["reason"])
        lines.append(f"* {finding['name']}: {verdict}. {told}".rstrip(". ") + ".")
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
