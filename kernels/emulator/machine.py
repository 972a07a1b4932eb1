"""One CTA at a time: registers, shared memory, and a scheduler that interleaves warps at random."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.emulator import EmulatorError, Finding, Findings
from kernels.emulator.copies import CopyQueue, TensorLoad, TensorMap
from kernels.emulator.formats import STORAGE, Array
from kernels.emulator.instructions import SHARED_BASE
from kernels.emulator.memory import GlobalMemory, SharedMemory
from kernels.emulator.ordering import Clocks
from kernels.emulator.program import EXIT, Program
from kernels.emulator.synchronisation import Barriers
from kernels.emulator.warpgroup import WARPS, ProductQueue

TIMINGS = ("early", "late", "mixed")


@dataclass(frozen=True)
class Schedule:
    """How a launch runs: when asynchronous work happens, and in which order warps do.

    ``most_blocks``: a CTA that executes more basic blocks than this never ends.
    """

    timing: str = "mixed"
    seed: int = 0
    most_blocks: int = 1_000_000


class Gang:
    """Consecutive warps that execute together, and their part of every register."""

    def __init__(self, cta: "Cta", first: int, last: int) -> None:
        self.cta, self.first, self.last = cta, first, last
        self.threads = 32 * (last - first)
        self.warp_of = np.arange(first, last).repeat(32)
        lanes = slice(32 * first, 32 * last)
        rows = cta.program.operands.rows
        self.views: list[Array] = []
        for register, view in cta.program.operands.slots:
            width, row = rows[register]
            self.views.append(cta.files[width][row, lanes].view(view))


class Cta:
    """The threads of one CTA."""

    shared_base = SHARED_BASE

    def __init__(
        self, program: Program, launch: "Launch", place: tuple[int, int, int], number: int
    ) -> None:
        self.program, self.number = program, number
        self.memory, self.maps, self.findings = launch.memory, launch.maps, launch.findings
        self.schedule, self.random = launch.schedule, launch.random
        self.warp_count = program.kernel.threads // 32
        self.files = launch.registers(place)
        self.clocks = Clocks(self.warp_count)
        size = program.launch_shared + launch.shared_bytes
        self.shared = SharedMemory(size, program.unit, self.clocks, self.findings, self.random)
        self.barriers = Barriers(self)
        self.copies = [CopyQueue() for _ in range(self.warp_count)]
        self.bulk_copies = [CopyQueue() for _ in range(self.warp_count)]
        self.products = [ProductQueue() for _ in range(self.warp_count // WARPS)]
        self.loads: list[TensorLoad] = []  # of TMA, not arrived yet
        self.meetings: dict[int, list[tuple[int, bool]]] = {}  # barrier -> (warp, whether it waits)
        self.block_of = [0] * self.warp_count  # -1: its threads are at several blocks
        self.block_of_thread = np.zeros(32 * self.warp_count, np.int64)
        self.blocked: list[tuple[Callable[[], bool], str, int] | None] = [None] * self.warp_count
        # Registers written, or used at all, since the last wgmma.fence, a bit each. Before the
        # first one: all.
        self.written = [-1] * self.warp_count
        self.accessed = [-1] * self.warp_count
        self.gangs = launch.gangs
        self.launch = launch

    # ----------------------------------------------------------- what instructions ask of their CTA

    def is_late(self) -> bool:
        """Return whether asynchronous work that starts now happens late."""
        timing = self.schedule.timing
        return timing == "late" or (timing == "mixed" and self.random.random() < 0.5)

    def tensor_map(self, key: int, line: int) -> TensorMap:
        """Return the tensor map that a parameter names."""
        if key not in self.maps:
            raise EmulatorError(f"line {line}: no tensor map at {key:#x}")
        return self.maps[key]

    def start_load(self, load: TensorLoad) -> None:
        """Let TMA bring a box."""
        if self.is_late():
            self.loads.append(load)
        else:
            load.finish()

    def block(self, warp: int, ready: Callable[[], bool], what: str, line: int) -> None:
        """Let a warp wait."""
        self.blocked[warp] = (ready, what, line)

    def meet(self, number: int, warp: int, count: int | None, waits: bool, line: int) -> None:
        """Come to a barrier; the last warp lets all go."""
        meeting = self.meetings.setdefault(number, [])
        meeting.append((warp, waits))
        if len(meeting) < (count or 32 * self.warp_count) // 32:
            if waits:
                self.block(warp, lambda: False, f"barrier {number}", line)
            return
        warps = [w for w, _ in meeting]
        if len(set(warps)) < len(warps):
            raise EmulatorError(f"line {line}: a warp came to barrier {number} twice")
        self.clocks.meet(warps)
        for other, _ in meeting:
            self.blocked[other] = None
        self.meetings[number] = []

    # -------------------------------------------------------------------------------- the scheduler

    def run(self) -> None:
        """Execute until all threads have returned."""
        executed = 0
        while any(block != EXIT for block in self.block_of):
            if self.loads and self.random.random() < 0.01:
                self._arrive()
            gang = self._choose()
            if gang is None:
                if not self.loads:
                    raise EmulatorError(self._deadlock())
                self._arrive()
                continue
            for _ in range(self.random.choice((1, 4, 16))):
                executed += 1
                if not self._step(gang):
                    break
            if executed > self.schedule.most_blocks:
                line = self.program.blocks[min(self.block_of[gang.first], EXIT - 1)].line
                raise EmulatorError(
                    f"line {line}: the kernel did not end within "
                    f"{self.schedule.most_blocks:,} blocks"
                )
        self._end()

    def _arrive(self) -> None:
        """Finish one copy of TMA, whichever."""
        self.loads.pop(self.random.randrange(len(self.loads))).finish()

    def _ready(self, warp: int) -> bool:
        if self.block_of[warp] == EXIT:
            return False
        waiting = self.blocked[warp]
        if waiting is not None:
            if not waiting[0]():
                return False
            self.blocked[warp] = None
        return True

    def _choose(self) -> Gang | None:
        """Return some warps at one block: as a rule all around a warp, sometimes fewer."""
        ready = [self._ready(warp) for warp in range(self.warp_count)]
        for warp, can_run in enumerate(ready):
            block = self.block_of[warp]
            if can_run and block >= 0 and self.program.blocks[block].whole_groups:
                first = warp // WARPS * WARPS
                ready[warp] = all(
                    ready[w] and self.block_of[w] == block for w in range(first, first + WARPS)
                )
        able = [warp for warp, can_run in enumerate(ready) if can_run]
        if not able:
            return None
        warp = self.random.choice(able)
        block = self.block_of[warp]
        if block < 0:
            return self._gang(warp, warp + 1)
        step = WARPS if self.program.blocks[block].whole_groups else 1
        first, last = warp // step * step, warp // step * step + step
        if self.random.random() < 0.9:
            while first and ready[first - 1] and self.block_of[first - 1] == block:
                first -= step
            while last < self.warp_count and ready[last] and self.block_of[last] == block:
                last += step
        return self._gang(first, last)

    def _gang(self, first: int, last: int) -> Gang:
        key = (first, last)
        if key not in self.gangs:
            self.gangs[key] = Gang(self, first, last)
        gang = self.gangs[key]
        gang.cta = self
        return gang

    def _step(self, gang: Gang) -> bool:
        """Execute a block; return whether the gang can go on together."""
        index, mask = self.block_of[gang.first], None
        lanes = slice(32 * gang.first, 32 * gang.last)
        if index < 0:
            index = int(self.block_of_thread[lanes].min())
            mask = self.block_of_thread[lanes] == index
        self.launch.executed.add(index)
        block = self.program.blocks[index]
        following = index + 1 if index + 1 < len(self.program.blocks) else EXIT
        again = None
        if block.waits is not None:
            again = block.waits(gang, mask)
        for action in block.actions:
            action(gang, mask)
        after = block.end(gang, mask) if block.end is not None else following
        if after is None:
            after = following
        return self._go(gang, mask, after, index, again)

    def _go(self, gang: Gang, mask: Array | None, after: Any, index: int, again: Any) -> bool:
        """Move the threads that took part to their next blocks."""
        if mask is None and again is None and not isinstance(after, np.ndarray):
            for warp in range(gang.first, gang.last):
                self.block_of[warp] = after
            return (
                after != EXIT
                and not any(self.blocked[gang.first : gang.last])
                and (gang.threads % 128 == 0 or not self.program.blocks[after].whole_groups)
                and (gang.first % WARPS == 0 or not self.program.blocks[after].whole_groups)
            )
        lanes = slice(32 * gang.first, 32 * gang.last)
        targets = np.broadcast_to(after, (gang.threads,)).copy()
        if again is not None:
            targets[again.repeat(32)] = index
        current = self.block_of_thread[lanes]
        current[...] = targets if mask is None else np.where(mask, targets, current)
        for warp in range(gang.first, gang.last):
            part = self.block_of_thread[32 * warp : 32 * warp + 32]
            same = (part == part[0]).all()
            self.block_of[warp] = int(part[0]) if same else -1
        return False

    def _deadlock(self) -> str:
        waiting = [
            f"warp {warp}: " + (f"{entry[1]}, line {entry[2]}" if entry else "its warp group")
            for warp, entry in enumerate(self.blocked)
            if self.block_of[warp] != EXIT
        ]
        line = next((entry[2] for entry in self.blocked if entry), self.program.blocks[0].line)
        return f"line {line}: deadlock; all warps wait ({'; '.join(waiting)})"

    def _end(self) -> None:
        """Report asynchronous work that nobody waited for."""
        line = self.program.kernel.instructions[-1].line
        if any(queue.unfinished() for queue in self.products):
            self.findings.add("a matrix product was never waited for", line, "wgmma")
        for queue in self.bulk_copies:
            for copy in queue.unfinished():
                self.findings.add("a bulk copy was never waited for", copy.line, "TMA")
                copy.finish()
        if any(queue.unfinished() for queue in self.copies):
            self.findings.add("a copy was never waited for", line, "cp.async")
        if self.loads:
            self.findings.add("a copy was never waited for", self.loads[0].line, "TMA")


class Launch:
    """One launch of a program on a grid."""

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, int],
        memory: GlobalMemory,
        findings: Findings,
        schedule: Schedule,
        shared_bytes: int = 0,
        maps: Mapping[int, TensorMap] | None = None,
    ) -> None:
        self.program, self.memory, self.findings = program, memory, findings
        self.schedule, self.shared_bytes, self.maps = schedule, shared_bytes, maps or {}
        self.random = random.Random(schedule.seed)
        self.parameters = parameters
        self.grid = (1, 1, 1)
        threads = program.kernel.threads
        heights = program.operands.heights
        self.files: dict[int, Array] = {
            width: np.zeros((heights[width], threads), kind) for width, kind in STORAGE.items()
        }
        self.fresh = self._fresh()
        self.gangs: dict[tuple[int, int], Gang] = {}
        self.executed: set[int] = set()  # basic blocks

    def _fresh(self) -> dict[int, Array]:
        """Return the registers as a CTA finds them: constants, and all bits set elsewhere."""
        fresh = {}
        for width, file in self.files.items():
            fresh[width] = np.full_like(file, False if width == 1 else ~file.dtype.type(0))
        for register, bits in self.program.operands.constants.items():
            width, row = self.program.operands.rows[register]
            fresh[width][row] = np.array(bits, np.uint64).astype(fresh[width].dtype)
        return fresh

    def registers(self, place: tuple[int, int, int]) -> dict[int, Array]:
        """Return the register files for the CTA at a place of the grid."""
        threads = np.arange(self.program.kernel.threads)
        values: dict[str, Any] = {"%tid.x": threads, "%tid.y": 0, "%tid.z": 0, "%ntid.y": 1}
        values |= {"%ntid.x": len(threads), "%ntid.z": 1, "%laneid": threads % 32}
        values |= {"%warpid": threads // 32}
        for axis, (at, count) in zip("xyz", zip(place, self.grid, strict=True), strict=True):
            values |= {f"%ctaid.{axis}": at, f"%nctaid.{axis}": count}
        for width, file in self.files.items():
            file[...] = self.fresh[width]
        for register in self.program.operands.specials:
            name = register.rpartition(":")[0]
            width, row = self.program.operands.rows[register]
            value = values[name] if name in values else self.parameters[name]
            self.files[width][row] = np.asarray(value, np.uint64).astype(STORAGE[width])
        return self.files

    def run(self, grid: tuple[int, int, int]) -> list[Finding]:
        """Run all CTAs, in an order that the seed decides, and return what was found."""
        self.grid = grid
        places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        order = list(range(len(places)))
        self.random.shuffle(order)
        with np.errstate(all="ignore"):
            for number in order:
                try:
                    Cta(self.program, self, places[number], number).run()
                except EmulatorError as error:
                    place = ", ".join(map(str, places[number]))
                    name = self.program.kernel.name
                    raise type(error)(f"{name}: {error} (CTA {place})") from None
        return self.findings.all()
