"""What each rank's collectives are at, from torch's flight recorder, and who keeps the others from going on.

With NCCL a collective is queued on the device and returns: every rank's stack ends where the host next needs a number,
and tells nothing. The recorder has each operation's place in its process group's order, and whether it has ended. The
format is that of `torch/distributed/flight_recorder`. This module does not import torch; it asks one that is loaded.
"""

from __future__ import annotations

import ast
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ANSWER_S = 1.0  # the recorder asks the driver how far events are, and a driver may hang
DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # the second has gloo's


@dataclass(frozen=True)
class GroupState:
    """How far this rank is in one process group.

    ``begun`` is the number of the last collective that it queued there, counting from 1; ``waiting`` the number of the
    first that has not ended, ``operation`` its name. ``peers`` are the ranks of the oldest batch of sends and receives
    that has not ended.
    """

    group: str
    members: tuple[int, ...]
    begun: int
    waiting: int | None = None
    operation: str | None = None
    peers: tuple[int, ...] = ()


def group_states() -> tuple[GroupState, ...]:
    """Return this process's groups; none where nothing is recorded or the recorder does not answer in time."""
    found: list[GroupState] = []

    def ask() -> None:
        try:
            found.extend(read(_dump()))
        except Exception as error:  # a format of another torch must not keep the watch from its work
            found.append(GroupState(f"the flight recorder cannot be read ({type(error).__name__}: {error})", (), 0))

    asking = threading.Thread(target=ask, name="flight recorder", daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return tuple(found)


def _dump() -> dict[str, Any]:
    """Return the recorder's content; empty where there is none."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    for name in DUMPS:
        dump: Callable[..., bytes] | None = getattr(c10d, name, None)
        content = json.loads(dump()) if dump is not None else {}
        if content.get("entries"):
            return content
    return {}


def read(dump: Mapping[str, Any]) -> list[GroupState]:
    """Return the state of each group in a dump of one rank."""
    entries: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for entry in dump.get("entries", ()):
        entries[tuple(entry["process_group"])].append(entry)
    return [_group_state(*group, found, dump["pg_config"]) for group, found in entries.items()]


def _group_state(
    name: str, description: str, entries: list[Mapping[str, Any]], groups: Mapping[str, Any]
) -> GroupState:
    members = tuple(ast.literal_eval(groups[name]["ranks"])) if name in groups else ()
    collectives = _ends([entry for entry in entries if not entry["is_p2p"]], "collective_seq_id")
    waiting = next((entry for entry in collectives.values() if not _ended(entry)), None)
    exchanges = [entry for entry in entries if entry["is_p2p"]]
    batch = next((n for n, entry in _ends(exchanges, "p2p_seq_id").items() if not _ended(entry)), None)
    names = [_name(entry) for entry in exchanges if entry["p2p_seq_id"] == batch]
    return GroupState(
        group=name if description in ("", "undefined") else f"{name} ({description})",
        members=members,
        begun=max(collectives, default=0),
        waiting=waiting["collective_seq_id"] if waiting is not None else None,
        operation=_name(waiting) if waiting is not None else None,
        peers=tuple(sorted({peer for peer in (_peer(name, members) for name in names) if peer is not None})),
    )


def _ends(entries: Iterable[Mapping[str, Any]], number: str) -> dict[int, Mapping[str, Any]]:
    """Return the last entry of each number. Of a batch, NCCL follows only this one, `nccl:coalesced`: those before it,
    one an operation with the batch's number, have no events and stay scheduled for ever."""
    return {entry[number]: entry for entry in entries}


def _ended(entry: Mapping[str, Any]) -> bool:
    """NCCL's watchdog marks what it found completed; gloo's operations are retired without a state of their own."""
    return entry["state"] == "completed" or bool(entry["retired"])


def _name(entry: Mapping[str, Any]) -> str:
    """`all_reduce` of `nccl:all_reduce`"""
    return str(entry["profiling_name"]).partition(":")[2]


def _peer(name: str, members: tuple[int, ...]) -> int | None:
    """Return the other rank of `send 0->1` or `recv 1<-0`, whose numbers are those of the group; None of a batch."""
    words = name.replace("->", " ").replace("<-", " ").split()
    if words[0] not in ("send", "recv") or len(words) != 3:
        return None
    number = int(words[2])
    return members[number] if members else number


Ranks = Mapping[int, Iterable[GroupState]]  # what each rank that answered says


@dataclass(frozen=True)
class Finding:
    """The ranks that others wait for, and why."""

    ranks: tuple[int, ...]
    reason: str


Reasons = dict[int, dict[int, str]]  # who waits -> for whom -> in what


def find_absent(ranks: Ranks) -> Finding | None:
    """Return who keeps the others waiting and waits for nobody; None where all have begun what the others wait in.

    Where all have, but not the same operation, those are returned whose operation is the rarest.
    """
    by_group: dict[str, dict[int, GroupState]] = defaultdict(dict)
    for rank, states in ranks.items():
        for state in states:
            by_group[state.group][rank] = state
    collectives: Reasons = defaultdict(dict)
    reasons: Reasons = defaultdict(dict)
    for group, of_ranks in by_group.items():
        for rank, state in of_ranks.items():
            for absent in _absent_peers(rank, state, of_ranks):
                reasons[rank][absent] = f"a send or receive of process group {group}"
            for absent in _absent_collective(state, of_ranks):
                collectives[rank][absent] = f"{state.operation} {state.waiting} of process group {group}"
    for rank, of_rank in collectives.items():
        reasons[rank] |= of_rank
    # Receives may be posted long before they are due: whoever has one only seems to wait, and all may in a circle.
    return _culprits(reasons) or _culprits(collectives) or _different_operations(by_group)


def _culprits(reasons: Reasons) -> Finding | None:
    """Return those for whom others wait and who wait for nobody; None where there are none."""
    awaited = {absent for of_rank in reasons.values() for absent in of_rank}
    culprits = tuple(sorted(rank for rank in awaited if rank not in reasons))
    if not culprits:
        return None
    where = sorted({of_rank[rank] for of_rank in reasons.values() for rank in culprits if rank in of_rank})
    return Finding(culprits, f"not yet in {where[0]}, in which others wait")


def _absent_collective(state: GroupState, of_ranks: Mapping[int, GroupState]) -> list[int]:
    waiting = state.waiting
    if waiting is None:
        return []
    return [rank for rank in state.members or of_ranks if rank not in of_ranks or of_ranks[rank].begun < waiting]


def _absent_peers(rank: int, state: GroupState, of_ranks: Mapping[int, GroupState]) -> list[int]:
    return [peer for peer in state.peers if peer not in of_ranks or rank not in of_ranks[peer].peers]


def _different_operations(by_group: Mapping[str, Mapping[int, GroupState]]) -> Finding | None:
    for group, of_ranks in by_group.items():
        waiting: dict[tuple[int | None, str | None], list[int]] = defaultdict(list)
        for rank, state in of_ranks.items():
            waiting[state.waiting, state.operation].append(rank)
        waiting.pop((None, None), None)
        numbers = {number for number, _ in waiting}
        if len(numbers) == 1 and len(waiting) > 1:
            (number, operation), rarest = min(waiting.items(), key=lambda item: len(item[1]))
            others = sorted({str(other) for _, other in waiting} - {str(operation)})
            reason = f"in {operation} as number {number} of process group {group}, where others are in {others[0]}"
            return Finding(tuple(sorted(rarest)), reason)
    return None
