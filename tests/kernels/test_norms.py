"""Layer and RMS normalisation: accuracy of outputs and every gradient, odd shapes and strides,
exact and repeatable.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference
from kernels.fused import norms
from tests.support.kernels.accuracy import (
    DTYPES,
    assert_as_accurate_as_torch,
    output_gradient,
    outputs_and_gradients,
)
from tests.support.kernels.refusals import moved, refused

OPS = ("layer_norm", "rms_norm")


def case(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, residual: bool = False
) -> dict[str, Tensor]:
    """Random arguments of a norm."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors = {"x": random(*shape), "weight": random(shape[-1])}
    if op == "layer_norm":
        tensors["bias"] = random(shape[-1])
    if residual:
        tensors["residual"] = random(*shape)
    return tensors


def in_fp32(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same arguments, those of these names in fp32, with numbers that 16 bits do not hold."""
    return tensors | {name: tensors[name].float() * 1.001 for name in names if name in tensors}


@pytest.fixture(autouse=True)
def no_tile_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tests change the limits that it follows from."""
    monkeypatch.setattr(norms, "_tile", norms._tile.__wrapped__)


@pytest.fixture
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 64 columns count as wide, and of more than 128 as too wide for sums in
    registers.
    """
    monkeypatch.setattr(norms, "_WIDEST_TILE", 64)
    monkeypatch.setattr(norms, "_CHUNK", 32)
    monkeypatch.setattr(norms, "_SUM_CHUNK", 64)
    monkeypatch.setattr(norms, "_WIDEST_SUMS", 128)
    monkeypatch.setattr(norms, "_WIDEST_TILE_MIXED", 48)
    monkeypatch.setattr(norms, "_WIDEST_SUMS_WIDER", 64)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 5, 127, 768])
@pytest.mark.parametrize("op", OPS)
def test_accuracy(
    fused_device: str, op: str, columns: int, dtype: torch.dtype, residual: bool
) -> None:
    assert_as_accurate_as_torch(op, case(op, (3, 7, columns), dtype, fused_device, residual))
    assert kernels.launches() == {"norm_forward": 1, "norm_backward": 1}


@pytest.mark.rotate(4)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [65, 128, 129, 300])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("narrow_tiles")
def test_accuracy_of_wide_rows(
    fused_device: str, op: str, columns: int, dtype: torch.dtype, residual: bool
) -> None:
    assert_as_accurate_as_torch(op, case(op, (5, columns), dtype, fused_device, residual))
    averages = {"norm_row_averages": 1} if columns > 128 else {}
    assert kernels.launches() == {"norm_forward_wide": 1, "norm_backward_wide": 1, **averages}


MIXED = {
    "parameters": ("weight", "bias"),
    "residual": ("residual",),
    "both": ("weight", "bias", "residual"),
}


@pytest.mark.rotate(4)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 60, 129])
@pytest.mark.parametrize("wide", MIXED)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("narrow_tiles")
def test_fp32_beside_activations_of_16_bits(
    fused_device: str, op: str, wide: str, columns: int, dtype: torch.dtype
) -> None:
    """y like x, the sum like the residual, gradients like their inputs, all as accurate as their
    own dtypes allow.
    """
    tensors = in_fp32(case(op, (7, columns), dtype, fused_device, residual=True), *MIXED[wide])
    assert_as_accurate_as_torch(op, tensors)
    results = outputs_and_gradients(getattr(kernels, op), tensors, None)
    assert results["output 0"].dtype == dtype
    assert results["output 1"].dtype == tensors["residual"].dtype
    assert all(results[f"gradient of {name}"].dtype == x.dtype for name, x in tensors.items())
    backward = "norm_backward" if columns <= 48 else "norm_backward_wide"
    assert kernels.launches()[backward] == 2
    plain = case(op, (7, columns), dtype, fused_device)
    assert_as_accurate_as_torch(op, in_fp32(plain, "weight", "bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [40, 65, 129])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("narrow_tiles")
def test_weights_around_zero(fused_device: str, op: str, columns: int, dtype: torch.dtype) -> None:
    """In each of the five kernels, with weights that 1 + weight would lose in 16 bits."""
    tensors = case(op, (6, columns), dtype, fused_device, residual=True)
    tensors["weight"] *= 2.0**-6
    assert_as_accurate_as_torch(op, tensors, weight_offset=1.0)
    results, plain = (
        outputs_and_gradients(getattr(kernels, op), tensors, None, weight_offset=offset)
        for offset in (1.0, 0.0)
    )
    assert not torch.equal(results["gradient of x"], plain["gradient of x"])
    gradients = (results["gradient of weight"], plain["gradient of weight"])
    assert torch.equal(*gradients)  # it does not depend on the weight
    assert any(name.startswith("norm_backward") for name in kernels.launches())


@pytest.mark.parametrize("function", [kernels.rms_norm, reference.rms_norm])
def test_the_rms_norm_is_gemma_2s(fused_device: str, function: Any) -> None:
    """transformers' own module, on bf16: both round the same fp32 numbers once."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    tensors = case("rms_norm", (50, 96), torch.bfloat16, fused_device)
    theirs = gemma.Gemma2RMSNorm(96, eps=1e-6).to(fused_device, torch.bfloat16)
    theirs.weight.data.copy_(tensors["weight"] * 0.1)
    ours = function(tensors["x"], theirs.weight, eps=1e-6, weight_offset=1.0)
    expected = theirs(tensors["x"])
    assert (ours == expected).float().mean() > 0.999  # fp32 sums in another order
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_no_dtype(fused_device: str, op: str) -> None:
    """Nor a bit, in the twin as in the kernels; torch's own norms would return fp32 under it on
    a GPU.
    """
    tensors = in_fp32(
        case(op, (3, 24), torch.bfloat16, fused_device, residual=True), *MIXED["both"]
    )
    for function in (getattr(kernels, op), getattr(kernels.reference, op)):
        expected = function(**tensors)
        with torch.autocast(fused_device, torch.bfloat16):
            results = function(**tensors)
        for value, wanted in zip(results, expected, strict=True):
            assert value.dtype == wanted.dtype
            assert torch.equal(value, wanted)


@pytest.mark.rotate(3)
@pytest.mark.parametrize("columns", [8193, 12_288, 16_384, 65_536, 65_537])
@pytest.mark.parametrize("op", OPS)
def test_the_widest_rows(fused_device: str, op: str, columns: int) -> None:
    """Up to 12,288 columns backward is one kernel that reads every row once from memory."""
    assert_as_accurate_as_torch(
        op, case(op, (3, columns), torch.float32, fused_device, residual=True)
    )
    assert kernels.launches().get("norm_row_averages", 0) == (columns > 12_288)
    assert kernels.launches()["norm_backward_wide"] == 1


@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize("columns", [1, 8193, 12_288, 12_289, 30_000, 65_536, 100_000])
def test_the_parts_of_a_wide_row_cover_it(columns: int, wider: bool) -> None:
    """And each part's sums fit into registers."""
    parts, chunks = norms._parts(columns, wider)
    covered = parts * chunks * norms._SUM_CHUNK
    assert columns <= covered < columns + parts * norms._SUM_CHUNK
    assert chunks * norms._SUM_CHUNK <= (norms._WIDEST_SUMS_WIDER if wider else norms._WIDEST_SUMS)


def test_layer_norm_without_a_bias(fused_device: str) -> None:
    x, weight = case("rms_norm", (4, 33), torch.float32, fused_device).values()
    expected = torch.nn.functional.layer_norm(x, (33,), weight)
    torch.testing.assert_close(kernels.layer_norm(x, weight, None), expected)


@pytest.mark.parametrize("wide", [False, True])
def test_a_large_mean_costs_no_precision(
    fused_device: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[x^2] - E[x]^2 in fp32 would be off by several units here: the mean is 10^4 deviations
    away.
    """
    if wide:
        monkeypatch.setattr(norms, "_WIDEST_TILE", 64)
        monkeypatch.setattr(norms, "_CHUNK", 32)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(fused_device) + 1e4
    ones, zeros = torch.ones(256, device=fused_device), torch.zeros(256, device=fused_device)
    y = kernels.layer_norm(x, ones, zeros)
    truth = torch.nn.functional.layer_norm(x.double(), (256,))
    torch.testing.assert_close(y.double(), truth, atol=2e-3, rtol=0.0)


@pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value):RuntimeWarning"
)  # in rows beyond the last
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integer_values_are_exact(fused_device: str, op: str, dtype: torch.dtype) -> None:
    """Rows of +1 and -1 have mean 0 and variance 1, so with integer weights every number is an
    integer.
    """
    signs = torch.tensor([1.0, -1.0]).repeat(3, 32).to(fused_device, dtype)
    tensors = case(op, (3, 64), dtype, fused_device)
    tensors |= {name: x.mul(3).round() for name, x in tensors.items()} | {"x": signs}
    y = getattr(kernels, op)(**tensors, eps=0.0)
    assert torch.equal(y, signs * tensors["weight"] + tensors.get("bias", 0))


@pytest.mark.rotate(2)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wide", [False, True])
def test_repeated_runs_are_equal(
    fused_device: str, op: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(norms, "_WIDEST_TILE", 64)
        monkeypatch.setattr(norms, "_SUM_CHUNK", 32)
        monkeypatch.setattr(norms, "_WIDEST_SUMS", 64)
    tensors = case(op, (30 if wide else 300, 100), torch.bfloat16, fused_device, residual=True)
    first, second = (
        outputs_and_gradients(getattr(kernels, op), tensors, torch.bfloat16) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("op", OPS)
def test_strides(fused_device: str, op: str) -> None:
    """A transposed input, a broadcast residual and the stride-0 gradient that sum() sends back."""
    tensors = case(op, (6, 5, 40), torch.float32, fused_device)
    gradients = []
    for function in (getattr(kernels, op), getattr(kernels.reference, op)):
        x = tensors["x"].detach().requires_grad_()
        y, total = function(
            x.transpose(0, 1),
            *list(tensors.values())[1:],
            residual=x[0, 0].expand(5, 6, 40).clone().expand(5, 6, 40),
        )
        (y.square().sum() + total.sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("columns", [40, 150])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("narrow_tiles")
def test_parameters_of_any_stride(fused_device: str, op: str, columns: int) -> None:
    """One column of a matrix, and one number repeated."""
    dense = case(op, (6, columns), torch.float32, fused_device)
    parameters = [name for name in dense if name != "x"]
    strided = {name: torch.stack((dense[name], -dense[name]), dim=1)[:, 0] for name in parameters}
    repeated = {name: dense[name][:1].expand(columns) for name in parameters}
    for changed in (strided, repeated):
        results = outputs_and_gradients(getattr(kernels, op), dense | changed, torch.float32)
        expected = {name: x.contiguous() for name, x in changed.items()}
        expected = outputs_and_gradients(getattr(kernels, op), dense | expected, torch.float32)
        assert all(torch.equal(results[name], value) for name, value in expected.items())


@pytest.mark.parametrize("op", OPS)
def test_an_unused_output_has_no_gradient(fused_device: str, op: str) -> None:
    tensors = case(op, (2, 3, 40), torch.float32, fused_device, residual=True)
    for output in (0, 1):
        gradients = []
        for function in (getattr(kernels, op), getattr(kernels.reference, op)):
            arguments = {name: x.detach().requires_grad_() for name, x in tensors.items()}
            function(**arguments)[output].square().sum().backward()
            gradients.append(
                [torch.zeros_like(x) if x.grad is None else x.grad for x in arguments.values()]
            )
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("op", OPS)
def test_no_rows(fused_device: str, op: str) -> None:
    tensors = case(op, (0, 16), torch.float32, fused_device)
    result = outputs_and_gradients(getattr(kernels, op), tensors, torch.float32)
    assert result["output 0"].shape == (0, 16)
    assert not result["gradient of weight"].any()
    tensors = case(op, (3, 0), torch.float32, fused_device)
    result = outputs_and_gradients(getattr(kernels, op), tensors, torch.float32)
    assert result["output 0"].shape == result["gradient of x"].shape == (3, 0)
    assert kernels.launches() == {}


@pytest.mark.parametrize("op", OPS)
def test_a_parameter_freed_between_forward_and_backward(fused_device: str, op: str) -> None:
    """ZeRO-3 empties a gathered parameter after forward and fills it again, elsewhere, before
    backward.
    """
    tensors = case(op, (4, 24), torch.float32, fused_device)
    expected = outputs_and_gradients(getattr(kernels, op), tensors, torch.float32)["gradient of x"]
    weight = torch.nn.Parameter(tensors.pop("weight"))
    x = tensors.pop("x").requires_grad_()
    y = getattr(kernels, op)(x, weight, **tensors)
    gathered = weight.data
    weight.data = torch.empty(0, device=fused_device)
    gathered_again = gathered.clone()
    gathered.fill_(float("nan"))
    weight.data = gathered_again
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(fused_device))
    assert torch.equal(x.grad, expected)


def test_the_operator_is_sound_for_compilers(fused_device: str) -> None:
    """Schema, fake implementation and autograd registration, as torch.compile relies on them."""
    x, weight, bias, residual = (
        t.requires_grad_()
        for t in case("layer_norm", (2, 8), torch.float32, fused_device, True).values()
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        norms._forward.overload, (x, residual, weight, bias, 1e-5, True, 1.0), test_utils=checks
    )
    alone = (x, None, weight, None, 1e-5, False, 0.0)
    torch.library.opcheck(norms._forward.overload, alone, test_utils=checks)


def test_compiles_into_one_graph(fused_device: str) -> None:
    """torch.compile takes the operators as they are: one graph, forward and backward, the same
    numbers.
    """
    tensors = case("layer_norm", (3, 24), torch.float32, fused_device, residual=True)
    compiled = torch.compile(norms.layer_norm, backend="aot_eager", fullgraph=True)
    ours, expected = (
        outputs_and_gradients(f, tensors, torch.float32) for f in (compiled, norms.layer_norm)
    )
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    op=st.sampled_from(OPS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
)
def test_any_shape(
    fused_device: str, op: str, rows: int, columns: int, dtype: torch.dtype, residual: bool
) -> None:
    tensors = case(op, (rows, columns), dtype, fused_device, residual)
    assert_as_accurate_as_torch(op, tensors, rounding=rounding_of_sums(op, tensors))


def rounding_of_sums(op: str, tensors: dict[str, Tensor]) -> dict[str, float]:
    """What the order of the rows' sums may cost the parameters' gradients: half a unit in the last
    place of each term. Of a few columns torch's own error may be small by chance.
    """
    ones = {name: torch.ones_like(tensors[name]) for name in ("weight", "bias") if name in tensors}
    wide = {name: tensor.double() for name, tensor in (tensors | ones).items()}
    if "bias" in wide:
        wide["bias"] = torch.zeros_like(wide["bias"])
    result = getattr(reference, op)(**wide)
    normalised = result[0] if isinstance(result, tuple) else result
    gradient = output_gradient(normalised, tensors["x"].dtype)
    half_a_unit = torch.finfo(torch.float32).eps / 2  # sums are in fp32, whatever the dtype
    terms = {"weight": gradient * normalised, "bias": gradient}
    return {
        f"gradient of {name}": half_a_unit * float(of.abs().sum(dim=0).max())
        for name, of in terms.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\), expected \(8,\)"),
        ({"bias": torch.ones(8).half()}, "bias has dtype torch.float16, expected torch.float32"),
        (
            {"weight": torch.ones(8).half()},
            "weight has dtype torch.float16, expected torch.float32",
        ),
        (
            {"residual": torch.ones(2, 8).half()},
            "residual has dtype torch.float16, expected torch.float32",
        ),
        ({"weight": torch.ones(8, device="meta")}, "weight is on meta, expected c"),
        ({"residual": torch.ones(3, 8)}, r"residual has shape \(3, 8\), expected \(2, 8\)"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\), expected \(..., width\)"),
    ],
)
def test_bad_arguments_are_named(
    fused_device: str, mode_of_bad_input: None, change: dict[str, Tensor], message: str
) -> None:
    tensors = case("layer_norm", (2, 8), torch.float32, fused_device) | moved(change, fused_device)
    refused("layer_norm", message, tensors)
