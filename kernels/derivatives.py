"""Which derivatives fused operators have: the gradient, in reverse mode, once.

Any other derivative is an error. torch's custom operators drop forward-mode tangents silently, so
``torch.func.jvp`` would return zeros. The twins in ``kernels.reference`` are plain torch, which has
every derivative.
"""

from collections.abc import Callable
from typing import Any, Never

from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef


def refuse_tangents(op: str, *values: Any) -> None:
    """Raise NotImplementedError if a tensor has a forward-mode tangent."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values):
        raise NotImplementedError(
            f"kernels.{op}: no forward-mode derivative (found an input with a tangent, which "
            "torch.func.jvp, jacfwd and forward_ad.make_dual create); use reverse mode, or "
            f"{_plain(op)}"
        )


def register_gradient(
    operator: CustomOpDef, op: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Register the gradient of an operator of ``kernels.<op>``; refuse tangents in it."""

    def without_tangents(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_tangents(op, *gradients)
        return backward(ctx, *gradients)

    operator.register_autograd(without_tangents, setup_context=setup_context)


def refuse_second_order(operator: CustomOpDef, op: str) -> None:
    """Make a second derivative of ``kernels.<op>`` raise NotImplementedError.

    ``operator`` is the one that computes the gradient.
    """

    def refuse(ctx: Any, *gradients: Tensor | None) -> Never:
        raise NotImplementedError(
            f"kernels.{op}: no second derivative (its gradient was differentiated, which "
            f"create_graph=True allows); use {_plain(op)}"
        )

    operator.register_autograd(refuse)


def _plain(op: str) -> str:
    """Return what to call instead to get any derivative."""
    if op == "attention":  # torch's fused SDPA has no second derivative either
        return "kernels.reference.attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    return f"kernels.reference.{op}"
