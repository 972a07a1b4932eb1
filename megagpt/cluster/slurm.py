"""Slurm's compact lists: the hosts of a job step and the number of tasks of each.

`gpu[01-03,7],login1` are five hosts, `2(x3),1` is two tasks on each of three hosts and one on a
fourth (srun(1), SLURM_STEP_NODELIST and SLURM_STEP_TASKS_PER_NODE).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

from megagpt.cluster.hosts import HOST_PATTERN, Host
from megagpt.utils import UserError

MAX_HOSTS = 100_000  # more than any cluster; a damaged range must not fill the memory
# splits at commas outside brackets
PARTS = re.compile(r"[^,\[\]]*(?:\[[^\[\]]*\][^,\[\]]*)*(?:,|$)")
PIECES = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
TASKS = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


def hosts_of_step(environment: Mapping[str, str]) -> list[Host]:
    """Return the hosts of this job step with their tasks, in task order; empty outside Slurm.

    srun numbers tasks host by host (block distribution) or in turns (cyclic). Only block is
    supported.
    """
    nodes = environment.get("SLURM_STEP_NODELIST")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if not nodes or not tasks:
        return []
    names = expand_hosts(nodes)
    counts = expand_tasks(tasks)
    if len(names) != len(counts):
        raise UserError(
            f"environment: SLURM_STEP_NODELIST={nodes} has {len(names)} hosts, but "
            f"SLURM_STEP_TASKS_PER_NODE={tasks} has {len(counts)}: start with srun python "
            "launch/train.py"
        )
    return [Host(name, count) for name, count in zip(names, counts, strict=True)]


def expand_hosts(nodes: str) -> list[str]:
    """Return the host names of a list such as `gpu[01-03,7],login1`."""
    parts = PARTS.findall(nodes)
    names = [name for part in parts if part for name in _expand_part(part.rstrip(","), nodes)]
    if (
        "".join(parts) != nodes
        or not names
        or not all(HOST_PATTERN.fullmatch(name) for name in names)
    ):
        raise UserError(f"environment: SLURM_STEP_NODELIST={nodes!a} is not a list of hosts")
    return names


def expand_tasks(tasks: str) -> list[int]:
    """Return the tasks of each host from a list such as `2(x3),1`."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = TASKS.fullmatch(part)
        if match is None or int(match[2] or 1) > MAX_HOSTS:
            raise UserError(
                f"environment: SLURM_STEP_TASKS_PER_NODE={tasks!a} is not a list of task counts"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_part(part: str, whole: str) -> list[str]:
    """Return the names of one part, which may have several brackets: every combination."""
    choices = [[text] if text else _numbers(ranges, whole) for ranges, text in PIECES.findall(part)]
    if math.prod(map(len, choices)) > MAX_HOSTS:
        raise UserError(f"environment: SLURM_STEP_NODELIST={whole!a} is not a list of hosts")
    return ["".join(pieces) for pieces in itertools.product(*choices)]


def _numbers(ranges: str, whole: str) -> list[str]:
    """Return 01, 02, 03, 7 for `01-03,7`; a range keeps the width of its first number."""
    numbers: list[str] = []
    for text in ranges.split(","):
        match = RANGE.fullmatch(text)
        if match is None or int(match[2] or match[1]) - int(match[1]) >= MAX_HOSTS:
            raise UserError(f"environment: SLURM_STEP_NODELIST={whole!a} is not a list of hosts")
        first = match[1]
        last = match[2] or first
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
