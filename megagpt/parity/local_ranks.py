"""Several ranks on this machine without a launcher, for commands that compare or measure."""

import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context, start_processes
from torch.multiprocessing.spawn import ProcessException

from megagpt.utils import ExitCode, TransientError, UserError

CPU_RANKS = 4  # if there is no GPU: enough for two axes of the mesh to have two ranks each


def gpus_here() -> int:
    """Return the number of GPUs that ranks started here would use; 0 on a CPU."""
    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def start(ranks: int, job: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``job(*arguments)`` returns on rank 0 of ``ranks`` new processes.

    Raise the UserError that a rank raised, or torch's ProcessException with the traceback of
    another failure; the other ranks have then been ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    answers = context.SimpleQueue()
    refusals = context.SimpleQueue()
    # It would warn of each rank that it ends.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        start_processes(
            _rank,
            (ranks, port, answers, refusals, job, arguments),
            nprocs=ranks,
            start_method="spawn",
        )
    except ProcessException:
        if refusals.empty():
            raise
        raise refusals.get() from None  # one rank's; the others raised the same or never got there
    return answers.get()


def _rank(
    rank: int,
    ranks: int,
    port: int,
    answers: Any,
    refusals: Any,
    job: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        answer = joined(job, *arguments)
    except UserError as error:
        # Only these two classes are sure to survive pickling.
        kind = TransientError if isinstance(error, TransientError) else UserError
        refusals.put(kind(str(error)))
        sys.exit(ExitCode.BAD_INPUT)
    if rank == 0:
        answers.put(answer)


def joined(job: Callable[..., Any], *arguments: Any) -> Any:
    """Run a job on this rank, joined to the others; every rank must call it.

    A rank that fails does not destroy the group: ranks that wait for it would fail before it has
    reported why.
    """
    from megagpt.parallel.engine import join_ranks

    join_ranks()
    answer = job(*arguments)
    dist.destroy_process_group()
    return answer
