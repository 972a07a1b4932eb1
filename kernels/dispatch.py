"""Which implementation of an operation runs, and why: one table.

Rows are tried in order; the first that does not refuse the call runs. A row refuses by returning
the reason, so every choice can be explained. A module with fused operations publishes ``refusal(op,
*args, **kwargs) -> str | None`` for what it cannot do. It may publish ``fault``, of the same
signature, for what it computes wrongly on this GPU. Device, dtype and environment are judged here.
No module has the name of an operation: importing ``kernels.attention`` as a module would hide the
function of that name.
"""

import functools
import importlib
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from kernels import checks, reference
from kernels.documents import DocumentBounds
from kernels.launcher import INTERPRETED
from kernels.operators import refuse_tangents
from kernels.verification.assembler import assembler
from kernels.verification.self_check import ForNow

log = logging.getLogger(__name__)

VARIABLE = "MEGAGPT_KERNELS"
_MODES = ("triton", "torch", "interpret")
_LOADED: dict[str, Any] = {}
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)  # by identity, which is fast: each call looks it up
class Row:
    """One implementation: its name, and the module with functions named like the operations.

    ``capability`` limits it to one compute capability. ``switch`` is a variable that turns it off
    with 0.
    """

    implementation: str
    module: str
    fused: bool = True
    capability: tuple[int, int] | None = None
    switch: str | None = None


_HOPPER = Row("hopper", "kernels.hopper.attention", capability=(9, 0), switch="MEGAGPT_HOPPER")
_TORCH = Row("torch", "kernels.reference", fused=False)

TABLE: dict[str, tuple[Row, ...]] = {
    "attention": (_HOPPER, Row("triton", "kernels.fused.attention"), _TORCH),
    "layer_norm": (Row("triton", "kernels.fused.norms"), _TORCH),
    "rms_norm": (Row("triton", "kernels.fused.norms"), _TORCH),
    "linear_cross_entropy": (
        Row("triton", "kernels.fused.cross_entropy"),
        Row("torch", "kernels.chunked_cross_entropy", fused=False),
    ),
    "swiglu": (Row("triton", "kernels.fused.activations"), _TORCH),
    "rotary": (Row("triton", "kernels.fused.rotary"), _TORCH),
    "dropout": (Row("triton", "kernels.fused.dropout"), _TORCH),
}


@dataclass(frozen=True)
class Choice:
    """The row that runs a call, and the reason of each row before it."""

    op: str
    row: Row
    refusals: tuple[tuple[str, str], ...]  # (implementation, reason)
    # The GPU that kernels are compiled for, or its compute capability.
    gpu: torch.device | tuple[int, int] | None = None

    def __str__(self) -> str:
        """Return one line, with the assembler if one is used: wrong results may be its fault."""
        line = (
            f"{self.op}: {self.row.implementation} "
            f"({_joined(self.refusals) or 'first in the table'})"
        )
        if self.gpu is None or not self.row.fused:
            return line
        gpu = self.gpu
        capability = _capability(gpu) if isinstance(gpu, torch.device) else gpu
        return f"{line}, {assembler(capability)}"


