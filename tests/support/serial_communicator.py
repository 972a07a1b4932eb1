"""What our pipelines post to NCCL, rank by rank, and how it would end where each communicator is a
queue.

The posts are recorded from `megagpt.parallel.pipeline.Pipeline` on torch's own schedules, on a
process group that sends nothing. They are then executed under NCCL's rules. A batch starts when
everything that its rank posted before on the same communicator has ended, and ends when every
counterpart of its operations has started. So a send ends no earlier than its receive is posted.
Passes take a time, a forward 1 and a backward 2 for each stage; transfers take none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagpt.parallel.engine import neighbour_groups
from megagpt.parallel.pipeline import MicroBatch, Pipeline

HIDDEN, LENGTH = 2, 1
FORWARD, BACKWARD = 1.0, 2.0


class Operation(NamedTuple):
    """One send or receive; ``peer`` is the other's global rank."""

    sends: bool
    peer: int


@dataclass(frozen=True, eq=False)
class Batch:
    """What one call posted to a group, and whether the call was ``batch_isend_irecv``."""

    operations: tuple[Operation, ...]
    group: tuple[int, ...]
    together: bool


class Post(NamedTuple):
    """The rank hands a batch to its communicator and goes on."""

    batch: Batch


class Wait(NamedTuple):
    """The rank goes on when the batch has ended."""

    batch: Batch


class Compute(NamedTuple):
    """The rank is busy."""

    duration: float


Program = list[Post | Wait | Compute]


class Recorder:
    """Notes what one rank posts, waits for and computes. A receive leaves ones."""

    def __init__(self) -> None:
        self.program: Program = []
        self._open: list[Operation] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note every send and receive of this process."""
        with (
            patch.object(
                dist.ProcessGroup,
                "send",
                lambda group, tensors, peer, tag: self._note(group, True, peer),
            ),
            patch.object(dist.ProcessGroup, "recv", self._receive()),
            patch.object(dist, "batch_isend_irecv", self._batch),
        ):
            yield

    def _receive(self) -> Callable[..., Any]:
        def receive(group: dist.ProcessGroup, tensors: list[Tensor], peer: int, tag: int) -> Any:
            for tensor in tensors:
                tensor.detach().fill_(1)
            return self._note(group, False, peer)

        return receive

    def _note(self, group: dist.ProcessGroup, sends: bool, peer: int) -> Any:
        members = tuple(dist.get_process_group_ranks(group))
        operation = Operation(sends, members[peer])
        if self._open is None:
            return self._post(Batch((operation,), members, together=False))
        self._open.append(operation)
        return None

    def _batch(self, operations: list[dist.P2POp]) -> list[Any]:
        (members,) = {
            tuple(dist.get_process_group_ranks(operation.group)) for operation in operations
        }
        self._open = []
        for operation in operations:
            operation.op(operation.tensor, operation.peer, operation.group)
        noted, self._open = tuple(self._open), None
        return [self._post(Batch(noted, members, together=True))]

    def _post(self, batch: Batch) -> Any:
        self.program.append(Post(batch))

        def wait(*_: Any) -> bool:
            self.program.append(Wait(batch))
            return True

        return SimpleNamespace(wait=wait, block_current_stream=wait)


class PlainEngine:
    """Runs chunks forward and backward as DeepSpeed's engine would, without one, and notes it."""

    def __init__(self, recorder: Recorder, chunks: int, first: bool, last: bool) -> None:
        self.module = SimpleNamespace(chunks=nn.ModuleList(nn.Linear(1, 1) for _ in range(chunks)))
        self.recorder, self.first, self.last = recorder, first, last

    def __call__(self, x: Tensor, chunk: int, targets: Tensor | None = None, **_: Any) -> Tensor:
        self.recorder.program.append(Compute(FORWARD))
        hidden = x[..., None].expand(*x.shape, HIDDEN).float() if self.first and chunk == 0 else x
        hidden = hidden * self.module.chunks[chunk].weight
        return hidden.mean() if self.last and chunk == len(self.module.chunks) - 1 else hidden

    def backward(self, scalar: Tensor, scale_wrt_gas: bool = True) -> None:
        self.recorder.program.append(Compute(BACKWARD))
        scalar.backward()


def programs(
    schedule: str, pipeline: int, virtual_stages: int, micro_batches: int, work: str
) -> list[Program]:
    """What each rank does in ``work``, of which each letter is a step of training (t) or an
    evaluation (e).
    """
    return [
        _program(rank, schedule, pipeline, virtual_stages, micro_batches, work)
        for rank in range(pipeline)
    ]


def _program(
    rank: int, schedule: str, pipeline: int, virtual_stages: int, micro_batches: int, work: str
) -> Program:
    dist.init_process_group("fake", rank=rank, world_size=pipeline, store=FakeStore())
    try:
        recorder = Recorder()
        running = Pipeline(
            _engine(recorder, rank, schedule, pipeline, virtual_stages), micro_batches
        )
        batch = [
            MicroBatch(*(torch.zeros(1, LENGTH, dtype=torch.int64) for _ in range(2)))
        ] * micro_batches
        shares = torch.ones(micro_batches)
        with recorder.listening():
            for kind in work:
                with torch.set_grad_enabled(kind == "t"):
                    (running.train if kind == "t" else running.evaluate)(batch, shares)
        return recorder.program
    finally:
        dist.destroy_process_group()


