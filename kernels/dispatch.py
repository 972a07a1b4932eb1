"""Which implementation of an operation runs, and why: one table.

Rows are tried in order; the first that does not refuse the call runs. A row refuses by returning the reason, so every
choice can be explained. A module that holds fused operations publishes ``refusal(op, *args, **kwargs) -> str | None``
for what it cannot do; device, dtype and the environment are judged here. Modules never bear an operation's name, since
importing ``kernels.attention`` as a module would shadow the function.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.launcher import INTERPRETED

log = logging.getLogger(__name__)

VARIABLE = "MEGAGPT_KERNELS"
_MODES = ("triton", "torch", "interpret")
_LOADED: dict[str, Any] = {}
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Row:
    """One implementation: its name, the module holding functions named like the operations, and what it is made of."""

    implementation: str
    module: str
    fused: bool = True


_TORCH = Row("torch", "kernels.reference", fused=False)

TABLE: dict[str, tuple[Row, ...]] = {
    "attention": (Row("triton", "kernels.fused_attention"), _TORCH),
    "layer_norm": (Row("triton", "kernels.norms"), _TORCH),
    "rms_norm": (Row("triton", "kernels.norms"), _TORCH),
    "linear_cross_entropy": (
        Row("triton", "kernels.cross_entropy"),
        Row("torch", "kernels.chunked_cross_entropy", fused=False),
    ),
    "bias_gelu": (Row("triton", "kernels.activations"), _TORCH),
    "swiglu": (Row("triton", "kernels.activations"), _TORCH),
    "rotary": (Row("triton", "kernels.rotary_embedding"), _TORCH),
    "dropout": (Row("triton", "kernels.fused_dropout"), _TORCH),
}


@dataclass(frozen=True)
class Choice:
    """The row that runs a call, and what each row before it refused."""

    op: str
    row: Row
    refusals: tuple[str, ...]

    def __str__(self) -> str:
        why = "; ".join(self.refusals) or "first in the table"
        return f"{self.op}: {self.row.implementation} ({why})"


def mode() -> str | None:
    """The implementation forced by MEGAGPT_KERNELS, or None. Raises ValueError for an unknown value."""
    forced = os.environ.get(VARIABLE) or None
    if forced is not None and forced not in _MODES:
        raise ValueError(f"{VARIABLE}={forced}: unknown value; set it to {', '.join(_MODES)}, or unset it")
    return forced


def choose(op: str, *args: Any, **kwargs: Any) -> Choice:
    """The implementation that would run ``op`` on these arguments. Raises ValueError where a forced one cannot."""
    forced = mode()
    refusals: list[str] = []
    for row in TABLE[op]:
        reason = _refusal(row, op, forced, args, kwargs)
        if reason is None:
            return Choice(op, row, tuple(refusals))
        refusals.append(f"{row.implementation}: {reason}")
    raise ValueError(f"kernels.{op}: no implementation for {VARIABLE}={forced}: {'; '.join(refusals)}")


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """One line saying which implementation of ``op`` runs on these arguments, and why the others do not."""
    return str(choose(op, *args, **kwargs))


_ANNOUNCED: set[Choice] = set()


@functools.cache
def operation(op: str) -> Callable[..., Any]:
    """The public function ``kernels.<op>``: the twin's signature, the table's choice."""

    @functools.wraps(getattr(reference, op))
    def run(*args: Any, **kwargs: Any) -> Any:
        choice = choose(op, *args, **kwargs)
        _announce(choice)
        return getattr(_module(choice.row.module), op)(*args, **kwargs)

    return run


def _announce(choice: Choice) -> None:
    """Log each choice when it is first made, so that a run's log says which kernels it trained on, and why."""
    if not torch.compiler.is_compiling() and choice not in _ANNOUNCED:
        _ANNOUNCED.add(choice)
        log.info("%s", choice)


def _refusal(row: Row, op: str, forced: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this row cannot run this call; None when it can."""
    if not row.fused:
        return None if forced in (None, "torch") else f"{VARIABLE} asks for fused kernels"
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    reason = _device_refusal(tensors[0].device, forced) or _dtype_refusal(tensors[0].dtype)
    if reason is not None:
        return reason
    reason = _module(row.module).refusal(op, *args, **kwargs)
    return None if reason is None else str(reason)


def _device_refusal(device: torch.device, forced: str | None) -> str | None:
    if forced == "torch":
        return f"{VARIABLE}=torch"
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if forced == "interpret" and not INTERPRETED:
        return f"{VARIABLE}=interpret came too late; set it before Python starts"
    if forced == "interpret":
        return None if device.type == "cpu" else f"the interpreter works on CPU tensors, not on {device.type}"
    if device.type != "cuda":
        return f"tensors on {device.type}, not on a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def _dtype_refusal(dtype: torch.dtype) -> str | None:
    return None if dtype in _FUSED_DTYPES else f"dtype {dtype} is not bfloat16, float16 or float32"


def _module(name: str) -> Any:
    """The module, imported once. torch.compile traces through a dictionary, but not through an import."""
    if name not in _LOADED:
        _LOADED[name] = importlib.import_module(name)
    return _LOADED[name]
