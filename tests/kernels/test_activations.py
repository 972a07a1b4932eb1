"""SwiGLU: accuracy, odd shapes and strides, exact and repeatable."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference
from kernels.fused import activations
from kernels.launcher import launch
from tests.support.kernels.accuracy import (
    DTYPES,
    assert_as_accurate_as_torch,
    outputs_and_gradients,
)
from tests.support.kernels.refusals import refused


def case(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random arguments; ``shape`` is the result's."""
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(device, dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 127), (9, 1100)])
def test_accuracy(fused_device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_accurate_as_torch("swiglu", case(shape, dtype, fused_device))
    assert kernels.launches() == {"swiglu_forward": 1, "swiglu_backward": 1}


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_the_tails_are_exact(fused_device: str) -> None:
    """Far from zero the gate is the identity or nothing, with slope 1 or 0."""
    values = torch.tensor([[-4096.0, -200.0, 200.0, 4096.0]], device=fused_device)
    pairs = torch.stack((values, torch.ones_like(values)), dim=-1).flatten(-2)
    result = outputs_and_gradients(kernels.swiglu, {"x": pairs}, torch.float32)
    assert torch.equal(result["output 0"], values.clamp(min=0))


def test_strides(fused_device: str) -> None:
    """A transposed input, and the stride-0 gradient that sum() sends back."""
    (x,) = case((6, 5, 40), torch.float32, fused_device).values()
    gradients = []
    for function in (kernels.swiglu, reference.swiglu):
        leaf = x.detach().requires_grad_()
        function(leaf.transpose(0, 1)).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_twice_as_many_channels_as_fit_into_31_bits(fused_device: str) -> None:
    """The first program alone, told that 2^30 results are wanted: it reads and writes its own
    block only.
    """
    x = torch.randn(2 * activations._BLOCK, generator=torch.Generator().manual_seed(0)).to(
        fused_device
    )
    y, dx = x.new_zeros(activations._BLOCK), torch.zeros_like(x)
    launch(activations.swiglu_forward, (1,), x, x, y, 2**30, BLOCK=activations._BLOCK)
    launch(activations.swiglu_backward, (1,), x, y, x, dx, 2**30, BLOCK=activations._BLOCK)
    leaf = x.requires_grad_()
    expected = kernels.swiglu(leaf)
    assert torch.equal(y, expected)
    assert torch.equal(dx, torch.autograd.grad(expected, leaf, y)[0])


def test_repeated_runs_are_equal_and_nothing_is_nothing(fused_device: str) -> None:
    tensors = case((50, 20), torch.bfloat16, fused_device)
    first, second = (
        outputs_and_gradients(kernels.swiglu, tensors, torch.bfloat16) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    empty = outputs_and_gradients(
        kernels.swiglu, case((0, 4), torch.float32, fused_device), torch.float32
    )
    assert empty["output 0"].shape == (0, 4)


def test_the_operator_is_sound_for_compilers(fused_device: str) -> None:
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    (x,) = case((3, 8), torch.float32, fused_device).values()
    torch.library.opcheck(activations._swiglu.overload, (x.requires_grad_(),), test_utils=checks)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(2, 20),
    channels=st.integers(4, 90),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(fused_device: str, rows: int, channels: int, dtype: torch.dtype) -> None:
    assert_as_accurate_as_torch("swiglu", case((rows, channels), dtype, fused_device))


def test_bad_arguments_are_named(fused_device: str, mode_of_bad_input: None) -> None:
    x = torch.ones(2, 7, device=fused_device)
    refused("swiglu", r"x has shape \(2, 7\), expected an even number of channels", {"x": x})
    refused(
        "swiglu", "x has dtype torch.int32, expected floating-point numbers", {"x": x[:, 1:].int()}
    )
