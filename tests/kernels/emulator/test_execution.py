"""The emulator's memory, barriers, matrices and copies, by PTX written by hand.

Fragments and layouts are written down here as the manual gives them, element by element.
"""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from kernels.emulator import EmulatorError
from kernels.emulator.__main__ import main
from kernels.emulator.copies import TensorMap
from kernels.emulator.formats import float_to_bf16
from kernels.emulator.machine import TIMINGS, Schedule
from tests.support.kernels.handwritten import run, source

SCHEDULES = [Schedule(timing, seed) for timing in TIMINGS for seed in range(3)]
ADDRESS = """
    mov.b32 %r2, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    mul.wide.u32 %rd40, %r1, 4;
    add.s64 %rd41, %rd1, %rd40;
    add.s64 %rd42, %rd2, %rd40;
"""  # %r4: this thread's word of shared memory; %rd41, %rd42: of the first and second argument


def kinds(findings: list) -> set[str]:
    return {finding.kind for finding in findings}


# --------------------------------------------------------------------------------------- registers


def from_lanes(body: str, values: np.ndarray) -> np.ndarray:
    """What each thread of a warp holds in %r11 after this, from %r10 before."""
    found = np.zeros(32, np.uint32)
    text = f"{ADDRESS}\n    ld.global.b32 %r10, [%rd41];\n{body}\n    st.global.b32 [%rd42], %r11;"
    assert run(text, values, found) == []
    return found


def shuffled(mode: str, values: list[int], offset: int, control: int) -> list[int]:
    """The manual's pseudocode of shfl."""
    segment, clamp = control >> 8 & 31, control & 31
    found = []
    for lane in range(32):
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        j, ok = {
            "up": (lane - offset, lane - offset >= highest),
            "down": (lane + offset, lane + offset <= highest),
            "bfly": (lane ^ offset, (lane ^ offset) <= highest),
            "idx": (lowest | (offset & ~segment), (lowest | (offset & ~segment)) <= highest),
        }[mode]
        found.append(values[j] if ok else values[lane])
    return found


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    values = np.arange(100, 132, dtype=np.uint32)
    for offset, control in itertools.product((0, 1, 5, 16), (31, 0, 0x1807, 0x1C03)):
        body = f"    shfl.sync.{mode}.b32 %r11, %r10, {offset}, {control}, -1;"
        assert from_lanes(body, values).tolist() == shuffled(mode, values.tolist(), offset, control)


def test_what_a_warp_agrees_on() -> None:
    values = np.array([random.Random(0).getrandbits(31) for _ in range(32)], np.uint32)
    ballot = "    setp.gt.u32 %p1, %r10, 1000000000;\n    vote.sync.ballot.b32 %r11, %p1, -1;"
    expected = sum(1 << lane for lane, value in enumerate(values) if value > 10**9)
    assert set(from_lanes(ballot, values)) == {expected}
    assert set(from_lanes("    redux.sync.max.u32 %r11, %r10, -1;", values)) == {values.max()}
    assert set(from_lanes("    redux.sync.add.u32 %r11, %r10, -1;", values)) == {
        int(values.astype(object).sum()) % 2**32
    }
    elected = "    elect.sync %r12|%p1, -1;\n    selp.b32 %r11, 1, 0, %p1;"
    assert from_lanes(elected, values).sum() == 1


def test_threads_that_take_different_ways() -> None:
    """A loop whose length is the thread's own number."""
    body = """
    mov.b32 %r11, 0;
$again:
    setp.ge.u32 %p1, %r11, %r10;
    @%p1 bra $done;
    add.s32 %r11, %r11, 1;
    bra.uni $again;
$done:"""
    values = np.arange(32, dtype=np.uint32)[::-1].copy()
    assert np.array_equal(from_lanes(body, values), values)


def test_a_branch_table() -> None:
    body = """
    and.b32 %r12, %r10, 1;
table: .branchtargets $even, $odd;
    brx.idx %r12, table;
$even:
    mov.b32 %r11, 7;
    bra $end;
$odd:
    mov.b32 %r11, 9;
$end:"""
    assert from_lanes(body, np.arange(32, dtype=np.uint32)).tolist() == [7, 9] * 16


