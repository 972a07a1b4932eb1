"""Runs PTX that tests write by hand on the emulator."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from kernels.emulator import Finding, Findings
from kernels.emulator.copies import TensorMap
from kernels.emulator.formats import FORMATS, UNSIGNED
from kernels.emulator.machine import Launch, Schedule
from kernels.emulator.memory import GlobalMemory
from kernels.emulator.program import Program

HEADER = """\
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<40>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<200>;
    .reg .b64 %rd<80>;
{loads}
{body}
    ret;
}}
"""


def source(body: str, pointers: int, threads: int, target: str = "sm_90a") -> str:
    """A kernel whose %rd1, %rd2, ... are its arguments, and %r1 the thread."""
    parameters = ",".join(
        f"\n    .param .u64 .ptr .global kernel_param_{i}" for i in range(pointers)
    )
    loads = "".join(f"    ld.param.b64 %rd{i + 1}, [kernel_param_{i}];\n" for i in range(pointers))
    return HEADER.format(
        target=target, parameters=parameters, threads=threads, body=body,
        loads=loads + "    mov.u32 %r1, %tid.x;",
    )  # fmt: skip


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    shared: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    schedule: Schedule | None = None,
    maps: Mapping[int, TensorMap] | None = None,
    target: str = "sm_90a",
) -> list[Finding]:
    """Run a kernel on arrays, which it changes. Tensor maps follow the arrays, by their keys."""
    findings = Findings()
    memory = GlobalMemory(findings)
    values = [array.ctypes.data for array in arrays]
    for array in arrays:
        memory.add(array.ctypes.data, array.nbytes)
    values += list(maps or {})
    program = Program(source(body, len(values), threads, target))
    parameters = {f"kernel_param_{i}": value for i, value in enumerate(values)}
    launch = Launch(
        program, parameters, memory, findings, schedule or Schedule(), shared, maps or {}
    )
    return launch.run(grid)


def evaluate(
    instruction: str, result: str, inputs: Sequence[tuple[str, Sequence[int]]]
) -> list[int]:
    """The bits of an instruction's results, a thread for each row of inputs (as bits).

    ``instruction`` has d for the result and a, b, c for the inputs, each of the type beside it.
    """
    count = len(inputs[0][1])
    threads = -(-count // 32) * 32
    body, names = [], {}
    arrays = []
    registers = itertools.count(10)
    for letter, (kind, values) in zip("abc", inputs, strict=False):
        word = UNSIGNED[max(8, FORMATS[kind].bits)]
        arrays.append(np.zeros(threads, word))
        arrays[-1][:count] = np.array(values, np.uint64).astype(word)
        names[letter], lines = _loaded(kind, len(arrays), next(registers), word)
        body += lines
    kind = result
    word = UNSIGNED[max(8, FORMATS[kind].bits)]
    arrays.append(np.zeros(threads, word))
    names["d"] = _register(kind, next(registers))
    body.append("    " + " ".join(names.get(part, part) for part in _words(instruction)) + ";")
    body += _stored(kind, names["d"], len(arrays), word)
    findings = run("\n".join(body), *arrays, threads=threads)
    assert findings == []
    return [int(value) for value in arrays[-1][:count]]


def _words(instruction: str) -> list[str]:
    for sign in ",{}[]|":
        instruction = instruction.replace(sign, f" {sign} ")
    return instruction.split()


def _register(kind: str, number: int) -> str:
    prefix = {1: "%p", 8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[FORMATS[kind].bits]
    return f"{prefix}{number}"


def _pointer(index: int, size: int, number: int) -> list[str]:
    return [
        f"    mul.wide.u32 %rd{number}, %r1, {size};",
        f"    add.s64 %rd{number}, %rd{number}, %rd{index};",
    ]


def _loaded(kind: str, index: int, number: int, word: type) -> tuple[str, list[str]]:
    size = np.dtype(word).itemsize
    pointer = number + 30
    lines = _pointer(index, size, pointer)
    register = _register(kind, number)
    if kind == "pred":
        lines.append(f"    ld.global.b8 %rs{number}, [%rd{pointer}];")
        lines.append(f"    setp.ne.u16 {register}, %rs{number}, 0;")
    else:
        lines.append(f"    ld.global.b{8 * size} {register}, [%rd{pointer}];")
    return register, lines


def _stored(kind: str, register: str, index: int, word: type) -> list[str]:
    size = np.dtype(word).itemsize
    lines = _pointer(index, size, 79)
    if kind == "pred":
        lines += [f"    selp.b16 %rs39, 1, 0, {register};", "    st.global.b8 [%rd79], %rs39;"]
    else:
        lines.append(f"    st.global.b{8 * size} [%rd79], {register};")
    return lines
