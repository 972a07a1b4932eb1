"""Rotary embedding: accuracy, strides of the fused projection, exact quarter turns, arguments
refused by name.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference
from kernels.fused import rotary as rotary_embedding
from tests.support.kernels.accuracy import DTYPES, assert_as_accurate_as_torch
from tests.support.kernels.refusals import moved, refused


def angles(length: int, head_dim: int, device: str) -> dict[str, Tensor]:
    """The usual table: position times 10,000^(-2i / head_dim)."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    table = torch.outer(torch.arange(length).float(), frequencies).to(device)
    return {"cosine": table.cos(), "sine": table.sin()}


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 33, 64), (1, 1, 1, 2), (1, 2, 5, 80), (2, 1, 7, 128)])
def test_accuracy(
    fused_device: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = angles(shape[2], shape[3], fused_device)
    twin = reference.rotary
    monkeypatch.setattr(reference, "rotary", lambda x: twin(x, **table))
    x = random(shape, dtype, fused_device)
    assert_as_accurate_as_torch("rotary", {"x": x}, lambda x: kernels.rotary(x, **table))
    assert kernels.launches() == {"rotary_rotate": 2}


def test_the_strides_of_a_fused_projection(fused_device: str) -> None:
    """Queries and keys as views into one projection, and the transposed gradient that attention
    sends back.
    """
    batch, length, heads, head_dim = 2, 9, 4, 16
    table = angles(length, head_dim, fused_device)
    projection = random((batch, length, heads * head_dim), torch.float32, fused_device)
    gradients = []
    for function in (kernels.rotary, reference.rotary):
        leaf = projection.detach().requires_grad_()
        q = leaf.view(batch, length, heads, head_dim).transpose(1, 2)
        turned = function(q[:, 1:], **table).transpose(1, 2).flatten(2)
        (turned.square().sum() + turned.sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_channels_further_apart_than_31_bits(fused_device: str, tmp_path: Path) -> None:
    """Four channels 2^30 elements apart: all of them lie in a file with holes, or in six GiB of
    a GPU.
    """
    count, stride = 3 * 2**30 + 2, 2**30
    if fused_device == "cpu":
        storage = torch.from_file(
            str(tmp_path / "sparse"), shared=True, size=count, dtype=torch.float16
        )
    else:
        storage = torch.empty(count, dtype=torch.float16, device=fused_device)
    x = storage.as_strided((1, 1, 2, 4), (0, 0, 1, stride))
    x.copy_(random((1, 1, 2, 4), torch.float16, fused_device))
    table = angles(2, 4, fused_device)
    assert torch.equal(kernels.rotary(x, **table), kernels.rotary(x.contiguous(), **table))


def test_more_heads_than_the_second_axis_of_a_grid_holds(
    fused_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = []
    monkeypatch.setattr(
        rotary_embedding, "launch", lambda kernel, grid, *_, **__: grids.append(grid)
    )
    kernels.rotary(torch.zeros(300, 300, 40, 2, device=fused_device), **angles(40, 2, fused_device))
    assert grids == [(2 * 300 * 300,)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quarter_turns_are_exact(fused_device: str, dtype: torch.dtype) -> None:
    x = torch.arange(1.0, 9.0).view(1, 1, 2, 4).to(fused_device, dtype)
    cosine, sine = torch.zeros(2, 2, device=fused_device), torch.ones(2, 2, device=fused_device)
    expected = torch.tensor([[-3.0, -4.0, 1.0, 2.0], [-7.0, -8.0, 5.0, 6.0]]).to(
        fused_device, dtype
    )
    assert torch.equal(kernels.rotary(x, cosine, sine)[0, 0], expected)


def test_the_operator_is_sound_for_compilers(fused_device: str) -> None:
    x = random((1, 2, 3, 8), torch.float32, fused_device).requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        rotary_embedding._rotary.overload,
        (x, *angles(3, 8, fused_device).values(), False),
        test_utils=checks,
    )


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    heads=st.integers(1, 4),
    length=st.integers(0, 70),
    half=st.integers(1, 40),
    rest=st.integers(0, 30),
    batched=st.booleans(),
)
def test_any_shape(
    fused_device: str, heads: int, length: int, half: int, rest: int, batched: bool
) -> None:
    """Some of the channels are rotated, or all of them; samples have the same positions, or not."""
    x, table = (
        random((2, heads, length, 2 * half + rest), torch.float32, fused_device),
        angles(length, 2 * half, fused_device),
    )
    if batched:
        table = {name: torch.stack((of, of.flip(0)))[:, None] for name, of in table.items()}
    gradients = []
    for function in (kernels.rotary, reference.rotary):
        leaf = x.detach().requires_grad_()
        function(leaf, **table).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    turned = kernels.rotary(x, **table)
    torch.testing.assert_close(turned, reference.rotary(x, **table))
    assert torch.equal(turned[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((3, 4, 8), {}, r"x has shape \(3, 4, 8\), expected \(batch, heads, length, head_dim\)"),
        (
            (1, 3, 4, 7),
            {},
            r"cosine has shape \(4, 4\), expected \(4, pairs\) with at most half of x's 7 channels",
        ),
        ((1, 3, 4, 8), {"sine": torch.ones(4, 3)}, r"sine has shape \(4, 3\), expected \(4, 4\)"),
        (
            (1, 3, 4, 8),
            {"cosine": torch.ones(4, 4).half()},
            "cosine has dtype torch.float16, expected torch.float32",
        ),
    ],
)
def test_bad_arguments_are_named(
    fused_device: str,
    mode_of_bad_input: None,
    shape: tuple[int, ...],
    change: dict[str, Tensor],
    message: str,
) -> None:
    table = angles(4, 8, fused_device) | moved(change, fused_device)
    refused("rotary", message, {"x": random(shape, torch.float32, fused_device), **table})
