"""Check every host before a run: reachable, same software, free space, devices, same paths.

The result is a table with a row a host, and below it each problem with what to type. The hosts are
asked in parallel, through ssh as DeepSpeed's launcher does. torch is imported only there.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.cluster.hosts import Host, world_size
from megagpt.common.text import text_table
from megagpt.config import RunConfig
from megagpt.parallel.ops import needed_ops
from megagpt.planning.legality import ANY_VOCABULARY, World, require_legal
from megagpt.preflight import forwarded, host_memory, host_probe, ssh
from megagpt.utils import GIB, human_bytes

ASK_TIMEOUT_S = 120.0  # torch from a cold network disk; ssh reports a dead host after 5 s
AT_ONCE = 64  # hosts asked in parallel
CLOCK_TOLERANCE_S = 5.0
LEAST_DISK = 1 * GIB
LEAST_MEMORY = 2 * GIB  # torch and DeepSpeed alone take about 1 GiB a rank
LEAST_SHARED_MEMORY = 1 * GIB  # for NCCL's buffers; containers have 64 MiB by default

Values = dict[str, Any]


@dataclass
class Report:
    """One host: its answers and its problems."""

    host: Host | None  # None: this machine, without ssh
    values: Values = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    asked_s: tuple[float, float] = (0.0, 0.0)  # times of question and answer by our clock

    @property
    def name(self) -> str:
        return self.host.name if self.host else "this machine"

    @property
    def answered(self) -> bool:
        return bool(self.values)


def require_legal_on(hosts: Sequence[Host], config: RunConfig, source: str) -> None:
    """Raise ConfigError if a run would be refused.

    The number of ranks is the one that the run expects, else that of the hosts, else one
    replica.
    """
    ranks = config.megagpt.parallel.world_size or world_size([*hosts]) or None
    require_legal(config, source, World(ranks, ANY_VOCABULARY))


def examine(hosts: Sequence[Host], config: RunConfig, run_directory: Path) -> list[Report]:
    """Return a report of each host, or of this machine if there are none; leave nothing behind."""
    variables, problems = forwarded.read() if hosts else ({}, [])
    reports = [Report(host) for host in hosts] or [Report(None)]
    question = _question(config, run_directory, variables)
    _in_parallel(reports, lambda report: _ask_facts(report, question))
    for report in reports:
        if report.answered:
            report.problems += [*_problems_alone(report), *_memory(report, hosts, config)]
            report.notes += _notes(report)
    sound = [report for report in reports if report.answered]
    if len(hosts) == 1:
        reports[0].notes.append(_one_host(hosts[0]))
    _compare(sound)
    _see_whether_shared(sound)
    reports[0].problems[:0] = [*problems, *_world_problems(hosts, config)]
    return reports


def _question(config: RunConfig, run_directory: Path, variables: Mapping[str, str]) -> Values:
    zero = config.zero_optimization
    offload = [
        section for section in (zero.offload_optimizer, zero.offload_param) if section is not None
    ]
    return {
        "task": "facts",
        "directory": str(Path.cwd()),
        "run_directory": str(run_directory.absolute()),
        "disks": sorted(
            {
                section.nvme_path
                for section in offload
                if section.device == "nvme" and section.nvme_path
            }
        ),
        "variables": dict(variables),
        "ops": {device: needed_ops(config, device) for device in ("cpu", "cuda")},
    }


def _in_parallel(reports: Iterable[Report], ask: Callable[[Report], None]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(ask, reports))


def _ask_facts(report: Report, question: Values) -> None:
    begun = time.time()
    report.values = _ask(report, question) or {}
    report.asked_s = begun, time.time()


def _ask(report: Report, request: Values) -> Any:
    """Return the answer of a host's probe; if there is none, return None and add a problem."""
    source = (
        f"{Path(host_probe.__file__).read_text()}\nanswer(json.loads({json.dumps(request)!r}))\n"
    )
    reply = ssh.run_python(
        report.host.name if report.host else None, source, timeout_s=ASK_TIMEOUT_S
    )
    if reply.failure is None:
        try:
            return json.loads(reply.output.splitlines()[-1])
        except (ValueError, IndexError):  # a login script printed, or ended the session
            reply = ssh.Reply(
                "",
                f"sent no answer ({reply.output[-60:]!a}); check if a login script prints or exits",
            )
    report.problems.append(f"{report.name}: {reply.failure}")
    return None


