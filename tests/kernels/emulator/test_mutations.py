"""Does the emulator see what is missing? Each instruction that synchronises is removed, or
weakened, one at a time; what is not noticed is in a table, with the reason.

A change is noticed by a finding, an error, or a wrong number. ``mutations.csv`` says how many may
pass unnoticed, by kernel and kind, because the instruction is redundant where it stands.
"""

import csv
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.emulator import EmulatorError
from kernels.emulator.machine import Schedule
from kernels.fused import attention as fused_attention
from kernels.fused import norms
from kernels.hopper import attention as hopper_attention
from tests.support.kernels.mutations import KINDS, Mutation, mutations

TABLE = Path(__file__).with_name("mutations.csv")


def table() -> dict[tuple[str, str, str], int]:
    """How many mutations may pass: (gpu, kernel, kind) -> count."""
    with TABLE.open(newline="") as file:
        return {
            (x["gpu"], x["kernel"], x["kind"]): int(x["redundant"]) for x in csv.DictReader(file)
        }


@cache
def attention_case(length: int, key_length: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """q, k, v, the gradient of the output; and output and gradients in fp64."""
    generator = torch.Generator().manual_seed(0)
    lengths = (length, key_length, key_length, length)
    q, k, v, dy = (
        torch.randn(1, n, 1, 64, generator=generator).bfloat16().transpose(1, 2) for n in lengths
    )
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT / 8
    hidden = ~torch.ones(length, key_length).tril(key_length - length).bool()
    y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ exact[2]
    gradients = torch.autograd.grad(y, exact, dy.double())
    return [q, k, v], dy, [y.detach(), *gradients]


def backward_error(deterministic: bool) -> float:
    tensors, dy, truth = attention_case(150, 150)
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = fused_attention.attention(*leaves, deterministic=deterministic)
    return largest([y, *torch.autograd.grad(y, leaves, dy)], truth)


def forward_error() -> float:
    tensors, _, truth = attention_case(150, 150)
    return largest([fused_attention.attention(*tensors)], truth[:1])


def hopper_error() -> float:
    """128 queries: one CTA. 900 keys: every place in the ring is filled again."""
    tensors, _, truth = attention_case(128, 900)
    return largest([hopper_attention._forward(*tensors, 0.125, True, False)[0]], truth[:1])


def norm_error() -> float:
    x = torch.randn(11, 768, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weight = torch.ones(768, dtype=torch.bfloat16, requires_grad=True)
    y = norms.rms_norm(x, weight)
    wide = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    truth = torch.nn.functional.rms_norm(wide[0], (768,), wide[1], 1e-5)
    found = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    return largest([y, *found], [truth, *torch.autograd.grad(truth.sum(), wide)])


def largest(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error relative to the largest value; infinite for NaN."""
    errors = [
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, truth, strict=True)
    ]
    return max(math.inf if math.isnan(error) else error for error in errors)


KERNELS: dict[str, Callable[[], float]] = {
    "attention_forward": forward_error,
    "attention_backward_keys": partial(backward_error, False),
    "attention_backward_queries": partial(backward_error, True),
    "attention_forward_hopper": hopper_error,
    "norm_forward": norm_error,
    "norm_backward": norm_error,
}


Clean = tuple[str, set[int], float, set[tuple[str, int]]]
_CLEAN: dict[str, Clean] = {}


def places(gpu: Any) -> set[tuple[str, int]]:
    """Kind and line of each finding, those included that the plugin knows."""
    return {(finding.kind, finding.line) for _, finding in gpu.findings}


def clean(kernel: str, gpu: Any) -> Clean:
    """Of the whole kernel: its text, the lines that run, its error, and what is found in it."""
    if kernel not in _CLEAN:
        error = KERNELS[kernel]()
        done = next(done for done in gpu.launches if done.kernel == kernel)
        assert error < 0.02
        _CLEAN[kernel] = done.ptx, done.lines, error, places(gpu)
        gpu.launches.clear()
    return _CLEAN[kernel]


def noticed(mutation: Mutation, kernel: str, gpu: Any) -> bool:
    _, _, usual, known = clean(kernel, gpu)
    gpu.change_ptx = lambda name, text: mutation.apply(text) if name == kernel else text
    try:
        for timing in ("early", "late"):
            gpu.schedule = Schedule(timing, seed=1)
            gpu.launches.clear()
            try:
                error = KERNELS[kernel]()
            except EmulatorError:
                return True
            if error > 2 * usual or places(gpu) - known:
                return True
        return False
    finally:
        gpu.change_ptx = None
        gpu.launches.clear()


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_instruction_is_noticed(kind: str, kernel: str, emulated_gpu: Any) -> None:
    if kernel.endswith("hopper") and emulated_gpu.capability != (9, 0):
        pytest.skip("for compute capability 9.0 alone")
    text, lines, *_ = clean(kernel, emulated_gpu)
    changes = [m for m in mutations(text) if m.kind == kind and m.line in lines]
    if not changes:
        pytest.skip("it has none")
    passed = [m for m in changes if not noticed(m, kernel, emulated_gpu)]
    gpu = f"sm_{10 * emulated_gpu.capability[0]}"
    print(f"\nmutations {gpu},{kernel},{kind},{len(changes)},{len(passed)}")
    allowed = table().get((gpu, kernel, kind), 0)
    assert len(passed) <= allowed, [f"{m.line}: {m.before.strip()}" for m in passed]
