"""Gather the ranks, or say which are missing.

torch waits for all ranks as long as for a collective, half an hour, and then cannot say which did
not come.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import deepspeed  # noqa: F401  # before the ranks gather: the import takes seconds on a cold disk
import torch.distributed as dist

from megagpt.cluster.launch_command import (
    COMMAND_VARIABLE,
    command_of_launcher,
    hosts_without_session,
)
from megagpt.cluster.launchers import Launch, adopt_launch, agent_serves, take_free_port
from megagpt.cluster.processes import listener
from megagpt.common.text import redacted, without_control_characters
from megagpt.utils import TransientError, UserError, human_duration

TIMEOUT_VARIABLE = "MEGAGPT_JOIN_TIMEOUT_S"
# enough for the slowest start: torch from a cold network disk, one host prepares the corpus
TIMEOUT_S = 300
NOTICE_S = 10.0
PAUSE_S = 0.5
HEARING_S = 3.0
COMMAND_WIDTH = 120
COMMAND = "command"
COMPLETE = "complete"
VERDICT = "verdict"
HEARD = "heard"
PREFLIGHT = "python launch/preflight.py --hostfile hosts"
PORT_REMEDY = (
    "stop what uses it, or choose another: deepspeed --master_port N, torchrun "
    "--master-port N, or MASTER_PORT"
)


@contextmanager
def gathered_ranks(
    of_rank_0: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[None]:
    """Enter a context once every rank has come and rank 0 has entered ``of_rank_0``.

    If that raises UserError, all ranks raise it. Create the process group inside. Every rank
    must call this. Raises UserError with the missing ranks and their hosts after
    MEGAGPT_JOIN_TIMEOUT_S (300), or as soon as the ssh session to a host is seen to end.
    Afterwards all ranks know the command that was typed, which only some can see.
    """
    launch = adopt_launch()
    if launch.world_size == 1:
        take_free_port()
        with of_rank_0():
            yield
        return
    store = _gather(launch)  # rank 0 serves it until this function returns
    if launch.rank == 0:
        with _announced(of_rank_0, store, launch):
            yield
    else:
        _await_verdict(store)
        yield


@contextmanager
def _announced(
    context: Callable[[], AbstractContextManager[object]], store: dist.Store, launch: Launch
) -> Iterator[None]:
    """Enter rank 0's context and tell the other ranks whether that succeeded."""
    try:
        entered = context()
    except UserError as error:
        store.set(VERDICT, str(error))
        _await_hearers(store, launch)
        raise
    with entered:
        store.set(VERDICT, "")
        yield


def _await_hearers(store: dist.Store, launch: Launch) -> None:
    """Serve the store until every other rank has read the verdict, for at most HEARING_S."""
    end = time.monotonic() + HEARING_S
    while store.add(HEARD, 0) < launch.world_size - 1 and time.monotonic() < end:
        time.sleep(0.05)


def _await_verdict(store: dist.Store) -> None:
    """Continue if rank 0 does, or raise its UserError."""
    with _rank_0_may_end():
        store.wait([VERDICT], timedelta(seconds=TIMEOUT_S))
        refusal = store.get(VERDICT).decode()
        store.add(HEARD, 1)
        if refusal:
            raise UserError(refusal)


def _gather(launch: Launch) -> dist.Store:
    end = time.monotonic() + _timeout_s()
    store = _open_store(launch, end)
    with _rank_0_may_end():
        _tell(store, launch)
        _await_others(store, launch, end)
        _hear(store)
    return store


