"""Runs the source of a Gluon kernel on a CPU, which Triton's interpreter cannot: it knows no Gluon.

The module is executed once more, with stand-ins for the parts of Gluon that it imports: tensors are
torch's, the partitions of a program are threads, layouts mean nothing. What the GPU does
asynchronously may happen at any time in between, so both ends are tried. Copies are ``early`` (they
arrive when started) or late (when somebody waits for them), and a product must read the same when
it is started and when it is waited for. A barrier that is missing, miscounted or waited for in the
wrong phase then shows as a wrong number, or as a wait without end; a tile released too early as a
product that reads two things. What it cannot show: layouts, alignment, and what compilers make of
the source.
"""

import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_NEVER_S = 60.0  # a barrier that nothing completes within this time never completes
_PROGRAM = threading.local()  # of each partition: its program's index, and its products in flight


class Tile(Tensor):
    """A tensor in registers."""

    type = SimpleNamespace(layout=SimpleNamespace(parent=None))


class Pointer:
    """The address of an element of a tensor."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)


class Descriptor:
    """What TMA knows of a tensor (batch, heads, length, head_dim): blocks of rows, zeros beyond
    the last.
    """

    def __init__(self, tensor: Tensor, rows: int) -> None:
        self.tensor, self.rows, self.dtype = tensor, rows, tensor.dtype
        self.block_type = SimpleNamespace(nbytes=rows * tensor.shape[3] * tensor.element_size())

    def read(self, position: list[Any]) -> Tensor:
        tile = torch.zeros(self.rows, self.tensor.shape[3], dtype=self.dtype)
        inside = self._block(position)
        tile[: len(inside)] = inside
        return tile

    def write(self, position: list[Any], tile: Tensor) -> None:
        inside = self._block(position)
        inside.copy_(tile[: len(inside)])

    def _block(self, position: list[Any]) -> Tensor:
        batch, head, row, column = (int(x) for x in position)
        assert column == 0
        return self.tensor[batch, head, row : row + self.rows]


class _Slot:
    """One of several tiles or barriers in shared memory."""

    def __init__(self, items: list[Any], index: int, transposed: bool = False) -> None:
        self.items, self.at, self.transposed = items, index, transposed

    @property
    def value(self) -> Any:
        return self.items[self.at].T if self.transposed else self.items[self.at]

    def store(self, value: Any) -> None:
        self.items[self.at] = value

    def permute(self, order: tuple[int, int]) -> "_Slot":
        assert order == (1, 0)
        return _Slot(self.items, self.at, transposed=True)


class _SharedMemory:
    """Tiles that hold no numbers yet, or barriers not initialised yet."""

    def __init__(self, dtype: torch.dtype, shape: list[int], layout: Any) -> None:
        self.shape = shape
        tiles = dtype.is_floating_point
        self.items: list[Any] = (
            list(torch.full(shape, torch.nan, dtype=dtype)) if tiles else [None] * shape[0]
        )

    def index(self, index: Any) -> _Slot:
        return _Slot(self.items, int(index))


class _Barrier:
    """Completes a phase after ``count`` arrivals and all the bytes expected by then."""

    def __init__(self, count: int) -> None:
        self.count, self.missing, self.bytes, self.phase = count, count, 0, 0
        self.changed = threading.Condition()
        self.copies: list[Callable[[], None]] = []

    def arrive(self, arrivals: int, expected_bytes: int = 0) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += expected_bytes
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            while self.copies:
                self.copies.pop(0)()
            assert self.changed.wait_for(
                lambda: self.copies or self.phase & 1 != parity, _NEVER_S
            ), "a wait without end"
            pending = bool(self.copies)
        if pending:
            self.wait(parity)


class _Product:
    """A matrix product in flight."""

    def __init__(self, a: Any, b: _Slot, accumulator: Any, use_accumulator: bool) -> None:
        self.a, self.b, self.accumulator = (
            a,
            b,
            accumulator if use_accumulator else torch.zeros_like(accumulator),
        )
        self.at_start = self.read()

    def read(self) -> Tensor:
        a = self.a.value if isinstance(self.a, _Slot) else self.a
        return self.accumulator + a.float() @ self.b.value.float()

    def finish(self) -> Tensor:
        assert torch.equal(self.read(), self.at_start), (
            "a tile changed, or was not there, while a product read it"
        )
        return self.at_start


def load(path: Path) -> ModuleType:
    """The module, its kernels now ordinary functions; ``run`` calls one of them."""
    stand_ins = _stand_ins()
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location(f"interpreted_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, original in before.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original
    return module


def run(
    kernel: Callable[..., None], programs: int, *arguments: Any, early: bool, **constants: Any
) -> None:
    """Launch a kernel: one program after another."""
    for index in range(programs):
        _PROGRAM.index, _PROGRAM.early = index, early
        kernel(*arguments, **constants)


def _warp_specialize(
    partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *warps: list[int]
) -> None:
    failures: list[BaseException] = []

    @torch.no_grad()  # each thread has a mode of its own
    def work(early: bool, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _PROGRAM.products, _PROGRAM.early = [], early
        try:
            function(*arguments)
            assert not _PROGRAM.products, "a product was never waited for"
        except BaseException as failure:
            failures.append(failure)

    threads = [
        threading.Thread(target=work, args=(_PROGRAM.early, *partition)) for partition in partitions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _copy_in(descriptor: Descriptor, position: list[Any], barrier: _Slot, tile: _Slot) -> None:
    ready = barrier.value

    def copy() -> None:
        tile.store(descriptor.read(position))
        ready.arrive(0, -descriptor.block_type.nbytes)

    if _PROGRAM.early:
        copy()
    else:
        with ready.changed:
            ready.copies.append(copy)
            ready.changed.notify_all()


def _multiply(
    a: Any, b: _Slot, accumulator: Tensor, use_acc: bool = True, is_async: bool = False
) -> _Product:
    assert is_async
    _PROGRAM.products.append(_Product(a, b, accumulator, use_acc))
    return _PROGRAM.products[-1]


def _wait_for_products(allowed: int, deps: tuple[Any, ...]) -> Any:
    done = _PROGRAM.products[: len(_PROGRAM.products) - allowed]
    _PROGRAM.products = _PROGRAM.products[len(done) :]
    results = {id(product): product.finish() for product in done}
    assert all(id(x) in results for x in deps if isinstance(x, _Product)), (
        "a product is used before it is finished"
    )
    values = tuple(results.get(id(x), x) for x in deps)
    return values[0] if len(values) == 1 else values


def _store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    pointer.tensor.view(-1)[pointer.offset[mask]] = values[mask]


def _pair(function: Callable[..., Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _jit(function: Any = None, **options: Any) -> Any:
    return function or (lambda decorated: decorated)


def _stand_ins() -> dict[str, ModuleType]:
    """By the names under which a kernel's module imports them."""
    nothing = SimpleNamespace(parent=None)
    language = {
        "constexpr": lambda value: value,
        "int64": torch.int64,
        "float32": torch.float32,
        "NVMMASharedLayout": SimpleNamespace(get_default_for=lambda *_: nothing),
        **dict.fromkeys(
            ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout"), lambda *_: nothing
        ),
        "allocate_shared_memory": _SharedMemory,
        "program_id": lambda axis: torch.tensor(_PROGRAM.index),
        "warp_specialize": _warp_specialize,
        "static_range": range,
        "cdiv": lambda a, b: -(-a // b),
        "minimum": _pair(torch.minimum),
        "maximum": _pair(torch.maximum),
        "arange": lambda start, end, layout: torch.arange(start, end).as_subclass(Tile),
        "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Tile),
        "full": lambda shape, value, dtype, layout: torch.full(
            shape, value, dtype=dtype
        ).as_subclass(Tile),
        "full_like": torch.full_like,
        "expand_dims": torch.unsqueeze,
        "convert_layout": lambda value, layout, **_: value,
        "where": torch.where,
        "max": lambda value, axis: value.amax(axis),
        "sum": torch.sum,
        "exp2": torch.exp2,
        "log2": torch.log2,
        "store": _store,
    }
    barriers = {
        "MBarrierLayout": lambda: nothing,
        "init": lambda slot, count: slot.store(_Barrier(count)),
        "expect": lambda slot, size: slot.value.arrive(1, size),
        "arrive": lambda slot, count: slot.value.arrive(count),
        "wait": lambda slot, phase: slot.value.wait(int(phase)),
    }
    copies = {
        "async_copy_global_to_shared": _copy_in,
        "async_copy_shared_to_global": lambda descriptor, position, tile: descriptor.write(
            position, tile.value
        ),
        "store_wait": lambda pendings: None,
    }
    hopper = {
        "fence_async_shared": lambda: None,
        "mbarrier": SimpleNamespace(**barriers),
        "tma": SimpleNamespace(**copies),
        "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": _wait_for_products,
    }
    contents = {
        "": {"gluon": SimpleNamespace(jit=_jit)},
        ".gluon": {"language": SimpleNamespace(**language)},
    }
    contents[".gluon.language.nvidia.hopper"] = hopper
    modules = {f"triton.experimental{name}": ModuleType(f"stand_in{name}") for name in contents}
    for module, members in zip(modules.values(), contents.values(), strict=True):
        vars(module).update(members)
    return modules
