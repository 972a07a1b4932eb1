"""Instructions that load and store, each thread for itself.

PTX ISA, "Data Movement and Conversion Instructions": ld, st, prefetch; "Parallel Synchronization
and Communication Instructions": atom, red.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.emulator.formats import FORMATS, UNSIGNED, Array, Format, flush
from kernels.emulator.instructions import (
    Action,
    Mask,
    Operands,
    address,
    allow,
    elements,
    meaning,
    unknown,
)
from kernels.emulator.memory import lanes
from kernels.emulator.parser import Instruction

_CACHES = {
    "ca", "cg", "cs", "lu", "cv", "nc", "wb", "wt", "weak", "volatile", "relaxed", "acquire",
    "release", "cta", "gpu", "sys", "L1::evict_last", "L1::evict_first", "L1::evict_normal",
    "L1::evict_unchanged", "L1::no_allocate", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B",
    "L2::evict_last", "L2::evict_first", "L2::evict_normal",
}  # fmt: skip
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "param": "param"}


def _parts(ins: Instruction) -> tuple[str, Format, int]:
    """Return the state space, the type and the number of elements of an access."""
    form = FORMATS.get(ins.modifiers[-1])
    space = next((_SPACES[name] for name in ins.modifiers if name in _SPACES), None)
    if form is None or space is None:
        raise unknown(ins, "no type, or a state space that is not emulated")
    allow(ins, {form.name, *_SPACES, *_VECTORS, *_CACHES})
    count = next((_VECTORS[name] for name in ins.modifiers if name in _VECTORS), 1)
    return space, form, count


@meaning("ld")
def load(ins: Instruction, operands: Operands) -> Action:
    """Load one element or a vector; a wider register gets it extended."""
    space, form, count = _parts(ins)
    names = elements(ins.operands[0])
    if len(names) != count:
        raise unknown(ins, f"{len(names)} registers for {count} elements")
    if space == "param":
        return _load_parameter(ins, operands, form)
    slot, offset = address(ins, ins.operands[1], operands)
    targets = [(i, *operands.whole(ins, name)) for i, name in enumerate(names) if name != "_"]
    size, line = form.bits // 8 * count, ins.line

    def run(gang: Any, mask: Mask) -> None:
        which = lanes(mask, gang.threads)
        if not len(which):
            return
        where = gang.views[slot][which] + gang.views[slot].dtype.type(offset)
        cta = gang.cta
        if space == "shared":
            offsets = cta.shared.offsets(where, size, line)
            data = cta.shared.load(gang.warp_of[which], offsets, size, line)
        else:
            data = cta.memory.load(where, size, cta.number, line)
        columns = data.view(form.view)
        for index, target, bits in targets:
            gang.views[target][which] = extended(columns[:, index], bits)

    return run


def extended(values: Array, bits: int) -> Array:
    """Return numbers as words of a register: sign-extended if signed."""
    if 8 * values.itemsize == bits:
        return values.view(UNSIGNED[bits])
    return values.astype(UNSIGNED[bits])


def _load_parameter(ins: Instruction, operands: Operands, form: Format) -> Action:
    name = ins.operands[1].strip("[] ")
    if name not in operands.parameters:
        raise unknown(ins, f"parameter {name}")
    source = operands.special(ins, name, FORMATS[f"b{form.bits}"])
    target, bits = operands.whole(ins, ins.operands[0])

    def run(gang: Any, mask: Mask) -> None:
        which = lanes(mask, gang.threads)
        gang.views[target][which] = extended(gang.views[source][which].view(form.view), bits)

    return run


@meaning("st")
def store(ins: Instruction, operands: Operands) -> Action:
    """Store one element or a vector; of a wider register the low bits."""
    space, form, count = _parts(ins)
    names = elements(ins.operands[1])
    if space == "param" or len(names) != count:
        raise unknown(ins, "this store")
    slot, offset = address(ins, ins.operands[0], operands)
    sources = [_source(ins, operands, name, form) for name in names]
    narrow, line = UNSIGNED[form.bits], ins.line

    def run(gang: Any, mask: Mask) -> None:
        which = lanes(mask, gang.threads)
        if not len(which):
            return
        where = gang.views[slot][which] + gang.views[slot].dtype.type(offset)
        columns = np.empty((len(which), count), narrow)
        for index, source in enumerate(sources):
            columns[:, index] = gang.views[source][which]
        cta = gang.cta
        if space == "shared":
            data = columns.view(np.uint8)
            offsets = cta.shared.offsets(where, data.shape[1], line)
            cta.shared.store(gang.warp_of[which], offsets, data, line)
        else:
            cta.memory.store(where, columns.view(np.uint8), cta.number, line)

    return run


def _source(ins: Instruction, operands: Operands, name: str, form: Format) -> int:
    """Return the slot of a register to store, which may be wider than the type."""
    width = operands.kernel.width(name)
    if width is None:
        return operands.source(ins, name, FORMATS[f"b{form.bits}"])
    return operands.whole(ins, name)[0]


# ------------------------------------------------------------------------------------------ atomics


def _float_add(old: Array, new: Array) -> Array:
    return old + new


_OPERATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "add": _float_add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}
_SCOPES = {"cta", "gpu", "sys", "relaxed", "acquire", "release", "acq_rel", "noftz"}


@meaning("atom", "red")
def atomic(ins: Instruction, operands: Operands) -> Action:
    """Change elements of global memory, one thread after the other, and return what was there."""
    form = FORMATS.get(ins.modifiers[-1])
    names = [name for name in ins.modifiers if name in (*_OPERATIONS, "cas")]
    if form is None or len(names) != 1 or "global" not in ins.modifiers:
        raise unknown(ins)
    allow(ins, {form.name, "global", names[0], *_SCOPES, *_VECTORS})
    count = next((_VECTORS[name] for name in ins.modifiers if name in _VECTORS), 1)
    texts = list(ins.operands)
    targets = elements(texts.pop(0)) if ins.name == "atom" else []
    slot, offset = address(ins, texts[0], operands)
    values = [[_source(ins, operands, name, form) for name in elements(text)] for text in texts[1:]]
    if len(values) != (2 if names[0] == "cas" else 1) or len(values[0]) != count:
        raise unknown(ins, "operands")
    results = [(i, operands.whole(ins, name)[0]) for i, name in enumerate(targets) if name != "_"]
    change = _changed(names[0], form)
    size = form.bits // 8 * count

    def run(gang: Any, mask: Mask) -> None:
        which = lanes(mask, gang.threads)
        where = gang.views[slot][which] + gang.views[slot].dtype.type(offset)
        given = [
            np.stack([gang.views[s][which].view(form.view) for s in part], axis=1)
            for part in values
        ]
        before = np.empty(given[0].shape, form.view)
        for segment, offsets, inside in gang.cta.memory.split(where, size, ins.line):
            table = segment.bytes[: segment.size // (form.bits // 8) * (form.bits // 8)].view(
                form.view
            )
            rows = np.arange(len(which)) if inside is ... else np.flatnonzero(inside)
            places = offsets[:, None] // (form.bits // 8) + np.arange(count * form.packed)
            for chunk in _distinct(places[:, 0]):
                old = table[places[chunk]]
                before[rows[chunk]] = old
                table[places[chunk]] = change(old, *(part[rows[chunk]] for part in given))
        for index, result in results:
            width = form.packed
            column = np.ascontiguousarray(before[:, index * width : (index + 1) * width])
            gang.views[result][which] = column.view(UNSIGNED[form.bits])[:, 0]

    return run


def _compared(old: Array, expected: Array, new: Array) -> Array:
    return np.asarray(np.where(old == expected, new, old))


def _changed(name: str, form: Format) -> Callable[..., Array]:
    """Return the function from what is there, and the operands, to what is there next."""
    if name == "cas":
        return _compared
    function = _OPERATIONS[name]
    if form.name == "f32" and name == "add":  # atom.add.f32 on global memory flushes subnormals
        return lambda old, new: flush(old + flush(new))
    if form.widen and form.narrow:
        widen, narrow = form.widen, form.narrow
        return lambda old, new: narrow(function(widen(old), widen(new)))
    return function


def _distinct(places: Array) -> list[Array]:
    """Split accesses into runs that touch no place twice."""
    if len(np.unique(places)) == len(places):
        return [np.arange(len(places))]
    return [np.array([index]) for index in range(len(places))]


@meaning("prefetch", "createpolicy", "discard", "applypriority")
def hint(ins: Instruction, operands: Operands) -> Action:
    """Do nothing: hints for caches change no value."""
    return lambda gang, mask: None
