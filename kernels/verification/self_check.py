"""Check that this GPU, driver and assembler compute attention right, on exact inputs.

ptxas 12.8, which triton 3.6 and 3.7 contain, is reported to miscompile the products that attention
uses (triton-lang/triton#11781: input registers are reused before an asynchronous product has read
them). A wrong product is no rounding difference, so every bit must agree. Each variant that Triton
compiles is checked when a call first needs it. The check compiles nothing that the call does not
need.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.launcher import uncounted
from kernels.verification.assembler import assembler
from kernels.verification.exact_attention import ExactCase, Variant, exact_case

log = logging.getLogger(__name__)

Attention = Callable[..., Tensor]

_VERDICTS: dict[tuple[str, torch.device, torch.dtype, Variant], str | None] = {}


class ForNow(str):
    """A reason that holds for one call only: the next one asks again."""

    __slots__ = ()


@torch.compiler.assume_constant_result
def verdict(
    module: str, device: torch.device, dtype: torch.dtype, variant: tuple[Any, ...]
) -> str | None:
    """Return what the ``attention`` of a module gets wrong on this device, or None.

    Runs once in this process for each device, dtype and ``variant`` (a ``Variant``), and logs a
    failure as a warning. torch.compile calls it while it compiles. A kernel that cannot be compiled
    or launched has failed. If the check cannot run now (no memory, inside backward, while a CUDA
    graph is captured), the kernel is refused for this call only.
    """
    variant = Variant(*variant)
    key = (module, device, dtype, variant)
    if key in _VERDICTS:
        return _VERDICTS[key]
    if (
        not variant.gradients
        and _VERDICTS.get((*key[:3], variant._replace(gradients=True)), "unknown") is None
    ):
        return None  # the check with gradients has passed, and includes the forward
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return ForNow(
            "self-check: impossible while a CUDA graph is captured; call attention once before"
        )
    if torch._C._current_graph_task_id() != -1:  # a nested backward would wait for this thread
        return ForNow("self-check: impossible inside backward; call attention once before")
    try:
        # A new thread has none of the caller's modes (autocast, inference mode, a default device,
        # a FLOP counter, hooks of activation checkpointing).
        with _any_algorithm(), uncounted(), ThreadPoolExecutor(max_workers=1) as thread:
            found = thread.submit(
                _ask, importlib.import_module(module).attention, *key[1:]
            ).result()
    except torch.OutOfMemoryError:
        return ForNow("self-check: no memory for it now")
    except Exception as error:
        found = (
            f"self-check: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        )
    if found is not None:
        log.warning("%s is not used on %s for %s, %s: %s", module, device, dtype, variant, found)
    _VERDICTS[key] = found
    return found


def _ask(
    attention: Attention, device: torch.device, dtype: torch.dtype, variant: Variant
) -> str | None:
    """Run the check in a new thread, which starts with GPU 0 as its current device."""
    if device.type != "cuda":
        return disagreement(attention, device, dtype, variant)
    with torch.cuda.device(device):
        found = disagreement(attention, device, dtype, variant)
    if found is None:
        return None
    used = assembler(torch.cuda.get_device_capability(device))
    return f"{found}; compiled by {used}: {used.advice()}"


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Allow torch's own products, the reference, even if they are not deterministic."""
    wanted = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


def disagreement(
    attention: Attention, device: torch.device, dtype: torch.dtype, variant: Variant
) -> str | None:
    """Return what ``attention`` gets wrong on this device, forward or backward, or None.

    Every bit must agree.
    """
    case = exact_case(variant, device)
    truth = answers(reference.attention, case, torch.float64, variant)
    ours = answers(attention, case, dtype, variant, deterministic=variant.deterministic)
    for name, value in ours.items():
        # fp64's softmax may be wrong in its last place.
        exact = (truth[name] / case.unit).round() * case.unit
        if not torch.equal(value, exact.to(dtype)):
            return f"self-check: {name} is wrong for {variant}"
    return None


def answers(
    attention: Attention, case: ExactCase, dtype: torch.dtype, variant: Variant, **options: Any
) -> dict[str, Tensor]:
    """Return the output, and the gradients if the variant has any."""
    with torch.set_grad_enabled(variant.gradients):
        q, k, v = (
            _laid_out(x.to(dtype), variant.aligned).requires_grad_(variant.gradients)
            for x in case[:3]
        )
        out = attention(q, k, v, **case.options, **options)
    if not variant.gradients:
        return {"output": out}
    gradients = torch.autograd.grad(out, (q, k, v), case.out_gradient.to(dtype))
    names = ("gradient of q", "gradient of k", "gradient of v")
    return {"output": out.detach(), **dict(zip(names, gradients, strict=True))}


def _laid_out(x: Tensor, aligned: bool) -> Tensor:
    """Return x stored as a model stores it, (batch, length, heads, head_dim).

    The distance between rows is a multiple of 16 elements if ``aligned``, else odd.
    """
    batch, heads, length, head_dim = x.shape
    pitch = -(-head_dim // 16) * 16 if aligned else head_dim | 1
    rows = x.new_zeros(batch, length, heads, pitch)[..., :head_dim]
    return rows.copy_(x.transpose(1, 2)).transpose(1, 2).detach()
