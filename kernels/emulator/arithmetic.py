"""Instructions that compute a register from registers, each thread for itself.

PTX ISA: "Integer Arithmetic", "Floating Point", "Half Precision Floating-Point", "Comparison and
Selection", "Logic and Shift Instructions".
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.emulator.formats import (
    FORMATS,
    UNSIGNED,
    Array,
    Format,
    flush,
    fused_multiply_add,
)
from kernels.emulator.instructions import (
    Action,
    Mask,
    Operands,
    allow,
    meaning,
    put,
    unknown,
)
from kernels.emulator.parser import Instruction

Function = Callable[..., Any]


def compute(
    ins: Instruction,
    operands: Operands,
    function: Function,
    result: Format,
    sources: list[Format],
) -> Action:
    """Return the action that applies a function to the sources, as arithmetic sees them."""
    target = operands.target(ins, ins.operands[0], result)
    slots = [
        operands.source(ins, text, form)
        for text, form in zip(ins.operands[1:], sources, strict=True)
    ]
    if any(form.widen for form in sources) or result.narrow:
        function = _in_fp32(function, result, sources)
    if len(slots) == 2 and result.packed == 1:
        first, second = slots

        def run_two(gang: Any, mask: Mask) -> None:
            views = gang.views
            put(views[target], function(views[first], views[second]), mask)

        return run_two

    def run(gang: Any, mask: Mask) -> None:
        views = gang.views
        if mask is not None and result.packed == 2:
            mask = mask.repeat(2)
        put(views[target], function(*[views[slot] for slot in slots]), mask)

    return run


def _in_fp32(function: Function, result: Format, sources: list[Format]) -> Function:
    """Return the function on numbers of 16 bits, computed in fp32 and rounded once more.

    fp32 has more than twice their bits, so that rounding twice is rounding once for sums and
    products (Figueroa, "When is double rounding innocuous?", 1995).
    """

    def rounded(*values: Array) -> Array:
        wide = [
            form.widen(value) if form.widen else value
            for form, value in zip(sources, values, strict=True)
        ]
        answer = function(*wide)
        return result.narrow(answer) if result.narrow else answer

    return rounded


# ---------------------------------------------------------------------- integers and floating point


def _divide(a: Array, b: Array) -> Array:
    """Divide integers towards zero; a division by zero gives all ones."""
    quotient = np.floor_divide(a, np.where(b == 0, 1, b).astype(a.dtype))
    if a.dtype.kind == "i":
        inexact = quotient * b != a
        quotient = quotient + (inexact & ((a < 0) != (b < 0)))
    return np.where(b == 0, ~np.zeros_like(a), quotient.astype(a.dtype))


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - _divide(a, b) * b)


def _smaller(a: Array, b: Array) -> Array:
    """Return the smaller number; of a number and a NaN, the number; -0 below +0."""
    found = np.fmin(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), found)


def _larger(a: Array, b: Array) -> Array:
    found = np.fmax(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), found)


_TWO: dict[str, tuple[Function, Function]] = {  # on integers, on floating-point numbers
    "add": (np.add, np.add),
    "sub": (np.subtract, np.subtract),
    "mul": (np.multiply, np.multiply),
    "div": (_divide, np.divide),
    "rem": (_remainder, np.fmod),
    "min": (np.minimum, _smaller),
    "max": (np.maximum, _larger),
}
_ROUNDING = {"rn", "approx", "full", "noftz"}  # approximations are computed as if rounded once


@meaning(*_TWO)
def arithmetic(ins: Instruction, operands: Operands) -> Action:
    """Compute d = a op b. Overflow of integers wraps; floating point rounds to nearest even."""
    form = format_of(ins)
    if ins.name == "mul" and not form.is_float:
        return _product(ins, operands, form)
    allow(ins, {form.name, "ftz", "sat", "NaN", "relu"} | (_ROUNDING if form.is_float else set()))
    function = _TWO[ins.name][form.is_float]
    if "NaN" in ins.modifiers:
        function = np.minimum if ins.name == "min" else np.maximum
    if ("sat" in ins.modifiers or "ftz" in ins.modifiers) and not form.is_float:
        raise unknown(ins, "integers do not saturate here")
    function = modified(ins, function)
    return compute(ins, operands, function, form, [form, form])


def format_of(ins: Instruction) -> Format:
    """Return the type that an instruction ends with."""
    if not ins.modifiers or ins.modifiers[-1] not in FORMATS:
        raise unknown(ins, "it does not end with a type")
    return FORMATS[ins.modifiers[-1]]


def modified(ins: Instruction, function: Function) -> Function:
    """Return the function with ``.ftz``, ``.sat`` and ``.relu``."""
    is_ftz, saturates = "ftz" in ins.modifiers, "sat" in ins.modifiers
    if is_ftz and ins.modifiers[-1] == "f32":
        inner = function

        def function(*values: Array) -> Array:
            return flush(inner(*map(flush, values)))

    if saturates:
        unclamped = function

        def function(*values: Array) -> Array:  # NaN becomes 0
            return np.fmin(np.fmax(unclamped(*values), np.float32(0)), np.float32(1))

    if "relu" in ins.modifiers:
        unlimited = function

        def function(*values: Array) -> Array:
            found = unlimited(*values)
            return np.maximum(found, found.dtype.type(0))

    return function


_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _product(ins: Instruction, operands: Operands, form: Format) -> Action:
    """Multiply integers: ``.lo`` the low half, ``.hi`` the high half, ``.wide`` all bits."""
    allow(ins, {form.name, "lo", "hi", "wide"}, 3)
    if "wide" in ins.modifiers:
        wide = FORMATS[_WIDER[form.name]]
        return compute(ins, operands, _wide_product(wide), wide, [form, form])
    function = np.multiply if "lo" in ins.modifiers else _high_product(form)
    return compute(ins, operands, function, form, [form, form])


def _wide_product(wide: Format) -> Function:
    return lambda a, b: a.astype(wide.view) * b.astype(wide.view)


def _high_product(form: Format) -> Function:
    """Return the high half of a product, by Python's integers where numpy has none wide enough."""
    if form.bits == 64:
        return lambda a, b: ((a.astype(object) * b.astype(object)) >> 64).astype(form.view)
    wide = FORMATS[_WIDER[form.name]]
    return lambda a, b: (_wide_product(wide)(a, b) >> form.bits).astype(form.view)


