"""What is left out, one at a time, to see whether the emulator notices.

Each mutation removes or weakens one instruction that synchronises. If no instruction is redundant,
an emulator that sees notices all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_WEAKER_WAIT = re.compile(
    r"^(\s*(?:@!?%p\d+\s+)?(?:cp\.async|wgmma|cp\.async\.bulk)\S*wait_group\S*\s+)(\d+)(.*)$"
)
_INSTRUCTION = r"^\s*(?:\{\s*)?(?:@!?%\w+\s+)?"
_REMOVED = {
    "barrier": r"bar(?:rier)?(?:\.cta)?\.sync\b",
    "warp barrier": r"bar\.warp\.sync\b",
    "copy group": r"cp\.async\.commit_group\b",
    "copy wait": r"cp\.async\.wait_group\b",
    "product fence": r"wgmma\.fence\b",
    "product group": r"wgmma\.commit_group\b",
    "product wait": r"wgmma\.wait_group\b",
    "proxy fence": r"fence\.proxy\.async\b",
    "barrier initialisation": r"mbarrier\.init\b",
    "arrival": r"mbarrier\.arrive\.shared\b|mbarrier\.arrive\.release\b|mbarrier\.arrive\.b64\b",
    "expected bytes": r"mbarrier\.arrive\.expect_tx\b",
    "store group": r"cp\.async\.bulk\.commit_group\b",
    "store wait": r"cp\.async\.bulk\.wait_group\b",
}

KINDS = (*_REMOVED, "weaker wait", "phase wait")


@dataclass(frozen=True)
class Mutation:
    """A change of one line."""

    kind: str
    line: int  # from 1
    before: str
    after: str

    def apply(self, text: str) -> str:
        """Return the PTX with the change."""
        lines = text.split("\n")
        assert lines[self.line - 1] == self.before
        lines[self.line - 1] = self.after
        return "\n".join(lines)


def mutations(text: str) -> Iterator[Mutation]:
    """Yield every removal or weakening of a synchronising instruction."""
    for number, line in enumerate(text.split("\n"), 1):
        for kind, pattern in _REMOVED.items():
            if re.search(_INSTRUCTION + rf"(?:{pattern})", line):
                yield Mutation(
                    kind, number, line, re.sub(rf"(?:@!?%\w+\s+)?(?:{pattern})[^;]*;", "", line)
                )
        if weaker := _WEAKER_WAIT.match(line):
            allowed = int(weaker[2]) + 1
            yield Mutation("weaker wait", number, line, f"{weaker[1]}{allowed}{weaker[3]}")
        if "mbarrier.try_wait" in line:
            target = re.search(r"mbarrier\.try_wait\S*\s+([%\w]+)", line)
            if target:
                yield Mutation(
                    "phase wait", number, line,
                    re.sub(r"mbarrier\.try_wait[^;]*;", f"setp.eq.u32 {target[1]}, 0, 0;", line),
                )  # fmt: skip
