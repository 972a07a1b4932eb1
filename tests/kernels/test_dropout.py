"""Dropout: the twin's mask bit for bit, forward and backward, and its independence of how a
batch is shared.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.fused import dropout as fused_dropout
from tests.support.kernels.accuracy import DTYPES
from tests.support.kernels.refusals import refused

SEEDS = torch.tensor([3, -(2**40) - 7, 2**62 + 5])


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_twin(fused_device: str, dtype: torch.dtype, probability: float) -> None:
    """The same elements survive, scaled alike; the gradient has the same mask."""
    x = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(0)).to(fused_device, dtype)
    results = []
    for function in (kernels.dropout, reference.dropout):
        leaf = x.detach().requires_grad_()
        y = function(leaf, probability, seed=SEEDS.to(fused_device), position_offset=11)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    assert kernels.launches() == {"dropout_apply": 2}
    (y, gradient), (expected, expected_gradient) = results
    assert torch.equal(y == 0, expected == 0)
    assert torch.equal(gradient == 0, expected_gradient == 0)
    torch.testing.assert_close(y, expected.to(dtype))
    torch.testing.assert_close(gradient, expected_gradient)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(length=st.integers(0, 9), channels=st.integers(1, 1100), offset=st.integers(0, 2**20))
def test_any_shape(fused_device: str, length: int, channels: int, offset: int) -> None:
    x = torch.ones(3, length, channels, device=fused_device)
    arguments = {"probability": 0.3, "seed": SEEDS.to(fused_device), "position_offset": offset}
    assert torch.equal(kernels.dropout(x, **arguments), reference.dropout(x, **arguments))


def test_strides(fused_device: str) -> None:
    x = (
        torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
        .to(fused_device)
        .transpose(0, 1)
    )
    torch.testing.assert_close(
        kernels.dropout(x, 0.5, seed=SEEDS.to(fused_device)),
        reference.dropout(x, 0.5, seed=SEEDS.to(fused_device)),
    )


def test_the_mask_does_not_depend_on_the_share_of_the_batch(fused_device: str) -> None:
    x = torch.ones(3, 6, 16, device=fused_device)
    whole = kernels.dropout(x, 0.5, seed=SEEDS.to(fused_device))
    assert torch.equal(whole[1:], kernels.dropout(x[1:], 0.5, seed=SEEDS[1:].to(fused_device)))
    assert torch.equal(
        whole[:, 2:], kernels.dropout(x[:, 2:], 0.5, seed=SEEDS.to(fused_device), position_offset=2)
    )


def test_the_operator_is_sound_for_compilers(fused_device: str) -> None:
    x = torch.ones(3, 2, 8, device=fused_device, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        fused_dropout._dropout.overload, (x, 0.5, SEEDS.to(fused_device), 0), test_utils=checks
    )


def test_bad_arguments_are_named(fused_device: str, mode_of_bad_input: None) -> None:
    good = {
        "x": torch.ones(3, 2, 8, device=fused_device),
        "probability": 0.5,
        "seed": SEEDS.to(fused_device),
    }
    for changes, message in (
        ({"probability": 1.0}, "probability is 1.0, expected 0 <= probability < 1"),
        ({"seed": good["seed"][1:]}, r"seed has shape \(2,\), expected \(3,\)"),
        ({"seed": good["seed"].float()}, "seed has dtype torch.float32, expected torch.int64"),
        ({"seed": good["seed"].to("meta")}, "seed is on meta, expected"),
        ({"x": good["x"][..., 0]}, r"x has shape \(3, 2\), expected \(batch, length, channels\)"),
    ):
        refused("dropout", message, good | changes)
