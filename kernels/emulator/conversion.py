"""Instructions that move registers, or convert them to another type.

PTX ISA, "Data Movement and Conversion Instructions": mov, cvt, cvta.
"""

from typing import Any

import numpy as np

from kernels.emulator.arithmetic import Function, as_bits, compute, format_of, modified
from kernels.emulator.formats import FORMATS, UNSIGNED, Array, Format, float_to_bf16, float_to_tf32
from kernels.emulator.instructions import (
    Action,
    Mask,
    Operands,
    allow,
    elements,
    meaning,
    put,
    unknown,
)
from kernels.emulator.parser import Instruction


@meaning("mov")
def move(ins: Instruction, operands: Operands) -> Action:
    """Copy a register, pack several into one, or unpack one into several."""
    form = format_of(ins)
    allow(ins, {form.name}, 2)
    to, origin = ins.operands
    if to.startswith("{") or origin.startswith("{"):
        return _pack(ins, operands, form)
    bits = FORMATS["pred" if form.bits == 1 else f"b{form.bits}"]
    literal = as_bits(operands, operands.source(ins, origin, form), bits)
    target = operands.target(ins, to, bits)

    def run(gang: Any, mask: Mask) -> None:
        put(gang.views[target], gang.views[literal], mask)

    return run


def _pack(ins: Instruction, operands: Operands, form: Format) -> Action:
    """Pack or unpack; the first register has the low bits."""
    packs = ins.operands[1].startswith("{")
    whole, parts = ins.operands if packs else ins.operands[::-1]
    names = elements(parts)
    if form.bits % len(names) or form.bits // len(names) not in (16, 32):
        raise unknown(ins, "parts of another width")
    part = FORMATS[f"b{form.bits // len(names)}"]
    count = len(names)
    if packs:
        target = operands.slot(operands.slots[operands.target(ins, whole, form)][0], part.view)
        sources = [operands.source(ins, name, part) for name in names]

        def pack(gang: Any, mask: Mask) -> None:
            for index, source in enumerate(sources):
                put(gang.views[target][index::count], gang.views[source], mask)

        return pack
    source = operands.slot(operands.slots[operands.source(ins, whole, form)][0], part.view)
    targets = [(i, operands.target(ins, name, part)) for i, name in enumerate(names) if name != "_"]

    def unpack(gang: Any, mask: Mask) -> None:
        for index, target in targets:
            put(gang.views[target], gang.views[source][index::count], mask)

    return unpack


@meaning("cvta")
def convert_address(ins: Instruction, operands: Operands) -> Action:
    """Copy an address: global and parameter addresses are generic ones here."""
    allow(ins, {"to", "global", "param", "u64"}, 2)
    return compute(ins, operands, lambda x: x, FORMATS["u64"], [FORMATS["u64"]])


_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(form: Format, rounding: str, source: Format) -> Function:
    """Round a float to an integer of the type's range. A NaN becomes 0, or the top bit alone."""
    limits = np.iinfo(form.view)
    wide = form.bits == 64 or source.name == "f64"
    not_a_number = (1 << (form.bits - 1)) if wide else 0

    def convert(x: Array) -> Array:
        whole = _WHOLE[rounding](x.astype(np.float64))
        inside = (whole > float(limits.min)) & (whole < float(limits.max))
        number = np.where(inside, whole, 0).astype(form.view)
        number = np.where(whole >= float(limits.max), limits.max, number)
        number = np.where(whole <= float(limits.min), limits.min, number)
        special = np.array(not_a_number, np.uint64).astype(UNSIGNED[form.bits]).view(form.view)
        return np.where(np.isnan(x), special, number).astype(form.view)

    return convert


