"""The emulator's instructions, one by one, against the definitions of the PTX manual.

Expected values are computed with Python's integers, fractions and math, a number at a time; the
emulator computes with numpy.
"""

import math
import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest

from kernels.emulator import UnknownInstructionError
from kernels.emulator.formats import FORMATS
from tests.support.kernels.handwritten import evaluate

COUNT = 96
# Format: exponent bits, mantissa bits.
FLOATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7), "f64": (11, 52), "tf32": (8, 10)}


def to_number(bits: int, kind: str) -> float:
    """The value of a float, by IEEE 754's definition."""
    exponent_bits, mantissa_bits = FLOATS[kind]
    sign = -1.0 if bits >> (exponent_bits + mantissa_bits) & 1 else 1.0
    exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def to_bits(value: Fraction | float, kind: str, negative_zero: bool = False) -> int:
    """The nearest float, ties to even, of an exact value; by the definition, digit by digit."""
    exponent_bits, mantissa_bits = FLOATS[kind]
    top = (1 << exponent_bits) - 1
    if isinstance(value, float):
        if math.isnan(value):
            return -1
        if math.isinf(value):
            return (top | (value < 0) << exponent_bits) << mantissa_bits
        negative_zero = negative_zero or math.copysign(1, value) < 0
        value = Fraction(value)
    negative = value < 0 or (value == 0 and negative_zero)
    magnitude = abs(value)
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = 1 - bias
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - mantissa_bits)
    quotient, rest = divmod(magnitude, unit)
    quotient += rest * 2 > unit or (rest * 2 == unit and quotient % 2 == 1)
    code = int(quotient) + (exponent - 1 + bias << mantissa_bits)  # a carry moves the exponent
    return min(code, top << mantissa_bits) | negative << (exponent_bits + mantissa_bits)


def numbers(kind: str, seed: int = 0) -> list[int]:
    """Bits of a type: its corners, and random ones; of floats no NaN."""
    generator = random.Random(f"{kind}{seed}")
    if kind == "pred":
        return [generator.randrange(2) for _ in range(COUNT)]
    bits = FORMATS[kind].bits if kind in FORMATS else 32
    if kind in FLOATS:
        _, mantissa_bits = FLOATS[kind]
        top = to_bits(math.inf, kind)
        corners = [0, 1 << (bits - 1), 1, to_bits(1.0, kind), to_bits(-2.5, kind), top, top - 1]
        one = to_bits(1.0, kind)
        near = [
            one + generator.randrange(-3 << mantissa_bits, 3 << mantissa_bits) for _ in range(60)
        ]
        signs = [value | generator.randrange(2) << (bits - 1) for value in near]
        wide = [generator.getrandbits(bits) for _ in range(200)]
        wide = [value for value in wide if not math.isnan(to_number(value, kind))]
        found = corners + signs + wide
    else:
        corners = [0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 7]
        found = corners + [generator.getrandbits(bits) for _ in range(COUNT)]
    found = found[:COUNT]
    generator.shuffle(found)
    return found


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def typed(value: int, kind: str) -> Any:
    """Bits as a number of a type."""
    if kind in FLOATS:
        return to_number(value, kind)
    return signed(value, FORMATS[kind].bits) if kind[0] == "s" else value


def truncated(a: int, b: int) -> int:
    return int(Fraction(a, b))


INTEGERS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: truncated(a, b) if b else -1,
    "rem": lambda a, b: a - truncated(a, b) * b if b else a,
}
INTEGER_CASES = [
    (f"{name}.{kind}", kind)
    for name in INTEGERS
    for kind in ("s32", "u32", "s64", "u64", "s16", "u16")
]


def check(
    instruction: str,
    result: str,
    kinds: Sequence[str],
    expected: Callable[..., int | None],
    columns: Sequence[list[int]] | None = None,
) -> None:
    """Compare all rows; a function that returns None has no opinion. -1 stands for any NaN."""
    columns = columns or [numbers(kind, index) for index, kind in enumerate(kinds)]
    found = evaluate(instruction, result, list(zip(kinds, columns, strict=True)))
    bits = FORMATS[result].bits
    for row, value in zip(zip(*columns, strict=True), found, strict=True):
        wanted = expected(*row)
        if wanted == -1 and result in FLOATS:
            assert math.isnan(to_number(value, result)), (instruction, row)
        elif wanted is not None:
            assert value == wanted & ((1 << bits) - 1), (
                f"{instruction} of {[hex(x) for x in row]}: {value:#x}, not {wanted:#x}"
            )


