"""Matrices spread over the threads of a warp: ldmatrix, stmatrix, mma.

PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions". Thread 4 g + t of a warp has row g
and columns 2 t and 2 t + 1 of each 8 x 8 matrix of 16-bit elements.
"""

import re
from typing import Any

import numpy as np

from kernels.emulator import EmulatorError
from kernels.emulator.formats import Array, bf16_to_float
from kernels.emulator.instructions import (
    Action,
    Mask,
    Operands,
    address,
    allow,
    elements,
    meaning,
    unknown,
)
from kernels.emulator.parser import Instruction

_COUNTS = {"x1": 1, "x2": 2, "x4": 4}


def whole_warps(gang: Any, mask: Mask, ins: Instruction) -> bool:
    """Return whether all threads take part; none may, some must not."""
    if mask is None or mask.all():
        return True
    if mask.reshape(-1, 32).any():
        raise EmulatorError(f"line {ins.line}: only some threads of a warp execute {ins.text}")
    return False


def as_numbers(words: Array, kind: str) -> Array:
    """Return 16-bit words as bf16 or fp16, or 32-bit words as tf32, in fp32."""
    if kind == "bf16":
        return bf16_to_float(words)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    return (words & np.uint32(0xFFFFE000)).view(np.float32)  # tf32: the low bits do not count


@meaning("ldmatrix")
def load_matrices(ins: Instruction, operands: Operands) -> Action:
    """Load 8 x 8 matrices; thread 8 j + r has the address of row r of matrix j."""
    allow(ins, {"sync", "aligned", "m8n8", "trans", "shared", "shared::cta", "b16", *_COUNTS}, 2)
    count = next(_COUNTS[name] for name in ins.modifiers if name in _COUNTS)
    slot, offset = address(ins, ins.operands[1], operands)
    targets = [operands.target(ins, name, "b32") for name in elements(ins.operands[0])]
    transposes = "trans" in ins.modifiers
    if len(targets) != count:
        raise unknown(ins, "registers")

    def run(gang: Any, mask: Mask) -> None:
        if not whole_warps(gang, mask, ins):
            return
        where = gang.views[slot].reshape(-1, 32)[:, : 8 * count].ravel() + np.uint32(offset)
        shared = gang.cta.shared
        offsets = shared.offsets(where, 16, ins.line)
        warps = gang.warp_of[::32].repeat(8 * count)
        rows = shared.load(warps, offsets, 16, ins.line).view(np.uint16).reshape(-1, count, 8, 8)
        if transposes:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        words = rows.view(np.uint32)  # (warps, matrices, g, t)
        for index, target in enumerate(targets):
            gang.views[target][:] = words[:, index].ravel()

    return run


@meaning("stmatrix")
def store_matrices(ins: Instruction, operands: Operands) -> Action:
    """Store 8 x 8 matrices, as ldmatrix loads them."""
    allow(ins, {"sync", "aligned", "m8n8", "trans", "shared", "shared::cta", "b16", *_COUNTS}, 2)
    count = next(_COUNTS[name] for name in ins.modifiers if name in _COUNTS)
    slot, offset = address(ins, ins.operands[0], operands)
    sources = [operands.source(ins, name, "b32") for name in elements(ins.operands[1])]
    transposes = "trans" in ins.modifiers

    def run(gang: Any, mask: Mask) -> None:
        if not whole_warps(gang, mask, ins):
            return
        where = gang.views[slot].reshape(-1, 32)[:, : 8 * count].ravel() + np.uint32(offset)
        shared = gang.cta.shared
        offsets = shared.offsets(where, 16, ins.line)
        words = np.stack([gang.views[source].reshape(-1, 8, 4) for source in sources], axis=1)
        rows = words.view(np.uint16)  # (warps, matrices, 8, 8)
        if transposes:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        warps = gang.warp_of[::32].repeat(8 * count)
        shared.store(warps, offsets, rows.view(np.uint8).reshape(-1, 16), ins.line)

    return run


# ---------------------------------------------------------------- the fragments of a warp's product


def left(registers: Array, kind: str) -> Array:
    """Return A, (warps, 16, k), from (registers, threads): rows g, g + 8, then further columns."""
    words = _elements(registers, kind)  # (columns, rows, warps, g, t, elements)
    words = words.transpose(2, 1, 3, 0, 4, 5)
    return as_numbers(words.reshape(words.shape[0], 16, -1), kind)


def right(registers: Array, kind: str) -> Array:
    """Return B, (warps, k, 8), from (registers, threads): thread 4 g + t has column g."""
    words = _elements(registers, kind)
    words = words.reshape(-1, *words.shape[2:]).transpose(1, 0, 3, 4, 2)
    return as_numbers(words.reshape(words.shape[0], -1, 8), kind)


def _elements(registers: Array, kind: str) -> Array:
    """Return the elements of registers as (pairs, 2 or 1, warps, 8, 4, elements)."""
    view = np.uint32 if kind == "tf32" else np.uint16
    rows = 2 if len(registers) % 2 == 0 else 1
    shape = (-1, rows, registers.shape[1] // 32, 8, 4, 1 if kind == "tf32" else 2)
    return np.ascontiguousarray(registers).view(view).reshape(shape)


def accumulators(registers: Array) -> Array:
    """Return C, (warps, 16, n), from fp32 (registers, threads): per 8 columns, two of each row."""
    blocks = registers.reshape(-1, 2, 2, registers.shape[1] // 32, 8, 4)  # j, h, c, warp, g, t
    return blocks.transpose(3, 1, 4, 0, 5, 2).reshape(blocks.shape[3], 16, -1)


def as_registers(product: Array) -> Array:
    """Return (registers, threads) from D, (warps, 16, n): the way back."""
    warps, _, columns = product.shape
    blocks = product.reshape(warps, 2, 8, columns // 8, 4, 2)  # warp, h, g, j, t, c
    return blocks.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, 32 * warps)


_SHAPES = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "f16"),
           ("m16n8k8", "tf32"), ("m16n8k4", "tf32")}  # fmt: skip


@meaning("mma")
def multiply(ins: Instruction, operands: Operands) -> Action:
    """Compute D = A B + C in fp32 of 16-bit or tf32 operands."""
    found = re.fullmatch(
        r"mma\.sync\.aligned\.(m\d+n\d+k\d+)\.row\.col\.f32\.(\w+)\.\2\.f32",
        ".".join((ins.name, *ins.modifiers)),
    )
    if found is None or (found[1], found[2]) not in _SHAPES or len(ins.operands) != 4:
        raise unknown(ins, "a shape or a type of products that is not known")
    kind = found[2]
    targets = [operands.target(ins, name, "f32") for name in elements(ins.operands[0])]
    a, b = ([operands.source(ins, n, "b32") for n in elements(t)] for t in ins.operands[1:3])
    c = [operands.source(ins, name, "f32") for name in elements(ins.operands[3])]

    def run(gang: Any, mask: Mask) -> None:
        if not whole_warps(gang, mask, ins):
            return
        views = gang.views
        product = left(np.stack([views[s] for s in a]), kind) @ right(
            np.stack([views[s] for s in b]), kind
        )
        added = accumulators(np.stack([views[s] for s in c])) + product
        for target, values in zip(targets, as_registers(added), strict=True):
            views[target][:] = values

    return run