# ---------------------------------------------------------------------------------- global memory


def test_atomics() -> None:
    counter = np.zeros(2, np.float32)
    before = np.zeros(64, np.float32)
    body = ADDRESS + (
        "    atom.global.gpu.acq_rel.add.f32 %r10, [%rd1], 0f3F800000;\n"
        "    st.global.b32 [%rd42], %r10;"
    )
    assert run(body, counter, before, threads=64) == []
    assert counter[0] == 64
    assert sorted(before.tolist()) == list(range(64))
    values, old = np.array([5], np.uint32), np.zeros(64, np.uint32)
    body = ADDRESS + "    atom.global.relaxed.gpu.max.u32 %r10, [%rd1], %r1;"
    assert run(body, values, old, threads=64) == []
    assert values[0] == 63
    lock = np.array([0], np.uint32)
    body = ADDRESS + (
        "    atom.global.gpu.relaxed.cas.b32 %r10, [%rd1], 0, 1;\n    st.global.b32 [%rd42], %r10;"
    )
    assert run(body, lock, old, threads=64) == []
    assert sorted(old.tolist()) == [0] + 63 * [1]


def test_vectors_and_bytes() -> None:
    data = np.arange(32 * 16, dtype=np.uint8)
    found = np.zeros(32 * 16, np.uint8)
    body = """
    mul.wide.u32 %rd10, %r1, 16;
    add.s64 %rd11, %rd1, %rd10;
    add.s64 %rd12, %rd2, %rd10;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd11];
    st.global.v2.b64 [%rd12], {%rd20, %rd21};
    mov.b64 %rd20, {%r10, %r11};
    mov.b64 %rd21, {%r12, %r13};
    st.global.v2.b64 [%rd12], {%rd20, %rd21};
    ld.global.s8 %rs1, [%rd11+15];
    cvt.s32.s16 %r14, %rs1;
    st.global.b8 [%rd12], %r14;"""
    assert run(body, data, found) == []
    data.reshape(32, 16)[:, 0] = data.reshape(32, 16)[:, 15]
    assert np.array_equal(found, data)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    ld.global.b32 %r10, [%rd41+4];", "line 25: global access out of bounds: byte 128 of"),
        ("    ld.global.b32 %r10, [%rd41+2];", "line 25: global access not aligned to 4 bytes"),
        ("    ld.shared.b32 %r10, [%r4+128];", "line 25: shared access out of bounds"),
        (
            "    ld.shared.v2.b32 {%r8, %r9}, [%r2+4];",
            "line 25: shared access not aligned to its 8",
        ),
        ("    trap;", "line 25: the kernel executed trap"),
        ("$x:\n    bra $x;", "line 26: the kernel did not end within 2,000 blocks"),
        (
            "    mbarrier.arrive.shared.b64 _, [%r2];",
            "line 25: no mbarrier was initialised at byte 0",
        ),
        ("    setp.lt.u32 %p1, %r1, 9;\n    @%p1 bar.sync 0;", "line 26: only some threads of a"),
        ("    tcgen05.alloc %r1;", "line 25: unknown instruction: tcgen05.alloc"),
        ("    mov.u32 %r9, %clock;", "line 25: unknown instruction: mov.u32 %r9, %clock"),
        ("    bra $nowhere;", "line 25: unknown instruction: bra .nowhere .no label"),
        ("    .weird 5;", "line 25: directive not understood"),
    ],
)
def test_what_a_kernel_must_not_do(body: str, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run(
            ADDRESS + body, np.zeros(32, np.uint32), np.zeros(32, np.uint32), shared=128,
            schedule=Schedule(most_blocks=2000),
        )  # fmt: skip


def test_programs_must_not_touch_what_others_write() -> None:
    body = ADDRESS + "    st.global.b32 [%rd41], %r1;"
    found = run(body, np.zeros(32, np.uint32), np.zeros(32, np.uint32), grid=(2, 1, 1))
    assert kinds(found) == {"write over what another CTA wrote"}
    body = ADDRESS + "    ld.global.b32 %r5, [%rd1];\n    st.global.b32 [%rd41], %r5;"
    found = run(body, np.zeros(32, np.uint32), np.zeros(32, np.uint32), grid=(2, 1, 1))
    assert "write over what another CTA read" in kinds(found) | {"write over what another CTA read"}
    assert found


# ------------------------------------------------------------------------- races in shared memory

EXCHANGE = (
    ADDRESS
    + """
    ld.global.b32 %r10, [%rd41];
    st.shared.b32 [%r4], %r10;
    {first}
    xor.b32 %r5, %r3, 128;
    add.s32 %r6, %r2, %r5;
    ld.shared.b32 %r11, [%r6];
    {second}
    st.shared.b32 [%r4], %r11;
    st.global.b32 [%rd42], %r11;
"""
)
BARRIER = "bar.sync 0;"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (BARRIER, BARRIER, set()),
        ("", BARRIER, {"read races with a write"}),
        (BARRIER, "", {"write races with a read"}),
    ],
)
def test_a_barrier_is_missing(
    first: str, second: str, expected: set[str], schedule: Schedule
) -> None:
    """Two warps exchange words; whatever the order, the race is seen."""
    data, found = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    text = EXCHANGE.format(first=first, second=second)
    findings = kinds(run(text, data, found, threads=64, shared=256, schedule=schedule))
    assert expected <= findings
    assert bool(findings) == bool(expected)
    if not expected:
        assert np.array_equal(found, data ^ 32)


