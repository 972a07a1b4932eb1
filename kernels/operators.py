"""Operators that torch's dispatcher sees only while something watches it.

A custom operator costs 50 microseconds a call and 150 more for its gradient, which is longer than
many of these kernels run. An ordinary eager call therefore runs the same function inside a
``torch.autograd.Function``. Where torch.compile, torch.func, a mode of the dispatcher (FLOP
counters, fake tensors, selective checkpoints) or a tensor subclass looks on, the custom operator is
called, with its schema and its shape function. ``python -m benchmarks.host_cost`` measures both.
"""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Types that need no closer look: asking whether something else is a tensor costs more.
_TENSORS = frozenset((Tensor, Parameter))
_KNOWN = _TENSORS | {type(None), bool, int, float, str, torch.dtype}


def ordinary(values: Any) -> bool:
    """Return whether a call on these values is plain eager work that nothing watches."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for value in values:  # noqa: SIM110  # a generator costs more than all comparisons
        if type(value) not in _KNOWN and isinstance(value, Tensor):
            return False
    return True


class Operator:
    """A function of tensors that is also ``torch.ops.megagpt.<name>``.

    Called like the function, with positional arguments. Its results must be new tensors.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.definition = torch.library.custom_op(f"megagpt::{name}", function, mutates_args=())
        self.overload = getattr(torch.ops.megagpt, name).default
        self.differentiable: type[torch.autograd.Function] | None = None

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """Register the function that returns empty results; return it."""
        self.definition.register_fake(shapes)
        return shapes

    def register_gradient(
        self, op: str, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """Register the gradient, as ``torch.library.register_autograd``; refuse tangents in it.

        ``op`` is the public operation, for messages.
        """

        def without_tangents(ctx: Any, *gradients: Tensor | None) -> Any:
            if forward_ad._current_level >= 0:
                refuse_tangents(op, *gradients)
            return backward(ctx, *gradients)

        self.definition.register_autograd(without_tangents, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        self.differentiable = type(
            self.name,  # which a profiler shows
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(without_tangents)},
        )

    def refuse_second_order(self, op: str) -> None:
        """Make a second derivative of ``kernels.<op>``, whose gradient this is, raise an error."""

        def refuse(ctx: Any, *gradients: Tensor | None) -> Never:
            raise NotImplementedError(
                f"kernels.{op}: no second derivative (its gradient was differentiated, which "
                f"create_graph=True allows); use {_plain(op)}"
            )

        self.definition.register_autograd(refuse)

    def __call__(self, *inputs: Any) -> Any:
        if not ordinary(inputs):
            return self.overload(*inputs)
        if not torch.is_grad_enabled():
            return self.function(*inputs)
        for value in inputs:
            if type(value) in _TENSORS and value.requires_grad:
                differentiable = self.differentiable
                return differentiable.apply(*inputs) if differentiable else self.overload(*inputs)
        return self.function(*inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make the decorated function the operator ``torch.ops.megagpt.<name>``."""
    return lambda function: Operator(name, function)


def refuse_tangents(op: str, *values: Any) -> None:
    """Raise NotImplementedError if a tensor has a forward-mode tangent.

    The operators have the gradient in reverse mode only. torch's custom operators drop tangents
    silently, so ``torch.func.jvp`` would return zeros. The twins in ``kernels.reference`` are plain
    torch, which has every derivative.
    """
    if forward_ad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values):
        raise NotImplementedError(
            f"kernels.{op}: no forward-mode derivative (found an input with a tangent, which "
            "torch.func.jvp, jacfwd and forward_ad.make_dual create); use reverse mode, or "
            f"{_plain(op)}"
        )


def _plain(op: str) -> str:
    """Return what to call instead to get any derivative."""
    if op == "attention":  # torch's fused SDPA has no second derivative either
        return "kernels.reference.attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    return f"kernels.reference.{op}"
