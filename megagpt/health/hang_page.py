"""The page about a run that hangs: which rank differs, and where every rank is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from megagpt.common.text import redacted, without_control_characters
from megagpt.health.crash import PAGE_WIDTH
from megagpt.health.flight_recorder import Finding, find_absent
from megagpt.health.watch import RankState

MOST_GROUPS = 4
FRAMES = 6


def hang_page(
    states: Sequence[RankState],
    *,
    timeout_s: float,
    last_checkpoint: Path | None,
    resume_command: str | None,
    stacks: Path,
) -> str:
    """Return plain text of 80 columns, longer where a path or a command is.

    ``stacks`` is the directory of the whole stacks.
    """
    rule = "─" * PAGE_WIDTH
    odd = odd_ranks(states)
    groups = sorted(grouped(states), key=lambda group: (group[0].rank not in odd, len(group)))
    facts = [
        ("last checkpoint", str(last_checkpoint or "none")),
        ("every stack", str(stacks)),
        ("to resume", resume_command or "nothing was saved: start again"),
    ]
    lines = [
        rule,
        f"  the run hangs: no progress for {timeout_s:g} s (megagpt.monitor.stall_timeout_s)",
        "",
        *textwrap.wrap(
            hang_verdict(states), PAGE_WIDTH - 4, initial_indent="  ", subsequent_indent="  "
        ),
        *(line for group in groups[:MOST_GROUPS] for line in _group(group)),
        *([f"  and {len(groups) - MOST_GROUPS} more places"] if len(groups) > MOST_GROUPS else []),
        "",
        *(f"  {label:<16}  {value}" for label, value in facts),
        rule,
    ]
    return without_control_characters(redacted("\n".join(lines)))


def grouped(states: Iterable[RankState]) -> list[list[RankState]]:
    """Return the ranks grouped by the point that they are at."""
    groups: dict[tuple[object, ...], list[RankState]] = {}
    for state in states:
        groups.setdefault(state.whereabouts, []).append(state)
    return list(groups.values())


def odd_ranks(states: Sequence[RankState]) -> list[int]:
    """Return the ranks that the others most likely wait for; empty if all are in the same place.

    In this order: ranks that do not answer, ranks absent from what the others' devices wait in,
    ranks that are steps behind, ranks that wait for nobody while others do, and ranks in the least
    common place.
    """
    absent = _absent(states)
    furthest = max(state.step for state in states)
    waits = any(state.collective for state in states)
    suspicions = (
        [state.rank for state in states if state.silent_s is not None],
        list(absent.ranks) if absent is not None else [],
        [state.rank for state in states if state.step < furthest],
        [state.rank for state in states if waits and state.collective is None],
    )
    for suspects in suspicions:
        if 0 < len(suspects) < len(states):
            return suspects
    groups = sorted(grouped(states), key=len)
    return (
        [state.rank for state in groups[0]]
        if len(groups) > 1 and len(groups[0]) < len(groups[1])
        else []
    )


def _absent(states: Sequence[RankState]) -> Finding | None:
    """Return what torch's flight recorders show together."""
    return find_absent({state.rank: state.groups for state in states if state.silent_s is None})


def hang_verdict(states: Sequence[RankState]) -> str:
    """Return a sentence on who differs and how, and another if the flight recorders agree."""
    odd = odd_ranks(states)
    if not odd:
        return (
            "no rank differs: all wait in the same place, or in as many places as there are ranks"
        )
    first = next(state for state in states if state.rank == odd[0])
    rest = [state for state in states if state.rank not in odd]
    others = (
        f"while {_ranks([state.rank for state in rest])} {'is' if len(rest) == 1 else 'are'} "
        f"{_where(rest[0])}"
    )
    absent = _absent(states)
    found = absent is not None and list(absent.ranks) == odd
    recorded = (
        f". torch's flight recorder: {_ranks(odd)} {absent.reason}"
        if absent is not None and found
        else ""
    )
    return (
        f"{_ranks(odd)} differ{'s' if len(odd) == 1 else ''}: {_where(first)}, {others}{recorded}"
    )


def _where(state: RankState) -> str:
    doing = (
        f"{state.doing} in step {state.step}"
        if state.step
        else f"{state.doing} before the first step"
    )
    if state.silent_s is not None:
        return f"no sign of life for {state.silent_s:.0f} s, last seen {doing}"
    within = f" in module {state.module}" if state.module else ""
    waiting = f", waiting in {state.collective}" if state.collective else ""
    return f"{doing}{within}{waiting}"


def _group(group: list[RankState]) -> list[str]:
    """Return the place of some ranks, with the stack of the first, innermost last."""
    first = group[0]
    who = first.name if len(group) == 1 else _ranks([state.rank for state in group])
    frames = [f"    {frame}"[:PAGE_WIDTH] for frame in reversed(first.stack[:FRAMES])]
    return ["", f"  {who}", f"  {_where(first)}", *frames]


def _ranks(ranks: list[int]) -> str:
    """Return `rank 3` or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {spans}"
