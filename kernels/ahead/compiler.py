"""Compile Triton functions for GPUs that are not here, and read what would make them slow.

A module with kernels publishes ``AHEAD_OF_TIME: list[AheadOfTime]``: the configurations it ships.
Compiling needs only triton's assembler, no GPU, and a process without TRITON_INTERPRET.

    python -m kernels.ahead.compiler [--capability 90] [--names NAME ...] [--write TABLE.csv]
"""

import contextlib
import importlib
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.ahead.machine_code import disassemble, in_flight
from kernels.ahead.table import read_table, write_table
from kernels.launcher import INTERPRETED
from kernels.options import OptionParser, user_path, whole_number
from kernels.verification.proxy_fence import missing_fences

MODULES = (
    "kernels.fused.attention_ahead",
    "kernels.hopper.attention",
    "kernels.fused.norms",
    "kernels.fused.cross_entropy",
    "kernels.fused.activations",
    "kernels.fused.rotary",
    "kernels.fused.dropout",
)
_ALIGNED = [["tt.divisibility", 16]]
_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_ASYNCHRONOUS_LOAD = re.compile(r"\bcp\.async\S*\.shared\S*\.global\S* .*?\], (0x[0-9a-f]+|\d+)")


@dataclass(frozen=True)
class AheadOfTime:
    """One shipped configuration of a Triton function.

    ``signature`` maps run-time arguments to triton types, e.g. ``{"x": "*bf16", "rows": "i32",
    "stride": "i32:16"}``. Pointers are assumed to be 16-byte aligned; ``:16`` marks an integer
    divisible by 16. A tuple argument is a tuple of such types, or of integers known when compiling.
    ``constants`` are the compile-time arguments, and run-time ones that triton would specialise,
    such as a stride of 1. ``capability`` is set for Gluon, and for block sizes chosen for one
    compute capability: the configuration is only for that one.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str | int, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    capability: int | None = None


@dataclass(frozen=True)
class Compiled:
    """What the assembler reported of one configuration, and the widths of its global loads."""

    registers: int
    spill_bytes: int  # stored to and loaded from local memory because registers ran out
    serialised_wgmma: int  # ptxas warnings C7510-C7519: matrix products that wait for one another
    shared_bytes: int
    wide_loads: int  # of 16 bytes and more
    narrow_loads: int
    wgmma: int  # matrix products of a warp group (Hopper)
    tma: int  # copies of a tile by the tensor memory accelerator
    missing_fences: int  # see kernels.verification.proxy_fence
    overwritten_operands: int  # see kernels.ahead.machine_code
    overlapped_exponentials: int


def compile_for(
    entry: AheadOfTime, capability: int = 90, ptx_directory: Path | None = None
) -> Compiled:
    """Compile for a compute capability (90 is sm_90).

    Writes the PTX to ``ptx_directory``, if given, in a file named after the entry.
    """
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    log = io.StringIO()
    with (
        contextlib.redirect_stdout(log),
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
    ):
        triton.knobs.nvidia.dump_ptxas_log = True
        # A cached kernel comes without the assembler's messages.
        triton.knobs.compilation.always_compile = True
        kernel = triton.compile(_source(entry), target=target, options=options)
    if ptx_directory is not None:
        Path(ptx_directory, f"{entry.name}.ptx").write_text(kernel.asm["ptx"])
    return _read(
        log.getvalue(),
        kernel.asm["ptx"],
        _machine_code(kernel.asm["cubin"]),
        kernel.metadata.shared,
    )


def _machine_code(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        return disassemble(path)


def shipped(modules: tuple[str, ...] = MODULES) -> Iterator[AheadOfTime]:
    """Yield every configuration that the modules publish."""
    for name in modules:
        yield from importlib.import_module(name).AHEAD_OF_TIME


def _source(entry: AheadOfTime) -> ASTSource:
    """Return the function with its types, its constants and alignments (by position)."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def declare(value: Any, path: tuple[int, ...]) -> Any:
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if value.startswith("*") or value.endswith(":16"):
            attributes[path] = _ALIGNED
        return value.removesuffix(":16")

    for position, name in enumerate(entry.kernel.arg_names):
        value = entry.signature.get(name)
        if name in entry.constants:
            signature[name] = "constexpr"
            constants[(position,)] = entry.constants[name]
        elif isinstance(value, tuple):
            signature[name] = tuple(
                declare(element, (position, i)) for i, element in enumerate(value)
            )
        elif value is not None:
            signature[name] = declare(value, (position,))
        else:
            raise ValueError(
                f"{entry.name}: argument {name} is neither in signature nor in constants"
            )
    source = GluonASTSource if entry.kernel.is_gluon() else ASTSource
    return source(fn=entry.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _read(log: str, ptx: str, machine_code: str, shared_bytes: int) -> Compiled:
    """Parse the assembler's verbose output, the PTX and the machine code."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(
            f"compiling ahead of time: no number of registers in the assembler's output:\n{log}"
        )
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    widths = Counter({True: 0, False: 0})
    for count, bits in _LOAD.findall(ptx):
        widths[int(count or 1) * int(bits) >= 128] += 1
    for size in _ASYNCHRONOUS_LOAD.findall(ptx):
        widths[int(size, 0) >= 16] += 1
    return Compiled(
        registers=int(registers[1]),
        spill_bytes=sum(int(stored) + int(loaded) for stored, loaded in spills),
        serialised_wgmma=len(re.findall(r"\bC75\d\d\b", log)),
        shared_bytes=shared_bytes,
        wide_loads=widths[True],
        narrow_loads=widths[False],
        wgmma=ptx.count("wgmma.mma_async"),
        tma=ptx.count("cp.async.bulk.tensor"),
        missing_fences=len(missing_fences(ptx)),
        **asdict(in_flight(machine_code)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one JSON line for each configuration, and write the table if asked to.

    The tests compare with that table.
    """
    parser = OptionParser(
        prog="python -m kernels.ahead.compiler", description="Compile without a GPU."
    )
    parser.add_argument(
        "--capability",
        type=whole_number(1),
        nargs="+",
        default=[90],
        help="compute capabilities, e.g. 80 90 100",
    )
    parser.add_argument("--names", nargs="+", help="only these configurations")
    parser.add_argument(
        "--write",
        type=user_path,
        metavar="TABLE",
        help="write the table here, keeping rows not compiled",
    )
    parser.add_argument(
        "--ptx", type=user_path, metavar="DIRECTORY", help="write the PTX of each here"
    )
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set; run in a process without it")
    known = list(dict.fromkeys(entry.name for entry in shipped()))
    unknown = set(options.names or ()) - set(known)
    if unknown:
        parser.error(f"unknown configurations {sorted(unknown)}; known: {', '.join(known)}")
    table = read_table(options.write) if options.write else {}
    for capability in options.capability:
        for entry in shipped():
            if entry.capability not in (None, capability) or entry.name not in (
                options.names or known
            ):
                continue
            row = asdict(compile_for(entry, capability, options.ptx))
            print(json.dumps({"name": entry.name, "capability": capability, **row}), flush=True)
            table[triton.__version__, f"sm_{capability}", entry.name] = row
    if options.write:
        write_table(options.write, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