def _problems_alone(report: Report) -> Iterator[str]:
    """Yield the problems of a host that do not depend on the others."""
    values = report.values
    name = report.name
    if not values["directory"]:
        yield (
            f"{name}: {Path.cwd()} is missing; every host needs the same paths: copy or share "
            f"the directory"
        )
        return
    if "failure" in values:
        yield (
            f"{name}: torch or the code cannot be imported: {values['failure']!a}; run make setup "
            f"there"
        )
        return
    devices = len(values["devices"])
    if report.host and devices and devices < report.host.slots:
        yield f"{name}: {report.host.slots} slots, but {devices} GPUs; write slots={devices}"
    for op, state in values["ops"].items():
        if state not in ("built", "not yet"):
            yield f"{name}: DeepSpeed's {op.removesuffix('Builder')}: {state}"
    yield from _places(values, name)
    memory = values["memory_bytes"]
    shared = values["shared_memory_bytes"]
    if memory is not None and memory < LEAST_MEMORY:
        yield f"{name}: {human_bytes(memory)} of memory left; stop what uses it"
    if devices and shared is not None and shared < LEAST_SHARED_MEMORY:
        yield (
            f"{name}: /dev/shm has {human_bytes(shared)}, NCCL needs 1 GiB: docker run "
            f"--shm-size=16g, or --ipc=host"
        )


def _memory(report: Report, hosts: Sequence[Host], config: RunConfig) -> Iterator[str]:
    """Yield the host memory that the run takes and that is not there.

    Without a hostfile, this machine has a rank for each device.
    """
    values = report.values
    memory = values["memory_bytes"]
    if "devices" not in values or (memory is not None and memory < LEAST_MEMORY):
        return  # another problem says so
    slots = report.host.slots if report.host else max(1, len(values["devices"]))
    ranks = config.megagpt.parallel.world_size or world_size([*hosts]) or slots
    if needed := host_memory.need(config, ranks, values):
        yield from host_memory.problems(report.name, needed, slots, values)


def _places(values: Values, name: str) -> Iterator[str]:
    """Yield directories that cannot be written and disks that are full."""
    for place in (values["place"], *values["disks"].values()):
        if not place["writable"]:
            yield (
                f"{name}: {place['path']} cannot be written: chown it, or choose another "
                f"--run_dir or nvme_path"
            )
        elif place["free_bytes"] is not None and place["free_bytes"] < LEAST_DISK:
            free = human_bytes(place["free_bytes"])
            yield (
                f"{name}: {free} left on the disk of {place['path']}: free some, or choose "
                f"another directory"
            )


def _notes(report: Report) -> Iterator[str]:
    """Yield facts that do not stop a run but that a user may want to know."""
    states = report.values.get("ops", {})
    if unbuilt := ", ".join(
        op.removesuffix("Builder") for op, state in states.items() if state == "not yet"
    ):
        yield (
            f"{report.name}: {unbuilt} will be compiled at the first start; to do it now: python "
            f"launch/build_ops.py"
        )
    skew = _clock_skew_s(report)
    if abs(skew) > CLOCK_TOLERANCE_S:
        yield (
            f"{report.name}: its clock is {skew:+.0f} s off, so log times will not match: run "
            f"timedatectl set-ntp true there"
        )


def _one_host(host: Host) -> str:
    """Return what DeepSpeed's launcher does with a hostfile of one host (launcher/runner.py)."""
    return (
        f"{host.name}: the only host of the file; DeepSpeed's launcher asks it by ssh all the "
        f"same, but trains on the machine where you type; there, without ssh: deepspeed "
        f"--num_accelerators {host.slots} launch/train.py, without --hostfile"
    )


def _clock_skew_s(report: Report) -> float:
    """Return how far a clock is outside the interval of the question: it was read within it."""
    begun, ended = report.asked_s
    clock = report.values["clock_s"]
    return clock - min(max(clock, begun), ended)


