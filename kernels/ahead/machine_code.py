"""What a kernel's machine code does while matrix products are running, read without a GPU.

A warp group's product (HGMMA in Hopper's machine code) runs beside the instructions after it, until
a WARPGROUP.DEPBAR waits for it. It may read its first operand from registers, which must not be
overwritten until then. ptxas 12.8 and 12.9 are reported to break that rule
(triton-lang/triton#11781). In attention, softmax should run at the same time.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"R(\d+)\b")
_OPERAND_REGISTERS = 4  # for each thread, 64 x 16 elements of 16 bits
_NO_RESULT = {
    "BAR", "BRA", "BSSY", "BSYNC", "CCTL", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "MEMBAR", "NOP",
    "RED", "REDG", "ST", "STG", "STL", "STS", "STSM", "SYNCS", "UTMALDG", "UTMASTG",
    "UTMACMDFLUSH", "WARPGROUP", "WARPSYNC",
}  # fmt: skip


@dataclass(frozen=True)
class InFlight:
    """Numbers of instructions that run while products are running."""

    overwritten_operands: int  # writes to registers that a product still reads: a miscompilation
    overlapped_exponentials: int  # exponentials of softmax


def disassemble(cubin: Path) -> str:
    """Return the machine code of a compiled kernel, by triton's cuobjdump."""
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run(
        [tool, "-sass", str(cubin)], check=True, capture_output=True, text=True
    ).stdout


def in_flight(listing: str) -> InFlight:
    """Count the instructions that run while products are running, in the listing's order.

    After an unconditional jump no product counts as running: a product whose wait comes later is
    not followed further.
    """
    running: list[set[int]] = []  # for each group of products: the registers that it reads
    group: set[int] = set()
    overwritten = exponentials = 0
    for condition, name, arguments in _INSTRUCTION.findall(listing):
        operands = [operand.strip() for operand in arguments.split(",")]
        if name.startswith("HGMMA"):
            group |= _registers(operands[1], _OPERAND_REGISTERS)
            if "gsb0" in operands:  # the last product of its group
                running = [*running, group]
                group = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            allowed = int(operands[-1], 0)
            running = running[max(0, len(running) - allowed) :]
        elif name in ("BRA", "EXIT") and not condition:
            running = []
            group = set()
        elif name.split(".")[0] not in _NO_RESULT:
            width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            overwritten += not _registers(operands[0], width).isdisjoint(group.union(*running))
            exponentials += name == "MUFU.EX2" and bool(running)
    return InFlight(overwritten, exponentials)


def _registers(operand: str, width: int) -> set[int]:
    """Return the numbers of ``width`` registers from this operand on.

    Empty if the operand is no register.
    """
    register = _REGISTER.match(operand)
    return set() if register is None else set(range(int(register[1]), int(register[1]) + width))
