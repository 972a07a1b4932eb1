"""What an instruction needs to be given a meaning: its operands as slots, and a table of meanings.

A meaning is a function that reads an instruction once, checks every modifier, and returns an
action. The action is called whenever threads execute the instruction, with a ``Gang`` (a run of
consecutive warps at the same instruction) and the mask of those that take part (None: all).
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from kernels.emulator import UnknownInstructionError
from kernels.emulator.formats import FORMATS, STORAGE, Array, Format
from kernels.emulator.parser import Instruction, Kernel

SHARED_BASE = 1024  # where a kernel's shared memory begins in the shared window: 1024-aligned

Mask = Array | None


class Gang(Protocol):
    """Consecutive warps that execute one instruction together."""

    first: int  # warp
    last: int  # the warp after them
    threads: int
    warp_of: Array  # (threads,) the warp of each thread
    views: list[Array]  # by slot: the gang's part of a register, seen as some type
    cta: Any


Action = Callable[[Any, Mask], Any]
Meaning = Callable[[Instruction, "Operands"], Action]
MEANINGS: dict[str, Meaning] = {}


def meaning(*names: str) -> Callable[[Meaning], Meaning]:
    """Enter a function into the table, under the names of its instructions."""

    def enter(function: Meaning) -> Meaning:
        for name in names:
            MEANINGS[name] = function
        return function

    return enter


def unknown(ins: Instruction, why: str = "it has no meaning here") -> UnknownInstructionError:
    """Return the error for an instruction, or a form of one, that the emulator does not know."""
    return UnknownInstructionError(
        f"line {ins.line}: unknown instruction: {ins.text} ({why}); add it to kernels/emulator/"
    )


def allow(ins: Instruction, allowed: Iterable[str], at_most: int | None = None) -> None:
    """Raise for a modifier that is not among those allowed, or a number of operands above it."""
    if strange := set(ins.modifiers) - set(allowed):
        raise unknown(ins, f"modifier .{sorted(strange)[0]}")
    if at_most is not None and len(ins.operands) > at_most:
        raise unknown(ins, f"{len(ins.operands)} operands")


def put(target: Array, value: Array, mask: Mask) -> None:
    """Write the threads of the mask."""
    if mask is None:
        target[...] = value
    else:
        np.copyto(target, value, where=mask)


class Operands:
    """Registers, constants, special registers and parameters, all kept as registers.

    A slot is a pair of a register and a type to see it as; actions hold slots.
    """

    def __init__(self, kernel: Kernel, shared: dict[str, int]) -> None:
        self.kernel, self.shared = kernel, shared
        self.rows: dict[str, tuple[int, int]] = {}  # register -> (width, row of its file)
        self.heights = dict.fromkeys(STORAGE, 0)
        self.constants: dict[str, int] = {}  # register -> its bits
        self.specials: set[str] = set()  # set when a CTA starts: %tid.x, parameters
        self.slots: list[tuple[str, Any]] = []
        self._found: dict[tuple[str, Any], int] = {}
        self.parameters = dict(kernel.parameters)

    def slot(self, register: str, view: Any) -> int:
        """Return the slot of a register seen as a numpy type."""
        key = (register, np.dtype(view))
        if key not in self._found:
            self._found[key] = len(self.slots)
            self.slots.append(key)
        return self._found[key]

    def source(self, ins: Instruction, text: str, form: Format | str) -> int:
        """Return the slot of an operand that is read as this type.

        Of a register wider than the type, the low bits are read.
        """
        form = FORMATS[form] if isinstance(form, str) else form
        if text in self.shared:
            return self._constant(self.shared[text], form)
        if text in self.parameters:
            return self.special(ins, text, form)
        if text.startswith("%") and self.kernel.width(text) is None:
            return self.special(ins, text, form)
        width = self.kernel.width(text)
        if width is None:
            return self._constant(_literal(ins, text, form), form)
        if width != form.bits:
            raise unknown(ins, f"a register of {width} bits as .{form.name}")
        return self.slot(self._row(text, width), form.view)

    def target(self, ins: Instruction, text: str, form: Format | str) -> int:
        """Return the slot of a register that is written as this type."""
        form = FORMATS[form] if isinstance(form, str) else form
        if text == "_":
            return self.slot(self._row("_" + str(form.bits), form.bits), form.view)
        width = self.kernel.width(text)
        if width is None:
            raise unknown(ins, f"{text} is no declared register")
        if width != form.bits:
            raise unknown(ins, f"a register of {width} bits as .{form.name}")
        return self.slot(self._row(text, width), form.view)

    def whole(self, ins: Instruction, text: str) -> tuple[int, int]:
        """Return the slot of a register seen as an unsigned number, and its width.

        For the instructions that accept a register wider than their type.
        """
        width = self.kernel.width(text)
        if width is None:
            return self.source(ins, text, "b64" if text in self.parameters else "b32"), 32
        return self.slot(self._row(text, width), STORAGE[width]), width

    def special(self, ins: Instruction, name: str, form: Format) -> int:
        """Return the slot of a register that is set when a CTA starts."""
        known = name in self.parameters or re.fullmatch(
            r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid", name
        )
        if not known:
            raise unknown(ins, f"special register {name}")
        register = f"{name}:{form.bits}"
        self.specials.add(register)
        return self.slot(self._row(register, form.bits), form.view)

    def _constant(self, bits: int, form: Format) -> int:
        register = f"={bits:x}:{form.bits}"
        self.constants[register] = bits
        return self.slot(self._row(register, form.bits), form.view)

    def _row(self, register: str, width: int) -> str:
        if register not in self.rows:
            self.rows[register] = (width, self.heights[width])
            self.heights[width] += 1
        return register


def _literal(ins: Instruction, text: str, form: Format) -> int:
    """Return the bits of a constant as a number of this type."""
    try:
        if text.lower().startswith(("0f", "0d")) and form.name in ("f32", "f64", "b32", "b64"):
            return int(text[2:], 16)
        if form.name == "pred":
            return int(bool(int(text, 0)))
        if form.name in ("f32", "f64"):
            unsigned = np.uint32 if form.bits == 32 else np.uint64
            return int(np.array(float(text), form.view).view(unsigned))
        value = int(text.rstrip("U"), 0) & ((1 << form.bits) - 1)
        return value | value << 16 if form.packed == 2 and value < 1 << 16 else value
    except ValueError:
        raise unknown(ins, f"operand {text}") from None


def elements(text: str) -> list[str]:
    """Return the registers of ``{%r1, %r2}``, or of a single one."""
    return [part.strip() for part in text.strip().strip("{}").split(",")]


def address(ins: Instruction, text: str, operands: Operands) -> tuple[int, int]:
    """Return the slot and the constant offset of ``[%rd1 + 16]``."""
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    match = re.fullmatch(r"(\S+?)\s*(?:\+\s*(-?\w+))?", inner)
    if match is None:
        raise unknown(ins, f"address {text}")
    width = operands.kernel.width(match[1])
    if width is None and match[1] in operands.shared:
        width = 32
    if width not in (32, 64):
        raise unknown(ins, f"address {text}")
    return operands.source(ins, match[1], f"b{width}"), int(match[2] or "0", 0)