def _compare(reports: Sequence[Report]) -> None:
    """Add problems to hosts that differ from the first, and notes about other devices."""
    for report in reports[1:]:
        first = reports[0]
        for library, version in report.values["software"].items():
            if version != (wanted := first.values["software"][library]):
                report.problems.append(
                    f"{report.name}: {library} {version}, but {first.name} has {wanted}: "
                    f"install the same: .venv/bin/python -m pip install -r requirements.txt"
                )
        codes = (report.values.get("code"), first.values.get("code"))
        if None not in codes and codes[0] != codes[1]:
            report.problems.append(
                f"{report.name}: its code differs from that of {first.name}; run git pull there, "
                f"or copy it again"
            )
        devices = [{*one.values.get("devices", [])} for one in (report, first)]
        if devices[0] != devices[1]:
            report.notes.append(
                f"{report.name}: other devices than {first.name}; the slowest sets the pace"
            )


def _see_whether_shared(reports: Sequence[Report]) -> None:
    """Check that all hosts share the run's directory: they must see the first host's file."""
    usable = [report for report in reports if report.values["place"]["writable"]]
    if len(usable) < 2:
        return
    first, *others = usable
    mark = str(Path(first.values["place"]["path"]) / f".preflight-{secrets.token_hex(8)}")
    if not _ask(first, {"task": "leave_mark", "path": mark}):
        return
    try:
        _in_parallel(others, lambda report: _look_for(report, mark, first.name))
    finally:
        _ask(first, {"task": "wipe_mark", "path": mark})


def _look_for(report: Report, mark: str, writer: str) -> None:
    seen = _ask(report, {"task": "see_mark", "path": mark})
    report.values["shared"] = seen
    if seen is False:
        report.problems.append(
            f"{report.name}: {Path(mark).parent} is not the same directory as on {writer}, but "
            "every host writes its part of a checkpoint there: share it (for example over NFS), or "
            "choose a shared --run_dir"
        )


def _world_problems(hosts: Sequence[Host], config: RunConfig) -> Iterator[str]:
    """Yield why a run on these hosts would be refused."""
    expected = config.megagpt.parallel.world_size
    ranks = world_size([*hosts])
    if hosts and expected not in (None, ranks):
        assert expected is not None
        others = "add the missing hosts" if ranks < expected else "remove the hosts beyond them"
        yield (
            f"the hostfile has {ranks} ranks, but megagpt.parallel.world_size is {expected}: "
            f"--set megagpt.parallel.world_size={ranks}, or {others}"
        )
    if len(hosts) > 1 and expected is None:
        yield f"megagpt.parallel.world_size is missing: --set megagpt.parallel.world_size={ranks}"


def table(reports: Sequence[Report]) -> str:
    """Return a table with one row a host and one column a check."""
    rows = [_row(report) for report in reports]
    return "\n".join(text_table([HEADINGS, *rows], numbers=False))


HEADINGS = (
    "host",
    "state",
    "torch",
    "DeepSpeed",
    "code",
    "devices",
    "memory",
    "/dev/shm",
    "run disk",
    "shared",
    "clock",
)


def _row(report: Report) -> tuple[str, ...]:
    state = "ok" if not report.problems else "PROBLEM" if report.answered else "NO ANSWER"
    if not report.answered:
        return (report.name, state, *["-"] * (len(HEADINGS) - 2))
    values = report.values
    devices = values.get("devices")
    return (
        report.name,
        state,
        values["software"]["torch"],
        values["software"]["deepspeed"],
        values.get("code", "-")[:8],
        "-" if devices is None else f"{len(devices)} x {devices[0]}" if devices else "CPU",
        _size(values["memory_bytes"]),
        _size(values["shared_memory_bytes"]),
        _size(values["place"]["free_bytes"]),
        {None: "-", True: "yes", False: "NO"}[values.get("shared")],
        f"{_clock_skew_s(report):+.0f} s",
    )


def _size(size: int | None) -> str:
    return "-" if size is None else human_bytes(size)
