"""Fused attention: accuracy of the output and every gradient, odd shapes, strides, documents,
dropout, exactness.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import costs, reference
from kernels.fused import attention as fused_attention
from kernels.launcher import reset_launches
from kernels.philox import keep_mask
from tests.conftest import HAS_GPU
from tests.support.kernels.accuracy import (
    DTYPES,
    assert_as_accurate_as_torch,
    largest_error,
    outputs_and_gradients,
)
from tests.support.kernels.attention_rounding import attention_rounding
from tests.support.kernels.refusals import moved, refused

ONE_PASS = {"attention_forward": 1, "attention_backward_delta": 1, "attention_backward_keys": 1}


def case(
    device: str,
    length: int,
    key_length: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    key_heads: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random q, k and v."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (heads, length), "k": (key_heads or heads, key_length or length)}
    sizes["v"] = sizes["k"]
    return {
        name: torch.randn(batch, *size, head_dim, generator=generator).to(device, dtype)
        for name, size in sizes.items()
    }


def assert_accurate(tensors: dict[str, Tensor], **options: Any) -> None:
    """Output and gradients are as accurate as torch's, but for what fp32 sums cost in any order."""
    rounding = attention_rounding(tensors, **options)
    assert_as_accurate_as_torch("attention", tensors, rounding=rounding, **options)


@pytest.mark.rotate(2)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "key_length"), [(1, 1), (33, 33), (5, 40), (40, 7)])
def test_accuracy(
    fused_device: str, length: int, key_length: int, dtype: torch.dtype, causal: bool
) -> None:
    assert_accurate(case(fused_device, length, key_length, dtype=dtype), causal=causal)
    assert kernels.launches() == ONE_PASS


