"""Matrix products of a warp group, which run beside what follows them.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". A product reads shared memory through
the asynchronous proxy, and its registers, at any time between its start and the end of the wait for
it: early ones at once, late ones in the wait. Until then its result is undefined (NaN). It is
finished for all four warps at once.
"""

import re
from functools import lru_cache
from typing import Any

import numpy as np

from kernels.emulator import EmulatorError
from kernels.emulator.copies import CopyQueue, swizzled
from kernels.emulator.formats import Array
from kernels.emulator.instructions import (
    SHARED_BASE,
    Action,
    Mask,
    Operands,
    allow,
    elements,
    meaning,
    unknown,
)
from kernels.emulator.matrices import accumulators, as_numbers, as_registers, left, whole_warps
from kernels.emulator.parser import Instruction

WARPS = 4
_ROWS = 64
_UNDEFINED = 0xFFFFFFFF  # a NaN
_SPANS = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of the swizzle, by the last two bits of a descriptor


@lru_cache(maxsize=4096)
def operand_places(descriptor: int, rows: int, itemsize: int, is_transposed: bool) -> Array:
    """Return where a product's operand lies: offsets in shared memory of (rows, 32 bytes of K).

    PTX ISA, "Matrix Descriptor Format" and "Shared Memory Matrix Layout". ``rows`` counts M or N.
    K-major operands have 8 rows one after another, each the swizzle's span wide; transposed ones
    have K one after another, and each row of the swizzle holds elements of M or N.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    span = _SPANS[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise EmulatorError("matrix descriptor: a base offset is not emulated")
    row = np.arange(rows)[:, None]
    k = np.arange(32 // itemsize)[None, :]
    if is_transposed:
        width = max(span, 16) // itemsize
        of_row = row // width * (leading if span else stride) + row % width * itemsize
        of_k = k // 8 * (stride if span else leading) + k % 8 * max(span, 16)
    else:
        of_row = row // 8 * stride + row % 8 * max(span, 16)
        of_k = k * itemsize if span else k * itemsize // 16 * leading + k * itemsize % 16
    return swizzled(start + of_row + of_k, span) - SHARED_BASE


class Product:
    """One wgmma.mma_async of a warp group, in flight."""

    def __init__(self, form: "_Form", gang: Any, first: int, use: bool, late: bool) -> None:
        self.form, self.cta, self.first, self.late = form, gang.cta, first, late
        self.lanes = slice(32 * first, 32 * (first + WARPS))
        self.group = first // WARPS
        at = 32 * (first - gang.first)
        self.b = self._operand(int(gang.views[form.b][at]), form.columns, form.b_transposed)
        self.a = None
        if form.a_slot is not None:
            self.a = self._operand(int(gang.views[form.a_slot][at]), _ROWS, form.a_transposed)
        self.initial = self._registers(form.d_rows).view(np.float32) if use else None
        self.next: Product | None = None  # adds to this one's result

    def _operand(self, descriptor: int, rows: int, transposed: bool) -> tuple[Array, Array]:
        """Return the places of an operand and which of them are stale; count them as in use."""
        itemsize = 4 if self.form.kind == "tf32" else 2
        try:
            places = operand_places(descriptor, rows, itemsize, transposed)
        except EmulatorError as error:
            raise EmulatorError(f"line {self.form.line}: {error}") from None
        if places.min() < 0 or places.max() + itemsize > self.cta.shared.size:
            raise EmulatorError(
                f"line {self.form.line}: a product reads bytes {places.min()} to "
                f"{places.max() + itemsize - 1} of {self.cta.shared.size} in shared memory"
            )
        tracker = self.cta.shared.tracker
        warps = slice(self.first, self.first + WARPS)
        units = places // tracker.unit
        tracker.check_async_read(warps, units, self.form.line)
        tracker.in_use[units] += 1
        return places, tracker.unfenced(warps, units, self.form.line, "wgmma")

    def _registers(self, rows: Array) -> Array:
        return self.cta.files[32][rows, self.lanes]

    def _matrix(self, operand: tuple[Array, Array]) -> Array:
        """Return an operand in shared memory as fp32 (rows, K)."""
        places, stale = operand
        view = np.uint32 if self.form.kind == "tf32" else np.uint16
        size = np.dtype(view).itemsize
        memory = self.cta.shared.bytes.view(view)[places // size]
        if stale.any():
            memory = np.where(stale, self.cta.shared.older.view(view)[places // size], memory)
        return as_numbers(memory, self.form.kind)

    def result(self) -> Array:
        """Return what the product adds up to, as (registers, threads)."""
        form = self.form
        if self.a is None:
            a = left(self._registers(form.a_rows), form.kind)
        else:
            a = self._matrix(self.a).reshape(WARPS, 16, -1)
        product = (form.signs * a) @ self._matrix(self.b).T
        if self.initial is not None:
            product = product + accumulators(self.initial)
        return as_registers(product).view(np.uint32)

    def finish(self) -> None:
        """End the product, which its warps have waited for."""
        if self.late:
            result = self.result()
            if self.next is not None:
                self.next.initial = result.view(np.float32)
            else:
                self.cta.files[32][self.form.d_rows, self.lanes] = result
        self.release()

    def release(self) -> None:
        """Note that the operands in shared memory have been read."""
        clocks, tracker = self.cta.clocks, self.cta.shared.tracker
        agent = clocks.first_group + self.group
        clock = int(clocks.seen[self.first, agent]) + 1
        for operand in filter(None, (self.a, self.b)):
            units = operand[0] // tracker.unit
            tracker.in_use[units] -= 1
            tracker.note_async_read(agent, clock, units)
        clocks.seen[self.first : self.first + WARPS, agent] = clock


class _Form:
    """What is the same each time one wgmma.mma_async is executed."""

    def __init__(self, ins: Instruction, operands: Operands) -> None:
        found = re.fullmatch(
            r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3",
            ".".join(ins.modifiers),
        )
        if found is None or int(found[2]) != (8 if found[3] == "tf32" else 16):
            raise unknown(ins, "a shape or a type of products that is not known")
        self.columns, self.kind, self.line = int(found[1]), found[3], ins.line
        d, a, b, use, *rest = ins.operands
        if len(elements(d)) != self.columns // 2 or len(rest) < 2:
            raise unknown(ins, "operands")
        self.d_rows = self._rows(ins, operands, d)
        self.a_rows, self.a_slot = np.array([], int), None
        if a.startswith("{"):
            self.a_rows = self._rows(ins, operands, a)
        else:
            self.a_slot = operands.source(ins, a, "b64")
        self.b = operands.source(ins, b, "b64")
        self.use = operands.source(ins, use, "pred")
        scales, transposes = [int(x, 0) for x in rest[:2]], [int(x, 0) for x in rest[2:]]
        self.signs = np.float32(scales[0] * scales[1])
        self.b_transposed = bool(transposes and transposes[-1])
        self.a_transposed = bool(transposes[0]) if len(transposes) == 2 else False

    def _rows(self, ins: Instruction, operands: Operands, text: str) -> Array:
        """Return the rows of the register file that hold a list of registers."""
        slots = [operands.source(ins, name, "b32") for name in elements(text)]
        return np.array([operands.rows[operands.slots[slot][0]][1] for slot in slots])


class ProductQueue(CopyQueue):
    """The products of one warp group."""

    def start(self, form: _Form, gang: Any, first: int, use: bool) -> None:
        """Start a product; an early one only where all before it were early."""
        cta = gang.cta
        waiting = [p for p in self.unfinished() if p.late]
        product = Product(form, gang, first, use, bool(waiting) or cta.is_late())
        files = cta.files[32]
        self._check_order(product)
        if not product.late:
            files[form.d_rows, product.lanes] = product.result()
        else:
            same = [p for p in waiting if p.form.d_rows[0] == form.d_rows[0]]
            if same and use:
                same[-1].next = product
            files[form.d_rows, product.lanes] = _UNDEFINED
        self.open.append(product)

    def _check_order(self, product: Product) -> None:
        """Report registers that were used since the last wgmma.fence.

        Accumulators are then undefined. Fragments of A are used as they are: ptxas orders them, as
        the machine code shows.
        """
        form, cta = product.form, product.cta
        warps = slice(product.first, product.first + WARPS)
        for what, rows, marks in (
            ("accumulates onto registers used", form.d_rows, cta.accessed[warps]),
            ("multiplies registers written", form.a_rows, cta.written[warps]),
        ):
            if not any(mark >> int(row) & 1 for mark in marks for row in rows):
                continue
            product.cta.findings.add(
                f"wgmma {what} since the last wgmma.fence",
                form.line,
                f"warps {product.first} to {product.first + WARPS - 1}",
            )
            if rows is form.d_rows and product.initial is not None:
                product.initial = np.full_like(product.initial, np.nan)


@meaning("wgmma")
def warpgroup(ins: Instruction, operands: Operands) -> Action:
    """Distinguish fence, product, commit and wait."""
    kind = ins.modifiers[0]
    if kind == "mma_async":
        return _multiply(ins, operands)
    allow(ins, {"fence", "commit_group", "wait_group", "sync", "aligned"}, 1)
    if kind == "fence":
        return lambda gang, mask: None  # the program orders registers by where it stands
    if kind == "commit_group":
        return _commit
    if kind != "wait_group":
        raise unknown(ins)
    allowed = int(ins.operands[0], 0)

    def wait(gang: Any, mask: Mask) -> None:
        for queue in _queues(gang):
            for product in queue.take(allowed):
                product.finish()

    return wait


def _commit(gang: Any, mask: Mask) -> None:
    for queue in _queues(gang):
        queue.commit()


def _queues(gang: Any) -> list[ProductQueue]:
    return gang.cta.products[gang.first // WARPS : gang.last // WARPS]


def _multiply(ins: Instruction, operands: Operands) -> Action:
    form = _Form(ins, operands)

    def run(gang: Any, mask: Mask) -> None:
        if not whole_warps(gang, mask, ins):
            return
        for first in range(gang.first, gang.last, WARPS):
            use = gang.views[form.use][32 * (first - gang.first)]
            gang.cta.products[first // WARPS].start(form, gang, first, bool(use))

    run.form = form  # type: ignore[attr-defined]  # the program asks which registers it reads
    return run
