"""``python -m kernels.emulator FILE.ptx``: what a kernel consists of, and what happens if it runs.

python -m kernels.emulator kernel.ptx
python -m kernels.emulator kernel.ptx --grid 4 --arguments f32[1024] f32[1024] 1024 0.5
"""

import re
from collections import Counter
from typing import Any

import numpy as np

from kernels.emulator import EmulatorError, Findings
from kernels.emulator.formats import FORMATS, UNSIGNED, float_to_bf16
from kernels.emulator.machine import TIMINGS, Launch, Schedule
from kernels.emulator.memory import GlobalMemory
from kernels.emulator.program import Program
from kernels.options import OptionParser, user_path, whole_number

_LARGEST_SHARED_BYTES = 227 * 1024
_TENSOR = re.compile(r"(\w+)\[(\d+)\]")


def main(arguments: list[str] | None = None) -> int:
    """Print what was found. Exit code 1 if the kernel is at fault, 2 if it cannot be run."""
    parser = OptionParser(
        prog="python -m kernels.emulator",
        description="Check that a kernel's PTX (sm_80 to sm_90) can be emulated, and run it.",
    )
    parser.add_argument("file", type=user_path, help="a PTX file")
    parser.add_argument("--kernel", help="its name [the first in the file]")
    parser.add_argument("--grid", type=whole_number(1), nargs="+", default=[1], metavar="N")
    parser.add_argument(
        "--arguments",
        nargs="+",
        metavar="ARGUMENT",
        help="run it: numbers, and tensors of random numbers such as f32[1024]; parameters without "
        "an argument are 0",
    )
    parser.add_argument(
        "--shared",
        type=whole_number(0),
        default=_LARGEST_SHARED_BYTES,
        help="bytes that the launch gives [as many as sm_90 has]",
    )
    parser.add_argument("--timing", choices=TIMINGS, default="mixed", help="of asynchronous work")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the warps' order")
    options = parser.parse_args(arguments)
    try:
        program = Program(options.file.read_text(), options.kernel)
    except (EmulatorError, OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.file}: {error}")
    print(_described(program))
    if options.arguments is None:
        return 0
    tensors, values = _arguments(options.arguments, program, parser)
    return _run(program, tensors, values, options)


def _described(program: Program) -> str:
    kernel = program.kernel
    kinds = Counter(ins.name for ins in kernel.instructions)
    listed = ", ".join(f"{name} {count}" for name, count in kinds.most_common())
    return (
        f"{kernel.name}: {kernel.target}, {kernel.threads} threads, "
        f"{len(kernel.instructions)} instructions ({listed})"
    )


def _arguments(
    texts: list[str], program: Program, parser: OptionParser
) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    """Return the tensors, and the bits of each parameter."""
    parameters = program.kernel.parameters
    if len(texts) > len(parameters):
        parser.error(
            f"--arguments: {len(texts)} given, {program.kernel.name} has {len(parameters)}"
        )
    generator = np.random.default_rng(0)
    tensors, values = [], []
    for text, (_, bits) in zip(texts, parameters, strict=False):
        if tensor := _TENSOR.fullmatch(text):
            if tensor[1] not in FORMATS or tensor[1] == "pred":
                parser.error(f"--arguments: {text}: unknown type; one of {', '.join(FORMATS)}")
            tensors.append(_random(generator, tensor[1], int(tensor[2])))
            values.append(tensors[-1].ctypes.data)
            continue
        try:
            is_float = bits in (32, 64) and not re.fullmatch(r"-?\d+", text)
            number = np.array(float(text), f"f{bits // 8}") if is_float else None
            value = int(text) if number is None else int(number.view(UNSIGNED[bits]))
        except ValueError:
            parser.error(f"--arguments: {text} is neither a number nor a tensor such as f32[1024]")
        values.append(value & 0xFFFFFFFFFFFFFFFF)
    return tensors, [*values, *[0] * (len(parameters) - len(values))]


def _random(generator: np.random.Generator, kind: str, count: int) -> np.ndarray[Any, Any]:
    form = FORMATS[kind]
    if not form.is_float:
        return generator.integers(0, 100, count).astype(form.view)
    numbers = generator.standard_normal(count * form.packed).astype(np.float32)
    return float_to_bf16(numbers) if kind.startswith("bf16") else numbers.astype(form.view)


def _run(program: Program, tensors: list[Any], values: list[int], options: Any) -> int:
    findings = Findings()
    memory = GlobalMemory(findings)
    for tensor in tensors:
        memory.add(tensor.ctypes.data, tensor.nbytes)
    before = [tensor.copy() for tensor in tensors]
    names = [name for name, _ in program.kernel.parameters]
    launch = Launch(
        program,
        dict(zip(names, values, strict=True)),
        memory,
        findings,
        Schedule(options.timing, options.seed),
        options.shared,
    )
    grid = (*options.grid, 1, 1)
    try:
        found = launch.run((grid[0], grid[1], grid[2]))
    except EmulatorError as error:
        print(error)
        return 1
    for index, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
        changed = np.flatnonzero(tensor.view(np.uint8) != old.view(np.uint8))
        print(f"tensor {index}: {len(changed)} of {tensor.nbytes} bytes changed")
    for finding in found:
        print(finding)
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
