"""Does this GPU, with this driver and assembler, compute attention right? Asked once, on inputs with exact answers.

ptxas 12.8, which triton 3.6 and 3.7 carry, is reported to miscompile the very products attention is made of
(triton-lang/triton#11781: input registers reused before an asynchronous product has read them). A wrong product is no
rounding difference, so inputs are small integers whose result is exact in every dtype, and every bit must agree.
"""

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_LENGTH = 1024  # several blocks of queries, and more blocks of keys than any ring of tiles holds; a power of two

Attention = Callable[..., Tensor]

_VERDICTS: dict[tuple[str, torch.device, torch.dtype, int], str | None] = {}


@torch.compiler.assume_constant_result
def verdict(module: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What the ``attention`` of a module gets wrong on this device; None where every bit agrees.

    Asked once in this process for each device, dtype and head dimension, and a disagreement is logged as a warning.
    torch.compile asks while it compiles. A kernel that cannot even be compiled or launched is at fault too. Where it
    cannot be asked (no memory, inside backward, a CUDA graph being captured) the kernel is refused this once.
    """
    key = (module, device, dtype, head_dim)
    if key in _VERDICTS:
        return _VERDICTS[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "self-check: impossible while a CUDA graph is captured; call it once before"
    if torch._C._current_graph_task_id() != -1:  # whose thread another backward would wait for
        return "self-check: impossible inside backward; call it once before"
    try:
        # Whatever the caller is amidst (autocast, inference mode, a default device, a FLOP counter, hooks of activation
        # checkpointing) holds in its own thread alone.
        with _any_algorithm(), ThreadPoolExecutor(max_workers=1) as thread:
            found = thread.submit(_ask, importlib.import_module(module).attention, *key[1:]).result()
    except torch.OutOfMemoryError:
        return "self-check: no memory for it now"
    except Exception as error:
        found = f"self-check: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if found is not None:
        log.warning("%s is not used on %s for %s, head_dim %d: %s", module, device, dtype, head_dim, found)
    _VERDICTS[key] = found
    return found


def _ask(attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The question, in a new thread, which begins on GPU 0 whatever the device."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return disagreement(attention, device, dtype, head_dim)


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Let torch's own products, which are the yardstick, run even where they cannot be deterministic."""
    wanted = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


def disagreement(attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What ``attention`` gets wrong on this device, forward or backward; None where every bit agrees."""
    for title, inputs, options in _cases(device, head_dim):
        truth = _results(_plain, inputs, torch.float64, **options)
        for deterministic in (False, True):
            ours = _results(attention, inputs, dtype, deterministic=deterministic, **options)
            for name, value in ours.items():
                # Exact answers are multiples of 1 / length; fp64's softmax strays from them by its last place.
                exact = (truth[name] * _LENGTH).round() / _LENGTH
                if not torch.equal(value, exact.to(dtype)):
                    return f"self-check: {name} is wrong for {title} (see triton-lang/triton#11781)"
    return None


def _cases(device: torch.device, head_dim: int) -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Any]]]:
    """(title, (q, k, v, gradient of the output), options), as integers in fp64; head_dim is a power of two."""
    generator = torch.Generator("cpu").manual_seed(0)

    def integers(heads: int = 2, length: int = _LENGTH) -> Tensor:
        drawn = torch.randint(-1, 2, (1, heads, length, head_dim), generator=generator, device="cpu")
        return drawn.to(device, torch.float64)

    # Equal weights over a power of two of keys. Opposite halves of v make the output 1 and its score gradients integers
    # over the length, of few bits, which bf16 holds; a sparse output gradient keeps them, and their sums, small. Every
    # score is 0, by two channels of q that cancel: were all of q 0, the gradient of k would be 0 too.
    k, v = 2 * integers(), integers()
    v[:, :, _LENGTH // 2 :] = 2 - v[:, :, : _LENGTH // 2]
    q, gradient = torch.zeros_like(v), torch.zeros_like(v)
    gradient[:, :, ::64, :16] = 1
    k[..., :2] = 1
    q[..., 0] = 1 - 2 * integers()[..., 0].abs()
    q[..., 1] = -q[..., 0]
    yield "equal weights", (q, k, v, gradient), {"causal": False, "scale": 1.0}
    # Every position bears its index in binary, so that under a large scale a query selects its own key alone. Its score
    # is head_dim, a power of two, whose products are exact.
    index = torch.arange(max(_LENGTH, head_dim), device="cpu")
    bits = index[:_LENGTH, None] >> (index[:head_dim] % int(math.log2(_LENGTH))) & 1
    code = (2 * bits - 1).to(device, torch.float64).expand(1, 2, -1, -1)
    selected = {"causal": True, "scale": 256.0}
    yield "selected keys", (code, code, integers(), integers()), selected
    # No multiple of any block, and both query heads on one head of keys; queries are the last of the keys.
    keys, queries = _LENGTH * 3 // 4 + 5, _LENGTH // 2 + 3
    ragged = (code[:, :, keys - queries : keys], code[:, :1, :keys], integers(1, keys), integers(2, queries))
    yield "ragged lengths", ragged, selected


def _results(function: Attention, inputs: tuple[Tensor, ...], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    out = function(q, k, v, **options)
    gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))
    names = ("gradient of q", "gradient of k", "gradient of v")
    return {"output": out.detach(), **dict(zip(names, gradients, strict=True))}


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Attention written out, one head of keys and values broadcasting over all of q."""
    scores = q @ k.mT * scale
    if causal:
        later = torch.ones_like(scores, dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1) @ v