@pytest.mark.parametrize(("opcode", "kind"), INTEGER_CASES)
def test_integers(opcode: str, kind: str) -> None:
    function = INTEGERS[opcode.rpartition(".")[0]]
    check(
        f"{opcode} d, a, b",
        kind,
        [kind, kind],
        lambda a, b: function(typed(a, kind), typed(b, kind)),
    )


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_wide_and_high_products(kind: str) -> None:
    bits = FORMATS[kind].bits

    def product(a: int, b: int) -> int:
        return typed(a, kind) * typed(b, kind)

    if kind[1:] != "16":
        check(f"mul.hi.{kind} d, a, b", kind, [kind, kind], lambda a, b: product(a, b) >> bits)
    if kind[1:] != "64":
        wide = f"{kind[0]}{2 * bits}"
        check(f"mul.wide.{kind} d, a, b", wide, [kind, kind], product)
        check(
            f"mad.wide.{kind} d, a, b, c", wide, [kind, kind, wide],
            lambda a, b, c: product(a, b) + typed(c, wide),
        )  # fmt: skip
    check(f"mad.lo.{kind} d, a, b, c", kind, [kind] * 3, lambda a, b, c: product(a, b) + c)


def exact(function: Callable[..., Fraction], kind: str) -> Callable[..., int | None]:
    """The rounded result of finite operands; of others there is no opinion."""

    def expected(*bits: int) -> int | None:
        values = [to_number(value, kind) for value in bits]
        if not all(map(math.isfinite, values)):
            return None
        result = function(*map(Fraction, values))
        return to_bits(result, kind) if result else None  # a zero's sign is tested apart

    return expected


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_sums_and_products_round_once(kind: str) -> None:
    pair = [kind, kind]
    check(f"add.rn.{kind} d, a, b", kind, pair, exact(lambda a, b: a + b, kind))
    check(f"sub.rn.{kind} d, a, b", kind, pair, exact(lambda a, b: a - b, kind))
    check(f"mul.rn.{kind} d, a, b", kind, pair, exact(lambda a, b: a * b, kind))
    check(f"neg.{kind} d, a", kind, [kind], exact(lambda a: -a, kind))
    check(f"abs.{kind} d, a", kind, [kind], exact(abs, kind))


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_fused_product_rounds_once(kind: str) -> None:
    check(f"fma.rn.{kind} d, a, b, c", kind, [kind] * 3, exact(lambda a, b, c: a * b + c, kind))


def test_a_fused_product_whose_fp64_sum_is_halfway() -> None:
    """(1 + 2^-23)(1 + 2^-23) - tiny: fp64 rounds the sum to a tie, which must not be broken up."""
    one, unit = 0x3F800000, 0x33800000  # 1, 2^-24
    tiny = to_bits(math.ldexp(1.0, -80), "f32")
    rows = [(one, unit, one), (unit, one, one), (one + 1, one, unit)]
    columns: list[list[int]] = [[], [], []]
    for a, b, c in rows:
        for column, value in zip(columns, (a, b, c), strict=True):
            column.append(value)
    # 2^-24 * 1 + 1 is a tie; with 2^-24 (1 + 2^-23) it is above.
    columns = [[unit, unit + 1, unit - 1], [one, one, one], [one, one, one]]
    check(
        "fma.rn.f32 d, a, b, c",
        "f32",
        ["f32"] * 3,
        exact(lambda a, b, c: a * b + c, "f32"),
        columns,
    )
    near = to_bits(1 + 2.0**-12, "f32")
    columns = [[near, near | 1 << 31], [near, near], [tiny, tiny]]
    check(
        "fma.rn.f32 d, a, b, c",
        "f32",
        ["f32"] * 3,
        exact(lambda a, b, c: a * b + c, "f32"),
        columns,
    )


def test_flushing_saturating_and_rectifying() -> None:
    subnormal, one, two = 0x00000005, 0x3F800000, 0x40000000
    assert evaluate("add.ftz.f32 d, a, b", "f32", [("f32", [subnormal]), ("f32", [0])]) == [0]
    assert evaluate("add.f32 d, a, b", "f32", [("f32", [subnormal]), ("f32", [0])]) == [subnormal]
    nan = 0x7FC00000
    assert evaluate(
        "add.sat.f32 d, a, b", "f32", [("f32", [one, nan, two | 1 << 31]), ("f32", [one, one, one])]
    ) == [one, 0, 0]  # fmt: skip


