"""Every shipped configuration of every kernel, as compiled, on the emulator, against fp64.

Shapes are small, but larger than a block, with a tail in each dimension. The names of the
configurations are those that ``kernels.ahead`` compiles; a test checks that its launches were of
the configurations that it says.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ahead.compiler import AheadOfTime, shipped
from kernels.fused import activations, cross_entropy, dropout, norms, rotary
from kernels.fused import attention as fused_attention
from kernels.hopper import attention as hopper_attention
from tests.support.kernels.accuracy import assert_as_accurate_as_torch
from tests.support.kernels.attention_rounding import attention_rounding

CAPABILITIES = (80, 90)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def entries(capability: int) -> dict[str, AheadOfTime]:
    """What is shipped for GPUs of a compute capability, by name."""
    return {x.name: x for x in shipped() if x.capability in (None, capability)}


def is_of(compiled: Any, entry: AheadOfTime) -> bool:
    """Whether a kernel was compiled as an entry says: types, constants, warps, stages.

    Not which integers are multiples of 16, which decides how wide loads are.
    """
    if compiled.src.fn.fn.__name__ != entry.kernel.fn.__name__:
        return False
    names = entry.kernel.arg_names
    constants = {path[0]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    types = compiled.src.signature
    return (
        all(
            constants.get(names.index(name)) == value
            for name, value in entry.constants.items()
            if name in names
        )
        and all(
            types[name].replace(" ", "") == kind.replace(" ", "")
            for name, kind in entry.signature.items()
            if name in types and isinstance(kind, str) and kind.startswith(("*", "tensordesc"))
            and name not in entry.constants
        )
        and compiled.metadata.num_warps >= entry.num_warps  # more if specialised
        and (entry.kernel.is_gluon() or compiled.metadata.num_stages == entry.num_stages)
    )  # fmt: skip


def assert_ran(gpu: Any, names: Iterable[str]) -> None:
    """The launches were of these configurations, perhaps among others."""
    known = entries(10 * gpu.capability[0])
    for name in names:
        assert any(is_of(done.compiled, known[name]) for done in gpu.launches), (
            f"{name} was not launched, but "
            f"{[(done.kernel, done.compiled.src.constants) for done in gpu.launches]}"
        )


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------------------------- attention

FLAGS = ("full", "documents", "window", "softcap", "dropout", "group_8", "deterministic")
PHASES = ("forward", "backward_keys", "backward_queries")


def attention_cases() -> dict[str, set[str]]:
    """The configurations of each call, by the part of their names after the phase."""
    cases: dict[str, set[str]] = {}
    for capability in CAPABILITIES:
        for name in entries(capability):
            phase = next((p for p in PHASES if name.startswith(f"attention_{p}_")), None)
            if phase is not None and "hopper" not in name:
                call = name.removeprefix(f"attention_{phase}_").removesuffix("_deterministic")
                cases.setdefault(call, set()).add(name)
    return cases


ATTENTION = attention_cases()


def attention_tensors(head_dim: int, dtype: torch.dtype, flags: set[str]) -> dict[str, Tensor]:
    """70 queries and 145 keys: more than a block, and no multiple of one."""
    heads, key_heads = (8, 1) if "group_8" in flags else (1, 1)
    length, key_length = (70, 70) if "documents" in flags else (70, 145)
    tensors = {
        name: random(1, n, h, head_dim, dtype=dtype, seed=seed).transpose(1, 2)
        for seed, (name, n, h) in enumerate(
            (("q", length, heads), ("k", key_length, key_heads), ("v", key_length, key_heads))
        )
    }
    if "documents" in flags:
        tensors["document_ids"] = (torch.arange(length) > 33).long()[None]
    if "dropout" in flags:
        tensors["dropout_seed"] = torch.tensor([7])
    return tensors


@pytest.mark.emulated
@pytest.mark.rotate(28)
@pytest.mark.parametrize("call", ATTENTION)
def test_attention(call: str, emulated_gpu: Any) -> None:
    """Forward and both backwards."""
    head_dim, dtype, *_ = call.split("_")
    flags = {flag for flag in FLAGS if flag in call}
    tensors = attention_tensors(int(head_dim), DTYPES[dtype], flags)
    options: dict[str, Any] = {"causal": "full" not in flags}
    options |= {"window": 50} if "window" in flags else {}
    options |= {"softcap": 20.0} if "softcap" in flags else {}
    options |= {"dropout": 0.1} if "dropout" in flags else {}
    rounding = attention_rounding(tensors, **options)
    for deterministic in (False, True):
        assert_as_accurate_as_torch(
            "attention", tensors, fused_attention.attention, rounding, deterministic=deterministic,
            **options,
        )  # fmt: skip
    known = entries(10 * emulated_gpu.capability[0])
    assert_ran(emulated_gpu, ATTENTION[call] & known.keys())
    delta = f"attention_backward_delta_{head_dim}_{dtype}"
    assert_ran(emulated_gpu, {delta} & known.keys())


HOPPER = {entry.name for entry in hopper_attention.AHEAD_OF_TIME}


@pytest.mark.emulated
@pytest.mark.rotate(3)
@pytest.mark.parametrize("name", sorted(HOPPER))
def test_attention_on_hopper(name: str, emulated_gpu: Any) -> None:
    """One block of queries and a tail, and more tiles of keys than the ring holds."""
    if emulated_gpu.capability != (9, 0):
        pytest.skip("for compute capability 9.0 alone")
    head_dim = 64 if "_64_" in name else 128
    dtype = DTYPES["fp16" if "fp16" in name else "bf16"]
    q, k, v = (
        random(1, n, 1, head_dim, dtype=dtype, seed=n).transpose(1, 2) for n in (130, 700, 701)
    )
    v = v[:, :, :700]
    causal = not name.endswith("full")
    tensors = {"q": q, "k": k, "v": v}
    rounding = attention_rounding(tensors, causal=causal)
    assert_as_accurate_as_torch(
        "attention", tensors, hopper_attention.attention, rounding, causal=causal
    )
    assert_ran(emulated_gpu, {name})


# -------------------------------------------------------------------------------------------- norms


def norm_cases() -> dict[str, set[str]]:
    """The configurations of each norm: forward, backward and averages."""
    cases: dict[str, set[str]] = {}
    for entry in norms.AHEAD_OF_TIME:
        for part in ("_forward", "_backward", "_row_averages"):
            if entry.name.endswith(part):
                cases.setdefault(entry.name.removesuffix(part), set()).add(entry.name)
    return cases


NORMS = norm_cases()


@pytest.mark.emulated
@pytest.mark.rotate(6)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, emulated_gpu: Any) -> None:
    """Eleven rows, which no block divides."""
    op = "layer_norm" if name.startswith("layer") else "rms_norm"
    columns = int(name.rpartition("_")[2])
    dtype = next((DTYPES[kind] for kind in ("fp16", "fp32") if kind in name), torch.bfloat16)
    other = torch.float32 if "mixed" in name else dtype
    tensors = {
        "x": random(11, columns, dtype=dtype),
        "weight": random(columns, dtype=other, seed=1),
    }
    if op == "layer_norm":
        tensors["bias"] = random(columns, dtype=other, seed=2)
    if "residual" in name:
        tensors["residual"] = random(11, columns, dtype=other, seed=3)
    options = {"weight_offset": 1.0} if "offset" in name else {}
    assert_as_accurate_as_torch(op, tensors, getattr(norms, op), **options)
    assert_ran(emulated_gpu, NORMS[name])


# --------------------------------------------------------------------------------------- the others


@pytest.mark.emulated
@pytest.mark.rotate(2)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cross_entropy(softcap: float | None, emulated_gpu: Any) -> None:
    """Two blocks of the vocabulary and a tail; an ignored target, and one of the last entry."""
    vocabulary = 2 * cross_entropy._BLOCK + 48
    tensors = {
        "hidden": random(5, 32),
        "weight": random(vocabulary, 32, seed=1),
        "targets": torch.tensor([3, -100, vocabulary - 1, 4100, 0]),
    }
    assert_as_accurate_as_torch(
        "linear_cross_entropy", tensors, cross_entropy.linear_cross_entropy, softcap=softcap
    )
    flag = "" if softcap is None else "_softcap"
    assert_ran(emulated_gpu, {f"cross_entropy_{part}{flag}" for part in ("statistics", "gradient")})


@pytest.mark.emulated
def test_activations(emulated_gpu: Any) -> None:
    tensors = {"x": random(5, activations._BLOCK + 48)}
    assert_as_accurate_as_torch("swiglu", tensors, activations.swiglu)
    assert_ran(emulated_gpu, {"swiglu_forward", "swiglu_backward"})


@pytest.mark.emulated
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary(head_dim: int, emulated_gpu: Any) -> None:
    angles = torch.arange(37)[:, None] * torch.linspace(1, 0.01, head_dim // 2)
    x = random(1, 37, 3, head_dim).transpose(1, 2)
    y = rotary.rotary(x, angles.cos(), angles.sin())
    a, b = x.double().chunk(2, -1)
    cosine, sine = angles.cos().double(), angles.sin().double()
    truth = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    assert (y.double() - truth).abs().max() <= 2**-7 * truth.abs().max()
    assert_ran(emulated_gpu, {f"rotary_{head_dim}"})


@pytest.mark.emulated
def test_dropout(emulated_gpu: Any) -> None:
    """Bit for bit what the twin drops."""
    from kernels import reference

    x, seed = random(2, 37, 80), torch.tensor([3, 1 << 40])
    y = dropout.dropout(x, 0.3, seed=seed)
    assert torch.equal(y, reference.dropout(x, 0.3, seed=seed))
    assert_ran(emulated_gpu, {"dropout"})


REST = {
    "cross_entropy_statistics", "cross_entropy_statistics_softcap", "cross_entropy_gradient",
    "cross_entropy_gradient_softcap", "swiglu_forward", "swiglu_backward",
    "rotary_64", "rotary_128", "dropout",
}  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shipped_configuration_has_a_test(capability: int) -> None:
    deltas = {f"attention_backward_delta_{dim}_bf16" for dim in (64, 128)}
    tested = HOPPER.union(deltas, REST, *ATTENTION.values(), *NORMS.values())
    assert entries(capability).keys() <= tested