@meaning("cvt")
def convert(ins: Instruction, operands: Operands) -> Action:
    """Convert between types; a register wider than its type gives its low bits."""
    *rest, to, origin = ins.modifiers
    if to == "tf32":
        allow(ins, {"rna", "tf32", "f32"}, 2)
        return compute(ins, operands, float_to_tf32, FORMATS["f32"], [FORMATS["f32"]])
    if to not in FORMATS or origin not in FORMATS:
        raise unknown(ins, "a type that is not known")
    result, source = FORMATS[to], FORMATS[origin]
    if result.packed == 2:
        return _convert_pair(ins, operands, result, source, rest)
    if source.is_float and not result.is_float:
        return _resized(ins, operands, _float_to_integer(ins, rest, result, source), result, source)
    if result.is_float:
        function = _to_float(ins, rest, result, source)
        return _resized(ins, operands, function, result, source)
    if rest not in ([], ["sat"]):
        raise unknown(ins, f"modifier .{rest[0]}")
    if rest == ["sat"]:
        limits = np.iinfo(result.view)

        def saturate(x: Array) -> Array:
            wide = x.astype(object) if source.bits == 64 else x.astype(np.int64)
            return np.minimum(np.maximum(wide, limits.min), limits.max).astype(result.view)

        return _resized(ins, operands, saturate, result, source)
    return _resized(ins, operands, lambda x: x.astype(result.view), result, source)


def _float_to_integer(
    ins: Instruction, rest: list[str], result: Format, source: Format
) -> Function:
    rounding = [name for name in rest if name in _WHOLE]
    if len(rounding) != 1 or set(rest) - {*rounding, "ftz", "sat"}:
        raise unknown(ins, "rounding")
    return _to_integer(result, rounding[0], source)


def _to_float(ins: Instruction, rest: list[str], result: Format, source: Format) -> Function:
    """Return the conversion to a float, from integers too: to nearest even unless it is exact."""
    if strange := set(rest) - {"rn", "ftz", "sat", "relu", "rz", *_WHOLE}:
        raise unknown(ins, f"modifier .{strange.pop()}")
    if "rz" in rest:
        if (result.name, source.name) != ("bf16", "f32"):
            raise unknown(ins, "rounding towards zero")
        return lambda x: (x.view(np.uint32) >> np.uint32(16) << np.uint32(16)).view(np.float32)
    whole = next((_WHOLE[name] for name in rest if name in _WHOLE), None)

    def function(x: Array) -> Array:
        number = whole(x) if whole else x
        if not result.narrow:
            return number.astype(result.view)
        return number if source.is_float else number.astype(np.float64)

    return modified(ins, function)


def _resized(
    ins: Instruction, operands: Operands, function: Function, result: Format, source: Format
) -> Action:
    """Return a conversion between registers that may be wider than the types."""
    origin, origin_bits = operands.whole(ins, ins.operands[1])
    if operands.kernel.width(ins.operands[1]) is None:
        origin, origin_bits = operands.source(ins, ins.operands[1], source), source.bits
    to, to_bits = operands.whole(ins, ins.operands[0])
    unsigned = UNSIGNED[max(8, source.bits)]

    def run(gang: Any, mask: Mask) -> None:
        x = gang.views[origin]
        if origin_bits != source.bits:
            x = x.astype(unsigned)
        x = x.view(source.view)
        value = np.asarray(function(source.widen(x) if source.widen else x))
        value = result.narrow(value) if result.narrow else value
        if to_bits != result.bits:  # extended by the sign of the type, or zeros
            signed = {16: np.int16, 32: np.int32, 64: np.int64}[to_bits]
            value = (
                value.astype(signed) if value.dtype.kind == "i" else value.astype(UNSIGNED[to_bits])
            )
        put(gang.views[to], value.view(UNSIGNED[max(16, to_bits)]), mask)

    return run


def _convert_pair(
    ins: Instruction, operands: Operands, result: Format, source: Format, rest: list[str]
) -> Action:
    """Round two fp32 numbers into one register; the first operand becomes the high half."""
    if source.name != "f32" or len(ins.operands) != 3 or set(rest) - {"rn", "relu"}:
        raise unknown(ins, "this pair")
    narrow = float_to_bf16 if result.name == "bf16x2" else FORMATS["f16"].narrow
    target = operands.target(ins, ins.operands[0], result)
    high, low = (operands.source(ins, text, source) for text in ins.operands[1:])
    assert narrow is not None
    rectifies = "relu" in rest

    def run(gang: Any, mask: Mask) -> None:
        for index, slot in enumerate((low, high)):
            x = gang.views[slot]
            put(gang.views[target][index::2], narrow(np.maximum(x, 0) if rectifies else x), mask)

    return run