def _joined(refusals: Iterable[tuple[str, str]]) -> str:
    """Return ``a: reason; b, c: another``: implementations with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for implementation, reason in refusals:
        by_reason.setdefault(reason, []).append(implementation)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def mode() -> str | None:
    """Return the implementation that MEGAGPT_KERNELS forces, or None.

    Raises ValueError for an unknown value.
    """
    forced = os.environ.get(VARIABLE) or None
    if forced is not None and forced not in _MODES:
        raise ValueError(
            f"{VARIABLE}={forced}: unknown value; set it to {', '.join(_MODES)}, or unset it"
        )
    return forced


def choose(op: str, *args: Any, capability: tuple[int, int] | None = None, **kwargs: Any) -> Choice:
    """Return the implementation that would run ``op`` on these arguments.

    Raises ValueError if a forced implementation cannot run it, or if no implementation takes the
    arguments (``kernels.checks``). With ``capability`` the answer is for a GPU of that compute
    capability, wherever the tensors are. The self-check, which needs that GPU, then counts as
    passed.
    """
    like = getattr(checks, op)(*args, **kwargs)
    refusals: list[tuple[str, str]] = []
    for row in TABLE[op]:
        reason = row_refusal(row, op, like, *args, capability=capability, **kwargs)
        if reason is None:
            return Choice(
                op, row, tuple(refusals), capability or (like.device if like.is_cuda else None)
            )
        refusals.append((row.implementation, reason))
    raise ValueError(
        f"kernels.{op}: no implementation for {VARIABLE}={mode()}: {_joined(refusals)}"
    )


def explain(op: str, *args: Any, capability: tuple[int, int] | None = None, **kwargs: Any) -> str:
    """Return one line: the implementation that runs ``op`` on these arguments, and why.

    If Triton compiles it for a GPU, the line names the ptxas that assembles it. ``capability``,
    e.g. (9, 0), asks about a GPU that is not here.
    """
    return str(choose(op, *args, capability=capability, **kwargs))


_ANNOUNCED: set[Choice] = set()


@functools.cache
def operation(op: str) -> Callable[..., Any]:
    """Return the public function ``kernels.<op>``: the twin's signature, the table's choice.

    Imports every module that may run on this machine, for all operations: torch.compile may trace
    the first call, and cannot trace an import, not even one that another operation's first use
    makes in the middle of its trace.
    """
    for row in itertools.chain(*TABLE.values()):
        if not row.fused or (_TRITON_INSTALLED and (torch.version.cuda or INTERPRETED)):
            _module(row.module)

    @functools.wraps(getattr(reference, op))
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            choice = choose(op, *args, **kwargs)
        else:
            choice = _chosen(op, args, kwargs)
        if choice.row is not _TORCH and forward_ad._current_level >= 0:
            refuse_tangents(op, *args, *kwargs.values())
        return getattr(_module(choice.row.module), op)(*args, **kwargs)

    # functools.wraps took the twin's; pickle looks a function up by its module and name.
    run.__module__ = "kernels"
    return run


# The choices of earlier calls, by what they depend on. Lengths differ from token to token in
# generation, so they are thrown away when there are many.
_CHOICES: dict[tuple[Any, ...], Choice] = {}
_MOST_CHOICES = 4096
_PLAIN = frozenset((type(None), bool, int, float, str))
_SWITCHES = tuple({row.switch for rows in TABLE.values() for row in rows if row.switch})


def _chosen(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """Return ``choose`` of an eager call, from memory if an earlier one was alike.

    Checking and choosing again would take longer than a small kernel.
    """
    key = _what_the_choice_depends_on(op, args, kwargs)
    if key is not None and (known := _CHOICES.get(key)) is not None:
        return known
    choice = choose(op, *args, **kwargs)
    _announce(choice)
    if key is not None and not any(isinstance(reason, ForNow) for _, reason in choice.refusals):
        if len(_CHOICES) >= _MOST_CHOICES:
            _CHOICES.clear()
        _CHOICES[key] = choice
    return choice


def _what_the_choice_depends_on(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Return a key that equal choices share; None where a call is not to be remembered.

    It holds the layout of every tensor and every other argument. The environment and torch's modes
    are read by ``mode``, the rows' switches and attention's self-check.
    """
    key: list[Any] = [
        op,
        os.environ.get(VARIABLE),
        *[os.environ.get(switch) for switch in _SWITCHES],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        *kwargs,
    ]
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind is DocumentBounds:
            value = value.positions
            kind = type(value)
            key.append(DocumentBounds)
        if kind is Tensor or kind is Parameter:
            key += (value.shape, value.stride(), value.dtype, value.device)
        elif kind in _PLAIN:
            key.append(value)
        elif isinstance(value, ProcessGroup):
            key.append(ProcessGroup)  # any group: a choice must not keep one alive
        else:
            return None
    return tuple(key)


def _announce(choice: Choice) -> None:
    """Log each choice the first time, so that a run's log says which kernels it used."""
    if choice not in _ANNOUNCED:
        _ANNOUNCED.add(choice)
        log.info("%s", choice)


def row_refusal(
    row: Row,
    op: str,
    like: Tensor,
    *args: Any,
    capability: tuple[int, int] | None = None,
    **kwargs: Any,
) -> str | None:
    """Return why this row cannot run a call whose tensors are like ``like``, or None.

    The other arguments are those of ``choose``.
    """
    forced = mode()
    if not row.fused:
        return None if forced in (None, "torch") else f"{VARIABLE} asks for fused kernels"
    reason = _environment_refusal(row, forced) or _device_refusal(
        row, like.device, forced, capability
    )
    reason = reason or _dtype_refusal(like.dtype)
    if reason is not None:
        return reason
    module = _module(row.module)
    reason = module.refusal(op, *args, **kwargs)
    if (
        reason is None
        and capability is None
        and like.device.type == "cuda"
        and hasattr(module, "fault")
    ):
        reason = module.fault(op, *args, **kwargs)
    found: str | None = reason
    return found


def _environment_refusal(row: Row, forced: str | None) -> str | None:
    """Return why the environment excludes a row, or None.

    Raises ValueError for an unknown value of the row's switch.
    """
    if forced == "torch":
        return f"{VARIABLE}=torch"
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if forced == "interpret" and not INTERPRETED:
        return (
            f"{VARIABLE}=interpret was set after kernels was imported; set it before Python starts"
        )
    if forced == "interpret" and row.capability is not None:
        return "the interpreter cannot run Gluon"
    setting = os.environ.get(row.switch, "1") if row.switch else "1"
    if setting not in ("0", "1"):
        raise ValueError(f"{row.switch}={setting}: unknown value; set it to 0 or 1, or unset it")
    return f"{row.switch}=0" if setting == "0" else None


def _device_refusal(
    row: Row, device: torch.device, forced: str | None, capability: tuple[int, int] | None
) -> str | None:
    if forced == "interpret":
        return (
            None
            if device.type == "cpu"
            else f"the interpreter works on CPU tensors, not on {device.type}"
        )
    if capability is None:
        if device.type != "cuda":
            return f"tensors on {device.type}, not on a GPU"
        capability = _capability(device)
    major, minor = capability
    if row.capability is not None and capability != row.capability:
        return f"compute capability {major}.{minor} is not {row.capability[0]}.{row.capability[1]}"
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU that is here; torch.compile takes it as constant."""
    return torch.cuda.get_device_capability(device)


def _dtype_refusal(dtype: torch.dtype) -> str | None:
    return None if dtype in _FUSED_DTYPES else f"dtype {dtype} is not bfloat16, float16 or float32"


def _module(name: str) -> Any:
    """Return the module, imported once; torch.compile traces a dictionary, not an import."""
    if name not in _LOADED:
        _LOADED[name] = importlib.import_module(name)
    return _LOADED[name]
