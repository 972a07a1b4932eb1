"""Compile Triton functions for GPUs that are not here, and read from the machine code what would make them slow.

A module with kernels publishes ``AHEAD_OF_TIME: list[AheadOfTime]``: the shipped configurations. Compiling needs only
the assembler that triton carries, no GPU, but a process without TRITON_INTERPRET.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AheadOfTime:
    """One shipped configuration of a Triton function.

    ``signature`` maps run-time arguments to triton types, e.g. ``{"x": "*bf16", "rows": "i32", "stride": "i32:16"}``;
    pointers are taken as 16-byte aligned, and ``:16`` marks an integer divisible by 16. ``constants`` are the
    compile-time arguments (and run-time ones that triton would specialise, such as a stride of 1).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