@pytest.mark.parametrize("length", [127, 129])
def test_lengths_around_a_block(fused_device: str, length: int) -> None:
    assert_accurate(case(fused_device, length, heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [512, 1023])
def test_long_sequences(fused_device: str, length: int, dtype: torch.dtype) -> None:
    assert_accurate(case(fused_device, length, heads=1, head_dim=64, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device: the interpreter has tiles of its own")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_tiles(
    fused_device: str, dtype: torch.dtype, head_dim: int, dropout: float
) -> None:
    tensors = case(
        fused_device, 1023, batch=2, heads=4, key_heads=2, head_dim=head_dim, dtype=dtype
    )
    tensors["dropout_seed"] = torch.tensor([3, 4], device=fused_device)
    for deterministic in (False, True):
        assert_accurate(tensors, dropout=dropout, deterministic=deterministic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 24, 80, 96, 256])
def test_head_dimensions(fused_device: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_accurate(case(fused_device, 20, heads=1, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_grouped_query_heads(fused_device: str, group: int, deterministic: bool) -> None:
    tensors = case(fused_device, 18, heads=8, key_heads=8 // group)
    assert_accurate(tensors, deterministic=deterministic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "key_length"), [(40, 40), (5, 40), (40, 7)])
def test_deterministic_backward(
    fused_device: str, length: int, key_length: int, dtype: torch.dtype
) -> None:
    tensors = case(fused_device, length, key_length, dtype=dtype)
    assert_accurate(tensors, deterministic=True)
    assert kernels.launches() == {**ONE_PASS, "attention_backward_queries": 1}


def test_torchs_own_switch_asks_for_a_deterministic_backward(fused_device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        q, k, v = (x.requires_grad_() for x in case(fused_device, 5, heads=1).values())
        kernels.attention(q, k, v).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels.launches()["attention_backward_queries"] == 1


def run_programs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run the programs of a launch from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forwards = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: forwards(builder.grid_dim[0] - 1 - x, y, z)
    )


def test_deterministic_backward_repeats_its_bits(
    fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles of keys, of which the interpreter runs the last one first the second time.

    Added up by atomics, that changes the gradient of q; a GPU's order changes by itself.
    """
    tensors = case(fused_device, 70 if fused_device == "cpu" else 1000, heads=1)
    results = []
    for backwards in (False, True):
        if backwards and fused_device == "cpu":
            run_programs_backwards(monkeypatch)
        run = outputs_and_gradients(kernels.attention, tensors, torch.float32, deterministic=True)
        atomic = outputs_and_gradients(kernels.attention, tensors, torch.float32)
        results.append((run, atomic))
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name
    if fused_device == "cpu":
        assert not torch.equal(*(atomic["gradient of q"] for _, atomic in results))


# ---------------------------------------------------------------------------- windows and soft caps

# Window, length and number of keys. The interpreter's blocks hold 16 keys and 32 queries: a window
# within a block, blocks that all need a mask, and blocks that need none between others that do.
WINDOWS = [(1, 33, 33), (20, 5, 60), (20, 40, 7), (20, 60, 60), (75, 100, 130)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("window", "length", "key_length"), WINDOWS)
def test_a_window(
    fused_device: str, window: int, length: int, key_length: int, deterministic: bool
) -> None:
    tensors = case(fused_device, length, key_length, heads=1)
    assert_accurate(tensors, window=window, deterministic=deterministic)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of saturated scores
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_soft_cap(fused_device: str, dtype: torch.dtype, deterministic: bool) -> None:
    """Scores from far below the cap to far beyond it, in heads of their own."""
    tensors = case(fused_device, 20, 40, heads=4, key_heads=2, dtype=dtype)
    tensors["q"] *= (
        torch.tensor([0.01, 1.0, 8.0, 100.0], device=fused_device).view(-1, 1, 1).to(dtype)
    )
    assert_accurate(tensors, softcap=2.0, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_window_and_soft_cap_beside_documents_groups_and_dropout(
    fused_device: str, deterministic: bool
) -> None:
    tensors = case(fused_device, 21, 25, heads=2, key_heads=1, dtype=torch.bfloat16)
    tensors["document_ids"] = torch.tensor([[0] * 8 + [1, 2] * 8 + [2]], device=fused_device)
    tensors["dropout_seed"] = torch.tensor([2**40 + 5], device=fused_device)
    options = {"dropout": 0.2, "head_offset": 3, "deterministic": deterministic}
    assert_accurate(tensors, window=11, softcap=3.0, scale=0.5, **options)


def test_windows_are_those_of_transformers() -> None:
    """The twin's mask, with and without a cache, against transformers' own functions."""
    masking = pytest.importorskip("transformers.masking_utils")
    for length, key_length, window in ((12, 12, 5), (3, 12, 5), (1, 12, 1)):
        theirs = masking.sliding_window_causal_mask_function(window)
        key = torch.arange(key_length)
        expected = theirs(0, 0, key[key_length - length :, None], key)
        ours = reference.visible(length, key_length, True, None, key.device, window)
        assert torch.equal(ours[0, 0], expected)


def test_the_twin_is_gemma_2s_attention() -> None:
    """transformers' own eager function, whose fp32 differs from the twin's by rounding alone."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    q, k, v = case("cpu", 20, heads=4, key_heads=2).values()
    mask = reference.visible(20, 20, True, None, q.device, 7)
    module = SimpleNamespace(num_key_value_groups=2, head_dim=16, training=False)
    theirs, _ = gemma.eager_attention_forward(
        module, q, k, v, torch.where(mask, 0.0, -torch.inf), scaling=0.3, softcap=1.5
    )
    ours = reference.attention(q, k, v, scale=0.3, window=7, softcap=1.5)
    torch.testing.assert_close(ours.transpose(1, 2), theirs)


@pytest.mark.parametrize(("length", "window"), [(100, 20), (100, 50), (4, 20)])
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of other blocks' rows
def test_blocks_outside_the_window_are_not_read(
    fused_device: str, length: int, window: int
) -> None:
    """Keys before the window of the last block of queries are NaN, which any product spreads."""
    block, size = {"cpu": (32, 1), "cuda": (128, 10)}[fused_device]  # of queries; keys' are smaller
    length, key_length, window = length * size, 100 * size, window * size
    q, k, v = case(fused_device, length, key_length, heads=1).values()
    expected = kernels.attention(q, k, v, window=window)
    first_row = (length - 1) // block * block
    first_seen = first_row + key_length - length - window + 1
    for x in (k, v):
        x[:, :, : first_seen // block * block] = torch.nan
    assert k.isnan().any()
    out = kernels.attention(q, k, v, window=window)
    assert torch.equal(out[:, :, first_row:], expected[:, :, first_row:])


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_does_not_read_blocks_outside_the_window(
    fused_device: str, deterministic: bool
) -> None:
    """NaN in queries beyond the windows of the first keys, and in keys before the last queries'."""
    size = {"cpu": 1, "cuda": 8}[fused_device]
    length, window, block = 128 * size, 20 * size, 32 * size
    q, k, v = (x.requires_grad_() for x in case(fused_device, length, heads=1).values())
    out = kernels.attention(q, k, v, window=window, deterministic=deterministic)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    expected = torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)
    with torch.no_grad():
        gradient[:, :, 2 * block :] = torch.nan
    _, dk, dv = torch.autograd.grad(out, (q, k, v), gradient)
    assert torch.equal(dk[:, :, :block], expected[1][:, :, :block])
    assert torch.equal(dv[:, :, :block], expected[2][:, :, :block])
    assert dv[:, :, 2 * block :].isnan().all()


def test_a_window_as_long_as_the_keys_is_none(fused_device: str) -> None:
    """It compiles nothing of its own: in generation, until the cache is as long as the window."""
    tensors = case(fused_device, 5, 20)
    assert torch.equal(kernels.attention(**tensors, window=20), kernels.attention(**tensors))
    settings = fused_attention._Settings(1.0, True, None, None, 0.0, 0)
    q, k = tensors["q"], tensors["k"]
    plan = fused_attention._plan("forward", settings, False, q.shape, k.shape, q.dtype, q.device)
    assert plan.scalars[4:] == (None, 1.0, math.log2(math.e), None, 1.0, 0)


def test_a_soft_cap_far_above_all_scores_changes_nothing(fused_device: str) -> None:
    tensors = case(fused_device, 20)
    capped = kernels.attention(**tensors, softcap=1e4)
    torch.testing.assert_close(capped, kernels.attention(**tensors))


DOCUMENTS = {
    "packed": [[0] * 19 + [1] + [2] * 20, [7] * 40],
    "interleaved": [[0, 1] * 20, [3, 3, 1, 2] * 10],
    "negative": [[-1] * 17 + [-(2**40)] * 23, [5] + [-1] * 39],
}


@pytest.mark.rotate(3)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("length", "causal"), [(40, True), (40, False), (9, True)])
@pytest.mark.parametrize("layout", DOCUMENTS)
def test_documents(
    fused_device: str, layout: str, length: int, causal: bool, deterministic: bool
) -> None:
    tensors = case(fused_device, length, 40, batch=2, heads=1)
    tensors["document_ids"] = torch.tensor(DOCUMENTS[layout], device=fused_device)
    assert_accurate(tensors, causal=causal, deterministic=deterministic)


def test_document_bounds() -> None:
    bounds = kernels.document_bounds(torch.tensor([[4, 4, 9, 4, 7], [1, 1, 1, 1, 1]])).positions
    assert bounds.dtype == torch.int32
    assert bounds[0].tolist() == [[0, 0, 2, 0, 4], [3, 3, 2, 3, 4]]
    assert bounds[1].tolist() == [[0] * 5, [4] * 5]


@pytest.mark.parametrize("length", [0, 1, 30])
def test_document_bounds_of_any_ids(length: int) -> None:
    ids = torch.randint(-2, 3, (4, length), generator=torch.Generator().manual_seed(0))
    same = ids[:, None] == ids[:, :, None]
    index = torch.arange(length)
    first = torch.where(same, index, length).amin(dim=2) if length else ids
    last = torch.where(same, index, -1).amax(dim=2) if length else ids
    assert torch.equal(
        kernels.document_bounds(ids).positions, torch.stack((first, last), dim=1).int()
    )


@pytest.mark.parametrize("length", [40, 9])
@pytest.mark.parametrize("layout", DOCUMENTS)
def test_bounds_stand_for_their_ids(fused_device: str, layout: str, length: int) -> None:
    """To the bit, of any strides, and in the twin, too."""
    tensors = case(fused_device, length, 40, batch=2, heads=1)
    ids = torch.tensor(DOCUMENTS[layout], device=fused_device)
    bounds = kernels.document_bounds(ids)
    assert kernels.document_bounds(bounds) is bounds
    strided = kernels.DocumentBounds(bounds.positions.mT.contiguous().mT)
    for function in (kernels.attention, reference.attention):
        expected = outputs_and_gradients(function, tensors, torch.float32, document_ids=ids)
        for form in (bounds, strided):
            results = outputs_and_gradients(function, tensors, torch.float32, document_ids=form)
            assert all(torch.equal(results[name], value) for name, value in expected.items())


@pytest.mark.parametrize("compiled", [False, True])
def test_ids_whose_memory_changes_unseen_are_read_again(fused_device: str, compiled: bool) -> None:
    """A buffer that batch after batch is received into: torch's version counter does not see who
    writes there.
    """
    q = case(fused_device, 20, heads=1)["q"]

    def attend(ids: Tensor) -> Tensor:
        return kernels.attention(q, q, q, document_ids=ids)

    if compiled:
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    ids = torch.zeros(1, 20, dtype=torch.int64, device=fused_device)
    for cut in (10, 5):
        ids.data.copy_(torch.arange(20) >= cut)
        assert ids._version == 0
        with torch.no_grad():
            alone = reference.attention(*(q[:, :, cut:],) * 3)
        torch.testing.assert_close(attend(ids)[:, :, cut:], alone)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("probability", "causal"), [(0.1, True), (0.9, False)])
def test_dropout(fused_device: str, probability: float, causal: bool, deterministic: bool) -> None:
    tensors = case(fused_device, 21, 37, batch=2)
    tensors["dropout_seed"] = torch.tensor([2**40 + 5, -3], device=fused_device)
    options = {
        "dropout": probability,
        "causal": causal,
        "head_offset": 3,
        "deterministic": deterministic,
    }
    assert_accurate(tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_reference_loses_nothing_on_the_way(dtype: torch.dtype) -> None:
    """Where the twin writes its probabilities out, fp64 stays fp64, and scores are not rounded
    to 16 bits.
    """
    q, k, v = case("cpu", 40, 7, dtype=dtype).values()
    scores = (q.double() @ k.double().mT * q.shape[-1] ** -0.5)[:, :, 33:]
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    out = reference.attention(q, k, v)[:, :, 33:]
    assert largest_error(out, weights.to(dtype).double() @ v.double()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("probability", [0.25, 0.75])
def test_dropout_drops_the_twins_elements(fused_device: str, probability: float) -> None:
    """With identity values the output is the dropped weights themselves."""
    q = torch.zeros(1, 2, 50, 50, device=fused_device)
    v = torch.eye(50, device=fused_device).expand(1, 2, 50, 50)
    seed = torch.tensor([11], device=fused_device)
    out = kernels.attention(
        q, q, v, causal=False, dropout=probability, dropout_seed=seed, head_offset=5
    )
    planes, rows = torch.tensor([5, 6], device=fused_device), torch.arange(50, device=fused_device)
    keep = keep_mask(probability, seed[:, None, None], planes[None, :, None], rows[None, None], 50)
    assert torch.equal(out != 0, keep)


def test_dropout_does_not_depend_on_how_heads_are_sharded(fused_device: str) -> None:
    tensors = case(fused_device, 20, heads=4)
    seed = torch.tensor([11], device=fused_device)
    whole = kernels.attention(**tensors, dropout=0.5, dropout_seed=seed)
    shard = kernels.attention(
        **{name: x[:, 2:] for name, x in tensors.items()},
        dropout=0.5,
        dropout_seed=seed,
        head_offset=2,
    )
    assert torch.equal(whole[:, 2:], shard)


def fused_projection(device: str) -> tuple[Tensor, ...]:
    """Heads as slices of one (batch, length, 3, heads, head_dim) tensor, as a model has them."""
    return torch.randn(2, 20, 3, 2, 16, device=device).permute(2, 0, 3, 1, 4).unbind(0)


def columns_first(device: str) -> tuple[Tensor, ...]:
    """The head dimension is the slow one."""
    return tuple(torch.randn(2, 2, 16, 20, device=device).transpose(2, 3) for _ in range(3))


def every_other(device: str) -> tuple[Tensor, ...]:
    """A stride of two in memory, and one batch repeated by a stride of zero."""
    return tuple(
        torch.randn(1, 2, 20, 32, device=device)[..., ::2].expand(2, -1, -1, -1) for _ in range(3)
    )


@pytest.mark.parametrize("layout", [fused_projection, columns_first, every_other])
def test_strides(fused_device: str, layout: Any) -> None:
    strided = [x.detach().requires_grad_() for x in layout(fused_device)]
    dense = [
        x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided
    ]
    outputs = [kernels.attention(*arguments, deterministic=True) for arguments in (strided, dense)]
    assert torch.equal(outputs[0], outputs[1])
    gradients = [
        torch.autograd.grad(out.sum(), x) for out, x in zip(outputs, (strided, dense), strict=True)
    ]
    for ours, truth in zip(*gradients, strict=True):
        assert torch.equal(ours, truth)


def test_a_gradient_of_stride_zero(fused_device: str) -> None:
    """``out.sum()`` sends back one number, expanded."""
    q, k, v = (x.requires_grad_() for x in case(fused_device, 20).values())
    ours = torch.autograd.grad(kernels.attention(q, k, v).sum(), (q, k, v))
    twins = torch.autograd.grad(reference.attention(q, k, v).sum(), (q, k, v))
    for x, y in zip(ours, twins, strict=True):
        torch.testing.assert_close(x, y)


def test_merging_the_heads_afterwards_is_free(fused_device: str) -> None:
    out = kernels.attention(**case(fused_device, 20))
    assert out.transpose(1, 2).is_contiguous()


def test_queries_that_see_nothing(fused_device: str) -> None:
    """With more queries than keys, causal attention leaves the first ones nothing."""
    q, k, v = (x.requires_grad_() for x in case(fused_device, 40, 7).values())
    for deterministic in (False, True):
        out = kernels.attention(q, k, v, deterministic=deterministic)
        assert torch.equal(out[:, :, :33], torch.zeros_like(out[:, :, :33]))
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
        assert torch.equal(dq[:, :, :33], torch.zeros_like(dq[:, :, :33]))
        assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # of masked scores, in the interpreter
@pytest.mark.parametrize("size", [1e4, -1e3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_huge_logits(fused_device: str, size: float, deterministic: bool) -> None:
    """Backward knows a row by one fp32 log-sum-exp, so its weights are relatively wrong by its last
    place, no more.

    Negative: the exponentials of all scores would underflow, while keys beyond the end would score
    0.
    """
    tensors = {name: x.abs() for name, x in case(fused_device, 35).items()}
    tensors["q"] *= size
    ours = outputs_and_gradients(
        kernels.attention, tensors, torch.float32, deterministic=deterministic
    )
    truth = outputs_and_gradients(reference.attention, tensors, torch.float64)
    scores = tensors["q"] @ tensors["k"].mT / 4
    relative = 4 * torch.finfo(torch.float32).eps * scores.abs().max().item()
    for name, value in ours.items():
        assert largest_error(value, truth[name]) <= relative * max(
            1.0, truth[name].abs().max().item()
        ), name


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_logits_in_bfloat16(fused_device: str) -> None:
    tensors = case(fused_device, 35, dtype=torch.bfloat16)
    tensors["q"] *= 100
    assert_accurate(tensors)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(fused_device: str, dtype: torch.dtype, deterministic: bool) -> None:
    """Equal scores over a power of two of keys: every sum is exact, so every bit must be right."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 64, 16)
    q, k, v = (
        torch.randint(-1, 2, shape, generator=generator).to(fused_device, dtype) for _ in range(3)
    )
    v[:, :, 32:] = (
        2 - v[:, :, :32]
    )  # so that every output is 1, and the score gradients fit bf16's 8 bits
    q[..., 1:], k[..., :2] = 0, 1
    q[..., 1] = -q[..., 0]  # scores are 0, but q is not, which the gradient of k is made of
    tensors = {"q": q, "k": k * 4, "v": v}
    options = {"causal": False, "scale": 1.0, "deterministic": deterministic}

    def gradients(function: Any, of: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (x.to(of).requires_grad_() for x in tensors.values())
        out = function(q, k, v, **options)
        sign = torch.ones_like(out)
        sign[:, :, ::4] = -1
        return (out, *torch.autograd.grad(out, (q, k, v), sign))

    for ours, truth in zip(
        gradients(kernels.attention, dtype),
        gradients(reference.attention, torch.float64),
        strict=True,
    ):
        exact = (truth * 64).round() / 64  # fp64's softmax may be wrong in its last place
        assert exact.any()
        assert torch.equal(ours, exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_selecting_one_key_is_exact(fused_device: str, dtype: torch.dtype) -> None:
    """Scores so far apart that softmax selects the query's own key: the output is v, its
    gradient passes through.
    """
    q = torch.eye(40, device=fused_device, dtype=dtype).expand(1, 2, 40, 40) * 64
    v = case(fused_device, 40, head_dim=40, dtype=dtype)["v"].requires_grad_()
    out = kernels.attention(q, q, v, causal=False, scale=1.0)
    assert torch.equal(out, v)
    gradient = torch.arange(40.0, device=fused_device).to(dtype).expand_as(out)
    assert torch.equal(torch.autograd.grad(out, v, gradient)[0], gradient)


def test_nothing_to_attend_to(fused_device: str) -> None:
    q = torch.randn(2, 2, 5, 16, device=fused_device, requires_grad=True)
    k = torch.randn(2, 2, 0, 16, device=fused_device, requires_grad=True)
    out = kernels.attention(q, k, k)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(q))
    assert q.grad is not None
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert kernels.attention(q[:0], k[:0], k[:0]).shape == (0, 2, 5, 16)
    assert kernels.launches() == {}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("function", [kernels.attention, reference.attention])
def test_heads_of_no_channels(fused_device: str, function: Any, dropout: float) -> None:
    """As torch's SDPA: an empty result with empty gradients."""
    q = torch.zeros(1, 2, 5, 0, device=fused_device, requires_grad=True)
    out = function(q, q, q, dropout=dropout, dropout_seed=torch.tensor([1], device=fused_device))
    out.sum().backward()
    assert out.shape == q.grad.shape == (1, 2, 5, 0)
    assert kernels.launches() == {}


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    length=st.integers(1, 40), extra=st.integers(-8, 20), group=st.sampled_from([1, 2]),
    head_dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), causal=st.booleans(), deterministic=st.booleans(),
    window=st.none() | st.integers(1, 70),
)  # fmt: skip
def test_any_shape(
    fused_device: str,
    length: int,
    extra: int,
    group: int,
    head_dim: int,
    dtype: Any,
    causal: bool,
    deterministic: bool,
    window: int | None,
) -> None:
    tensors = case(
        fused_device,
        length,
        max(1, length + extra),
        heads=2,
        key_heads=2 // group,
        head_dim=head_dim,
        dtype=dtype,
    )
    window = window if causal else None
    assert_accurate(tensors, causal=causal, deterministic=deterministic, window=window)


BAD_INPUT = {
    "q has shape .2, 20, 16., expected .batch, heads": {"q": torch.zeros(2, 20, 16)},
    "v has shape .1, 2, 19, 16., expected .1, 2, 20, 16.": {"v": torch.zeros(1, 2, 19, 16)},
    "k has shape .1, 2, 20, 8., expected .1, 2, 20, 16.": {"k": torch.zeros(1, 2, 20, 8)},
    "k has dtype torch.float16, expected torch.float32": {
        "k": torch.zeros(1, 2, 20, 16, dtype=torch.float16)
    },
    "k is on meta, expected": {"k": torch.zeros(1, 2, 20, 16, device="meta")},
    "q has 3 heads, expected a multiple of k's 2": {"q": torch.zeros(1, 3, 20, 16)},
    "dropout is 1.5, expected a probability": {"dropout": 1.5},
    "dropout needs dropout_seed": {"dropout": 0.5},
    "dropout_seed has shape .3,., expected .1,.": {
        "dropout": 0.5,
        "dropout_seed": torch.zeros(3, dtype=torch.int64),
    },
    "dropout_seed has dtype torch.float32, expected torch.int64": {
        "dropout": 0.5,
        "dropout_seed": torch.zeros(1),
    },
    "dropout_seed is on meta, expected": {
        "dropout": 0.5,
        "dropout_seed": torch.zeros(1, dtype=torch.int64, device="meta"),
    },
    "q has dtype torch.int64, expected floating-point numbers": {
        "q": torch.zeros(1, 2, 20, 16, dtype=torch.int64)
    },
    "document_ids has shape .1, 7., expected .1, 20.": {
        "document_ids": torch.zeros(1, 7, dtype=torch.int64)
    },
    "document_ids.positions has shape .1, 2, 7., expected .1, 2, 20.": {
        "document_ids": kernels.DocumentBounds(torch.zeros(1, 2, 7, dtype=torch.int32))
    },
    "document_ids.positions has dtype torch.int64, expected torch.int32": {
        "document_ids": kernels.DocumentBounds(torch.zeros(1, 2, 20, dtype=torch.int64))
    },
    "document_ids is on meta, expected": {
        "document_ids": torch.zeros(1, 20, dtype=torch.int64, device="meta")
    },
    "window is 0, expected at least 1 key, or None": {"window": 0},
    "window is 4 with causal=False, expected causal=True": {"window": 4, "causal": False},
    "softcap is 0.0, expected a positive number, or None": {"softcap": 0.0},
    "softcap is nan, expected a positive number": {"softcap": math.nan},
    "q has length 21, expected at most k's 20 with document_ids": {
        "q": torch.zeros(1, 2, 21, 16),
        "document_ids": torch.zeros(1, 20, dtype=torch.int64),
    },
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_refused_before_any_launch(
    fused_device: str, mode_of_bad_input: None, message: str
) -> None:
    refused("attention", message, case(fused_device, 20) | moved(BAD_INPUT[message], fused_device))


def test_what_the_kernels_cannot_do_is_left_to_torch_with_a_reason() -> None:
    q = torch.zeros(1, 1, 4, 300)
    assert fused_attention.refusal("attention", q, q, q) == "head_dim 300 is above 256"
    q = q[..., :16]
    assert fused_attention.refusal("attention", q, q, q, scale=-1.0) == "scale -1.0 is not positive"
    assert fused_attention.refusal("attention", q, q, q, scale=0.5) is None


def test_offsets_beyond_31_bits_are_never_formed_inside_a_block() -> None:
    near = torch.empty_strided((1, 1, 2, 16), (0, 0, 2**22, 1), device="meta")
    far = torch.empty_strided((1, 1, 2, 16), (0, 0, 2**23, 1), device="meta")
    assert fused_attention._addressable(near) is near
    assert fused_attention._addressable(far).is_contiguous()


def test_the_operators_declare_shapes_and_gradients(fused_device: str) -> None:
    q, k, v = (x.requires_grad_() for x in case(fused_device, 20, heads=2, key_heads=1).values())
    seed = torch.tensor([1], device=fused_device)
    torch.library.opcheck(
        torch.ops.megagpt.attention_forward.default, (q, k, v, None, seed, 0.25, True, 7, 3.0,
        0.5, 0, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


class Zeros(TorchDispatchMode):
    """The shapes of tensors made of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.name() in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
            self.shapes.append(tuple(result.shape))
        return result


def test_no_gradient_is_made_up_for_the_log_sum_exp(fused_device: str) -> None:
    q, k, v = (x.requires_grad_() for x in case(fused_device, 20).values())
    out = kernels.attention(q, k, v)
    with Zeros() as made:
        torch.autograd.grad(out, q, torch.ones_like(out))
    assert (1, 2, 20) not in made.shapes


@pytest.mark.parametrize("options", [{}, {"window": 7, "softcap": 2.0}])
def test_torch_compile_sees_one_graph(fused_device: str, options: dict[str, Any]) -> None:
    tensors = case(fused_device, 20)
    eager = kernels.attention(**tensors, **options)
    compiled = torch.compile(
        lambda q, k, v: kernels.attention(q, k, v, **options) * 2,
        backend="aot_eager",
        fullgraph=True,
    )
    reset_launches()
    assert torch.equal(compiled(**tensors), eager * 2)
    assert kernels.launches() == {"attention_forward": 1}


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 7, "softcap": 2.0}])
def test_flops_are_counted_as_declared(fused_device: str, options: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in case(fused_device, 20, 30).values())
    with FlopCounterMode(display=False) as counter:
        kernels.attention(q, k, v, **options).sum().backward()
    options.pop("softcap", None)  # element-wise work is not counted
    declared = [
        costs.attention(1, 2, 20, 16, key_length=30, itemsize=4, backward=backward, **options).flops
        for backward in (False, True)
    ]
    assert counter.get_total_flops() == sum(declared)
