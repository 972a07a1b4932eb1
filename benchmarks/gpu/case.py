"""A case, and the words for how one ends. No torch."""

from dataclasses import dataclass, field
from typing import Any

RIGHT, WRONG, NOT_RUN = "right", "WRONG", "not run"
MET, NOT_MET = "met", "not met"
TRITON_LEAST = (8, 0)


class NotRun(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a case's code if something that it needs is missing; the message says what."""


@dataclass(frozen=True)
class Case:
    """One process that calls ``call`` and reports findings.

    ``call`` is ``module:function``; the function gets a ``child.Context`` and the arguments (JSON
    values). ``expected_s`` is its expected time: with less time left it is not started. After
    ``limit_s`` it is killed. The rest is what it needs: packages, device and host memory in GiB, a
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
    cache: str = ""  # the folder of compiled kernels; empty: that of the ptxas in use
    refusal: str = ""  # why it cannot run here, if that is known before it starts


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    ``reason`` is empty if it is right. ``taken_over``: it ran in an earlier call.
    """

    case: Case
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    taken_over: bool = False


def in_words(verdict: str, reason: str) -> str:
    """Return the verdict with its reason, such as ``not run: no GPU``."""
    return f"{verdict}: {reason}" if reason else verdict