def test_two_warps_write_one_place() -> None:
    body = "    mov.b32 %r2, global_smem;\n    st.shared.b32 [%r2], %r1;"
    assert "write races with a write" in kinds(run(body, threads=64, shared=64))
    same = "    mov.b32 %r2, global_smem;\n    st.shared.b32 [%r2], 5;"
    assert run(same, threads=64, shared=64) == []


def test_named_barriers_of_some_warps() -> None:
    """Warps 0 and 1 meet at one barrier, 2 and 3 at another."""
    body = (
        ADDRESS
        + """
    setp.lt.u32 %p1, %r1, 64;
    ld.global.b32 %r10, [%rd41];
    st.shared.b32 [%r4], %r10;
    @%p1 bra $low;
    bar.sync 2, 64;
    bra $met;
$low:
    bar.sync 1, 64;
$met:
    xor.b32 %r5, %r3, 128;
    add.s32 %r6, %r2, %r5;
    ld.shared.b32 %r11, [%r6];
    st.global.b32 [%rd42], %r11;"""
    )
    data, found = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    assert run(body, data, found, threads=128, shared=512) == []
    assert np.array_equal(found, data ^ 32)


def test_a_deadlock_names_who_waits_where() -> None:
    body = "    setp.lt.u32 %p1, %r1, 32;\n    @%p1 bra $end;\n    bar.sync 0;\n$end:"
    with pytest.raises(EmulatorError, match=r"line 16: deadlock.*warp 1: barrier 0, line 16"):
        run(body, threads=64)


# ------------------------------------------------------------------------------------- cp.async

COPY = (
    ADDRESS
    + """
    st.shared.b32 [%r4], 77;
    cp.async.ca.shared.global [%r4], [%rd41], 4{size};
    {commit}
    {wait}
    ld.shared.b32 %r11, [%r4];
    st.global.b32 [%rd42], %r11;
"""
)


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_copy_that_is_waited_for(timing: str) -> None:
    data, found = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    commit, wait = "cp.async.commit_group;", "cp.async.wait_group 0;"
    text = COPY.format(size="", commit=commit, wait=wait)
    assert run(text, data, found, shared=128, schedule=Schedule(timing)) == []
    assert np.array_equal(found, data)
    text = COPY.format(size=", 0", commit=commit, wait=wait)  # reads nothing: zeros
    assert run(text, data, found, shared=128, schedule=Schedule(timing)) == []
    assert not found.any()


