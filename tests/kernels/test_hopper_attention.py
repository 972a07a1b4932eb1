"""Attention in Gluon: what its source computes, what the compiler makes of it, and, on a Hopper
GPU, that it runs.

Triton's interpreter knows no Gluon. Without a GPU the compiled kernel runs on the emulator: the
tests marked ``emulated`` (python -m pytest -p kernels.emulator.plugin), which
emulator/test_on_the_emulator.py starts.
"""

import importlib.util
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import costs, reference
from kernels.emulator import EmulatorError
from kernels.emulator.machine import Schedule
from kernels.fused import attention as fused_attention
from kernels.hopper import attention as hopper_attention
from kernels.hopper import forward as attention_forward_hopper
from kernels.launcher import reset_launches
from kernels.verification import exact_attention, self_check
from kernels.verification.exact_attention import Variant
from tests.conftest import HAS_GPU
from tests.kernels.test_compile_ahead import compiled
from tests.support.kernels.accuracy import assert_as_accurate_as_torch, largest_error
from tests.support.kernels.attention_rounding import attention_rounding

SOURCE = Path(attention_forward_hopper.__file__)
HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
SHIPPED = [entry.name for entry in hopper_attention.AHEAD_OF_TIME]
CAUSAL_BF16 = [name for name in SHIPPED if name.endswith("bf16")]


