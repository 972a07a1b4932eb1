"""Instructions by which threads wait for one another, or exchange registers.

PTX ISA, "Parallel Synchronization and Communication Instructions": bar, barrier, fence, mbarrier,
shfl, vote, redux, elect, activemask.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.emulator import EmulatorError
from kernels.emulator.formats import FORMATS, Array
from kernels.emulator.instructions import (
    SHARED_BASE,
    Action,
    Mask,
    Operands,
    address,
    allow,
    meaning,
    put,
    unknown,
)
from kernels.emulator.matrices import whole_warps
from kernels.emulator.memory import lanes
from kernels.emulator.ordering import MOST_BARRIERS
from kernels.emulator.parser import Instruction

# -------------------------------------------------------------------------------- barriers of a CTA


@meaning("bar", "barrier")
def barrier(ins: Instruction, operands: Operands) -> Action:
    """Wait until as many threads as the second operand says have come (all, without it)."""
    if "warp" in ins.modifiers:
        allow(ins, {"warp", "sync"}, 1)
        return _warp_barrier
    allow(ins, {"cta", "sync", "arrive", "aligned"}, 2)
    if not ins.operands[0].isdigit() and not ins.operands[0].startswith("0x"):
        raise unknown(ins, "the barrier's number is no constant")
    number = int(ins.operands[0], 0)
    count = int(ins.operands[1], 0) if len(ins.operands) > 1 else None
    waits = "arrive" not in ins.modifiers

    def run(gang: Any, mask: Mask) -> None:
        if whole_warps(gang, mask, ins):
            for warp in range(gang.first, gang.last):
                gang.cta.meet(number, warp, count, waits, ins.line)

    return run


def _warp_barrier(gang: Any, mask: Mask) -> None:
    """Do nothing: the threads of a warp run in step here, so memory is in order among them."""


@meaning("fence", "membar")
def fence(ins: Instruction, operands: Operands) -> Action:
    """Let the asynchronous proxy see what the thread knows of; other fences order nothing more.

    Barriers order what threads see here, so a fence without a proxy has nothing to add.
    """
    allow(
        ins,
        {"proxy", "async", "async::generic", "shared::cta", "global", "acq_rel", "sc",
         "cta", "gpu", "sys", "gl", "mbarrier_init", "release", "acquire", "cluster"},
        0,
    )  # fmt: skip
    if "proxy" not in ins.modifiers and "mbarrier_init" not in ins.modifiers:
        return lambda gang, mask: None

    def run(gang: Any, mask: Mask) -> None:
        for warp in np.unique(gang.warp_of[lanes(mask, gang.threads)]):
            gang.cta.clocks.fence(int(warp))

    return run


# ---------------------------------------------------------------------------------------- mbarriers


class Barrier:
    """An mbarrier: it completes a phase after some arrivals, when no byte is awaited any more."""

    def __init__(self, count: int, agent: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0
        self.agent = agent  # that writes for the copies which complete here
        self.arrived: Array | None = None  # what arrivals of this phase knew
        self.known: Array | None = None  # what those of the completed phases knew

    def writes(self) -> tuple[int, int]:
        """Return the agent and the clock of copies that complete in this phase."""
        return self.agent, self.phase + 1

    def arrive(self, known: Array, line: int, count: int = 1) -> None:
        """Count arrivals of a thread, with what its warp knew."""
        self.arrived = known if self.arrived is None else np.maximum(self.arrived, known)
        self.pending -= count
        if self.pending < 0:
            raise EmulatorError(f"line {line}: more arrivals than the mbarrier counts")
        self._complete()

    def expect_bytes(self, count: int) -> None:
        """Await more bytes in this phase."""
        self.bytes += count
        self._complete()

    def complete_bytes(self, count: int, line: int) -> None:
        """Count bytes that arrived."""
        self.bytes -= count
        self._complete()

    def _complete(self) -> None:
        if self.pending or self.bytes:
            return
        self.phase += 1
        self.pending = self.count
        if self.arrived is not None:
            arrived = self.arrived
            self.known = arrived if self.known is None else np.maximum(self.known, arrived)
            self.known = self.known.copy()
            self.known[:, self.agent] = self.phase
            self.arrived = None


class Barriers:
    """The mbarriers of a CTA, by their shared address."""

    def __init__(self, cta: Any) -> None:
        self.cta = cta
        self.table: dict[int, Barrier] = {}

    def at(self, key: int, line: int) -> Barrier:
        """Return the mbarrier at an address."""
        if key not in self.table:
            raise EmulatorError(
                f"line {line}: no mbarrier was initialised at byte {key - SHARED_BASE} of shared "
                "memory"
            )
        return self.table[key]

    def create(self, warp: int, key: int, count: int, line: int) -> None:
        """Initialise an mbarrier: a generic write of its 8 bytes."""
        self._write(warp, key, line)
        old = self.table.get(key)
        agent = old.agent if old else self.cta.clocks.first_barrier + len(self.table)
        if agent >= self.cta.clocks.first_barrier + MOST_BARRIERS:
            raise EmulatorError(f"line {line}: more than {MOST_BARRIERS} mbarriers")
        self.table[key] = Barrier(count, agent)

    def remove(self, warp: int, key: int, line: int) -> None:
        """Make the memory of an mbarrier ordinary again."""
        self.at(key, line)
        self._write(warp, key, line)
        self.table[key].count = self.table[key].pending = -1

    def _write(self, warp: int, key: int, line: int) -> None:
        shared = self.cta.shared
        offsets = shared.offsets(np.array([key]), 8, line)
        units = shared.tracker.units(offsets, 8)
        shared.tracker.check_write(np.array([warp]), units, line)
        shared.tracker.note_write(np.array([warp]), units, generic=1)

    def check_seen(self, warp: int, key: int, line: int) -> None:
        """Report a use by a warp that has not seen the initialisation."""
        tracker = self.cta.shared.tracker
        units = tracker.units(np.array([key - SHARED_BASE]), 8)
        tracker.check_read(np.array([warp]), units, line)

    def check_seen_by_tma(self, warp: int, key: int, line: int) -> None:
        """Report a copy that may complete on an mbarrier which its proxy does not see yet."""
        self.at(key, line)
        self.check_seen(warp, key, line)
        tracker = self.cta.shared.tracker
        units = tracker.units(np.array([key - SHARED_BASE]), 8)
        tracker.unfenced(slice(warp, warp + 1), units, line, "TMA's mbarrier")


@meaning("mbarrier")
def mbarrier(ins: Instruction, operands: Operands) -> Action:
    """Distinguish what is done with mbarriers."""
    allow(
        ins,
        {"init", "inval", "arrive", "expect_tx", "try_wait", "test_wait", "parity", "shared",
         "shared::cta", "b64", "release", "acquire", "cta", "relaxed"},
    )  # fmt: skip
    kind = ins.modifiers[0]
    if kind == "init":
        return _each(ins, operands, 0, 1, lambda cta, warp, key, count: cta.barriers.create(
            warp, key, count, ins.line))  # fmt: skip
    if kind == "inval":
        return _each(ins, operands, 0, None, lambda cta, warp, key, _: cta.barriers.remove(
            warp, key, ins.line))  # fmt: skip
    if kind == "arrive":
        return _arrival(ins, operands)
    if kind == "expect_tx":
        return _each(ins, operands, 0, 1, lambda cta, warp, key, count: cta.barriers.at(
            key, ins.line).expect_bytes(count))  # fmt: skip
    if kind in ("try_wait", "test_wait") and "parity" in ins.modifiers:
        return _wait(ins, operands)
    raise unknown(ins)


def _each(
    ins: Instruction,
    operands: Operands,
    where: int,
    number: int | None,
    act: Callable[[Any, int, int, int], None],
) -> Action:
    """Return the action that does something for each thread: (cta, warp, address, operand)."""
    slot, offset = address(ins, ins.operands[where], operands)
    given = None if number is None else operands.source(ins, ins.operands[number], "u32")

    def run(gang: Any, mask: Mask) -> None:
        for lane in lanes(mask, gang.threads):
            value = 0 if given is None else int(gang.views[given][lane])
            act(gang.cta, int(gang.warp_of[lane]), int(gang.views[slot][lane]) + offset, value)

    return run


def _arrival(ins: Instruction, operands: Operands) -> Action:
    """Arrive; the state that the instruction returns must not be used."""
    if ins.operands[0].startswith("%") and not ins.operands[0].startswith("%dummy"):
        operands.target(ins, ins.operands[0], "b64")
    where = next(i for i, text in enumerate(ins.operands) if text.startswith("["))
    number = where + 1 if len(ins.operands) > where + 1 else None
    expects = "expect_tx" in ins.modifiers

    def arrive(cta: Any, warp: int, key: int, value: int) -> None:
        found = cta.barriers.at(key, ins.line)
        cta.barriers.check_seen(warp, key, ins.line)
        if expects:
            found.bytes += value
        count = 1 if expects or number is None else value
        found.arrive(cta.clocks.snapshot(warp), ins.line, count)

    return _each(ins, operands, where, number, arrive)


def _wait(ins: Instruction, operands: Operands) -> Action:
    """Wait for the phase of a parity. The wait may also give up, which a loop has to expect."""
    target = operands.target(ins, ins.operands[0], "pred")
    slot, offset = address(ins, ins.operands[1], operands)
    parity = operands.source(ins, ins.operands[2], "u32")

    def run(gang: Any, mask: Mask) -> Array | None:
        """Return which warps have to come again, if any."""
        cta, again = gang.cta, np.zeros(gang.last - gang.first, bool)
        for warp in np.unique(gang.warp_of[lanes(mask, gang.threads)]):
            lane = 32 * (int(warp) - gang.first)
            key = int(gang.views[slot][lane]) + offset
            phase = int(gang.views[parity][lane]) & 1
            found = cta.barriers.at(key, ins.line)
            cta.barriers.check_seen(int(warp), key, ins.line)
            part = slice(lane, lane + 32)
            part_mask = None if mask is None else mask[part]
            if found.phase & 1 != phase:
                if found.known is not None:
                    cta.clocks.learn(int(warp), found.known)
                put(gang.views[target][part], np.array(True), part_mask)
            elif cta.random.random() < 0.1:
                put(gang.views[target][part], np.array(False), part_mask)
            else:
                again[warp - gang.first] = True
                cta.block(
                    int(warp),
                    lambda found=found, phase=phase: found.phase & 1 != phase,
                    f"mbarrier at byte {key - SHARED_BASE}, parity {phase}",
                    ins.line,
                )
        return again if again.any() else None

    return run


# ----------------------------------------------------------------------- registers of other threads


@meaning("shfl")
def shuffle(ins: Instruction, operands: Operands) -> Action:
    """Read a register of another thread of the warp; beyond the segment, one's own."""
    allow(ins, {"sync", "bfly", "idx", "up", "down", "b32"}, 5)
    to, _, valid = ins.operands[0].partition("|")
    target = operands.target(ins, to, "b32")
    in_range = operands.target(ins, valid, "pred") if valid else None
    a, b, c = (operands.source(ins, text, "u32") for text in ins.operands[1:4])
    mode = ins.modifiers[1]

    def run(gang: Any, mask: Mask) -> None:
        if not whole_warps(gang, mask, ins):
            return
        views = gang.views
        lane = np.tile(np.arange(32, dtype=np.int64), gang.threads // 32)
        offset, control = views[b].astype(np.int64) & 31, views[c].astype(np.int64)
        segment, clamp = control >> 8 & 31, control & 31
        highest = lane & segment | clamp & ~segment
        lowest = lane & segment
        if mode == "bfly":
            source, ok = lane ^ offset, (lane ^ offset) <= highest
        elif mode == "idx":
            source = lowest | offset & ~segment
            ok = source <= highest
        elif mode == "up":
            source, ok = lane - offset, lane - offset >= highest
        else:
            source, ok = lane + offset, lane + offset <= highest
        source = np.where(ok, source, lane) + np.arange(gang.threads) // 32 * 32
        views[target][:] = views[a][source]
        if in_range is not None:
            views[in_range][:] = ok

    return run


_REDUCTIONS: dict[str, Any] = {
    "add": np.sum,
    "min": np.min,
    "max": np.max,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@meaning("redux")
def reduce(ins: Instruction, operands: Operands) -> Action:
    """Combine the registers of a warp's threads."""
    form = FORMATS.get(ins.modifiers[-1])
    name = next((name for name in ins.modifiers if name in _REDUCTIONS), None)
    if form is None or name is None or form.is_float:
        raise unknown(ins)
    allow(ins, {"sync", name, form.name}, 3)
    target = operands.target(ins, ins.operands[0], form)
    source = operands.source(ins, ins.operands[1], form)

    def run(gang: Any, mask: Mask) -> None:
        if whole_warps(gang, mask, ins):
            values = gang.views[source].reshape(-1, 32)
            combined = _REDUCTIONS[name](values, axis=1).astype(form.view)
            gang.views[target][:] = combined.repeat(32)

    return run


@meaning("vote")
def vote(ins: Instruction, operands: Operands) -> Action:
    """Ask the threads of a warp for a predicate."""
    allow(ins, {"sync", "all", "any", "uni", "ballot", "pred", "b32"}, 3)
    kind = ins.modifiers[1]
    target = operands.target(ins, ins.operands[0], "b32" if kind == "ballot" else "pred")
    text = ins.operands[1]
    source = operands.source(ins, text.removeprefix("!"), "pred")

    def run(gang: Any, mask: Mask) -> None:
        if not whole_warps(gang, mask, ins):
            return
        answers = (gang.views[source] ^ text.startswith("!")).reshape(-1, 32)
        if kind == "ballot":
            weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
            result = (answers * weights).sum(axis=1).astype(np.uint32)
        elif kind == "uni":
            result = answers.all(axis=1) | ~answers.any(axis=1)
        else:
            result = answers.all(axis=1) if kind == "all" else answers.any(axis=1)
        gang.views[target][:] = result.repeat(32)

    return run


@meaning("elect")
def elect(ins: Instruction, operands: Operands) -> Action:
    """Choose one thread of those of the warp that take part."""
    allow(ins, {"sync"}, 2)
    to, _, chosen = re.sub(r"\s", "", ins.operands[0]).partition("|")
    leader = None if to == "_" else operands.target(ins, to, "b32")
    target = operands.target(ins, chosen, "pred")

    def run(gang: Any, mask: Mask) -> None:
        taking_part = np.ones(gang.threads, bool) if mask is None else mask
        first = taking_part.reshape(-1, 32).argmax(axis=1)
        elected = np.tile(np.arange(32), gang.threads // 32) == first.repeat(32)
        put(gang.views[target], elected, mask)
        if leader is not None:
            put(gang.views[leader], first.repeat(32), mask)

    return run


@meaning("setmaxnreg", "griddepcontrol", "nanosleep", "pragma")
def unobserved(ins: Instruction, operands: Operands) -> Action:
    """Do nothing: how many registers a warp has, and when the next grid starts, change no value."""
    return lambda gang, mask: None
