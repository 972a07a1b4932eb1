"""Is a fused operation as accurate as torch's own? Both are held against the same operation in
fp64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def outputs_and_gradients(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    **options: Any,
) -> dict[str, Tensor]:
    """What the function returns, and the gradient of every floating-point argument, from random
    output gradients.

    The numbers are the same whatever the dtype, None being that of each tensor: they are rounded to
    the dtype of the first of ``tensors`` first.
    """
    arguments = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    result = function(**arguments, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    given = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    seeds = [output_gradient(x, given, index) for index, x in enumerate(outputs)]
    leaves = {name: x for name, x in arguments.items() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return named | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def output_gradient(output: Tensor, given: torch.dtype, index: int = 0) -> Tensor:
    """The gradient that arrives at an output: random, rounded to the dtype ``given``, in the
    output's own dtype.
    """
    generator = torch.Generator().manual_seed(1 + index)
    return torch.randn(output.shape, generator=generator).to(given).to(output.device, output.dtype)


def assert_as_accurate_as_torch(
    op: str,
    tensors: dict[str, Tensor],
    ours: Callable[..., Any] | None = None,
    rounding: dict[str, float] | None = None,
    **options: Any,
) -> None:
    """Outputs and gradients of ``kernels.<op>`` (or ``ours``) are within twice the error of torch's
    in the same dtype.

    The rule of FlashAttention's tests (hopper/test_flash_attn.py), whose second term allows for
    rounding the result; and one unit in the last place of the largest value, for small results that
    torch rounds correctly by chance. ``rounding`` adds what is known of an operation's sums, by the
    name of the result.
    """
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    mixed = len({tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}) > 1
    twin = getattr(reference, op)
    fused = outputs_and_gradients(ours or getattr(kernels, op), tensors, None, **options)
    theirs = outputs_and_gradients(twin, tensors, None, **options)
    exact = outputs_and_gradients(twin, tensors, torch.float64, **options)
    for name, truth in exact.items():
        assert fused[name].dtype == theirs[name].dtype, name
        assert fused[name].shape == theirs[name].shape, name
        own = fused[name].dtype if mixed else dtype
        error, allowed = largest_error(fused[name], truth), 2 * largest_error(theirs[name], truth)
        shifted = (truth.to(own) + 0.3 - 0.3).double() - truth
        allowed += torch.finfo(own).eps * largest_error(truth, torch.zeros_like(truth))
        allowed += 2 * (shifted.abs().max().item() if shifted.numel() else 0.0)
        allowed += (rounding or {}).get(name, 0.0)
        assert error <= allowed, f"{op}: {name}: error {error:.3g}, torch's allows {allowed:.3g}"


def largest_error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference, infinite where either is not a number and the other is."""
    difference = (value.double() - truth).abs()
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0