@meaning("fma", "mad")
def multiply_add(ins: Instruction, operands: Operands) -> Action:
    """Compute d = a * b + c, in floating point with one rounding."""
    form = format_of(ins)
    if ins.name == "mad" and not form.is_float:
        allow(ins, {form.name, "lo", "hi", "wide"}, 4)
        if "wide" in ins.modifiers:
            wide = FORMATS[_WIDER[form.name]]
            product = _wide_product(wide)
            return compute(
                ins, operands, lambda a, b, c: product(a, b) + c, wide, [form, form, wide]
            )
        product = np.multiply if "lo" in ins.modifiers else _high_product(form)
        return compute(ins, operands, lambda a, b, c: product(a, b) + c, form, [form] * 3)
    allow(ins, {form.name, "rn", "ftz", "sat", "relu"}, 4)
    if form.name == "f64":
        raise unknown(ins, "fp64 has no fused product here")
    function = fused_multiply_add if form.name == "f32" else _half_multiply_add
    return compute(ins, operands, modified(ins, function), form, [form] * 3)


def _half_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of numbers of 16 bits: exact in fp64 but for sums of far apart numbers."""
    return a.astype(np.float64) * b + c


_ONE: dict[str, Function] = {
    "neg": np.negative,
    "abs": np.abs,
    "rcp": lambda x: np.divide(1, x, dtype=np.float64),
    "sqrt": lambda x: np.sqrt(x.astype(np.float64)),
    "rsqrt": lambda x: 1 / np.sqrt(x.astype(np.float64)),
    "ex2": lambda x: np.exp2(x.astype(np.float64)),
    "lg2": lambda x: np.log2(x.astype(np.float64)),
    "sin": lambda x: np.sin(x.astype(np.float64)),
    "cos": lambda x: np.cos(x.astype(np.float64)),
    "tanh": lambda x: np.tanh(x.astype(np.float64)),
    "not": np.invert,
    "popc": lambda x: np.array([int(v).bit_count() for v in x], np.uint32),
    "clz": lambda x: np.array([8 * x.itemsize - int(v).bit_length() for v in x], np.uint32),
    "brev": lambda x: np.array([int(f"{int(v):0{8 * x.itemsize}b}"[::-1], 2) for v in x], x.dtype),
}


@meaning(*_ONE)
def of_one(ins: Instruction, operands: Operands) -> Action:
    """Compute d = op a. Approximations are computed in fp64 and rounded: no worse than promised."""
    form = format_of(ins)
    allow(ins, {form.name, "approx", "ftz", "rn"}, 2)
    function = _ONE[ins.name]
    if form.name == "pred":
        function = np.logical_not
    if form.name == "f32":
        exact = function
        function = modified(ins, lambda x: exact(x).astype(np.float32))
    result = FORMATS["u32"] if ins.name in ("popc", "clz") else form
    return compute(ins, operands, function, result, [form])


# ----------------------------------------------------------------------------------- bits and bytes


def _shift_left(a: Array, count: Array) -> Array:
    bits = 8 * a.itemsize
    return np.where(count >= bits, 0, a << np.minimum(count, bits - 1).astype(a.dtype))


def _shift_right(a: Array, count: Array) -> Array:
    """Shift in zeros, or copies of the sign. Counts above the width are the width."""
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, 0, shifted)


@meaning("shl", "shr")
def shift(ins: Instruction, operands: Operands) -> Action:
    """Shift by a number of bits that may exceed the width."""
    form = format_of(ins)
    allow(ins, {form.name}, 3)
    function = _shift_left if ins.name == "shl" else _shift_right
    return compute(ins, operands, function, form, [form, FORMATS["u32"]])


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@meaning(*_LOGIC)
def logic(ins: Instruction, operands: Operands) -> Action:
    """Combine bits, or predicates."""
    form = format_of(ins)
    allow(ins, {form.name}, 3)
    return compute(ins, operands, _LOGIC[ins.name], form, [form, form])


def _any_logic(table: int) -> Function:
    def combine(a: Array, b: Array, c: Array) -> Array:
        found = np.zeros_like(a)
        for index in range(8):
            if table >> index & 1:
                terms = [x if index >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0))]
                found |= terms[0] & terms[1] & terms[2]
        return found

    return combine


@meaning("lop3")
def any_logic(ins: Instruction, operands: Operands) -> Action:
    """Apply the truth table of three inputs that the last operand is."""
    allow(ins, {"b32"}, 5)
    table = int(ins.operands[4], 0)
    short = _with_operands(ins, ins.operands[:4])
    return compute(short, operands, _any_logic(table), FORMATS["b32"], [FORMATS["b32"]] * 3)


def _with_operands(ins: Instruction, texts: tuple[str, ...]) -> Instruction:
    return Instruction(ins.name, ins.modifiers, texts, ins.guard, ins.negated, ins.line, ins.text)


def _permute(a: Array, b: Array, selectors: Array) -> Array:
    """Pick four bytes out of eight; bit 3 of a selector replicates the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(a)
    for position in range(4):
        selector = selectors >> np.uint32(4 * position) & np.uint32(15)
        byte = (both >> (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), 255, 0)
        chosen = np.where(selector & np.uint32(8), sign, byte).astype(np.uint32)
        found |= chosen << np.uint32(8 * position)
    return found


