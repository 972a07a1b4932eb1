"""Linear cross-entropy in chunks: accuracy, every reduction, ignored targets, a vocabulary split
between ranks.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import checks, chunked_cross_entropy, costs, reference
from kernels.launcher import reset_launches
from tests.support.kernels.accuracy import (
    DTYPES,
    assert_as_accurate_as_torch,
    outputs_and_gradients,
)
from tests.support.kernels.refusals import moved, refused
from tests.support.ranks import RankPool

# A soft cap's tanh sees the -inf beyond the last column in the interpreter, and drops the result.
of_padding = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)
BOTH = {"cross_entropy_statistics", "cross_entropy_gradient"}


def case(
    rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Random arguments, every fifth target ignored."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[::5] = -100
    return {
        "hidden": torch.randn(rows, hidden_size, generator=generator).to(device, dtype),
        "weight": torch.randn(vocabulary, hidden_size, generator=generator).to(device, dtype),
        "targets": targets.to(device),
    }


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LOGITS_CHUNK_BYTES", 1)
    monkeypatch.setattr(costs, "LEAST_CHUNK_ROWS", 20)
    monkeypatch.setattr(costs, "GROUP_CHUNK_ROWS", 20)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(fused_device: str, dtype: torch.dtype, reduction: str, z_loss: float) -> None:
    tensors = case(30, 16, 77, dtype, fused_device)
    assert_as_accurate_as_torch("linear_cross_entropy", tensors, reduction=reduction, z_loss=z_loss)
    assert set(kernels.launches()) == BOTH


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["fused", "torch"])
@of_padding
def test_accuracy_of_a_soft_cap(
    fused_device: str, mode: str, dtype: torch.dtype, reduction: str, z_loss: float
) -> None:
    """Logits of about 4 below a cap of 3."""
    tensors = case(30, 16, 77, dtype, fused_device)
    ours = None if mode == "fused" else chunked_cross_entropy.linear_cross_entropy
    options = {"softcap": 3.0, "reduction": reduction, "z_loss": z_loss}
    assert_as_accurate_as_torch("linear_cross_entropy", tensors, ours, **options)
    assert set(kernels.launches()) == (BOTH if mode == "fused" else set())


@pytest.mark.parametrize("function", [kernels.linear_cross_entropy, reference.linear_cross_entropy])
@of_padding
def test_a_soft_cap_is_gemma_2s(fused_device: str, function: Any) -> None:
    """The lines of transformers' Gemma2ForCausalLM.forward, then torch's loss."""
    tensors = case(30, 16, 77, torch.float32, fused_device)
    logits = tensors["hidden"] @ tensors["weight"].T
    logits = logits / 3.0
    logits = torch.tanh(logits)
    logits = logits * 3.0
    expected = torch.nn.functional.cross_entropy(logits, tensors["targets"])
    torch.testing.assert_close(function(**tensors, softcap=3.0), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("several_chunks")
def test_accuracy_over_chunks_and_blocks(
    fused_device: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks of rows, and a vocabulary of several blocks with a ragged end."""
    from kernels.fused import cross_entropy

    monkeypatch.setattr(cross_entropy, "_BLOCK", 32)
    tensors = case(50, 8, 133, torch.bfloat16, fused_device)
    assert_as_accurate_as_torch("linear_cross_entropy", tensors, reduction=reduction)
    assert kernels.launches()["cross_entropy_statistics"] == 3
    assert kernels.launches()["cross_entropy_gradient"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("several_chunks")
def test_the_plain_torch_chunks(reduction: str, dtype: torch.dtype) -> None:
    chunked = chunked_cross_entropy.linear_cross_entropy
    tensors = case(50, 8, 133, dtype, "cpu")
    assert_as_accurate_as_torch(
        "linear_cross_entropy", tensors, chunked, reduction=reduction, z_loss=1e-2
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_integer_logits_are_exact(fused_device: str, dtype: torch.dtype) -> None:
    """Logits of 0 and 4096: the softmax is exactly one-hot, so the loss and every gradient are
    integers.
    """
    hidden = torch.eye(4, device=fused_device, dtype=dtype).requires_grad_()
    weight = (4096 * torch.eye(4, device=fused_device, dtype=dtype)).requires_grad_()
    targets = torch.tensor([0, 1, 3, -100], device=fused_device)
    loss = kernels.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    loss.backward()
    assert loss.item() == 4096.0
    dlogits = torch.zeros(4, 4, device=fused_device, dtype=dtype)
    dlogits[2, 2], dlogits[2, 3] = 1, -1
    assert torch.equal(hidden.grad, dlogits @ weight)
    assert torch.equal(weight.grad, dlogits.T @ hidden)


def test_large_logits_keep_their_differences(fused_device: str) -> None:
    """Logits of 2^20 plus small integers, exact in fp32: log-sum-exp rounded to fp32 would be
    off by a sixteenth.
    """
    steps = torch.arange(7.0, device=fused_device)
    tensors = {
        "hidden": torch.stack((torch.ones_like(steps), steps / 4), dim=1),
        "weight": torch.stack((torch.full_like(steps, 2.0**20), -steps), dim=1),
        "targets": torch.arange(7, device=fused_device),
    }
    losses = kernels.linear_cross_entropy(**tensors, reduction="none")
    truth = reference.linear_cross_entropy(
        tensors["hidden"].double(), tensors["weight"].double(), tensors["targets"], reduction="none"
    )
    torch.testing.assert_close(losses.double(), truth, rtol=1e-6, atol=1e-6)
    assert_as_accurate_as_torch("linear_cross_entropy", tensors)


def test_a_masked_vocabulary(fused_device: str) -> None:
    """Logits of -inf, a whole leading block of them, contribute nothing."""
    weight = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).to(fused_device)
    weight[:4500, 0] = -torch.inf
    hidden = torch.ones(2, 4, device=fused_device)
    targets = torch.tensor([4700, 4999], device=fused_device)
    loss = kernels.linear_cross_entropy(hidden, weight, targets)
    expected = reference.linear_cross_entropy(hidden, weight[4500:], targets - 4500)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("reduction", "softcap"), [("mean", None), ("none", None), ("mean", 3.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@of_padding
def test_rows_that_pad_the_vocabulary_have_no_probability(
    fused_device: str, dtype: torch.dtype, reduction: str, softcap: float | None
) -> None:
    """As if they were not there, whatever they hold; the targets that matter are the first 50."""
    options: dict[str, Any] = {"reduction": reduction, "softcap": softcap}
    tensors = case(30, 16, 77, dtype, fused_device)
    tensors["targets"] = tensors["targets"].clamp(max=49)
    tensors["weight"][50:] = 100.0
    padded = outputs_and_gradients(
        kernels.linear_cross_entropy, tensors, dtype, vocabulary=50, **options
    )
    assert set(kernels.launches()) == BOTH
    short = tensors | {"weight": tensors["weight"][:50].clone()}
    cut = outputs_and_gradients(kernels.linear_cross_entropy, short, dtype, **options)
    plain = outputs_and_gradients(
        reference.linear_cross_entropy, tensors, dtype, vocabulary=50, **options
    )
    for results in (padded, plain):
        assert not results["gradient of weight"][50:].any()
        results["gradient of weight"] = results["gradient of weight"][:50]
    for name, value in cut.items():
        torch.testing.assert_close(padded[name], value, msg=name)
        torch.testing.assert_close(plain[name], value, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["fused", "torch"])
def test_every_target_ignored(
    fused_device: str, mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger-Kernel's loss of 0; gradients of 0, as torch, Liger-Kernel and flash-attn have them."""
    if mode == "torch":
        monkeypatch.setenv("MEGAGPT_KERNELS", "torch")
    tensors = case(4, 8, 16, torch.float32, fused_device) | {
        "targets": torch.full((4,), -100, device=fused_device)
    }
    for function in (kernels.linear_cross_entropy, reference.linear_cross_entropy):
        results = outputs_and_gradients(
            function, tensors, torch.float32, reduction=reduction, z_loss=1e-2
        )
        assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


@pytest.mark.parametrize(
    ("dtype", "factor", "ulps"),
    [(torch.bfloat16, 1.0, 0.5), (torch.float16, 2.0**10, 0.5), (torch.bfloat16, 3.0, 1.5)],
)
def test_the_gradient_of_hidden_is_rounded_once(
    fused_device: str, dtype: torch.dtype, factor: float, ulps: float
) -> None:
    """The mean is over 54 targets, no power of two, and the weight's products are exact: they pick
    logits out.

    Scaling by 1 / 54 what had been rounded gave 1.07 units in the last place. A factor that arrives
    in backward and is no power of two still rounds a second time.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 515, generator=generator).to(fused_device, dtype)
    targets = torch.randint(515, (64,), generator=generator).to(fused_device)
    targets[:10] = -100
    gradients = []
    for function, wide in (
        (kernels.linear_cross_entropy, dtype),
        (reference.linear_cross_entropy, torch.float64),
    ):
        leaf = hidden.detach().to(wide).requires_grad_()
        eye = torch.eye(515, device=fused_device, dtype=wide)
        (factor * function(leaf, eye, targets)).backward()
        gradients.append(leaf.grad[10:].double())
    ours, exact = gradients
    normal = (
        exact.abs() * 54 / factor >= torch.finfo(dtype).tiny
    )  # before the mean and the factor scale it
    assert normal.float().mean() > 0.9
    unit = torch.exp2(exact.abs().log2().floor()) * torch.finfo(dtype).eps
    assert ((ours - exact).abs() / unit)[normal].max() < ulps + 0.01


def test_a_target_outside_the_vocabulary_is_not_quietly_wrong(fused_device: str) -> None:
    tensors = case(4, 8, 16, torch.float32, fused_device) | {
        "targets": torch.tensor([3, 16, -1, 5]).to(fused_device)
    }
    losses = kernels.linear_cross_entropy(**tensors, reduction="none")
    assert losses.isinf().tolist() == [False, True, True, False]


def test_shapes_and_strides(fused_device: str) -> None:
    """Three dimensions, hidden states that are a transpose, and another number to ignore."""
    tensors = case(24, 8, 40, torch.float32, fused_device)
    hidden = tensors["hidden"].view(4, 6, 8).transpose(0, 1)
    targets = tensors["targets"].abs().remainder(40).view(4, 6).T
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"ignore_index": 7, "reduction": reduction}
        ours = kernels.linear_cross_entropy(hidden, tensors["weight"], targets, **options)
        torch.testing.assert_close(
            ours, reference.linear_cross_entropy(hidden, tensors["weight"], targets, **options)
        )


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_gradient_alone(fused_device: str, frozen: str) -> None:
    gradients = []
    for function in (kernels.linear_cross_entropy, reference.linear_cross_entropy):
        tensors = case(10, 8, 40, torch.float32, fused_device)
        wanted = tensors["weight" if frozen == "hidden" else "hidden"].requires_grad_()
        (3 * function(**tensors)).backward()
        gradients.append(wanted.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", ["fused", "torch"])
def test_autocast_does_not_reach_inside(
    fused_device: str, mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "torch":
        monkeypatch.setenv("MEGAGPT_KERNELS", "torch")
    tensors = case(10, 8, 40, torch.float32, fused_device)
    loss = kernels.linear_cross_entropy
    expected = outputs_and_gradients(loss, tensors, torch.float32, reduction=reduction)
    with torch.autocast(fused_device, torch.bfloat16):
        results = outputs_and_gradients(loss, tensors, torch.float32, reduction=reduction)
    assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_evaluation_computes_no_gradient(fused_device: str) -> None:
    tensors = case(10, 8, 40, torch.float32, fused_device)
    tensors["weight"].requires_grad_()
    with torch.no_grad():
        kernels.linear_cross_entropy(**tensors)
    assert set(kernels.launches()) == {"cross_entropy_statistics"}


def test_backward_twice_gives_the_same(fused_device: str) -> None:
    """The gradients kept from forward are scaled into new tensors, not in place."""
    tensors = case(10, 8, 40, torch.float32, fused_device)
    hidden = tensors["hidden"].requires_grad_()
    loss = 3 * kernels.linear_cross_entropy(**tensors)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_parameter_freed_between_forward_and_backward(fused_device: str, reduction: str) -> None:
    """ZeRO-3 empties a gathered parameter after forward and fills it again, elsewhere, before
    backward.
    """
    tensors = case(10, 8, 40, torch.float32, fused_device)
    expected = outputs_and_gradients(
        reference.linear_cross_entropy, tensors, torch.float32, reduction=reduction
    )
    weight = torch.nn.Parameter(tensors["weight"])
    hidden = tensors["hidden"].requires_grad_()
    loss = kernels.linear_cross_entropy(hidden, weight, tensors["targets"], reduction=reduction)
    gathered = weight.data
    weight.data = torch.empty(0, device=fused_device)
    gathered_again = gathered.clone()
    gathered.fill_(float("nan"))
    weight.data = gathered_again
    loss.backward(
        torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(fused_device)
    )
    torch.testing.assert_close(hidden.grad, expected["gradient of hidden"])
    torch.testing.assert_close(weight.grad, expected["gradient of weight"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_are_sound_for_compilers(fused_device: str, reduction: str) -> None:
    hidden, weight, targets = case(6, 8, 20, torch.float32, fused_device).values()
    ready = reduction == "mean"
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    arguments = (*leaves, targets, -100, 0.0, 3.0, 0, 20, "", "triton", ready, ready, ready)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(chunked_cross_entropy._forward.overload, arguments, test_utils=checks)


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("none", 4)])
def test_flops_are_counted(fused_device: str, reduction: str, products: int) -> None:
    """Three products as in plain autograd; one more where the logits must be computed again."""
    tensors = case(10, 8, 40, torch.float32, fused_device)
    tensors["hidden"].requires_grad_()
    tensors["weight"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        kernels.linear_cross_entropy(**tensors, reduction=reduction).sum().backward()
    assert counter.get_total_flops() == products * 2 * 10 * 8 * 40


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(8, 24),
    hidden_size=st.integers(4, 24),
    vocabulary=st.integers(8, 90),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    fused_device: str, rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype
) -> None:
    tensors = case(rows, hidden_size, vocabulary, dtype, fused_device)
    assert_as_accurate_as_torch("linear_cross_entropy", tensors, reduction="sum")


@pytest.mark.parametrize(
    ("rows", "hidden_size", "vocabulary"), [(1, 1, 1), (1, 5, 3), (6, 1, 2), (0, 4, 7)]
)
def test_the_smallest_shapes(
    fused_device: str, rows: int, hidden_size: int, vocabulary: int
) -> None:
    """Too few numbers for the statistics of the rule above: compared with torch directly."""
    tensors = case(rows, hidden_size, vocabulary, torch.float32, fused_device)
    functions = (kernels.linear_cross_entropy, reference.linear_cross_entropy)
    ours, theirs = (
        outputs_and_gradients(f, tensors, torch.float32, reduction="sum") for f in functions
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory")
def test_peak_memory_is_a_tenth(fused_device: str) -> None:
    peaks = []
    for function in (kernels.linear_cross_entropy, reference.linear_cross_entropy):
        tensors = case(16_384, 768, 50_304, torch.bfloat16, fused_device)
        tensors["hidden"].requires_grad_()
        tensors["weight"].requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(**tensors).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1] / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(9, 7)}, r"weight has shape \(9, 7\), expected \(9, 8\)"),
        (
            {"weight": torch.ones(9, 8).half()},
            "weight has dtype torch.float16, expected torch.float32",
        ),
        (
            {"targets": torch.ones(5, dtype=torch.int64)},
            r"targets has shape \(5,\), expected \(4,\)",
        ),
        ({"targets": torch.ones(4)}, "targets has dtype torch.float32, expected torch.int64"),
        ({"weight": torch.ones(8)}, r"weight has shape \(8,\), expected \(vocabulary, 8\)"),
        ({"targets": torch.ones(4, device="meta")}, "targets is on meta, expected c"),
        ({"reduction": "median"}, 'reduction is "median", expected "mean", "sum" or "none"'),
        ({"softcap": -1.0}, "softcap is -1.0, expected a positive number, or None"),
        ({"vocabulary": 10}, "vocabulary is 10, expected at most 9: weight has 9 rows"),
        (
            {"vocabulary": 13, "vocabulary_start": 3},
            "vocabulary is 13, expected at most 12: weight has 9 rows",
        ),
        ({"vocabulary": 0}, "vocabulary is 0, expected at least 1"),
        ({"vocabulary": -1, "group": "some"}, "vocabulary is -1, expected at least 1"),
        (
            {"vocabulary": 3, "vocabulary_start": 3},
            "vocabulary is 3, expected more than vocabulary_start, which is 3",
        ),
        (
            {"vocabulary_start": -1},
            "vocabulary_start is -1, expected the first row's index, at least 0",
        ),
        ({"weight": torch.ones(0, 8)}, r"weight has shape \(0, 8\), expected at least one row"),
        ({"hidden": torch.ones(8)}, r"hidden has shape \(8,\), expected \(..., hidden_size\)"),
    ],
)
def test_bad_arguments_are_named(
    fused_device: str, mode_of_bad_input: None, change: dict[str, Any], message: str
) -> None:
    refused(
        "linear_cross_entropy",
        message,
        case(4, 8, 9, torch.float32, fused_device) | moved(change, fused_device),
    )


def test_a_rank_of_a_group_may_hold_padding_only_or_rows_of_others_beside() -> None:
    arguments = case(4, 8, 9, torch.float32, "cpu")
    for vocabulary in (3, 9, 12, 100):
        checks.linear_cross_entropy(
            **arguments, vocabulary=vocabulary, vocabulary_start=9, group="some"
        )


# ----------------------------------------------------------------- a vocabulary split between ranks

SHARES = ((0, 50), (50, 77))  # uneven on purpose


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the pool's ranks are CPU processes and need the interpreter"
)
def test_vocabulary_parallel(two_ranks: RankPool) -> None:
    """Two ranks with their rows of the weight: each has the loss and gradients of one process
    with all of them.
    """
    for launched in two_ranks.run("tests.kernels.test_cross_entropy:compare_shards"):
        assert launched == BOTH


def compare_shards() -> set[str]:
    """On each rank: fused and plain, against fp64; returns the Triton functions that ran."""
    share = SHARES[dist.get_rank()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "GROUP_CHUNK_ROWS", 10)
        for mode in ("torch", "interpret"):
            patch.setenv("MEGAGPT_KERNELS", mode)
            reset_launches()
            for dtype, reduction in itertools.product(
                (torch.float32, torch.bfloat16), ("mean", "none")
            ):
                _compare_shard(share, dtype, reduction=reduction)
            _compare_shard(share, torch.float32, softcap=3.0)
    return set(kernels.launches())


def _compare_shard(share: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
    tensors = case(25, 16, 77, dtype, "cpu")
    options |= {"z_loss": 1e-2}
    whole = outputs_and_gradients(reference.linear_cross_entropy, tensors, torch.float64, **options)
    tensors["weight"] = tensors["weight"][slice(*share)].clone()
    options |= {"group": dist.group.WORLD, "vocabulary_start": share[0]}
    ours = outputs_and_gradients(kernels.linear_cross_entropy, tensors, dtype, **options)
    whole["gradient of weight"] = whole["gradient of weight"][slice(*share)]
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    )
    for name, truth in whole.items():
        torch.testing.assert_close(ours[name].double(), truth, **tolerance)
