"""Tensors of more than 2^31 elements, on a GPU that holds them: what lies beyond is computed as
if it were alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.fused import cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
        reason="needs a GPU with 60 GiB",
    ),
]
BEYOND = 2**31 + 2**13


def assert_last_as_if_alone(
    function: Callable[..., Tensor], inputs: list[Tensor], samples: int = 2
) -> None:
    """The last ``samples`` of the inputs give the same bits among all the others as alone,
    forward and backward.
    """

    def run(*given: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        out = function(*leaves)
        return [x[-samples:] for x in (out, *torch.autograd.grad(out, leaves, out.detach()))]

    for among, alone in zip(run(*inputs), run(*(x[-samples:] for x in inputs)), strict=True):
        assert torch.equal(among, alone)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def memory(fused_device: str) -> Any:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("columns", [4096, 16_384])
def test_norms(columns: int) -> None:
    weight, bias = random(columns), random(columns)
    assert_last_as_if_alone(
        lambda x: kernels.layer_norm(x, weight, bias), [random(BEYOND // columns + 3, columns)]
    )


def test_swiglu() -> None:
    assert_last_as_if_alone(kernels.swiglu, [random(BEYOND // 4096, 4096)])


def test_dropout() -> None:
    x = random(BEYOND // (128 * 256) + 3, 128, 256)
    seeds = torch.arange(len(x), device="cuda")
    assert_last_as_if_alone(lambda x: kernels.dropout(x, 0.1, seed=seeds[-len(x) :]), [x])


def test_rotary() -> None:
    angles = torch.outer(torch.arange(128.0), torch.arange(32.0)).cuda()
    x = random(BEYOND // (128 * 64), 1, 128, 64)
    assert_last_as_if_alone(lambda x: kernels.rotary(x, angles.cos(), angles.sin()), [x])


def test_attention() -> None:
    inputs = [random(BEYOND // (128 * 64), 1, 128, 64) for _ in range(3)]
    assert_last_as_if_alone(lambda q, k, v: kernels.attention(q, k, v, deterministic=True), inputs)


def test_cross_entropy() -> None:
    logits, targets = random(BEYOND // 4096, 4096), torch.full((BEYOND // 4096,), 7, device="cuda")
    among, alone = (
        cross_entropy._statistics(logits, targets),
        cross_entropy._statistics(logits[-2:], targets[-2:]),
    )
    assert torch.equal(among[:, -2:], alone)
    scales, normaliser = torch.ones_like(among[0]), torch.stack((among[0], among[1].log()), dim=1)
    last = logits[-2:].clone()
    cross_entropy._gradient(logits, targets, normaliser, scales, 0.0)
    cross_entropy._gradient(last, targets[-2:], normaliser[-2:], scales[-2:], 0.0)
    assert torch.equal(logits[-2:], last)