def _extract(a: Array, position: Array, length: Array) -> Array:
    """Return a bit field; that of a signed type is extended by its sign."""
    bits = 8 * a.itemsize
    position, wanted = position & np.uint32(255), length & np.uint32(255)
    length = np.minimum(wanted, np.maximum(np.int64(bits) - position, 0)).astype(np.uint32)
    field = _shift_right(a.view(UNSIGNED[bits]), position)
    one = UNSIGNED[bits](1)
    keep = np.where(length >= bits, ~UNSIGNED[bits](0), _shift_left(one + 0 * field, length) - one)
    field = field & keep.astype(field.dtype)
    if a.dtype.kind == "u":
        return field
    top = np.minimum(position.astype(np.int64) + wanted - 1, bits - 1)
    sign = (_shift_right(a.view(UNSIGNED[bits]), np.maximum(top, 0)) & one).astype(bool)
    sign &= wanted > 0
    return np.where(sign, field | ~keep.astype(field.dtype), field).view(a.dtype)


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """Return b with a bit field replaced by the low bits of a."""
    position, length = position & np.uint32(255), length & np.uint32(255)
    keep = _shift_left(_shift_left(np.ones_like(a), length) - np.ones_like(a), position)
    return (b & ~keep) | (_shift_left(a, position) & keep)