def _engine(
    recorder: Recorder, rank: int, schedule: str, pipeline: int, virtual_stages: int
) -> Any:
    """As much of `megagpt.parallel.engine.Engine` as a pipeline asks for."""
    off = SimpleNamespace(enabled=False)
    parallel = SimpleNamespace(
        schedule=schedule, tensor=1, sequence=False, gradient_reduction="per_step"
    )
    ours = SimpleNamespace(
        parallel=parallel,
        model=SimpleNamespace(sequence_length=LENGTH, hidden_size=HIDDEN),
        monitor=SimpleNamespace(stall_timeout_s=0),
    )
    config: Any = SimpleNamespace(
        megagpt=ours, train_micro_batch_size_per_gpu=1, bf16=off, fp16=off
    )
    mesh: Any = SimpleNamespace(
        rank=rank,
        pipeline_size=pipeline,
        pipeline_group=dist.group.WORLD,
        device_mesh=SimpleNamespace(mesh=torch.arange(pipeline).view(pipeline, 1, 1)),
    )
    stages = range(rank, pipeline * virtual_stages, pipeline)
    last = pipeline * virtual_stages - 1
    return SimpleNamespace(
        config=config,
        mesh=mesh,
        stages=stages,
        num_stages=last + 1,
        device=torch.device("cpu"),
        deepspeed=PlainEngine(recorder, len(stages), stages[0] == 0, stages[-1] == last),
        neighbour_groups=neighbour_groups(config, mesh),
        tied_group=None,
        begin_trace=lambda: None,
    )


Communicator = Callable[[int, Batch], Any]  # the one that a rank uses for a batch


def of_the_group(rank: int, batch: Batch) -> Any:
    """NCCL with a bound device, as DeepSpeed has it."""
    return batch.group


def lazily_of_a_pair(rank: int, batch: Batch) -> Any:
    """NCCL without a bound device: what is posted alone uses a communicator of the two ranks,
    for both ways.
    """
    return (
        batch.group
        if batch.together
        else (batch.group, frozenset((rank, batch.operations[0].peer)))
    )


def one_for_all(rank: int, batch: Batch) -> Any:
    """The pipeline's, whatever the group."""
    return "pipeline"


def one_by_one(ranks: Sequence[Program]) -> list[Program]:
    """The same operations in the same order, each posted alone."""
    single = {
        step.batch: [
            replace(step.batch, operations=(operation,), together=False)
            for operation in step.batch.operations
        ]
        for program in ranks
        for step in program
        if isinstance(step, Post)
    }

    def split(step: Post | Wait | Compute) -> Program:
        return (
            [step]
            if isinstance(step, Compute)
            else [type(step)(batch) for batch in single[step.batch]]
        )

    return [[part for step in program for part in split(step)] for program in ranks]


class Execution:
    """Runs the programs of all ranks until they end or nothing moves."""

    def __init__(self, ranks: Sequence[Program], communicator: Communicator) -> None:
        self.ranks, self.communicator = ranks, communicator
        self.at, self.clock = [0] * len(ranks), [0.0] * len(ranks)
        self.queues: dict[tuple[int, Any], list[Batch]] = defaultdict(
            list
        )  # posted and not ended, the oldest first
        self.free_at: Counter[tuple[int, Any]] = Counter()
        self.posted_at: dict[Batch, float] = {}
        self.ended_at: dict[Batch, float] = {}
        self.numbers: dict[
            Batch, list[tuple[bool, Any, int]]
        ] = {}  # sends, from where to where, which of those
        self._counts: Counter[tuple[bool, Any]] = Counter()
        while any(self._advance(rank) for rank in range(len(ranks))) or self._communicate():
            pass

    @property
    def stuck(self) -> dict[int, Operation]:
        """What each rank that does not reach its end waits for."""
        waiting = {
            rank: step[self.at[rank]]
            for rank, step in enumerate(self.ranks)
            if self.at[rank] < len(step)
        }
        return {
            rank: step.batch.operations[0]
            for rank, step in waiting.items()
            if isinstance(step, Wait)
        }

    @property
    def duration(self) -> float:
        return max(self.clock)

    def _advance(self, rank: int) -> bool:
        """Let a rank go on as far as it can; whether it could."""
        program, start = self.ranks[rank], self.at[rank]
        while self.at[rank] < len(program):
            step = program[self.at[rank]]
            if isinstance(step, Compute):
                self.clock[rank] += step.duration
            elif isinstance(step, Post):
                self._post(rank, step.batch)
            elif step.batch in self.ended_at:
                self.clock[rank] = max(self.clock[rank], self.ended_at[step.batch])
            else:
                break
            self.at[rank] += 1
        return self.at[rank] > start

    def _post(self, rank: int, batch: Batch) -> None:
        channel = self.communicator(rank, batch)
        self.queues[rank, channel].append(batch)
        self.posted_at[batch], self.numbers[batch] = self.clock[rank], []
        for sends, peer in batch.operations:
            way = (channel, rank, peer) if sends else (channel, peer, rank)
            self._counts[sends, way] += 1
            self.numbers[batch].append((sends, way, self._counts[sends, way]))

    def _communicate(self) -> bool:
        """End every first batch of a queue whose counterparts are first in theirs; whether there
        was one.
        """
        started = {}
        for queue_of, queue in self.queues.items():
            for number in self.numbers[queue[0]] if queue else ():
                started[number] = max(self.posted_at[queue[0]], self.free_at[queue_of])
        ended = []
        for queue_of, queue in self.queues.items():
            own = self.numbers[queue[0]] if queue else []
            both = [*own, *((not sends, *rest) for sends, *rest in own)]
            if both and all(number in started for number in both):
                ended.append((queue_of, max(started[number] for number in both)))
        for queue_of, time in ended:
            self.ended_at[self.queues[queue_of].pop(0)] = self.free_at[queue_of] = time
        return bool(ended)
