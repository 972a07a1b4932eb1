"""The check of attention on first use: its answers are exact, every variant has its own, and
what is wrong is found.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import reference
from kernels.fused import attention as fused_attention
from kernels.launcher import reset_launches
from kernels.verification import exact_attention, self_check
from kernels.verification.assembler import Assembler
from kernels.verification.exact_attention import Variant, exact_case, variant_of

CPU = torch.device("cpu")


def twin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    document_ids: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention with its probabilities written out, whose fp32 is exact on exact inputs."""
    mask = reference.visible(q.shape[2], k.shape[2], causal, document_ids, q.device, window)
    return reference._explicit_attention(q, k, v, mask, scale, dropout, dropout_seed, 0, softcap)


VARIANTS = (
    Variant(64),
    Variant(128, causal=False, group=0),
    Variant(80, documents=True),
    Variant(32, dropout=True, group=16, length=0, key_length=0),
    Variant(96, documents=True, dropout=True, causal=False, key_length=0),
    Variant(256, length=1, gradients=False),
    Variant(64, window=True),
    Variant(128, softcap=True),
    Variant(80, documents=True, window=True, softcap=True, dropout=True, key_length=0),
)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_answers_are_exact_in_16_bits(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel rounds to 16 bits (weights, output, score gradients) loses nothing; sums are
    exact in any order.
    """
    if variant != VARIANTS[0]:
        monkeypatch.setattr(exact_attention, "LENGTH", 256)
    case = exact_case(variant, CPU)
    truth = self_check.answers(reference.attention, case, torch.float64, variant)
    for name, value in truth.items():
        exact = (value / case.unit).round() * case.unit
        assert (value - exact).abs().max() < 1e-9, name
        assert exact.any(), name
        assert exact.abs().max() < torch.finfo(torch.float16).max, name
        if name == "output":
            assert torch.equal(exact.bfloat16().double(), exact)
    if variant.gradients:
        assert_score_gradients_are_exact(case)


def assert_score_gradients_are_exact(case: exact_attention.ExactCase) -> None:
    """They fit 8 bits, and no sum of theirs needs more than the 24 of fp32."""
    k, v = (x.repeat_interleave(case.q.shape[1] // case.k.shape[1], 1) for x in (case.k, case.v))
    identity = torch.eye(k.shape[2], dtype=torch.float64).expand(1, k.shape[1], -1, -1)
    weights = reference.attention(case.q, k, identity, **case.options)  # what multiplies v
    if "dropout" in case.options:
        plain = {
            name: value for name, value in case.options.items() if not name.startswith("dropout")
        }
        softmax = reference.attention(case.q, k, identity, **plain)
    else:
        softmax = weights
        assert (
            (weights > 1e-9).sum(-1) >= weights.shape[3] // 16
        ).any()  # operands that are not zero, over several blocks of keys
    delta = (weights * (case.out_gradient @ v.mT)).sum(-1, keepdim=True)
    scores = weights * (case.out_gradient @ v.mT) - softmax * delta
    if "softcap" in case.options:
        scaled = case.q @ k.mT * case.options["scale"] / case.options["softcap"]
        scores *= 1 - scaled.tanh().square()
    scores = (scores / case.unit * 2**10).round() * case.unit / 2**10
    assert torch.equal(scores.bfloat16().double(), scores)
    for sums in (scores.abs() @ k.abs(), scores.mT.abs() @ case.q.abs()):
        assert sums.max() / case.unit < 2**24


MISTAKES: dict[str, tuple[Variant, Callable[..., Tensor]]] = {}


def mistake(variant: Variant) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Note an attention that is right but for calls of this variant."""

    def note(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MISTAKES[attention.__name__] = (variant, attention)
        return attention

    return note


@mistake(Variant(80))
def channels_beyond_64_are_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return twin(q, F.pad(k[..., :64], (0, k.shape[3] - 64)), v, **options)


@mistake(Variant(64, documents=True))
def documents_are_not_told_apart(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, **options: Any
) -> Tensor:
    return twin(q, k, v, **options)


@mistake(Variant(64, documents=True))
def documents_are_runs(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, **options: Any
) -> Tensor:
    """Blocks outside the document are skipped, the mask inside is forgotten."""
    return twin(q, k, v, document_ids=document_ids // 2, **options)


@mistake(Variant(64, window=True))
def the_window_is_forgotten(q: Tensor, k: Tensor, v: Tensor, window: int, **options: Any) -> Tensor:
    return twin(q, k, v, **options)


@mistake(Variant(64, window=True))
def the_window_has_one_key_more(
    q: Tensor, k: Tensor, v: Tensor, window: int, **options: Any
) -> Tensor:
    return twin(q, k, v, window=window + 1, **options)


@mistake(Variant(64, length=0, key_length=0, window=True))
def the_window_has_one_key_less(
    q: Tensor, k: Tensor, v: Tensor, window: int, **options: Any
) -> Tensor:
    return twin(q, k, v, window=window - 1, **options)


@mistake(Variant(64, softcap=True, gradients=False))
def scores_are_not_capped(
    q: Tensor, k: Tensor, v: Tensor, softcap: float, **options: Any
) -> Tensor:
    return twin(q, k, v, **options)


@mistake(Variant(64, softcap=True))
def the_gradient_passes_the_soft_cap_unchanged(
    q: Tensor, k: Tensor, v: Tensor, softcap: float, **options: Any
) -> Tensor:
    """Scores are capped, but dS lacks the factor 1 - tanh^2."""
    tanh = Tensor.tanh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tanh", lambda x: x + (tanh(x) - x).detach())
        return twin(q, k, v, softcap=softcap, **options)


@mistake(Variant(64, dropout=True))
def heads_drop_alike(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return torch.cat(
        [twin(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], **options) for i in (0, 1)], 1
    )


@mistake(Variant(64, dropout=True))
def what_remains_is_not_scaled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return twin(q, k, v, **options) * 0.5


@mistake(Variant(64, group=0))
def heads_take_turns_at_keys(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return twin(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), **options)


@mistake(Variant(64))
def every_query_sees_the_next_key(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
    return reference._explicit_attention(q, k, v, mask, options["scale"], 0.0, None, 0)


@mistake(Variant(64, length=0, key_length=0))
def the_last_block_of_keys_is_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    mask = torch.ones_like(v)
    mask[:, :, -16:] = 0
    return twin(q, k, v * mask, **options)


@mistake(Variant(64, deterministic=True))
def only_the_deterministic_backward_is_wrong(
    q: Tensor, k: Tensor, v: Tensor, deterministic: bool = False, **options: Any
) -> Tensor:
    if deterministic and q.requires_grad:
        q.register_hook(lambda gradient: gradient.roll(1, 2))
    return twin(q, k, v, **options)


@mistake(Variant(64, length=1, gradients=False))
def a_single_query_sees_the_keys_beside(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return twin(q, k.roll(1, 2), v, **options)


@mistake(Variant(64))
def weights_are_overwritten_before_they_are_read(
    q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> Tensor:
    """As triton#11781 has it: the first product of two in flight finds the operand of the second
    in its registers.
    """
    scores = (q @ k.mT * options["scale"]).detach()
    weights = scores.masked_fill(
        torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf
    ).softmax(-1)
    return (
        twin(q, k, v, **options)
        + (weights[..., 64:128] - weights[..., :64]) @ v[:, :, :64].detach()
    )


@mistake(Variant(64))
def score_gradients_are_overwritten(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The product with q takes one block of queries for another.

    The causal mask hid that from an earlier check.
    """
    k.register_hook(
        lambda gradient: torch.cat((gradient[:, :, :64].flip(2), gradient[:, :, 64:]), 2)
    )
    return twin(q, k, v, **options)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_a_variant_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_attention, "LENGTH", 256)
    variant, wrong = MISTAKES[name]

    def attention(*tensors: Tensor, deterministic: bool, **options: Any) -> Tensor:
        return wrong(*tensors, **options, **({"deterministic": True} if deterministic else {}))

    found = self_check.disagreement(attention, CPU, torch.float32, variant)
    assert found is not None
    assert found.startswith("self-check: ")
    assert found.endswith(f" is wrong for {variant}")
    assert self_check.disagreement(twin, CPU, torch.float32, variant) is None


CHANGES = {
    "one element off by one": lambda x: x + torch.eye(*x.shape[2:]),
    "nothing there": lambda x: x * 0,
    "the wrong sign": torch.neg,
    "one head the other's": lambda x: x.flip(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("wrong", ["output", "gradient of q", "gradient of k", "gradient of v"])
def test_it_names_what_is_wrong(wrong: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result may be wrong in any of these ways, causal or not: a check had gradients of k
    that were always 0.
    """
    monkeypatch.setattr(exact_attention, "LENGTH", 128)

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        spoilt = {"gradient of q": q, "gradient of k": k, "gradient of v": v}
        if wrong in spoilt:
            spoilt[wrong].register_hook(CHANGES[change])
        out = twin(q, k, v, **options)
        return CHANGES[change](out) if wrong == "output" else out

    for variant in (Variant(64), Variant(64, causal=False)):
        found = self_check.disagreement(attention, CPU, torch.float32, variant)
        assert found == f"self-check: {wrong} is wrong for {variant}"


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        (Variant(16), torch.float32),
        (Variant(24, aligned=False, group=0, length=0, key_length=0), torch.bfloat16),
        (Variant(16, documents=True, causal=False), torch.float16),
        (Variant(16, documents=True, dropout=True, deterministic=True), torch.bfloat16),
        (Variant(16, length=1, gradients=False), torch.bfloat16),
        (Variant(16, window=True, softcap=True, deterministic=True), torch.bfloat16),
    ],
    ids=str,
)
def test_the_kernels_pass(
    fused_device: str, variant: Variant, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs what its variant needs, and none of its launches is counted."""
    if fused_device == "cpu":
        monkeypatch.setattr(exact_attention, "LENGTH", 32)
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    device = torch.device(fused_device)
    assert self_check.disagreement(fused_attention.attention, device, dtype, variant) is None
    expected = {"attention_forward"}
    if variant.gradients:
        expected |= {"attention_backward_delta", "attention_backward_keys"}
    if variant.deterministic:
        expected |= {"attention_backward_queries"}
    assert set(kernels.launches()) == expected
    reset_launches()
    assert self_check.verdict("kernels.fused.attention", device, dtype, variant) is None
    assert kernels.launches() == {}


def test_a_variant_is_what_triton_compiles() -> None:
    q, k = torch.zeros(1, 8, 48, 80, requires_grad=True), torch.zeros(1, 2, 50, 80)
    assert variant_of(q, q, q) == Variant(80)
    assert variant_of(q, k, k) == Variant(80, key_length=0, group=0)
    assert variant_of(q, k[:, :1], k[:, :1], causal=False) == Variant(
        80, key_length=0, group=0, causal=False
    )
    assert variant_of(q, q, q, dropout=0.1, deterministic=True) == Variant(
        80, dropout=True, deterministic=True
    )
    assert variant_of(q, q, q, document_ids=torch.zeros(1, 48)) == Variant(80, documents=True)
    assert variant_of(q, q, q, window=47, softcap=2.0) == Variant(80, window=True, softcap=True)
    assert variant_of(q, q, q, window=48) == Variant(80)  # it hides no key
    assert not Variant(*variant_of(q[..., :24:2], q[..., :12], q[..., :12])).aligned
    with torch.no_grad():
        assert variant_of(q[:, :, :1], q, q, deterministic=True) == Variant(
            80, length=1, gradients=False
        )
        assert variant_of(q, q, q) == Variant(
            80
        )  # may be computed again with gradients, inside backward
    with torch.inference_mode():
        assert variant_of(q, q, q) == Variant(80, gradients=False)


def test_a_verdict_on_both_passes_holds_for_the_forward_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Variant] = []
    monkeypatch.setattr(self_check, "disagreement", lambda *key: asked.append(key[-1]))
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    forward = Variant(64, gradients=False)
    for variant in (
        Variant(64),
        forward,
        Variant(128, gradients=False),
        forward._replace(head_dim=128),
    ):
        assert self_check.verdict("kernels.fused.attention", CPU, torch.float32, variant) is None
    assert asked == [Variant(64), Variant(128, gradients=False)]


def test_a_wrong_result_on_a_gpu_names_the_assembler_and_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Assembler("12.8.93", "triton's own", "TRITON_PTXAS_PATH")
    monkeypatch.setattr(
        self_check, "disagreement", lambda *key: "self-check: output is wrong for head_dim 64"
    )
    monkeypatch.setattr(self_check, "assembler", lambda capability: old)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = self_check._ask(
        reference.attention, torch.device("cuda", 0), torch.bfloat16, Variant(64)
    )
    assert found is not None
    assert found.startswith(
        "self-check: output is wrong for head_dim 64; compiled by ptxas 12.8.93 (triton's own): "
        "ptxas before 13.3 is reported to miscompile such products (triton-lang/triton#11781); pip "
        "install 'nvidia-cuda-nvcc>=13.3'; export TRITON_PTXAS_PATH="
    )