def _funnel(left: bool, wraps: bool) -> Function:
    def funnel(low: Array, high: Array, count: Array) -> Array:
        count = count & np.uint32(31) if wraps else np.minimum(count, np.uint32(32))
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        shift = count.astype(np.uint64)
        if left:
            return (both << shift >> np.uint64(32)).astype(np.uint32)
        return (both >> shift).astype(np.uint32)

    return funnel


@meaning("prmt", "bfe", "bfi", "shf")
def fields(ins: Instruction, operands: Operands) -> Action:
    """Move bytes and bit fields."""
    form, word = format_of(ins), FORMATS["u32"]
    allow(ins, {form.name, "l", "r", "wrap", "clamp"} if ins.name == "shf" else {form.name})
    if ins.name == "prmt":
        return compute(ins, operands, _permute, form, [form, form, word])
    if ins.name == "bfe":
        return compute(ins, operands, _extract, form, [form, word, word])
    if ins.name == "bfi":
        return compute(ins, operands, _insert, form, [form, form, word, word])
    function = _funnel("l" in ins.modifiers, "wrap" in ins.modifiers)
    return compute(ins, operands, function, form, [form, form, word])


# ------------------------------------------------------------------------- comparison and selection

_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
_COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(ins: Instruction, form: Format) -> Function:
    """Return the comparison; those of floats are false for NaN, with a ``u`` added true."""
    name = ins.modifiers[0]
    if not form.is_float:
        if name not in _ORDERED:
            raise unknown(ins, f"comparison .{name}")
        return _ORDERED[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    plain = name.removesuffix("u")
    if plain not in ("eq", "ne", "lt", "le", "gt", "ge"):
        raise unknown(ins, f"comparison .{name}")
    if plain != name:
        return lambda a, b: _ORDERED[plain](a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":  # numpy's is true for NaN
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _ORDERED[name]


@meaning("setp")
def set_predicate(ins: Instruction, operands: Operands) -> Action:
    """Compute p = a cmp b, combined with another predicate if there is one."""
    form, predicate = format_of(ins), FORMATS["pred"]
    middle = ins.modifiers[1:-1]
    if strange := set(middle) - {"ftz", *_COMBINED}:
        raise unknown(ins, f"modifier .{strange.pop()}")
    compare = _comparison(ins, form)
    if "ftz" in middle and form.name == "f32":
        unflushed = compare

        def compare(a: Array, b: Array) -> Array:
            return unflushed(flush(a), flush(b))

    combine = next((_COMBINED[name] for name in middle if name in _COMBINED), None)
    if "|" in ins.operands[0] or len(ins.operands) != (3 if combine is None else 4):
        raise unknown(ins, "two results, or a strange number of operands")
    if combine is None:
        return compute(ins, operands, compare, predicate, [form, form])
    if ins.operands[3].startswith("!"):
        raise unknown(ins, "a negated operand")
    return compute(
        ins, operands, lambda a, b, c: combine(compare(a, b), c), predicate, [form, form, predicate]
    )


@meaning("selp")
def select(ins: Instruction, operands: Operands) -> Action:
    """Compute d = p ? a : b."""
    form = format_of(ins)
    allow(ins, {form.name}, 4)
    bits = FORMATS[f"b{form.bits}"]
    if form.bits == 1:
        raise unknown(ins)
    slots = [operands.source(ins, text, form).__int__() for text in ins.operands[1:3]]
    plain = [as_bits(operands, slot, bits) for slot in slots]
    chooser = operands.source(ins, ins.operands[3], "pred")
    target = operands.target(ins, ins.operands[0], bits)

    def run(gang: Any, mask: Mask) -> None:
        views = gang.views
        put(views[target], np.where(views[chooser], views[plain[0]], views[plain[1]]), mask)

    return run


def as_bits(operands: Operands, slot: int, bits: Format) -> int:
    """Return the slot of the same register, seen as bits."""
    return operands.slot(operands.slots[slot][0], bits.view)