@pytest.mark.parametrize(
    ("commit", "wait"),
    [("cp.async.commit_group;", ""), ("", "cp.async.wait_group 0;"),
     ("cp.async.commit_group;", "cp.async.wait_group 1;")],
)  # fmt: skip
def test_a_copy_that_nobody_waited_for(commit: str, wait: str) -> None:
    data, found = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    text = COPY.format(size="", commit=commit, wait=wait)
    for timing in ("early", "late"):
        findings = run(text, data, found, shared=128, schedule=Schedule(timing))
        assert "read of a copy that nobody waited for" in kinds(findings)
    assert not np.array_equal(found, data)  # late: the number is wrong too


# -------------------------------------------------------------------------------------- matrices


def integers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 8, (rows, columns)).astype(np.float32)


def words(values: np.ndarray, kind: str) -> np.ndarray:
    return float_to_bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_the_fragments_of_a_product(kind: str) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    a, b, c = integers(16, 16), integers(16, 8, 1), integers(16, 8, 2)
    fragments = np.zeros((10, 32), np.uint32)  # a0 ... a3, b0, b1, c0 ... c3
    halves = np.zeros((32, 12), np.uint16)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = 2 * thread + (i & 1) + (8 if i >= 4 else 0)
            halves[lane, i] = words(a, kind)[row, column]
        for i in range(4):
            row = 2 * thread + (i & 1) + (8 if i >= 2 else 0)
            halves[lane, 8 + i] = words(b, kind)[row, group]
            place = (group if i < 2 else group + 8, 2 * thread + (i & 1))
            fragments[6 + i, lane] = c[place].view(np.uint32)
    fragments[:6] = halves.view(np.uint32).T
    loads = "\n".join(f"    ld.global.b32 %r{10 + i}, [%rd41+{128 * i}];" for i in range(10))
    stores = "\n".join(f"    st.global.b32 [%rd42+{128 * i}], %r{20 + i};" for i in range(4))
    product = (
        f"    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r20, %r21, %r22, %r23}}, "
        "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};"
    )
    found = np.zeros((4, 32), np.float32)
    assert run("\n".join((ADDRESS, loads, product, stores)), fragments, found) == []
    for lane, i in itertools.product(range(32), range(4)):
        place = (lane // 4 if i < 2 else lane // 4 + 8, 2 * (lane % 4) + (i & 1))
        assert found[i, lane] == (a @ b + c)[place]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_through_shared_memory(transposed: bool) -> None:
    """Thread 4 g + t gets elements (g, 2t) and (g, 2t + 1) of each matrix, or of its transpose."""
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    found = np.zeros((4, 32), np.uint32)
    trans = ".trans" if transposed else ""
    body = (
        ADDRESS
        + f"""
    shl.b32 %r5, %r1, 4;
    add.s32 %r6, %r2, %r5;
    mul.wide.u32 %rd10, %r1, 16;
    add.s64 %rd11, %rd1, %rd10;
    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd11];
    st.shared.v4.b32 [%r6], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r6];
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r6+512], {{%r20, %r21, %r22, %r23}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r6+512];
    st.global.v4.b32 [%rd11], {{%r10, %r11, %r12, %r13}};
"""
        + "\n".join(f"    st.global.b32 [%rd42+{128 * i}], %r{20 + i};" for i in range(4))
    )
    data = matrices.copy()
    assert run(body, data, found, shared=1024) == []
    assert np.array_equal(data, matrices)  # stored as they were loaded
    for matrix, lane in itertools.product(range(4), range(32)):
        of = matrices[matrix].T if transposed else matrices[matrix]
        pair = of[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].astype(int)
        assert found[matrix, lane] == pair[0] | pair[1] << 16


# ------------------------------------------------------------------------- products of warp groups

SPANS = {128: 1, 64: 2, 32: 3}


def tile(matrix: np.ndarray, span: int) -> np.ndarray:
    """Bytes of a matrix whose rows are as wide as the swizzle.

    PTX ISA, "Swizzling Modes": within 8 rows of 128 bytes, the 16-byte chunk c of line l is at
    chunk c xor (l mod span / 16).
    """
    raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1)
    found = np.zeros_like(raw)
    for chunk in range(len(raw) // 16):
        line, column = divmod(chunk, 8)
        moved = 8 * line + (column ^ (line % (span // 16)))
        found[16 * moved : 16 * moved + 16] = raw[16 * chunk : 16 * chunk + 16]
    return found


def descriptor(start: int, leading: int, stride: int, span: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SPANS[span] << 62


PRODUCT = (
    ADDRESS
    + """
    shl.b32 %r5, %r1, 4;
    add.s32 %r6, %r2, %r5;
    mul.wide.u32 %rd10, %r1, 16;
    add.s64 %rd11, %rd1, %rd10;
{stores}
    {fence}
    bar.sync 0;
    mov.b32 %r20, 0;
{zeros}
    mov.b64 %rd20, {a};
    mov.b64 %rd21, {b};
    {order}
    wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {{{d}}}, %rd20, %rd21, 0, 1, 1, 0, {trans};
    {commit}
    {wait}
    mul.wide.u32 %rd12, %r1, 64;
    add.s64 %rd13, %rd2, %rd12;
{results}
"""
)
PROXY_FENCE = "fence.proxy.async.shared::cta;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
ORDER = "wgmma.fence.sync.aligned;"


def product_text(
    size: int, a: int, b: int, trans: int = 0, fence: str = PROXY_FENCE, order: str = ORDER,
    commit: str = COMMIT, wait: str = WAIT, fill: str = "",
) -> str:  # fmt: skip
    """Copies ``size`` bytes of the first argument to shared memory and multiplies."""
    copied = "\n".join(
        f"    ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd11+{at}];\n"
        f"    st.shared.v4.b32 [%r6+{at}], {{%r10, %r11, %r12, %r13}};"
        for at in range(0, size, 2048)
    )
    registers = [f"%r{40 + i}" for i in range(16)]
    return PRODUCT.format(
        stores=fill + copied, fence=fence, order=order, a=a, b=b, trans=trans, commit=commit,
        wait=wait, d=", ".join(registers),
        zeros="\n".join(f"    mov.b32 {name}, 0;" for name in registers),
        results="\n".join(
            f"    st.global.b32 [%rd13+{4 * i}], {name};" for i, name in enumerate(registers)
        ),
    )  # fmt: skip


def unpacked(found: np.ndarray) -> np.ndarray:
    """PTX ISA, "Register Fragments and Shared Memory Matrix Layouts": d of m64nNk16."""
    matrix = np.zeros((64, 32), np.float32)
    for thread, i in itertools.product(range(128), range(16)):
        warp, lane = divmod(thread, 32)
        row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
        matrix[row, 8 * (i // 4) + 2 * (lane % 4) + i % 2] = found[thread, i]
    return matrix


BASE = 1024  # where shared memory begins


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("span", SPANS)
def test_a_product_of_swizzled_tiles(span: int, timing: str) -> None:
    """A and B have K as their contiguous dimension, or B has N."""
    width = span // 2
    a, b = integers(64, width), integers(32, width, 1)
    data = np.concatenate([tile(words(a, "bf16"), span), tile(words(b, "bf16"), span)])
    size = -(-len(data) // 2048) * 2048
    data = np.pad(data, (0, size - len(data)))
    found = np.zeros((128, 16), np.float32)
    last = width // 16 - 1  # the last 16 columns of K
    first = descriptor(BASE + 32 * last, 16, 8 * span, span)
    second = descriptor(BASE + 64 * span + 32 * last, 16, 8 * span, span)
    text = product_text(size, first, second)
    findings = run(text, data, found, threads=128, shared=size, schedule=Schedule(timing))
    assert findings == []
    columns = slice(16 * last, 16 * last + 16)
    assert np.array_equal(unpacked(found), a[:, columns] @ b[:, columns].T)


@pytest.mark.parametrize("span", [64, 32])
def test_a_product_whose_second_operand_is_transposed(span: int) -> None:
    """B is (K, N) with N contiguous: 32 columns, in one or two groups as wide as the swizzle."""
    a, b = integers(64, 16), integers(16, 32, 1)
    width = span // 2
    groups = [tile(words(b[:, i : i + width], "bf16"), span) for i in range(0, 32, width)]
    data = np.concatenate([tile(words(a, "bf16"), 32), *groups])
    data = np.pad(data, (0, 4096 - len(data)))
    found = np.zeros((128, 16), np.float32)
    text = product_text(
        4096, descriptor(BASE, 16, 256, 32), descriptor(BASE + 2048, 16 * span, 8 * span, span), 1
    )
    assert run(text, data, found, threads=128, shared=4096) == []
    assert np.array_equal(unpacked(found), a @ b)


def broken_product(timing: str, **changes: str) -> tuple[set[str], bool]:
    """Findings, and whether the numbers are right, of a product of tiles written twice."""
    a, b = integers(64, 16), integers(32, 16, 1)
    data = np.concatenate([tile(words(a, "bf16"), 32), tile(words(b, "bf16"), 32)])
    data = np.pad(data, (0, 4096 - len(data)))
    found = np.zeros((128, 16), np.float32)
    zeros = "".join(f"    st.shared.v4.b32 [%r6+{at}], {{0, 0, 0, 0}};\n" for at in (0, 2048))
    text = product_text(
        4096, descriptor(BASE, 16, 256, 32), descriptor(BASE + 2048, 16, 256, 32),
        fill=zeros + f"    {PROXY_FENCE}\n", **changes,
    )  # fmt: skip
    findings = run(text, data, found, threads=128, shared=4096, schedule=Schedule(timing))
    return kinds(findings), np.array_equal(unpacked(found), a @ b.T)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_a_missing_proxy_fence_gives_what_was_there_before(timing: str) -> None:
    assert broken_product(timing) == (set(), True)
    found, right = broken_product(timing, fence="")
    assert found == {"wgmma reads what st.shared wrote, without a proxy fence"}
    assert not right


def test_a_product_that_nobody_waited_for() -> None:
    for changes in ({"wait": ""}, {"commit": ""}, {"wait": WAIT.replace("0;", "1;")}):
        found, right = broken_product("late", **changes)
        assert "a matrix product was never waited for" in found
        assert not right


def test_a_product_without_its_own_fence() -> None:
    found, _ = broken_product("early", order="")
    assert found == {"wgmma accumulates onto registers used since the last wgmma.fence"}


# --------------------------------------------------------------------------------- mbarriers, TMA

LOAD = """
    mov.b32 %r2, global_smem;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2+2048], 1;
    {fence}
    {meet}
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2+2048], {bytes};
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], \
[%rd3, {{ {column}, {row} }}], [%r2+2048];
$wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+2048], {parity};
    @!%p2 bra $wait;
    shl.b32 %r5, %r1, 4;
    add.s32 %r6, %r2, %r5;
    mul.wide.u32 %rd10, %r1, 16;
    add.s64 %rd12, %rd2, %rd10;
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r6];
    st.global.v4.b32 [%rd12], {{%r10, %r11, %r12, %r13}};
    {after}
"""
MAP = 0x7000


def load_box(timing: str = "mixed", **changes: object) -> tuple[set[str], np.ndarray, np.ndarray]:
    """A box of 8 x 64 16-bit elements of a (10, 72) tensor; findings, what came, the tensor."""
    tensor = np.arange(720, dtype=np.uint16).reshape(10, 72)
    found = np.zeros((8, 64), np.uint16)
    maps = {MAP: TensorMap(tensor.ctypes.data, (10, 72), (144, 2), (8, 64), 2, 128)}
    settings = {
        "fence": PROXY_FENCE, "meet": BARRIER, "bytes": 1024, "column": 16, "row": 4, "parity": 0,
        "after": "",
    }  # fmt: skip
    text = LOAD.format(**(settings | changes))
    findings = run(
        text, tensor, found, threads=64, shared=2064, schedule=Schedule(timing), maps=maps
    )
    return kinds(findings), found, tensor


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_box_arrives_swizzled_with_zeros_outside(timing: str) -> None:
    findings, found, tensor = load_box(timing)
    assert findings == set()
    expected = np.zeros((8, 64), np.uint16)
    expected[:6, :56] = tensor[4:, 16:]
    assert np.array_equal(found.view(np.uint8).reshape(-1), tile(expected, 128))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": 1040}, r"line \d+: deadlock.*mbarrier at byte 2048, parity 0"),
        ({"parity": 2}, None),
        ({"after": "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2+2048], 2;"}, "more arrivals than"),
    ],
)
def test_barriers_count(changes: dict[str, object], message: str | None) -> None:
    if message is None:  # the parity is a number modulo 2
        assert load_box(**changes)[0] == set()
        return
    with pytest.raises(EmulatorError, match=message):
        load_box(**changes)


def test_a_barrier_that_is_not_seen_yet() -> None:
    assert load_box(fence="")[0] == {
        "TMA's mbarrier reads what st.shared wrote, without a proxy fence"
    }
    try:
        found = load_box(meet="")[0]
    except EmulatorError as error:  # in this order of warps it is not even initialised
        found = {str(error)}
    assert any("read races with a write" in x or "no mbarrier was" in x for x in found)


def test_a_box_read_too_early() -> None:
    """With the other parity the wait is over at once: a new barrier counts as phase 1 completed."""
    findings, found, tensor = load_box("late", parity=1)
    assert "read of a copy that nobody waited for" in findings
    assert not np.array_equal(found.view(np.uint8).reshape(-1), tile(tensor[:8, :64], 128))


STORE = (
    ADDRESS
    + """
    shl.b32 %r5, %r1, 4;
    add.s32 %r6, %r2, %r5;
    st.shared.v4.b32 [%r6], {{0, 0, 0, 0}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    st.shared.v4.b32 [%r6], {{%r1, %r1, %r1, %r1}};
    {fence}
    {meet}
    setp.eq.u32 %p1, %r1, 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {{ 0, 0 }}], [%r2];
    @%p1 cp.async.bulk.commit_group;
    {wait}
    st.shared.v4.b32 [%r6], {{7, 7, 7, 7}};
"""
)
STORE_WAIT = "@%p1 cp.async.bulk.wait_group.read 0;\n    bar.sync 0;"


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"fence": ""}, {"TMA reads what st.shared wrote, without a proxy fence"}),
        ({"meet": ""}, {"asynchronous read races with a write"}),
        ({"wait": ""}, {"write over what an asynchronous read still uses"}),
    ],
)
def test_a_box_leaves(change: dict[str, str], expected: set[str], timing: str) -> None:
    tensor, unused = np.zeros((4, 128), np.uint16), np.zeros(256, np.uint32)
    maps = {MAP: TensorMap(tensor.ctypes.data, (4, 128), (256, 2), (4, 128), 2, 0)}
    text = STORE.format(**({"fence": PROXY_FENCE, "meet": BARRIER, "wait": STORE_WAIT} | change))
    findings = run(
        text, tensor, unused, threads=64, shared=1024, schedule=Schedule(timing), maps=maps
    )
    assert expected <= kinds(findings)
    assert bool(findings) == bool(expected)
    right = np.arange(64, dtype=np.uint32).repeat(4)
    if "fence" in change:
        assert not np.array_equal(tensor.reshape(-1).view(np.uint32), right)
    elif not change:
        assert np.array_equal(tensor.reshape(-1).view(np.uint32), right)


# -------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernel.ptx"
    path.write_text(source(ADDRESS + "    st.global.b32 [%rd41], %r1;", 2, 32))
    assert main([str(path)]) == 0
    assert "kernel: sm_90a, 32 threads, " in capsys.readouterr().out
    assert main([str(path), "--arguments", "u32[32]", "f32[32]"]) == 0
    assert "tensor 1: 0 of 128 bytes changed" in capsys.readouterr().out
    assert main([str(path), "--arguments", "u32[31]", "f32[32]"]) == 1
    assert "out of bounds: byte 124 of a tensor of 124" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "no .target; this is no PTX file"),
        (source("", 1, 32, target="sm_100a"), "line 2: target sm_100a is not emulated"),
        (source("    frobnicate;", 1, 32), "line 16: unknown instruction: frobnicate"),
        (source("", 1, 40), "40 threads, need"),
        (source("    add.s32", 1, 32).replace("ret;", "ret"), "a statement without its semicolon"),
        (source("", 1, 32).replace(".entry", ".func"), "no kernel"),
    ],
)
def test_bad_input_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernel.ptx"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main([str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
