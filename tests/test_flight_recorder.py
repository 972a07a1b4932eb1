"""The rank that keeps the others waiting on the device is found from what torch recorded on each."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.flight_recorder.components.types import Op

from megagpt import flight_recorder
from megagpt.flight_recorder import Finding, GroupState, find_absent, group_states, read
from megagpt.hang_page import odd_ranks, verdict
from megagpt.watch import RankState

WORLD, STAGES = ("0", "default_pg"), ("5", "mesh_pipeline")
RANKS_OF = {"0": "[0, 1, 2, 3]", "5": "[1, 3]", "6": "[0, 3]"}  # the second group's rank 0 is rank 1


def entry(group: tuple[str, str], number: int, name: str, state: str, retired: bool, **fields: Any) -> dict[str, Any]:
    """One entry as NCCL's recorder of torch 2.13 writes it (version 2.10); states are scheduled, started, completed."""
    p2p = fields.get("is_p2p", False)
    return {
        "record_id": number,
        "pg_id": int(group[0]),
        "process_group": group,
        "op_id": number,
        "collective_seq_id": 0 if p2p else number,
        "p2p_seq_id": number if p2p else 0,
        "profiling_name": f"nccl:{name}",
        "time_created_ns": number,
        "timeout_ms": 1800000,
        "is_p2p": p2p,
        "input_sizes": [[3]],
        "input_dtypes": ["Float"],
        "output_sizes": [[3]],
        "output_dtypes": ["Float"],
        "state": state,
        "retired": retired,
        "time_discovered_started_ns": None,
        "time_discovered_completed_ns": None,
        "frames": [],
    }


def dump(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    config = {name: {"name": name, "desc": "", "ranks": ranks} for name, ranks in RANKS_OF.items()}
    return {"version": "2.10", "pg_config": config, "pg_status": {}, "entries": list(entries)}


DONE = [entry(WORLD, 1, "all_reduce", "completed", True), entry(WORLD, 2, "broadcast", "completed", True)]
WAITING = [
    *DONE,
    entry(WORLD, 3, "all_reduce", "started", False),
    entry(WORLD, 4, "all_gather", "scheduled", False),
]


def test_the_entries_are_those_that_torchs_own_analyser_reads() -> None:
    memberships = {"0": {0, 1, 2, 3}, "5": {1, 3}}
    operations = [Op(found, memberships, found["process_group"][0]) for found in WAITING]
    assert [(op.type, op.state) for op in operations[2:]] == [
        ("all_reduce", "started"),
        ("all_gather", "scheduled"),
    ]


def found(**dumps: Sequence[dict[str, Any]]) -> Finding | None:
    return find_absent({int(rank[1:]): read(dump(entries)) for rank, entries in dumps.items()})


def test_the_rank_that_has_not_begun_what_others_wait_in_is_named() -> None:
    (state,) = read(dump(WAITING))
    assert state == GroupState("0 (default_pg)", (0, 1, 2, 3), begun=4, waiting=3, operation="all_reduce")
    absent = found(r0=WAITING, r1=WAITING, r2=DONE, r3=WAITING)
    assert absent == Finding((2,), "not yet in all_reduce 3 of process group 0 (default_pg), in which others wait")
    assert found(r0=WAITING, r1=WAITING, r3=WAITING) == absent  # one that does not answer
    assert found(r0=WAITING, r1=WAITING, r2=WAITING, r3=WAITING) is None
    assert found(r0=DONE, r1=DONE) is None


def test_who_waits_for_another_is_not_the_cause() -> None:
    """Ranks 0 and 2 wait for 1, which waits in a pipeline for what 3 has not sent."""
    batches = [  # each operation, and the end: only this one is followed (torch's test_batched_send_recv)
        entry(STAGES, 6, "send 0->1", "scheduled", False, is_p2p=True),
        entry(STAGES, 6, "coalesced", "completed", True, is_p2p=True),
        entry(STAGES, 7, "recv 0<-1", "scheduled", False, is_p2p=True),
    ]
    receives = [*batches, entry(STAGES, 7, "coalesced", "started", False, is_p2p=True)]
    (_, done) = read(dump([*DONE, *batches[:2]]))
    assert done.peers == ()
    (_, pipeline) = read(dump([*DONE, *receives]))
    assert pipeline.peers == (3,)
    absent = found(r0=WAITING, r1=[*DONE, *receives], r2=WAITING, r3=DONE)
    assert absent is not None
    assert absent.ranks == (3,)
    both = [entry(STAGES, 7, "send 1->0", "started", False, is_p2p=True)]
    absent = found(r0=WAITING, r1=[*DONE, *receives], r2=WAITING, r3=[*DONE, *both])
    assert absent is not None
    assert absent.ranks == (1, 3)  # they exchange something: neither is in the collective


def test_a_receive_that_is_not_due_yet_hides_nobody() -> None:
    """Rank 3 hangs in the middle of an interleaved step, after it has posted a receive from rank 0 for a later pass.
    Rank 0 waits for it and it seems to wait for rank 0; the collective that it has not begun decides."""
    early = [entry(("6", "undefined"), 2, "recv 1<-0", "scheduled", False, is_p2p=True)]
    absent = found(r0=WAITING, r1=WAITING, r2=WAITING, r3=[*DONE, *early])
    assert absent == Finding((3,), "not yet in all_reduce 3 of process group 0 (default_pg), in which others wait")


def test_another_operation_in_the_same_place_is_named() -> None:
    other = [*DONE, entry(WORLD, 3, "broadcast", "started", False)]
    absent = found(r0=WAITING, r1=other, r2=WAITING, r3=WAITING)
    reason = "in broadcast as number 3 of process group 0 (default_pg), where others are in all_reduce"
    assert absent == Finding((1,), reason)


def test_the_page_names_the_rank_although_all_stacks_are_alike() -> None:
    """With NCCL every rank waits in the same line for a number from the device."""
    state = RankState(0, "", 7, "training", 9.0, None, None, "megagpt/pipeline.py:113 mean_loss", (), final=True)
    ranks = [replace(state, rank=r, groups=tuple(read(dump(DONE if r == 2 else WAITING)))) for r in range(4)]
    assert odd_ranks([replace(state, groups=()) for state in ranks]) == []
    assert odd_ranks(ranks) == [2]
    assert verdict(ranks).endswith(
        "torch's flight recorder: rank 2 not yet in all_reduce 3 of process group 0 (default_pg), in which others wait"
    )


def test_a_recorder_that_does_not_answer_or_is_not_understood_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "torch._C._distributed_c10d"
    monkeypatch.setitem(
        flight_recorder.sys.modules, module, type("", (), {"_dump_nccl_trace_json": lambda: b"no JSON"})
    )
    (state,) = group_states()
    assert state.group.startswith("the flight recorder cannot be read (")
    monkeypatch.setitem(flight_recorder.sys.modules, module, None)
    assert group_states() == ()


@pytest.mark.gpu
def test_nccl_records_what_is_read(tmp_path: Any) -> None:
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.distributed.all_reduce(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
        content = json.loads(torch._C._distributed_c10d._dump_nccl_trace_json())
        assert content["entries"][-1]["profiling_name"] == "nccl:all_reduce"
        (state,) = group_states()
        assert (state.members, state.begun) == ((0,), 1)
    finally:
        torch.distributed.destroy_process_group()
