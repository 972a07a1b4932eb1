"""Derivatives of the fused operations: right, or refused by name; never silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import kernels
from kernels import reference

SEED = torch.tensor([3, 4])
ANGLES = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([[1, 2, 3, 4, 5], [6, -100, 0, 1, 2]])
WEIGHT = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))

# Each operation as a function of one tensor (2, 5, 8), given the module that has it.
CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention": lambda ops, x: ops.attention(*[x.unflatten(-1, (2, 4)).transpose(1, 2)] * 3),
    "attention, window and soft cap": lambda ops, x: ops.attention(
        *[x.unflatten(-1, (2, 4)).transpose(1, 2)] * 3, window=3, softcap=2.0
    ),
    "layer_norm": lambda ops, x: ops.layer_norm(x, WEIGHT[0], WEIGHT[1]),
    "rms_norm": lambda ops, x: ops.rms_norm(x, WEIGHT[0], residual=2 * x)[0],
    "linear_cross_entropy": lambda ops, x: ops.linear_cross_entropy(x, WEIGHT, TARGETS),
    "linear_cross_entropy, none": lambda ops, x: ops.linear_cross_entropy(
        x, WEIGHT, TARGETS, reduction="none"
    ),
    "linear_cross_entropy, soft cap": lambda ops, x: ops.linear_cross_entropy(
        x, WEIGHT, TARGETS, softcap=2.0
    ),
    "swiglu": lambda ops, x: ops.swiglu(x),
    "rotary": lambda ops, x: ops.rotary(x[:, None], *ANGLES),
    "dropout": lambda ops, x: ops.dropout(x, 0.5, seed=SEED),
}
LINEAR = ("rotary", "dropout")  # their gradient is the operation itself

every_operation = pytest.mark.parametrize("name", CALLS)
pytestmark = [
    pytest.mark.usefixtures("fused_device"),
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning"
    ),  # tanh of padding
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the interpreter shows it; arguments are on the CPU"
    ),
]


def x_and_tangent() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)


@every_operation
def test_forward_mode_is_refused(name: str) -> None:
    x, tangent = x_and_tangent()
    message = (
        f"kernels.{name.partition(',')[0]}: no forward-mode derivative .*use reverse mode, "
        f"or kernels.reference"
    )
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: CALLS[name](kernels, x), (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        CALLS[name](kernels, forward_ad.make_dual(x, tangent))
    with forward_ad.dual_level():
        CALLS[name](kernels, x)  # without a tangent nothing is lost


@every_operation
def test_a_tangent_of_the_incoming_gradient_is_refused(name: str) -> None:
    x = x_and_tangent()[0].requires_grad_()
    y = CALLS[name](kernels, x)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_torch_compile_refuses_forward_mode_too() -> None:
    x, tangent = x_and_tangent()
    compiled = torch.compile(
        lambda x: torch.func.jvp(lambda x: CALLS["layer_norm"](kernels, x), (x,), (tangent,)),
        backend="eager",
    )
    with pytest.raises(
        NotImplementedError, match=r"kernels\.layer_norm: no forward-mode derivative"
    ):
        compiled(x)


def test_the_twin_has_forward_mode() -> None:
    """Where the table chooses the twin, torch's own derivative comes out, which finite
    differences confirm.
    """
    x, tangent = (value.double() for value in x_and_tangent())

    def norm(x: Tensor) -> Tensor:
        return reference.layer_norm(x, WEIGHT[0].double(), WEIGHT[1].double())

    _, ours = torch.func.jvp(norm, (x,), (tangent,))
    torch.testing.assert_close(ours, (norm(x + 1e-6 * tangent) - norm(x - 1e-6 * tangent)) / 2e-6)


@pytest.mark.parametrize("mode", ["fused", "torch"])
@every_operation
def test_a_second_derivative_is_right_or_refused(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient with create_graph is right; differentiating it again is an error, or right
    where it is linear.
    """
    if mode == "torch":
        monkeypatch.setenv("MEGAGPT_KERNELS", "torch")
    x = x_and_tangent()[0].requires_grad_()
    y = CALLS[name](kernels, x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(CALLS[name](reference, x).square().sum(), x)
    torch.testing.assert_close(gradient.detach(), expected)
    if name in LINEAR:
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        twin = CALLS[name](reference, x)
        (plain,) = torch.autograd.grad(twin.square().sum(), x, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(plain.square().sum(), x)[0])
    elif mode == "fused" or name.startswith("linear_cross_entropy"):  # its chunks run on a CPU, too
        with pytest.raises(
            NotImplementedError, match=f"kernels.*{name.partition(',')[0]}.*: no second derivative"
        ):
            gradient.square().sum().backward()


@every_operation
def test_vmap_is_right(name: str) -> None:
    """torch loops over what an operator has no batching rule for."""
    x, other = x_and_tangent()
    mapped = torch.func.vmap(lambda x: CALLS[name](kernels, x))(torch.stack((x, other)))
    torch.testing.assert_close(
        mapped, torch.stack((CALLS[name](reference, x), CALLS[name](reference, other)))
    )


@every_operation
def test_functional_gradients_are_right_or_refused(name: str) -> None:
    """torch.func.grad cannot enter custom operators' gradients; the day that it can, it must be
    right.
    """
    x, _ = x_and_tangent()
    try:
        gradient = torch.func.grad(lambda x: CALLS[name](kernels, x).square().sum())(x)
    except RuntimeError as error:
        assert "functorch transforms" in str(error)  # noqa: PT017
        return
    expected = torch.func.grad(lambda x: CALLS[name](reference, x).square().sum())(x)
    torch.testing.assert_close(gradient, expected)
