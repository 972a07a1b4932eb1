"""How this process was started, and which rank of how many it is.

Each launcher sets its own variables. torch and DeepSpeed read RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT; we also read LOCAL_SIZE, the number of ranks of this host.
`adopt_launch` derives them, or says why it cannot: a process that does not know its rank would
train alone, beside others that do the same.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megagpt.cluster.hosts import Host, problems_between
from megagpt.cluster.launch_command import (
    command_of_launcher,
    hosts_of_launcher,
    launcher_number,
)
from megagpt.cluster.mpi import OWN_PORTS, PREFIXES, variables_of_mpi
from megagpt.cluster.slurm import hosts_of_step
from megagpt.utils import LOCAL_SIZE_VARIABLES, UserError

OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OF_A_START = OF_A_RANK[:3]  # users may export the other two in advance
DEEPSPEED_PORT = "29500"  # unless its launcher is told another (constants.py)


MPI_SIZES = [f"{prefix}SIZE" for prefix in PREFIXES]


@dataclass(frozen=True)
class Launch:
    """A rank and its place among all ranks.

    None and empty ``hosts`` mean not known. ``hosts`` are in the order of the ranks.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int | None = None
    num_hosts: int | None = None
    hosts: tuple[Host, ...] = ()

    def host_of(self, rank: int) -> str | None:
        """Return the name of the host that runs a rank, or None if the launcher does not tell."""
        names = [host.name for host in self.hosts for _ in range(host.slots)]
        return names[rank] if len(names) == self.world_size else None