def case(
    length: int,
    key_length: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    key_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Random q, k and v, as slices of rows that hold all heads."""
    generator = torch.Generator().manual_seed(0)

    def random(length: int, heads: int) -> Tensor:
        drawn = torch.randn(batch, length, heads, head_dim, generator=generator)
        return drawn.to(device, dtype).transpose(1, 2)

    keys = (key_length or length, key_heads or heads)
    return {"q": random(length, heads), "k": random(*keys), "v": random(*keys)}


def assert_right(tensors: dict[str, Tensor], causal: bool) -> None:
    """Output and log-sum-exp against fp64.

    The weights are rounded to the dtype of the values, as is the output.
    """
    group = tensors["q"].shape[1] // tensors["k"].shape[1]
    q, k, v = (
        x.double().repeat_interleave(n, 1)
        for x, n in zip(tensors.values(), (1, group, group), strict=True)
    )
    out, log_sum_exp = hopper_attention._forward(*tensors.values(), 0.125, causal, False)
    scores = q @ k.mT * 0.125
    if causal:
        length, key_length = scores.shape[2:]
        scores = scores.masked_fill(
            scores.new_ones(length, key_length).triu(1 + key_length - length) > 0, -math.inf
        )
    last_place = torch.finfo(out.dtype).eps
    assert largest_error(out, scores.softmax(-1) @ v) <= 1.5 * last_place * v.abs().max()
    assert largest_error(log_sum_exp, scores.logsumexp(-1) * math.log2(math.e)) <= 1e-5


@pytest.mark.emulated
@pytest.mark.rotate(5)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "key_length"),
    [
        (1, 1),
        (1, 300),
        (63, 65),
        (64, 64),
        (127, 127),
        (128, 128),
        (129, 129),
        (5, 1023),
        (300, 364),
        (1000, 1000),
    ],
)
def test_any_length(length: int, key_length: int, causal: bool) -> None:
    """Around tiles and blocks of rows, and more tiles than the ring holds."""
    assert_right(case(length, key_length), causal)


@pytest.mark.emulated
@pytest.mark.rotate(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4])
def test_head_dimension_128_and_grouped_heads(group: int, dtype: torch.dtype) -> None:
    assert_right(case(400, batch=2, heads=4, key_heads=4 // group, head_dim=128, dtype=dtype), True)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    length=st.integers(1, 400),
    extra=st.integers(0, 700),
    group=st.sampled_from([1, 2]),
    causal=st.booleans(),
)
@pytest.mark.emulated
def test_any_shape(length: int, extra: int, group: int, causal: bool) -> None:
    assert_right(case(length, length + extra, key_heads=2 // group), causal)


@pytest.mark.emulated
@pytest.mark.rotate(2)
@pytest.mark.parametrize("causal", [True, False])
def test_the_portable_backward_takes_its_log_sum_exp(causal: bool) -> None:
    tensors = case(40, 70, key_heads=1)
    for deterministic in (False, True):
        options = {"causal": causal, "deterministic": deterministic}
        rounding = attention_rounding(tensors, **options)
        assert_as_accurate_as_torch(
            "attention", tensors, ours=hopper_attention.attention, rounding=rounding, **options
        )


@pytest.mark.rotate(4)
@pytest.mark.emulated
@pytest.mark.parametrize(
    "variant", [Variant(64), Variant(64, length=0, key_length=0, group=0, causal=False)], ids=str
)
def test_the_self_check_passes(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_attention, "LENGTH", 256)  # two tiles of keys
    assert (
        self_check.disagreement(
            hopper_attention.attention, torch.device("cpu"), torch.bfloat16, variant
        )
        is None
    )


@pytest.mark.emulated
def test_rows_of_16_bytes_that_are_not_16_elements_are_no_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TMA reads them, but not the rows of any pitch that the portable kernels are checked with."""
    monkeypatch.setattr(exact_attention, "LENGTH", 32)
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    q = (
        torch.zeros(1, 32, 2 * 64 + 8, dtype=torch.bfloat16)[..., :128]
        .unflatten(-1, (2, 64))
        .transpose(1, 2)
    )
    assert hopper_attention.refusal("attention", q, q, q) is None
    assert hopper_attention.fault("attention", q, q, q) is None
    assert [(module, variant.aligned) for module, _, _, variant in self_check._VERDICTS] == [
        ("kernels.hopper.attention", True),
        ("kernels.fused.attention", False),
    ]


@pytest.mark.emulated
def test_the_self_check_finds_a_faulty_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable one, which this kernel's forward relies on: no check of the portable forward
    is needed for that.
    """
    monkeypatch.setattr(exact_attention, "LENGTH", 64)
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    right = fused_attention.backward

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = right(*arguments)
        return dq, dk + torch.eye(*dk.shape[2:]).to(dk), dv

    monkeypatch.setattr(fused_attention, "backward", wrong)
    q = case(20)["q"].requires_grad_()
    assert hopper_attention.fault(
        "attention", q, q, q
    ) == "self-check: gradient of k is wrong for " + (
        "head_dim 64, lengths that are no multiples of 16"
    )
    assert [module for module, *_ in self_check._VERDICTS] == ["kernels.hopper.attention"]


@pytest.mark.emulated
def test_huge_logits() -> None:
    tensors = {name: x.abs() for name, x in case(150).items()}
    for size in (100.0, -100.0):
        q, k, v = tensors["q"] * size, tensors["k"], tensors["v"]
        out, _ = hopper_attention._forward(q, k, v, 1.0, True, False)
        assert (
            largest_error(out, reference.attention(q.double(), k.double(), v.double(), scale=1.0))
            <= 0.02
        )


MISTAKES = {
    "a tile of keys is read before it is there": (
        "    mbarrier.wait(k_ready.index(stage), phase)\n",
        "",
    ),
    "a tile of values is read before it is there": (
        "    mbarrier.wait(v_ready.index(stage), phase)\n",
        "",
    ),
    "a tile is copied over while it is read": (
        "    mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)\n",
        "",
    ),
    "values are released before they are read": (
        "    scores = warpgroup_mma_wait(1, deps=(scores,))\n",
        "    scores = warpgroup_mma_wait(1, deps=(scores,))\n    "
        "mbarrier.arrive(v_empty.index(before), count=1)\n",
    ),
    "scores are used before they are there": (
        "    scores = warpgroup_mma_wait(1, ",
        "    scores = warpgroup_mma_wait(2, ",
    ),
    "one consumer's release is enough": ("_barriers(STAGES, CONSUMERS)", "_barriers(STAGES, 1)"),
    "a consumer forgets to release": ("    mbarrier.arrive(v_empty.index(before), count=1)\n", ""),
    "the diagonal is not masked": ("for step in range(1, whole)", "for step in range(1, steps)"),
    "the last values are those of another step": ("(steps - 1) % v_tiles", "steps % v_tiles"),
    "sums are not rescaled": ("    weighted = weighted * _column(rescale, out_layout)\n", ""),
}


@pytest.mark.emulated
@pytest.mark.rotate(10)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated_gpu: Any
) -> None:
    """Planted in the source, they are compiled, and run with copies that arrive early and late."""
    right, wrong = MISTAKES[mistake]
    text = SOURCE.read_text()
    assert right in text
    changed = tmp_path / "changed_forward.py"
    changed.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("changed_forward", changed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = module.attention_forward_hopper
    monkeypatch.setattr(hopper_attention, "attention_forward_hopper", kernel)
    found = 0
    for timing in ("early", "late"):
        emulated_gpu.schedule = Schedule(timing)
        try:
            assert_right(case(128, 900, heads=1), True)
            assert_right(case(130, heads=1), True)  # one tile: each of its values weighs more
        except (AssertionError, EmulatorError):
            found += 1
        found += len(emulated_gpu.findings)
        emulated_gpu.launches.clear()
    assert found


@pytest.mark.parametrize(
    "names", [CAUSAL_BF16, pytest.param(SHIPPED, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_what_the_compiler_makes_of_it(names: list[str], tmp_path: Path) -> None:
    """No spills, no product that waits for another, and softmax runs while products do, on tiles
    that TMA brought.
    """
    rows = compiled("--ptx", str(tmp_path), "--names", *names)
    assert len(rows) == len(names)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["serialised_wgmma"] == 0, row
        assert row["overwritten_operands"] == 0, row
        head_dim = 128 if "128" in row["name"] else 64
        scores, values = (
            head_dim // 16,
            128 // 16,
        )  # instructions of 16 channels, or of 16 keys, each
        assert row["wgmma"] == 2 * (scores + 2 * (scores + values) + values), (
            row
        )  # 2 consumers; before, 2 loops, after
        exponentials = (
            64 * 128 // 128 + 2
        )  # a thread's share of a tile, and the rescaling of its two rows
        assert row["overlapped_exponentials"] >= 2 * 2 * exponentials, row
        assert row["tma"] >= 6, row  # q twice, k, v and the result of each consumer
        assert row["shared_bytes"] <= 227 * 1024, row
        ptx = (tmp_path / f"{row['name']}.ptx").read_text()
        assert_barriers_are_seen_by_all(ptx)
        assert_results_are_seen_by_tma(ptx)
        assert_registers_suffice(ptx)


def instructions(ptx: str, *names: str) -> list[str]:
    """Those that begin with one of the names, in the order of the listing."""
    return re.findall(rf"^\s*(?:@!?%p\d+\s+)?({'|'.join(names)})", ptx, re.MULTILINE)


def assert_barriers_are_seen_by_all(ptx: str) -> None:
    """They are made, a fence shows them to TMA, and all warps meet, before anything is copied or
    waited for.
    """
    names = (
        r"mbarrier\.init",
        r"fence\.proxy\.async",
        r"bar\.sync|barrier\.sync",
        r"mbarrier\.try_wait|cp\.async\.bulk",
    )
    order = [
        next(i for i, name in enumerate(names) if re.match(name, x))
        for x in instructions(ptx, *names)
    ]
    first_use = order.index(3)
    assert order.count(0) == order[:first_use].count(0) > 0
    made = max(i for i, kind in enumerate(order) if kind == 0)
    fenced = order.index(1, made)
    assert order.index(2, fenced) < first_use


def assert_results_are_seen_by_tma(ptx: str) -> None:
    """Of each consumer: written to shared memory, a fence, all of its warps meet, a copy, and
    that is waited for.
    """
    names = (
        r"stmatrix",
        r"fence\.proxy\.async",
        r"bar\.sync|barrier\.sync",
        r"cp\.async\.bulk\.tensor\S*\.global\.shared",
    )
    names += (r"cp\.async\.bulk\.wait_group",)
    order = "".join(
        str(next(i for i, name in enumerate(names) if re.match(name, x)))
        for x in instructions(ptx, *names)
    )
    assert len(re.findall(r"0+2*12*34", order)) == 2, order


def assert_registers_suffice(ptx: str) -> None:
    """Three warp groups have the registers they begin with, redistributed: while they work, and
    before (triton's own).
    """
    at_first = re.search(r"^\.maxnreg (\d+)", ptx, re.MULTILINE)
    assert at_first is not None
    had = 3 * int(at_first[1])
    asked = {
        int(count) for count in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)
    }
    assert had * 128 <= 65536
    assert had == 240 + 240 + 24
    idle, main = sorted(asked - {24, 240})
    assert main + 2 * idle <= had


def test_it_is_for_hopper_alone() -> None:
    name = hopper_attention.AHEAD_OF_TIME[0].name
    assert compiled("--capability", "80", "--names", name) == []


def test_unaligned_beginnings_are_copied() -> None:
    storage = torch.arange(2 * 4 * 64 + 8, dtype=torch.float16)
    for offset, copied in ((0, False), (8, False), (4, True)):
        x = storage[offset : offset + 2 * 4 * 64].view(1, 2, 4, 64)
        descriptor = hopper_attention._descriptor(x, 64)
        assert torch.equal(descriptor.base, x)
        assert (descriptor.base.data_ptr() != x.data_ptr()) is copied
        assert descriptor.block_shape == [1, 1, 64, 64]


def test_strides_of_single_heads_mean_nothing() -> None:
    x = torch.zeros(64 * 4, dtype=torch.float16).as_strided((1, 1, 4, 64), (3, 5, 64, 1))
    assert hopper_attention.refusal("attention", x, x, x) is None
    assert hopper_attention._descriptor(x, 64).strides == [64, 64, 64, 1]


def test_flops_are_counted_as_declared() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        q, k = torch.empty(1, 4, 20, 64).half(), torch.empty(1, 2, 30, 64).half()
        hopper_attention._forward(q, k, k, 0.1, True, False)
    assert (
        counter.get_total_flops() == costs.attention(1, 4, 20, 64, key_length=30, itemsize=2).flops
    )


@pytest.mark.emulated
def test_the_operator_declares_shapes_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*(x.requires_grad_() for x in case(20, key_heads=1).values()), 0.125, True, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.megagpt.attention_forward_hopper.default, arguments, test_utils=checks
    )


def test_a_fault_is_asked_for_once_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel that computes wrongly, or cannot be launched at all, is at fault; the log says so
    when it is found.
    """
    calls: list[int] = []

    def broken(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        raise RuntimeError("no such instruction\nsecond line")

    monkeypatch.setattr(hopper_attention, "attention", broken)
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    key = (
        "kernels.hopper.attention",
        torch.device("cpu"),
        torch.bfloat16,
        Variant(64, documents=True),
    )
    for _ in range(2):
        assert self_check.verdict(*key) == "self-check: RuntimeError: no such instruction"
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "kernels.hopper.attention is not used on cpu for torch.bfloat16, head_dim 64, documents: "
        "self-check: RuntimeError: no such instruction"
    ]


def caught_in(
    surroundings: AbstractContextManager[Any], monkeypatch: pytest.MonkeyPatch
) -> str | None:
    """The verdict on a right kernel, if first asked for in these surroundings."""

    def right(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool, **options: Any) -> Tensor:
        return reference.attention(q, k, v, **options)

    monkeypatch.setattr(exact_attention, "LENGTH", 64)
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    monkeypatch.setattr(hopper_attention, "attention", right)
    with surroundings:
        return self_check.verdict(
            "kernels.hopper.attention", torch.device("cpu"), torch.float32, Variant(64)
        )


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """As on a GPU without CUBLAS_WORKSPACE_CONFIG, where torch's own products raise."""
    product = Tensor.__matmul__

    def refuse(*operands: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "Deterministic behavior was enabled, but this operation is not deterministic"
            )
        return product(*operands)

    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__matmul__", refuse)
        try:
            yield
        finally:
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "another default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic_algorithms,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "fake tensors": FakeTensorMode,
    "hooks that save nothing": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda x: None, lambda x: x
    ),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_verdict_is_the_kernels_alone(surroundings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the first call happens to be made: the verdict holds for the whole process."""
    assert caught_in(SURROUNDINGS[surroundings](), monkeypatch) is None


def test_a_verdict_counts_no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = FlopCounterMode(display=False)
    assert caught_in(counter, monkeypatch) is None
    assert counter.get_total_flops() == 0


def test_a_want_of_memory_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is a captured CUDA graph, or a backward whose thread the check would wait for: they
    are asked again.
    """
    with pytest.MonkeyPatch.context() as full:
        full.setattr(
            self_check,
            "answers",
            lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")),
        )
        assert caught_in(nullcontext(), full) == "self-check: no memory for it now"
    with pytest.MonkeyPatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        found = self_check.verdict(
            "kernels.hopper.attention", torch.device("cuda"), torch.bfloat16, Variant(64)
        )
        assert (
            found
            == "self-check: impossible while a CUDA graph is captured; call attention once before"
        )
    monkeypatch.setattr(self_check, "_VERDICTS", {})
    x, found = torch.ones(1, requires_grad=True), []
    key = ("kernels.hopper.attention", torch.device("cpu"), torch.bfloat16, Variant(64))
    x.register_hook(lambda gradient: found.append(self_check.verdict(*key)))
    (2 * x).backward()
    assert found == ["self-check: impossible inside backward; call attention once before"]
    assert not caplog.records
    assert caught_in(nullcontext(), monkeypatch) is None


def test_torch_compile_asks_for_the_verdict_while_it_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for each variant, whatever sizes it traces."""
    asked: list[Variant] = []
    monkeypatch.setattr(self_check, "disagreement", lambda *key: asked.append(key[-1]))
    monkeypatch.setattr(self_check, "_VERDICTS", {})

    def run(x: Tensor, documents: Tensor) -> Tensor:
        return (
            x * 2
            if fused_attention.fault("attention", x, x, x, document_ids=documents) is None
            else x
        )

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (32, 48, 33):
        x = torch.ones(1, 2, length, 16)
        assert torch.equal(compiled(x, torch.zeros(1, length)), 2 * x)
    assert asked == [Variant(16, documents=True), Variant(16, 0, 0, documents=True)]


# ----------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("length", "key_length"), [(1, 1), (127, 127), (129, 1000), (1023, 1023), (4096, 4096)]
)
def test_on_hopper(
    length: int, key_length: int, head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    tensors = case(
        length, key_length, batch=2, heads=4, key_heads=2, head_dim=head_dim, dtype=dtype,
        device="cuda"
    )  # fmt: skip
    assert kernels.explain("attention", **tensors, causal=causal).startswith(
        "attention: hopper (first in the table)"
    )
    reset_launches()
    rounding = attention_rounding(tensors, causal=causal)
    assert_as_accurate_as_torch("attention", tensors, rounding=rounding, causal=causal)
    assert kernels.launches()["attention_forward_hopper"] == 1
    assert "attention_forward" not in kernels.launches()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_thousand_runs_on_hopper_are_equal(head_dim: int) -> None:
    """A race would show sooner or later."""
    q, k, v = case(1000, heads=8, head_dim=head_dim, device="cuda").values()
    first = kernels.attention(q, k, v)
    assert all(torch.equal(kernels.attention(q, k, v), first) for _ in range(1000))
