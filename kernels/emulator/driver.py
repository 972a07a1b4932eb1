"""A Triton driver whose GPU is the emulator: kernels compile as ever, and run on CPU tensors.

    with emulated(capability=(9, 0)) as gpu:
        kernel[grid](x, y, ...)
        print(gpu.launches)

The process must not have TRITON_INTERPRET set: Triton decorates its functions when it is imported.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime import driver as active

from kernels.emulator import Finding, Findings
from kernels.emulator.copies import TensorMap
from kernels.emulator.machine import Launch, Schedule
from kernels.emulator.memory import GlobalMemory
from kernels.emulator.program import Program

_SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # of Triton's swizzle modes, in bytes
_SHARED_BYTES = {8: 166_912, 9: 232_448}  # that one CTA may have, by generation


@dataclass(frozen=True)
class Done:
    """What one launch did."""

    kernel: str
    grid: tuple[int, int, int]
    findings: list[Finding]
    ptx: str
    lines: set[int]  # of the PTX that were executed
    compiled: CompiledKernel


@dataclass
class Gpu:
    """The emulated GPU: what it pretends to be, how it runs, and what it ran."""

    capability: tuple[int, int]
    schedule: Schedule = field(default_factory=Schedule)
    launches: list[Done] = field(default_factory=list)
    change_ptx: Any = None  # for tests of the emulator: (kernel's name, PTX) -> PTX

    @property
    def findings(self) -> list[tuple[str, Finding]]:
        """Return (kernel, finding) of all launches."""
        return [(done.kernel, finding) for done in self.launches for finding in done.findings]

    def run(self, kernel: CompiledKernel, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        """Execute a launch; a fault of the kernel is an EmulatorError."""
        name, text = kernel.metadata.name, kernel.asm["ptx"]
        if self.change_ptx is not None:
            text = self.change_ptx(name, text)
        program = _program(text, name)
        findings = Findings()
        memory = GlobalMemory(findings)
        values, maps = _flattened(kernel, arguments, memory)
        names = [parameter for parameter, _ in program.kernel.parameters]
        missing = len(names) - len(values)  # Triton's own scratch pointers come last
        parameters = dict(zip(names, [*values, *[0] * missing], strict=True))
        schedule = replace(self.schedule, seed=self.schedule.seed + len(self.launches))
        launch = Launch(
            program, parameters, memory, findings, schedule, kernel.metadata.shared, maps
        )
        found = launch.run(grid)
        lines = program.lines(launch.executed)
        self.launches.append(Done(name, grid, found, text, lines, kernel))


@functools.lru_cache(maxsize=64)
def _program(text: str, name: str) -> Program:
    return Program(text, name)


def _flattened(
    kernel: CompiledKernel, arguments: list[Any], memory: GlobalMemory
) -> tuple[list[int], dict[int, TensorMap]]:
    """Return the bits of each parameter, and the tensor maps by the address that names them."""
    values: list[int] = []
    maps: dict[int, TensorMap] = {}
    descriptors = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for inner, part in zip(kind, value, strict=True):
                add(inner, part)
        elif kind == "constexpr":
            return
        elif kind.startswith("tensordesc"):
            key = 0x1000 * (len(maps) + 1)
            maps[key] = _tensor_map(value, next(descriptors), memory)
            values.extend([key, *map(int, value.shape), *map(int, value.strides)])
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            memory.add(storage.data_ptr(), storage.nbytes())
            values.append(value.data_ptr())
        elif value is None:
            values.append(0)
        else:
            values.append(_bits(kind, value))

    for kind, value in zip(kernel.src.signature.values(), arguments, strict=True):
        add(kind, value)
    return values, maps


def _bits(kind: str, value: Any) -> int:
    """Return a number as the bits of its parameter."""
    if kind in ("fp32", "f32"):
        return int(torch.tensor(float(value)).view(torch.int32).item()) & 0xFFFFFFFF
    if kind in ("fp64", "f64"):
        return int(torch.tensor(float(value), dtype=torch.float64).view(torch.int64)) & (2**64 - 1)
    return int(value) & (2**64 - 1)


def _tensor_map(descriptor: Any, meta: dict[str, Any], memory: GlobalMemory) -> TensorMap:
    tensor = descriptor.base
    storage = tensor.untyped_storage()
    memory.add(storage.data_ptr(), storage.nbytes())
    size = tensor.element_size()
    return TensorMap(
        tensor.data_ptr(),
        tuple(map(int, descriptor.shape)),
        tuple(int(stride) * size for stride in descriptor.strides),
        tuple(meta["block_size"]),
        size,
        _SPANS[meta["swizzle"]],
    )


class _Utilities:
    """What Triton asks of a driver when it loads a kernel."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.shared_bytes = _SHARED_BYTES[capability[0]]

    def load_binary(self, *arguments: Any) -> tuple[None, str, int, int, int]:
        """Return module, function, registers, spills and the largest number of threads."""
        return None, arguments[0], 0, 0, 1024

    def unload_module(self, *arguments: Any) -> None:
        """Do nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what limits a launch."""
        return {
            "max_shared_mem": self.shared_bytes, "max_num_regs": 65536, "multiprocessor_count": 2,
            "warpSize": 32, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
        }  # fmt: skip


def _driver(gpu: Gpu) -> Any:
    class Launcher:
        """Triton makes one for each compiled kernel."""

        def __init__(self, source: Any, metadata: Any) -> None:
            self.count = len(source.signature)
            self.kernel: CompiledKernel | None = None

        def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
            assert self.kernel is not None
            gpu.run(self.kernel, (x, y, z), list(rest[-self.count :]))

    class Driver:
        launcher_cls = Launcher
        utils = _Utilities(gpu.capability)

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
            return gpu.capability

        def get_current_target(self) -> GPUTarget:
            major, minor = gpu.capability
            return GPUTarget("cuda", 10 * major + minor, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return Driver()


@dataclass(frozen=True)
class _Properties:
    """What torch.cuda says of the emulated GPU: a small one, so that grids are small."""

    major: int
    minor: int
    shared_memory_per_block_optin: int
    multi_processor_count: int = 2


@contextmanager
def emulated(
    capability: tuple[int, int] = (9, 0), schedule: Schedule | None = None
) -> Iterator[Gpu]:
    """Let Triton's launches run on the emulator, within the block.

    torch.cuda then describes the emulated GPU. Nothing is assembled to machine code: kernels keep
    their PTX alone, under a key of their own in Triton's cache.
    """
    gpu = Gpu(capability, schedule or Schedule())
    properties = _Properties(*capability, _SHARED_BYTES[capability[0]])
    prepare, make_hash, before = CompiledKernel._init_handles, CUDABackend.hash, active._active

    def prepare_here(self: CompiledKernel) -> None:
        """Tell the launcher which kernel it launches; Triton passes only a handle."""
        prepare(self)
        self._run.kernel = self

    active.set_active(_driver(gpu))
    with (
        patch.object(CompiledKernel, "_init_handles", prepare_here),
        patch.object(CUDABackend, "make_cubin", lambda *arguments: b"not assembled"),
        patch.object(CUDABackend, "hash", lambda self: f"{make_hash(self)}-emulated"),
        patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
    ):
        try:
            yield gpu
        finally:
            active._active = before