def signs_of_launcher(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables that show that a launcher started this process.

    Call it before `adopt_launch`, which sets some of them.
    """
    return [
        name for name in (*OF_A_START, "SLURM_STEP_NUM_TASKS", *MPI_SIZES) if environment.get(name)
    ]


def adopt_launch(environment: MutableMapping[str, str] = os.environ) -> Launch:
    """Return this rank's launch and set the variables that torch reads.

    Without a launcher it is one rank alone. Raises UserError if variables are missing,
    contradict each other, or spread the ranks unevenly over the hosts.
    """
    if environment.get("MASTER_PORT") == DEEPSPEED_PORT and environment.get("CROSS_SIZE") == "1":
        _leave_deepspeeds_port(environment)
    if environment.get("SLURM_STEP_NUM_TASKS") and not environment.get("RANK"):
        _set(environment, _of_slurm(environment))
    elif not any(environment.get(name) for name in OF_A_START) and (
        found := variables_of_mpi(environment, os.getppid())
    ):
        _set(environment, found)
    elif not any(environment.get(name) for name in OF_A_START):
        _require_alone(environment)
        _set(environment, _of_one_process())
    launch = _of_variables(environment)
    problems = [*_problems(launch)]
    if problems:
        raise UserError("\n".join(problems))
    if launch.local_size is not None:
        environment["LOCAL_SIZE"] = str(launch.local_size)
    return launch


def _of_variables(environment: Mapping[str, str]) -> Launch:
    """Return the launch that a complete set of variables describes."""
    missing = [name for name in OF_A_RANK if not environment.get(name)]
    if missing:
        given = [name for name in OF_A_RANK if environment.get(name)]
        raise UserError(
            f"environment: {', '.join(given)} set, but {', '.join(missing)} missing: "
            f"unset all of them, or start with {_starts()}"
        )
    _whole(environment, "MASTER_PORT")
    size = next((name for name in LOCAL_SIZE_VARIABLES if environment.get(name)), None)
    launcher = _launcher(environment)
    return Launch(
        launcher=launcher,
        rank=_whole(environment, "RANK"),
        world_size=_whole(environment, "WORLD_SIZE"),
        local_rank=_whole(environment, "LOCAL_RANK"),
        local_size=_whole(environment, size) if size else None,
        hosts=tuple(_hosts(launcher, environment)),
        num_hosts=_number_of_hosts(environment),
    )


def _hosts(launcher: str, environment: Mapping[str, str]) -> list[Host]:
    if launcher == "deepspeed":
        return hosts_of_launcher()
    return hosts_of_step(environment) if launcher == "srun python" else []


def _number_of_hosts(environment: Mapping[str, str]) -> int | None:
    """Return the number of hosts that DeepSpeed, torchrun or Slurm reports, or None."""
    names = ("CROSS_SIZE", "GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES")
    return next((_whole(environment, name) for name in names if environment.get(name)), None)


def _launcher(environment: Mapping[str, str]) -> str:
    """Return what a user types before `launch/train.py`."""
    if "CROSS_RANK" in environment:
        return "deepspeed"
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    if environment.get("SLURM_STEP_NUM_TASKS"):
        return "srun python"
    size = next((environment[name] for name in MPI_SIZES if environment.get(name)), None)
    return f"mpirun -n {size} python" if size else "python"


def _problems(launch: Launch) -> Iterator[str]:
    """Yield what is wrong with the numbers of a launch."""
    if not 0 <= launch.rank < launch.world_size:
        yield (
            f"environment: RANK={launch.rank} is not among the {launch.world_size} ranks of "
            f"WORLD_SIZE"
        )
    if launch.local_size is not None and not 0 <= launch.local_rank < launch.local_size:
        yield (
            f"environment: LOCAL_RANK={launch.local_rank} is not among the {launch.local_size} "
            f"ranks of this host"
        )
    uneven = problems_between([*launch.hosts], launch.launcher)
    yield from uneven
    if uneven or launch.local_size is None or launch.num_hosts is None:
        return
    if launch.local_size * launch.num_hosts != launch.world_size:
        yield (
            f"{launch.launcher}: {launch.local_size} ranks on host {socket.gethostname()}, but "
            f"{launch.world_size} on {launch.num_hosts} hosts; give every host the same number"
        )


def _leave_deepspeeds_port(environment: MutableMapping[str, str]) -> None:
    """Give the ranks of one host a port of their own, unless `--master_port` was typed.

    DeepSpeed's launcher takes the same port for every run, so two on one machine would collide.
    """
    command = command_of_launcher()
    node = launcher_number()
    typed = any(word.startswith(("--master_p", "--master-p")) for word in command or ())
    if command is not None and node is not None and not typed:
        environment["MASTER_PORT"] = str(OWN_PORTS[node % len(OWN_PORTS)])


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a task that srun started."""
    names = (
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NODELIST",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
    )
    if missing := [name for name in (*names, "SLURM_JOB_ID") if not environment.get(name)]:
        raise UserError(
            f"environment: SLURM_STEP_NUM_TASKS set, but {', '.join(missing)} missing: start with "
            f"{_starts()}"
        )
    hosts = hosts_of_step(environment)
    node = _whole(environment, "SLURM_NODEID")
    rank = _whole(environment, "SLURM_PROCID")
    if node >= len(hosts):
        raise UserError(
            f"environment: SLURM_NODEID={node} is not among the hosts of SLURM_STEP_NODELIST"
        )
    if rank != sum(host.slots for host in hosts[:node]) + _whole(environment, "SLURM_LOCALID"):
        raise UserError(
            "srun assigned ranks cyclically; use --distribution=block so that neighbouring ranks "
            "share a host"
        )
    _require_visible_devices(environment, hosts[node].slots)
    # The port is the same on every rank, and another for other jobs on a host.
    job = _whole(environment, "SLURM_JOB_ID") + _whole(environment, "SLURM_STEP_ID", "0")
    return {
        "RANK": str(rank),
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_SIZE": str(hosts[node].slots),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or hosts[0].name,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(OWN_PORTS[job % len(OWN_PORTS)]),
    }


def _require_visible_devices(environment: Mapping[str, str], tasks_here: int) -> None:
    """Raise UserError if this task cannot see the GPU of its local rank.

    `--gpus-per-task` shows each task one GPU only, as number 0.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if visible and len(visible.split(",")) < tasks_here:
        raise UserError(
            f"srun: {tasks_here} tasks on this host, but this one sees only "
            f"CUDA_VISIBLE_DEVICES={visible}; every rank must see all GPUs of its host: use "
            f"--gpus-per-node={tasks_here} instead of --gpus-per-task, or --gpu-bind=none"
        )


def _require_alone(environment: Mapping[str, str]) -> None:
    """Raise UserError if a scheduler has started, or granted, more processes than this one."""
    if (size := environment.get("PMI_SIZE", "1")) != "1":  # of MPICH and Intel MPI
        raise UserError(
            f"environment: PMI_SIZE={size}, but no RANK: each process would train alone; start "
            f"with {_starts()}"
        )
    if environment.get("SLURM_JOB_ID") and (tasks := environment.get("SLURM_NTASKS", "1")) != "1":
        raise UserError(
            f"Slurm granted {tasks} tasks, but this is the only process: start all with srun "
            f"python {_script()}, or only this one with SLURM_NTASKS=1 python {_script()}"
        )


def _starts() -> str:
    """Return how to start this command with each launcher."""
    script = _script()
    return f"deepspeed {script}, torchrun --nproc-per-node N {script}, or srun python {script}"


def _script() -> str:
    """Return what was typed after `python`, if it is one of our commands."""
    script = Path(sys.argv[0])
    return str(script) if script.parent.name == "launch" else "launch/train.py"


def _of_one_process() -> dict[str, str]:
    """Return the variables of a world of one rank on this machine, with a free port."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    return {**rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def take_free_port(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give a rank that is alone a port that nobody uses: no other rank has to find it."""
    if not agent_serves(environment):
        environment["MASTER_PORT"] = str(_free_port())


def agent_serves(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun's agent serves torch's store, at a port that it chose."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _set(environment: MutableMapping[str, str], values: Mapping[str, str]) -> None:
    """Set variables; raise UserError if one already has another value.

    A job script may have set it.
    """
    for name in OF_A_START:
        if environment.get(name, values[name]) not in ("", values[name]):
            raise UserError(
                f"environment: {name}={environment[name]}, but the launcher says {values[name]}: "
                f"unset {name}"
            )
    environment.update(values)


def _whole(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name) or default
    if not text.isdecimal():
        raise UserError(
            f"environment: {name}={text!a} is not a whole number; start with {_starts()}"
        )
    return int(text)
