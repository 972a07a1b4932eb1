"""What a case is, and the words for how one ends. No torch."""

from dataclasses import dataclass, field
from typing import Any

RIGHT, WRONG, NOT_RUN = "right", "WRONG", "not run"
MET, NOT_MET = "met", "not met"
TRITON_LEAST = (8, 0)


class NotRun(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a case's code where something that it needs is absent; the message says what."""


@dataclass(frozen=True)
class Case:
    """One process: ``call`` is ``module:function``, given a ``child.Context`` and the arguments
    (JSON values).

    ``expected_s`` is what it should take: it is not begun with less time left. ``limit_s`` is when
    it is killed. The rest is what it needs: packages, device memory and host memory in GiB, a
    compute capability, a working ptxas.
    """

    part: str
    name: str
    call: str
    arguments: dict[str, Any] = field(default_factory=dict)
    expected_s: float = 30.0
    limit_s: float = 180.0
    environment: dict[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ("triton",)
    device_gib: float = 0.0
    host_gib: float = 0.0
    capability: tuple[int, int] = (0, 0)
    compiles: bool = True
    cache: str = ""  # of compiled kernels, where it is not that of the ptxas in use
    refusal: str = ""  # known beforehand: why it cannot run here


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    ``reason`` is empty where it is right; ``taken_over`` from an earlier call.
    """

    case: Case
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    taken_over: bool = False


def in_words(verdict: str, reason: str) -> str:
    """``not run: no GPU``."""
    return f"{verdict}: {reason}" if reason else verdict
