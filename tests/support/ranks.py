"""A pool of real ranks (processes joined by gloo) that serves many test cases.

Starting ranks costs seconds, so a pool lives for the session, and all pools are forked from one
process that has imported what they need (`tests.support.jobs.imported`). A job that fails or
exceeds its deadline fails one test, with what every rank was doing; the pool is then ended, by its
own process ids, and the next test gets a new one.
"""

import faulthandler
import importlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

JOB_DEADLINE_S = 120.0
START_DEADLINE_S = 120.0
FAILURE_GRACE_S = 3.0


class RankError(AssertionError):
    """A job failed on some rank; the message holds its traceback, or every rank's stack after a
    hang.
    """


class RankPool:
    """``world_size`` ranks; ``run("tests.support.jobs.training:name", argument=...)`` calls a
    function on each, returns the results.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.directory = Path(tempfile.mkdtemp(prefix="ranks_"))
        self.processes: list[SpawnProcess] = []
        self.connections: list[Connection] = []
        port = free_port()
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.support.jobs.imported"])
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs, self.directory), daemon=True
            )
            process.start()
            self.processes.append(process)
            self.connections.append(ours)
        self._collect("start", START_DEADLINE_S)

    def run(self, job: str, *, deadline_s: float = JOB_DEADLINE_S, **arguments: Any) -> list[Any]:
        """Each rank's result of ``module:function(**arguments)``. Raises RankError."""
        for connection in self.connections:
            connection.send((job, arguments))
        return self._collect(job, deadline_s)

    @property
    def alive(self) -> bool:
        return bool(self.processes)

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.connections = [], []

    def _collect(self, job: str, deadline_s: float) -> list[Any]:
        """Every rank's answer; once one has failed, the others, which may wait for it, get a
        moment only.
        """
        end = time.monotonic() + deadline_s
        results: list[Any] = [None] * self.world_size
        failures: list[str] = []
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, results[rank] = connection.recv()
                except EOFError:
                    succeeded, results[rank] = (
                        False,
                        f"died: exit code {self.processes[rank].exitcode}",
                    )
                if not succeeded:
                    failures.append(f"rank {rank} in {job}:\n{results[rank]}")
                    end = min(end, time.monotonic() + FAILURE_GRACE_S)
        failures += [f"rank {rank} gave no answer to {job}" for rank in waiting.values()]
        if failures:
            message = "\n".join([*failures, self._stacks()])
            self.close()
            raise RankError(message)
        return results

    def _stacks(self) -> str:
        """What every rank is doing, by its own faulthandler."""
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        texts = [(self.directory / f"stack_{rank}").read_text() for rank in range(self.world_size)]
        return "\n".join(
            f"--- rank {rank} was here\n{text}" for rank, text in enumerate(texts) if text
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world_size: int, port: int, connection: Connection, directory: Path) -> None:
    """A rank's life: join the others, then answer jobs until the pipe closes."""
    with (
        (directory / f"stack_{rank}").open("w") as stacks,
        (directory / f"output_{rank}").open("w") as output,
    ):
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }
        connection.send(_answer(_join, {}))
        while True:
            try:
                job, arguments = connection.recv()
            except EOFError:
                return
            module, _, function = job.partition(":")
            connection.send(_answer(getattr(importlib.import_module(module), function), arguments))


def _join() -> None:
    import torch

    from megagpt.parallel.engine import join_ranks

    torch.set_num_threads(1)
    join_ranks()


def _answer(function: Any, arguments: dict[str, Any]) -> tuple[bool, Any]:
    try:
        return True, function(**arguments)
    except BaseException:
        return False, traceback.format_exc()