def test_the_smaller_of_a_number_and_a_nan() -> None:
    nan, one, zero, minus = 0x7FC00000, 0x3F800000, 0, 1 << 31
    a, b = [nan, one, zero, minus], [one, nan, minus, zero]
    pair = [("f32", a), ("f32", b)]
    assert evaluate("min.f32 d, a, b", "f32", pair) == [one, one, minus, minus]
    assert evaluate("max.f32 d, a, b", "f32", pair) == [one, one, zero, zero]
    found = evaluate("max.NaN.f32 d, a, b", "f32", pair)
    assert [math.isnan(to_number(x, "f32")) for x in found] == [True, True, False, False]


APPROXIMATIONS: dict[str, tuple[Callable[[float], float], float]] = {
    # The manual's largest relative error (absolute for lg2 near 1, tanh, sin, cos).
    "ex2.approx.f32": (lambda x: 2.0**x, 2**-22),
    "lg2.approx.f32": (lambda x: math.log2(x), 2**-22),
    "rcp.approx.f32": (lambda x: 1 / x, 2**-23),
    "rsqrt.approx.f32": (lambda x: x**-0.5, 2**-22.9),
    "sqrt.approx.f32": (lambda x: x**0.5, 2**-23),
    "tanh.approx.f32": (math.tanh, 2**-11),
    "sin.approx.f32": (math.sin, 2**-20.5),
    "cos.approx.f32": (math.cos, 2**-20.5),
}


@pytest.mark.parametrize("opcode", APPROXIMATIONS)
def test_approximations_are_within_the_manuals_error(opcode: str) -> None:
    function, error = APPROXIMATIONS[opcode]
    inputs = [to_bits(0.03 + 0.11 * index, "f32") for index in range(28)]
    found = evaluate(f"{opcode} d, a", "f32", [("f32", inputs)])
    for value, result in zip(inputs, found, strict=True):
        truth = function(to_number(value, "f32"))
        assert abs(to_number(result, "f32") - truth) <= error * max(1.0, abs(truth)), opcode


def test_division() -> None:
    def quotient(a: int, b: int) -> int | None:
        x, y = to_number(a, "f32"), to_number(b, "f32")
        if not (math.isfinite(x) and math.isfinite(y)) or y == 0 or x == 0:
            return None
        return to_bits(Fraction(x) / Fraction(y), "f32")

    check("div.rn.f32 d, a, b", "f32", ["f32", "f32"], quotient)


