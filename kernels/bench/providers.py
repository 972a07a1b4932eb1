"""The implementations that are compared: ours, torch's, and installed libraries.

Each of torch's attention backends is a provider of its own.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import checks, chunked_cross_entropy, reference
from kernels.bench.cases import Case
from kernels.dispatch import TABLE, Row, row_refusal

Function = Callable[..., Any]


_BACKENDS = {
    "cuda": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}


class UnavailableError(Exception):
    """A provider that cannot run here, or not this case; the message is the reason."""


@dataclass(frozen=True)
class Provider:
    """An implementation's name, and how to get its function for a case.

    The function takes the case's tensors and options by name. ``own_masks``: it does not drop the
    elements that ours drops, so its results can be checked only without dropout.
    """

    name: str
    prepare: Callable[[Case], Function]
    own_masks: bool = False


def providers(op: str, device: str) -> list[Provider]:
    """Return the providers of an operation.

    Whether one is available is known when it is prepared or first runs.
    """
    found = [Provider("torch", _torch)]
    if device == "cuda":
        found = [*_fused(op), *found, Provider("torch.compile", _compiled)]
    if op == "attention":
        found += [
            Provider(f"sdpa {_short(b)}", functools.partial(_sdpa, backend=b), own_masks=True)
            for b in _BACKENDS[device]
        ]
        if device == "cuda":
            found += [
                Provider("flex_attention", _flex),
                Provider("flash-attn", _flash_attn, own_masks=True),
            ]
    if op == "linear_cross_entropy":
        found.append(
            Provider("torch, chunked", lambda case: chunked_cross_entropy.linear_cross_entropy)
        )
    if op in _LIGER and device == "cuda":
        found.append(Provider("liger", _liger))
    return found


def _fused(op: str) -> list[Provider]:
    """Return each of our implementations, named as in dispatch's table."""
    return [
        Provider(f"megagpt {row.implementation}", functools.partial(_ours, row=row))
        for row in TABLE[op]
        if row.fused
    ]


def _ours(case: Case, row: Row) -> Function:
    arguments: dict[str, Any] = case.tensors | case.options
    refusal = row_refusal(row, case.op, getattr(checks, case.op)(**arguments), **arguments)
    if refusal is not None and refusal.startswith("self-check:") and "no memory" not in refusal:
        raise RuntimeError(refusal)  # a wrong result is a failure, not a restriction
    if refusal is not None:
        raise UnavailableError(refusal)
    function: Function = getattr(importlib.import_module(row.module), case.op)
    return function


def _torch(case: Case) -> Function:
    function: Function = getattr(reference, case.op)
    return function


def _compiled(case: Case) -> Function:
    torch.compiler.reset()  # else torch.compile gives up after some shapes, and runs uncompiled
    function: Function = torch.compile(getattr(reference, case.op), dynamic=False)
    return function


def _short(backend: SDPBackend) -> str:
    name = backend.name.removesuffix("_ATTENTION").lower()
    return f"cudnn {torch.backends.cudnn.version()}" if name == "cudnn" else name


def _sdpa(case: Case, backend: SDPBackend) -> Function:
    q, k = case.tensors["q"], case.tensors["k"]
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if "softcap" in case.options:
        raise UnavailableError("has no soft cap")
    ids, window = case.options.get("document_ids"), case.options.get("window")
    if ids is not None or window is not None:
        options["attn_mask"] = reference.visible(
            q.shape[2], k.shape[2], case.options["causal"], ids, q.device, window
        )
    else:  # a single query is the last position and sees all keys
        options["is_causal"] = case.options["causal"] and q.shape[2] > 1

    def run(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, **_: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)

    return run


def _flex(case: Case) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.options.get("dropout"):
        raise UnavailableError("has no dropout")
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k = case.tensors["q"], case.tensors["k"]
    ids = case.options.get("document_ids")
    softcap = case.options.get("softcap")
    batch, length = q.shape[0], q.shape[2]
    mask = None
    if ids is not None:
        mask = create_block_mask(
            lambda b, h, query, key: (query >= key) & (ids[b, query] == ids[b, key]),
            batch,
            None,
            length,
            length,
            q.device,
        )
    elif case.options["causal"] and length > 1:
        window = case.options.get("window", length)
        mask = create_block_mask(
            lambda b, h, query, key: (query >= key) & (key > query - window),
            None,
            None,
            length,
            length,
            q.device,
        )
    modified: dict[str, Any] = {"block_mask": mask, "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap is not None:
        modified["score_mod"] = lambda score, b, h, query, key: (
            softcap * torch.tanh(score / softcap)
        )
    return lambda q, k, v, **_: compiled(q, k, v, **modified)


def _flash_attn(case: Case) -> Function:
    if "document_ids" in case.options:
        raise UnavailableError("supports documents only in another layout of q, k and v")
    flash = _import("flash_attn").flash_attn_func

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        dropout: float = 0.0,
        window: int | None = None,
        softcap: float = 0.0,
        **_: Any,
    ) -> Tensor:
        layout = (x.transpose(1, 2) for x in (q, k, v))
        # Its window counts the keys before the query; -1 and a soft cap of 0 are none.
        before = -1 if window is None else window - 1
        out = flash(
            *layout, dropout_p=dropout, causal=causal, window_size=(before, -1), softcap=softcap
        )
        return out.transpose(1, 2)

    return run


# Liger-Kernel's autograd functions take their arguments by position.
_LIGER: dict[str, Callable[[Any], Function]] = {
    "layer_norm": lambda ops: (
        lambda x, weight, bias: ops.LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
    ),
    "rms_norm": lambda ops: (
        lambda x, weight: ops.LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)
    ),
    "linear_cross_entropy": lambda ops: (
        lambda hidden, weight, targets: ops.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets
        )[0]
    ),
}


def _liger(case: Case) -> Function:
    if "residual" in case.tensors:
        raise UnavailableError("has no function with a fused residual")
    if case.options:
        raise UnavailableError(f"is not called with {', '.join(case.options)}")
    return _LIGER[case.op](_import("liger_kernel.ops"))


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"not installed ({error})") from error
