"""The result of a search as text and as JSON, and the file of its winner."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagpt.planning.cost.performance import Estimate
from megagpt.planning.layout import Layout
from megagpt.planning.price import Budget
from megagpt.planning.report import assumptions, mesh_line
from megagpt.planning.search.ask import Answer
from megagpt.planning.search.best import Found
from megagpt.utils import UserError, human_count, write_atomically

MOST_PARTS = 3  # differences that say why a run loses
NOTHING = (
    "no legal layout fits; use more ranks, a device with more memory, a smaller batch or a smaller "
    "model"
)


def text(answer: Answer, budget: Budget) -> str:
    """Return the layouts, fastest first, then why the file's own loses, then the assumptions."""
    parts = [_head(answer)]
    if answer.notes:
        parts.append("\n".join(["notes:", *(f"  {line}" for line in answer.notes)]))
    parts += [_entry(place, one) for place, one in enumerate(answer.found, start=1)] or [NOTHING]
    if line := budget.line(answer.found[0].estimate if answer.found else None, answer.ranks):
        parts.append(line)
    own = [f"your own: {line}" for line in _own(answer)]
    parts += own or ["to train with the first, write it to a file: --write run.json"]
    return "\n\n".join([*parts, assumptions(answer.assumed, answer.limits)])


def _head(answer: Answer) -> str:
    tokens = human_count(answer.batch * answer.model.sequence_length)
    return (
        f"{answer.source}: {human_count(answer.model.num_parameters)} parameters on {answer.ranks} "
        f"ranks, {answer.batch} sequences of {answer.model.sequence_length} ({tokens} tokens) a "
        f"step\nthe fastest of all meshes, schedules, micro-batches, recomputations, ZeRO stages "
        f"and offloads that are legal and fit; of equally fast ones, the one with the least memory"
    )


def _entry(place: int, one: Found) -> str:
    result = one.estimate
    host = f", {one.host_gib:.1f} GiB a host" if one.host_gib else ""
    return (
        f"{place}. step {result.step_s:.3g} s, MFU {result.mfu:.0%}, {one.device_gib:.1f} GiB a "
        f"device{host}; {bound(result)}\n"
        f"   {mesh_line(one.layout)}\n"
        f"   --set {shlex.join(one.items)}"
    )


def bound(result: Estimate) -> str:
    """Return what takes most of the step, and what comes next."""
    first, second = sorted(result.parts.items(), key=lambda part: -part[1])[:2]
    return (
        f"bound by {first[0]} ({first[1] / result.step_s:.0%}), then {second[0]} "
        f"({second[1] / result.step_s:.0%})"
    )


def _own(answer: Answer) -> Iterator[str]:
    """Yield why the configuration itself is not the first, or that it is."""
    if answer.own_problem:
        yield f"impossible: {answer.own_problem}"
    if (own := answer.own) is None:
        return
    yield from (f"refused: {line}" for line in own.refusals)
    if not own.fits_device:
        room = own.limits.device_gib - own.limits.reserve_gib
        yield f"does not fit: {own.device_gib:.1f} of {room:.1f} GiB a device"
    if not own.fits_host:
        yield f"does not fit: {own.host_gib:.1f} of {own.limits.host_gib:.0f} GiB a host"
    if not answer.found or not own.good:
        return
    best = answer.found[0].estimate
    if own.estimate.step_s <= best.step_s * 1.0005:
        yield f"is as fast as the first: step {own.estimate.step_s:.3g} s"
    else:
        yield _why_slower(own.layout, own.estimate, best)


def _why_slower(layout: Layout, own: Estimate, best: Estimate) -> str:
    more = {name: seconds - best.parts[name] for name, seconds in own.parts.items()}
    most = sorted(more.items(), key=lambda part: -part[1])[:MOST_PARTS]
    least = best.step_s / 1000  # what a difference must be to be worth a word
    words = [f"{name} {seconds:+.3g} s" for name, seconds in most if seconds > least]
    return (
        f"step {own.step_s:.3g} s, {own.step_s / best.step_s - 1:.0%} slower than the first: "
        f"{', '.join(words)} ({mesh_line(layout)})"
    )


def as_json(answer: Answer, budget: Budget) -> dict[str, Any]:
    """Return the result for machines: bytes and seconds, nothing rounded."""
    first = answer.found[0].estimate if answer.found else None
    return {
        "ranks": answer.ranks,
        "batch": answer.batch,
        "notes": answer.notes,
        "found": [
            {
                "set": list(one.items),
                "device_gib": one.device_gib,
                "host_gib": one.host_gib,
                "estimate": vars(one.estimate),
            }
            for one in answer.found
        ],
        "own": list(_own(answer)),
        "budget": budget.as_json(first, answer.ranks),
        "limits": vars(answer.limits),
        "assumptions": vars(answer.assumed),
    }


def write_winner(answer: Answer, path: Path) -> None:
    """Write the configuration with the first layout.

    Raises UserError if nothing fits or the file exists.
    """
    if not answer.found:
        raise UserError(f"--write {path}: nothing to write, {NOTHING}")
    if path.exists():
        raise UserError(f"--write {path}: the file exists; remove it, or name another")
    document: Mapping[str, Any] = answer.written.changed(answer.found[0].items).as_written()
    try:
        write_atomically(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"--write {path}: cannot be written: {error.strerror}; name another"
        ) from error