def bytes_of(value: int, bits: int) -> list[int]:
    return list(value.to_bytes(bits // 8, "little"))


def permuted(a: int, b: int, selectors: int) -> int:
    source = bytes_of(a, 32) + bytes_of(b, 32)
    found = []
    for position in range(4):
        selector = selectors >> (4 * position) & 15
        byte = source[selector & 7]
        found.append((255 if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def field(value: int, kind: str, position: int, length: int) -> int:
    """The manual's loop over the bits of a field."""
    position, length = position & 255, length & 255
    bits = FORMATS[kind].bits
    is_signed = kind[0] == "s"
    sign = 0
    if is_signed and length:
        sign = value >> min(position + length - 1, bits - 1) & 1
    found = 0
    for index in range(bits):
        inside = index < length and position + index < bits
        found |= (value >> (position + index) & 1 if inside else sign) << index
    return found


def replaced(a: int, b: int, position: int, length: int) -> int:
    for index in range(length):
        if position + index < 32:
            place = position + index
            b = b & ~(1 << place) | (a >> index & 1) << place
    return b


COUNTS = [index % 40 for index in range(COUNT)]


def test_bits() -> None:
    for kind in ("b32", "b64", "b16"):
        bits = FORMATS[kind].bits
        for name, function in (
            ("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b),
        ):  # fmt: skip
            check(f"{name}.{kind} d, a, b", kind, [kind, kind], function)
        check(f"not.{kind} d, a", kind, [kind], lambda a: ~a)
        columns = [numbers(kind), [3 * count for count in COUNTS]]
        check(f"shl.{kind} d, a, b", kind, [kind, "u32"], lambda a, n: a << n, columns)
        for unsigned in ("b", "u", "s"):
            form = f"{unsigned}{bits}"
            check(
                f"shr.{form} d, a, b", kind, [kind, "u32"],
                lambda a, n, form=form: typed(a, form) >> n, columns,
            )  # fmt: skip
    check("popc.b32 d, a", "u32", ["b32"], lambda a: bin(a).count("1"))
    check("clz.b32 d, a", "u32", ["b32"], lambda a: 32 - len(bin(a)[2:]) if a else 32)
    check("brev.b32 d, a", "b32", ["b32"], lambda a: int(f"{a:032b}"[::-1], 2))
    check("prmt.b32 d, a, b, c", "b32", ["b32"] * 3, permuted)


def test_bit_fields() -> None:
    positions, lengths = [index % 37 for index in range(COUNT)], COUNTS
    columns = [numbers("u32"), positions, lengths]
    for kind in ("u32", "s32"):
        check(
            f"bfe.{kind} d, a, b, c", kind, [kind, "u32", "u32"],
            lambda a, b, c, kind=kind: field(a, kind, b, c), columns,
        )  # fmt: skip
    for position, length in ((0, 0), (3, 5), (16, 16), (30, 9), (0, 32)):
        check(
            f"bfi.b32 d, a, b, {position}, {length}", "b32", ["b32", "b32"],
            lambda a, b, p=position, n=length: replaced(a, b, p, n),
        )  # fmt: skip
    for count in (0, 1, 13, 31, 32, 45):
        check(
            f"shf.l.wrap.b32 d, a, b, {count}", "b32", ["b32", "b32"],
            lambda a, b, n=count: ((b << 32 | a) << (n & 31)) >> 32,
        )  # fmt: skip
        check(
            f"shf.r.clamp.b32 d, a, b, {count}", "b32", ["b32", "b32"],
            lambda a, b, n=count: (b << 32 | a) >> min(n, 32),
        )  # fmt: skip


@pytest.mark.parametrize("table", [0xC0, 0x96, 0xE8, 0x1B])
def test_any_logic_of_three(table: int) -> None:
    def looked_up(a: int, b: int, c: int) -> int:
        return sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
            for i in range(32)
        )

    check(f"lop3.b32 d, a, b, c, {table}", "b32", ["b32"] * 3, looked_up)


ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u16", "f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ORDERED)
def test_comparisons(name: str, kind: str) -> None:
    compare = ORDERED[name]
    b = [
        x if index % 3 else y
        for index, (x, y) in enumerate(zip(numbers(kind), numbers(kind, 1), strict=True))
    ]
    columns = [numbers(kind), b]
    check(
        f"setp.{name}.{kind} d, a, b", "pred", [kind, kind],
        lambda a, b: int(compare(typed(a, kind), typed(b, kind))), columns,
    )  # fmt: skip


def test_comparisons_with_nan() -> None:
    nan, one = 0x7FC00000, 0x3F800000
    pair = [("f32", [nan, one, one]), ("f32", [one, nan, one])]
    for name, expected in (
        ("ne", [0, 0, 0]), ("neu", [1, 1, 0]), ("lt", [0, 0, 0]), ("ltu", [1, 1, 0]),
        ("geu", [1, 1, 1]), ("nan", [1, 1, 0]), ("num", [0, 0, 1]),
    ):  # fmt: skip
        assert evaluate(f"setp.{name}.f32 d, a, b", "pred", pair) == expected, name


def test_combined_predicates_and_selection() -> None:
    check(
        "setp.lt.and.s32 d, a, b, c", "pred", ["s32", "s32", "pred"],
        lambda a, b, c: int(signed(a, 32) < signed(b, 32) and bool(c)),
    )  # fmt: skip
    check("selp.b32 d, a, b, c", "b32", ["b32", "b32", "pred"], lambda a, b, c: a if c else b)
    check("selp.f32 d, a, b, c", "f32", ["f32", "f32", "pred"], lambda a, b, c: a if c else b)


@pytest.mark.parametrize(
    ("to", "origin"),
    [("s64", "s32"), ("u64", "u32"), ("s32", "s16"), ("u32", "u16"), ("u16", "u32"), ("s64", "s16"),
     ("u32", "u64"), ("s32", "s64"), ("u64", "u16")],
)  # fmt: skip
def test_integers_of_another_width(to: str, origin: str) -> None:
    check(f"cvt.{to}.{origin} d, a", to, [origin], lambda a: typed(a, origin))


@pytest.mark.parametrize("to", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("origin", ["s32", "u32", "s64", "s16"])
def test_integers_to_floats(to: str, origin: str) -> None:
    if to == "bf16" and origin != "s32":
        pytest.skip("the manual has no such conversion before sm_90")
    check(
        f"cvt.rn.{to}.{origin} d, a",
        to,
        [origin],
        lambda a: to_bits(Fraction(typed(a, origin)), to),
    )


@pytest.mark.parametrize(
    ("to", "origin"), [("bf16", "f32"), ("f16", "f32"), ("f32", "f16"), ("f32", "bf16")]
)
def test_floats_to_floats(to: str, origin: str) -> None:
    rounding = "rn." if to != "f32" else ""

    def expected(a: int) -> int:
        return to_bits(to_number(a, origin), to)

    check(f"cvt.{rounding}{to}.{origin} d, a", to, [origin], expected)


def test_pairs() -> None:
    for kind in ("bf16", "f16"):
        check(
            f"cvt.rn.{kind}x2.f32 d, a, b", "b32", ["f32", "f32"],
            lambda a, b, kind=kind: to_bits(to_number(a, "f32"), kind) << 16
            | to_bits(to_number(b, "f32"), kind),
        )  # fmt: skip
        halves = [
            [x | y << 16 for x, y in zip(numbers(kind, i), numbers(kind, i + 5), strict=True)]
            for i in (0, 1)
        ]

        def added(a: int, b: int, kind: str = kind) -> int | None:
            sums = [
                exact(Fraction.__add__, kind)(a >> s & 0xFFFF, b >> s & 0xFFFF) for s in (0, 16)
            ]
            return None if None in sums else sums[0] | sums[1] << 16

        check(f"add.rn.{kind}x2 d, a, b", f"{kind}x2", [f"{kind}x2"] * 2, added, halves)


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16"])
@pytest.mark.parametrize("rounding", ["rzi", "rni", "rmi", "rpi"])
def test_floats_to_integers_clamp(to: str, rounding: str) -> None:
    bits = FORMATS[to].bits
    low, high = (
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    )
    to_whole = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[rounding]

    def expected(a: int) -> int:
        value = to_number(a, "f32")
        if math.isinf(value):
            return high if value > 0 else low
        return min(max(to_whole(Fraction(value)), low), high)

    check(f"cvt.{rounding}.{to}.f32 d, a", to, ["f32"], expected)
    nan = evaluate(f"cvt.{rounding}.{to}.f32 d, a", to, [("f32", [0x7FC00000])])
    assert nan == [1 << 63 if bits == 64 else 0]


def test_tf32_rounds_ties_away() -> None:
    def expected(a: int) -> int | None:
        value = to_number(a, "f32")
        if not math.isfinite(value) or abs(value) < 2.0**-126:
            return None
        magnitude = a & 0x7FFFFFFF
        return ((magnitude + 0x1000) & 0x7FFFE000) | a & 0x80000000

    check("cvt.rna.tf32.f32 d, a", "b32", ["f32"], expected)


def test_moves() -> None:
    check("mov.b32 d, a", "b32", ["b32"], lambda a: a)
    check("mov.b32 d, {a, b}", "b32", ["b16", "b16"], lambda a, b: a | b << 16)
    check("mov.b64 d, {a, b}", "b64", ["b32", "b32"], lambda a, b: a | b << 32)
    check("mov.b32 {_, d}, a", "b16", ["b32"], lambda a: a >> 16)
    check("mov.b64 {d, _}, a", "b32", ["b64"], lambda a: a & 0xFFFFFFFF)


def test_constants() -> None:
    half = struct.unpack("<I", struct.pack("<f", 0.5))[0]
    assert evaluate("add.s32 d, a, -5", "s32", [("s32", [7])]) == [2]
    assert evaluate(f"add.f32 d, a, 0f{half:08X}", "f32", [("f32", [half])]) == [0x3F800000]
    assert evaluate("mov.b32 d, 0x10", "b32", [("b32", [0])]) == [16]


UNKNOWN = (
    "add.rz.f32 d, a, b",
    "add.cc.u32 d, a, b",
    "mul24.lo.s32 d, a, b",
    "cvt.rn.satfinite.f32.s32 d, a",
    "setp.lt.bogus.s32 d, a, b",
    "sad.s32 d, a, b, a",
)


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_what_is_not_known_is_named_with_its_line(instruction: str) -> None:
    kind = "f32" if "f32" in instruction else "s32"
    with pytest.raises(
        UnknownInstructionError, match=r"line \d+: unknown instruction: \w+"
    ) as error:
        evaluate(instruction, kind, [(kind, [1]), (kind, [2])])
    assert instruction.split()[0] in str(error.value)
