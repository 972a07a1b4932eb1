"""A kernel as basic blocks of actions.

A block begins where a branch may lead, or after an instruction that may make a warp wait. All
meanings are looked up when the program is made, so an unknown instruction is an error before
anything runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels.emulator import (  # noqa: F401  # they fill the table of meanings
    EmulatorError,
    access,
    arithmetic,
    conversion,
    copies,
    matrices,
    synchronisation,
    warpgroup,
)
from kernels.emulator.instructions import (
    MEANINGS,
    SHARED_BASE,
    Action,
    Mask,
    Operands,
    elements,
    unknown,
)
from kernels.emulator.parser import Instruction, parse

EXIT = 1 << 30  # the block after the last
_ENDS = ("bra", "brx", "ret", "exit", "trap")
_NO_RESULT = {
    "st", "red", "cp", "bar", "barrier", "fence", "membar", "wgmma", "stmatrix", "prefetch",
    "mbarrier", "setmaxnreg", "griddepcontrol",
}  # fmt: skip


@dataclass
class Block:
    """Instructions that run without a jump, and how they end.

    ``end`` returns the next block, of the gang or of each thread; None is the next in order.
    """

    line: int
    actions: list[Action] = field(default_factory=list)
    end: Callable[[Any, Mask], Any] | None = None
    waits: Callable[[Any, Mask], Any] | None = None  # may ask warps to execute the block again
    whole_groups: bool = False  # only whole warp groups execute it, together


class Program:
    """What a kernel's text means, ready to run."""

    def __init__(self, text: str, name: str | None = None) -> None:
        self.kernel = parse(text, name)
        if self.kernel.threads % 32:
            raise EmulatorError(f"{self.kernel.name}: {self.kernel.threads} threads, need warps")
        self.fixed_shared = sum(size or 0 for size in self.kernel.shared.values())
        self.operands = Operands(self.kernel, self._place_shared())
        self.has_products = any(ins.name == "wgmma" for ins in self.kernel.instructions)
        self.unit = 1 if self._accesses_bytes() else 2
        self.starts = self._starts()
        self.blocks = [
            self._block(index, self.kernel.instructions[first:last])
            for index, (first, last) in enumerate(
                zip(self.starts, [*self.starts[1:], len(self.kernel.instructions)], strict=True)
            )
        ]

    def _place_shared(self) -> dict[str, int]:
        """Return addresses: those of a size first, then the memory that is given at launch."""
        at, places = SHARED_BASE, {}
        for symbol, size in sorted(self.kernel.shared.items(), key=lambda item: item[1] is None):
            places[symbol] = at
            at += -(-(size or 0) // 1024) * 1024
        self.launch_shared = at - SHARED_BASE
        return places

    def _accesses_bytes(self) -> bool:
        return any(
            ins.name in ("ld", "st") and ins.modifiers[-1] in ("b8", "u8", "s8")
            and any(name.startswith("shared") for name in ins.modifiers)
            for ins in self.kernel.instructions
        )  # fmt: skip

    def _starts(self) -> list[int]:
        """Return the indices of instructions that begin a block."""
        cuts = {0, *self._jump_targets()}
        for index, ins in enumerate(self.kernel.instructions):
            if ins.name in _ENDS or ins.name in ("bar", "barrier"):
                cuts.add(index + 1)
            elif ins.name == "mbarrier" and ins.modifiers[0] in ("try_wait", "test_wait"):
                cuts |= {index, index + 1}
            elif ins.name == "wgmma" and self._begins_products(index):
                cuts.add(index)
        return sorted(cut for cut in cuts if cut < len(self.kernel.instructions))

    def _jump_targets(self) -> set[int]:
        """Return the indices that jumps lead to; most labels are only for debuggers."""
        jumps = (ins for ins in self.kernel.instructions if ins.name == "bra")
        names = {ins.operands[0] for ins in jumps}.union(*self.kernel.tables.values())
        return {self.kernel.labels[name] for name in names if name in self.kernel.labels}

    def _begins_products(self, index: int) -> bool:
        return index == 0 or self.kernel.instructions[index - 1].name != "wgmma"

    def _block(self, index: int, instructions: list[Instruction]) -> Block:
        block = Block(instructions[0].line)
        block.whole_groups = any(ins.name == "wgmma" for ins in instructions)
        written = accessed = 0  # registers since the last mark, one bit each
        for ins in instructions:
            if ins.name in _ENDS:
                block.end = self._end(ins, index)
                continue
            action = self.action(ins)
            if ins.name == "mbarrier" and ins.modifiers[0] in ("try_wait", "test_wait"):
                block.waits = action
                continue
            if self.has_products:
                if ins.name == "wgmma" and ins.modifiers[0] in ("mma_async", "fence"):
                    fences = ins.modifiers[0] == "fence"
                    block.actions.append(_mark(written, accessed, fences))
                    written = accessed = 0
                if ins.name != "wgmma":
                    written |= 0 if ins.name in _NO_RESULT else self._bits(ins.operands[:1])
                    accessed |= self._bits(ins.operands)
            block.actions.append(action)
        if accessed:
            block.actions.append(_mark(written, accessed, False))
        return block

    def _bits(self, operands: tuple[str, ...]) -> int:
        """Return the 32-bit registers among operands, one bit each."""
        names = (name for operand in operands for name in elements(operand.strip("[] ")))
        rows = (self.operands.rows.get(name) for name in names)
        return sum({1 << row for width, row in filter(None, rows) if width == 32})

    def lines(self, blocks: set[int]) -> set[int]:
        """Return the lines of the instructions of some blocks."""
        ends = [*self.starts[1:], len(self.kernel.instructions)]
        return {
            ins.line
            for index in blocks
            for ins in self.kernel.instructions[self.starts[index] : ends[index]]
        }

    def action(self, ins: Instruction) -> Action:
        """Return what an instruction does, under its guard."""
        if ins.name not in MEANINGS:
            raise unknown(ins)
        action = MEANINGS[ins.name](ins, self.operands)
        if ins.guard is None:
            return action
        guard, negated = self._guard(ins), ins.negated

        def guarded(gang: Any, mask: Mask) -> Any:
            holds = gang.views[guard]
            holds = ~holds if negated else holds
            return action(gang, holds if mask is None else holds & mask)

        return guarded

    def _guard(self, ins: Instruction) -> int:
        assert ins.guard is not None
        return self.operands.source(ins, ins.guard, "pred")

    def _target(self, ins: Instruction, label: str) -> int:
        if label not in self.kernel.labels:
            raise unknown(ins, f"no label {label}")
        index = self.kernel.labels[label]
        return EXIT if index >= len(self.kernel.instructions) else self.starts.index(index)

    def _end(self, ins: Instruction, index: int) -> Callable[[Any, Mask], Any]:
        """Return where control goes: PTX ISA, "Control Flow Instructions"."""
        following = index + 1 if index + 1 < len(self.starts) else EXIT
        if ins.name == "trap":
            raise_trap = _trap(ins)
            return raise_trap if ins.guard is None else _guarded_trap(self._guard(ins), ins)
        if ins.name == "brx":
            table = self.kernel.tables.get(ins.operands[1])
            if table is None or ins.guard is not None or ins.modifiers[0] != "idx":
                raise unknown(ins)
            targets = np.array([self._target(ins, label) for label in table])
            which = self.operands.source(ins, ins.operands[0], "u32")
            return lambda gang, mask: targets[gang.views[which].astype(np.int64) % len(targets)]
        target = EXIT if ins.name in ("ret", "exit") else self._target(ins, ins.operands[0])
        if ins.guard is None:
            return lambda gang, mask: target
        guard, negated = self._guard(ins), ins.negated

        def branch(gang: Any, mask: Mask) -> Any:
            return np.where(gang.views[guard] ^ negated, target, following)

        return branch


def _mark(written: int, accessed: int, fences: bool) -> Action:
    """Return the action that notes registers as used since the last wgmma.fence, or forgets."""

    def run(gang: Any, mask: Mask) -> None:
        cta = gang.cta
        for warp in range(gang.first, gang.last):
            cta.written[warp] = 0 if fences else cta.written[warp] | written
            cta.accessed[warp] = 0 if fences else cta.accessed[warp] | accessed

    return run


def _trap(ins: Instruction) -> Callable[[Any, Mask], Any]:
    def run(gang: Any, mask: Mask) -> Any:
        raise EmulatorError(f"line {ins.line}: the kernel executed trap")

    return run


def _guarded_trap(guard: int, ins: Instruction) -> Callable[[Any, Mask], Any]:
    def run(gang: Any, mask: Mask) -> Any:
        holds = gang.views[guard] ^ ins.negated
        if (holds if mask is None else holds & mask).any():
            raise EmulatorError(f"line {ins.line}: the kernel executed trap")

    return run