@contextmanager
def _rank_0_may_end() -> Iterator[None]:
    """Explain the loss of the store that rank 0 serves."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise TransientError("rank 0 exited during rendezvous; see its log") from error


def _timeout_s() -> int:
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    if not text.isdecimal() or int(text) == 0:
        raise UserError(
            f"environment: {TIMEOUT_VARIABLE}={text!a} is not a whole number of seconds "
            f"(for example 300)"
        )
    return int(text)


def _open_store(launch: Launch, end: float) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT, served by rank 0 or by torchrun's agent."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = launch.rank == 0 and not agent_serves()
    if not serves:
        _await_server(launch, address, port, end)
    try:
        store = dist.TCPStore(
            address,
            port,
            launch.world_size,
            is_master=serves,
            timeout=_until(end),
            wait_for_workers=False,
            multi_tenant=True,  # torch's own store uses the same port later
        )
    except dist.DistNetworkError as error:
        raise UserError(
            f"port {port} of host {socket.gethostname()} is in use{_user_of(port)}; {PORT_REMEDY}"
        ) from error
    return dist.PrefixStore(f"megagpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _user_of(port: int) -> str:
    """Return the process that uses a port, if it can be seen.

    For example ` by process 4711 (python launch/train.py; to end it: kill 4711)`.
    """
    user = listener(port)
    if user is None:
        return ""
    command = without_control_characters(redacted(shlex.join(user.words)))
    return (
        f" by process {user.number} ({textwrap.shorten(command, COMMAND_WIDTH)}; to end it: "
        f"kill {user.number})"
    )


def _await_server(launch: Launch, address: str, port: int, end: float) -> None:
    """Wait until the port answers; torch's store would write a warning at each attempt."""
    while True:
        try:
            socket.create_connection(
                (address, port), timeout=max(PAUSE_S, end - time.monotonic())
            ).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise TransientError(
                    f"{_name(launch, 0)} did not answer at {address}:{port} within "
                    f"{human_duration(_timeout_s())} ({error}); check its host, its log and the "
                    f"firewall; to check all hosts: {PREFLIGHT}"
                ) from error
        time.sleep(PAUSE_S)


def _tell(store: dist.Store, launch: Launch) -> None:
    """Announce this rank and what it can see; the last rank announces that all are here."""
    if (command := command_of_launcher()) is not None:
        store.set(COMMAND, shlex.join(command))
    store.set(_key(launch.rank), "here")
    if store.add("arrived", 1) == launch.world_size:
        store.set(COMPLETE, "")


def _await_others(store: dist.Store, launch: Launch, end: float) -> None:
    """Wait for the last rank; after a while rank 0 prints which ranks it waits for."""
    notice_at = time.monotonic() + NOTICE_S if launch.rank == 0 else end
    while not store.check([COMPLETE]):  # its `wait` would log a warning at each time-out
        time.sleep(PAUSE_S)
        if lost := hosts_without_session():
            raise TransientError(
                f"the ssh session to {', '.join(lost)} has ended, so {_missing(store, launch)} "
                f"cannot join; see its output above, or check all hosts: {PREFLIGHT}"
            )
        if time.monotonic() >= end:
            raise TransientError(
                f"{_missing(store, launch)} did not join within {human_duration(_timeout_s())}; "
                f"look for an error in its output, or check all hosts: {PREFLIGHT}"
            )
        if time.monotonic() >= notice_at:
            notice_at = end
            left = human_duration(end - time.monotonic())
            waiting = (
                f"waiting for {_missing(store, launch)}; {left} left (set {TIMEOUT_VARIABLE} "
                f"to wait longer)"
            )
            print(waiting, file=sys.stderr, flush=True)


def _missing(store: dist.Store, launch: Launch) -> str:
    return ", ".join(
        _name(launch, rank) for rank in range(launch.world_size) if not store.check([_key(rank)])
    )


def _hear(store: dist.Store) -> None:
    """Store the command that was typed, if any rank could see it."""
    if store.check([COMMAND]):
        os.environ[COMMAND_VARIABLE] = store.get(COMMAND).decode()


def _until(end: float) -> timedelta:
    return timedelta(seconds=max(0.1, end - time.monotonic()))


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _name(launch: Launch, rank: int) -> str:
    host = launch.host_of(rank)
    return f"rank {rank} (host {host})" if host else f"rank {rank}"
