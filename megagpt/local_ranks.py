"""Several ranks on this machine without a launcher, for commands that compare or measure."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context, start_processes

CPU_RANKS = 4  # where there is no GPU: enough for every axis of the mesh to have two


def devices_here() -> int:
    """The ranks that this machine is for: one a GPU."""
    return torch.cuda.device_count() or CPU_RANKS


def start(ranks: int, job: Callable[..., Any], *arguments: Any) -> Any:
    """What ``job(*arguments)`` returns on rank 0 of so many new processes.

    Raises what a rank raised, the other ranks having been ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = get_context("spawn").SimpleQueue()
    start_processes(_rank, (ranks, port, answers, job, arguments), nprocs=ranks, start_method="spawn")
    return answers.get()


def _rank(rank: int, ranks: int, port: int, answers: Any, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    answer = joined(job, *arguments)
    if rank == 0:
        answers.put(answer)


def joined(job: Callable[..., Any], *arguments: Any) -> Any:
    """Run a job on this rank, joined to the others; every rank must call it."""
    from megagpt.engine import join_ranks

    join_ranks()
    try:
        return job(*arguments)
    finally:
        dist.destroy_process_group()
