"""The attention configurations that are compiled ahead of time: those of typical calls."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from kernels.ahead.compiler import AheadOfTime
from kernels.fused.attention_backward import (
    attention_backward_delta,
    attention_backward_keys,
    attention_backward_queries,
)
from kernels.fused.attention_forward import attention_forward
from kernels.fused.attention_tiles import choose_tiles, padded

_KERNELS = {
    "forward": attention_forward,
    "backward_keys": attention_backward_keys,
    "backward_queries": attention_backward_queries,
}
_STRIDES = ("i32:16", "i32:16", "i32:16", 1)
_TYPES = {
    **dict.fromkeys(("heads", "group", "length", "key_length", "window", "head_offset"), "i32"),
    **dict.fromkeys(("scale", "scale_log2", "cap_scale", "keep_scale"), "fp32"),
    **dict.fromkeys(("log_sum_exp", "delta"), "*fp32"),
    "documents": "*i32",
    "seeds": "*i64",
}


def _configuration(
    generation: int,
    phase: str,
    head_dim: int,
    dtype: str = "bf16",
    *,
    causal: bool = True,
    documents: bool = False,
    window: bool = False,
    softcap: bool = False,
    dropout: bool = False,
    group: int = 1,
    atomic: bool = True,
) -> AheadOfTime:
    """Return one call, with block sizes from the table.

    Triton treats a group of 1 as a compile-time constant, so it is one here.
    """
    kernel = _KERNELS[phase]
    tiles = choose_tiles(
        phase,
        head_dim,
        generation=generation,
        fp32=dtype == "fp32",
        small=dropout,
        documents=documents,
        window=window,
        softcap=softcap,
    )
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": padded(head_dim),
        "BLOCK_M": tiles.BLOCK_M,
        "BLOCK_N": tiles.BLOCK_N,
        "CAUSAL": causal,
        "DOCUMENTS": documents,
        "DROP_BELOW": 2**32 // 10 if dropout else 0,
        "ADD_QUERY_GRADIENT": atomic,
    }
    constants |= {} if documents else {"documents": None}
    constants |= {} if window else {"window": None}
    constants |= {} if softcap else {"cap_scale": None}
    constants |= {} if dropout else {"seeds": None}
    constants |= {"group": 1} if group == 1 else {}
    types: dict[str, Any] = {
        name: _STRIDES if name.endswith("strides") else f"*{dtype}" for name in kernel.arg_names
    }
    types |= _TYPES | ({"dq": "*fp32"} if phase == "backward_keys" and atomic else {})
    flags = {
        "full": not causal,
        "documents": documents,
        "window": window,
        "softcap": softcap,
        "dropout": dropout,
        f"group_{group}": group > 1,
    }
    flags["deterministic"] = phase == "backward_keys" and not atomic
    name = "_".join(
        ["attention", phase, str(head_dim), dtype, *(flag for flag, on in flags.items() if on)]
    )
    known = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return AheadOfTime(
        name, kernel, types, known, tiles.num_warps, tiles.num_stages, 10 * generation
    )


def _delta(head_dim: int) -> AheadOfTime:
    types: dict[str, Any] = {
        "out": "*bf16",
        "out_gradient": "*bf16",
        "delta": "*fp32",
        "heads": "i32",
        "length": "i32",
    }
    strides = {"out_strides": _STRIDES, "gradient_strides": _STRIDES}
    constants = {"HEAD_DIM": head_dim, "BLOCK_DIM": padded(head_dim), "BLOCK_M": 64}
    return AheadOfTime(
        f"attention_backward_delta_{head_dim}_bf16",
        attention_backward_delta,
        types | strides,
        constants,
    )


def _shipped(generation: int) -> Iterator[AheadOfTime]:
    """Yield what typical calls launch on the first GPUs of a generation.

    ``generation`` is the major number of the compute capability.
    """
    configuration = partial(_configuration, generation)
    yield from (
        configuration(phase, dim) for dim in (16, 32, 64, 80, 128, 256) for phase in _KERNELS
    )
    yield from (configuration(phase, dim, "fp16") for dim in (64, 128) for phase in _KERNELS)
    yield from (configuration(phase, dim, causal=False) for dim in (64, 128) for phase in _KERNELS)
    yield from (
        configuration(phase, dim, documents=True) for dim in (64, 128) for phase in _KERNELS
    )
    yield from (
        configuration(phase, dim, dropout=True) for dim in (64, 128, 256) for phase in _KERNELS
    )
    yield from (
        configuration(phase, dim, documents=True, dropout=True)
        for dim in (64, 128)
        for phase in _KERNELS
    )
    yield from (configuration(phase, dim, "fp32") for dim in (64, 128, 256) for phase in _KERNELS)
    yield from (configuration(phase, dim, window=True) for dim in (64, 128) for phase in _KERNELS)
    # Gemma 2's head dimensions; its layers alternate between a window and all keys.
    yield from (
        configuration(phase, dim, softcap=True, window=window)
        for dim in (128, 256)
        for window in (False, True)
        for phase in _KERNELS
    )
    yield from (configuration("backward_keys", dim, group=8) for dim in (64, 128))
    yield from (configuration("backward_keys", dim, atomic=False) for dim in (64, 128))


AHEAD_OF_TIME: list[AheadOfTime] = [
    *(entry for generation in (8, 9, 10) for entry in _shipped(generation)),
    *(_delta(dim) for dim in (64, 128)),
]
