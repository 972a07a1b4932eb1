"""Which rank a process is, from the variables of each launcher; and that half of them is an
error, never a guess.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.cluster import launchers
from megagpt.cluster.hosts import Host
from megagpt.cluster.launchers import OF_A_RANK, OWN_PORTS, Launch, adopt_launch, take_free_port
from megagpt.cluster.slurm import expand_hosts, expand_tasks
from megagpt.utils import UserError

DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "29500",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29400",
}
BY_HAND = {name: DEEPSPEED[name] for name in OF_A_RANK}


def slurm(rank: int = 3, **changes: str) -> dict[str, str]:
    """What srun sets for a task of `srun --nodes 2 --ntasks-per-node 2`."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[09-10]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_NODEID": str(rank // 2),
        "SLURM_NTASKS": "4",
        "PMI_SIZE": "4",
    } | changes


def mpi(rank: int = 3, local_size: int = 4, **changes: str) -> dict[str, str]:
    """What OpenMPI sets for a process of `mpirun -n 4`."""
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local_size),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "PMIX_NAMESPACE": "3344695297",
    } | changes


def refusal(environment: dict[str, str]) -> str:
    before = dict(environment)
    with pytest.raises(UserError) as error:
        adopt_launch(environment)
    assert {name: environment.get(name) for name in before} == before
    return str(error.value)


def test_without_a_launcher_a_process_is_the_only_rank() -> None:
    environment: dict[str, str] = {"PATH": "/bin", "MASTER_ADDR": "left-over"}
    assert adopt_launch(environment) == Launch("python", 0, 1, 0, local_size=1)
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert {*OF_A_RANK, "LOCAL_SIZE"} <= {*environment}
    assert adopt_launch(environment) == Launch("python", 0, 1, 0, local_size=1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (DEEPSPEED, Launch("deepspeed", 3, 4, 1, 2, 2)),
        (TORCHRUN, Launch("torchrun", 3, 4, 1, 2, 2)),
        (BY_HAND, Launch("python", 3, 4, 1)),
        (slurm() | TORCHRUN, Launch("torchrun", 3, 4, 1, 2, 2)),
    ],
    ids=["deepspeed", "torchrun", "by hand", "torchrun by srun"],
)
def test_launchers_that_set_torchs_names_are_believed(
    environment: dict[str, str], expected: Launch
) -> None:
    environment = dict(environment)
    before = dict(environment)
    assert adopt_launch(environment) == expected
    assert environment == before | ({"LOCAL_SIZE": "2"} if expected.local_size else {})


def test_tasks_of_srun_find_their_ranks_and_one_another() -> None:
    environments = [slurm(rank) for rank in range(4)]
    launches = [adopt_launch(environment) for environment in environments]
    hosts = (Host("gpu09", 2), Host("gpu10", 2))
    assert launches == [Launch("srun python", rank, 4, rank % 2, 2, 2, hosts) for rank in range(4)]
    assert [launches[0].host_of(rank) for rank in range(4)] == ["gpu09", "gpu09", "gpu10", "gpu10"]
    meetings = {
        (environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
        for environment in environments
    }
    assert len(meetings) == 1
    address, port = meetings.pop()
    assert address == "gpu09"
    assert port in OWN_PORTS
    assert adopt_launch(environments[3]) == launches[3]


def test_jobs_on_one_host_meet_at_different_ports() -> None:
    environments = [slurm(SLURM_JOB_ID=str(4711 + job)) for job in range(10)]
    for environment in environments:
        adopt_launch(environment)
    assert len({environment["MASTER_PORT"] for environment in environments}) == 10


def test_processes_of_mpirun_find_their_ranks_and_one_another() -> None:
    environments = [mpi(rank) for rank in range(4)]
    launches = [adopt_launch(environment) for environment in environments]
    assert launches == [Launch("mpirun -n 4 python", rank, 4, rank, 4) for rank in range(4)]
    assert {environment["MASTER_ADDR"] for environment in environments} == {"127.0.0.1"}
    (port,) = {environment["MASTER_PORT"] for environment in environments}
    assert int(port) in OWN_PORTS
    adopt_launch(other := mpi(PMIX_NAMESPACE="3344695298"))
    assert other["MASTER_PORT"] != port
    far = mpi(2, local_size=2, MASTER_ADDR="gpu1", MASTER_PORT="29600")
    assert adopt_launch(far) == Launch("mpirun -n 4 python", 2, 4, 0, 2)
    assert (far["MASTER_ADDR"], far["MASTER_PORT"]) == ("gpu1", "29600")


ONE_HOST = DEEPSPEED | {"CROSS_SIZE": "1", "LOCAL_SIZE": "4", "LOCAL_RANK": "3", "CROSS_RANK": "0"}


@pytest.mark.parametrize(
    ("command", "changes", "own"),
    [
        (["deepspeed", "launch/train.py"], {}, True),
        (["deepspeed", "--num_gpus", "4", "launch/train.py"], {}, True),
        (["deepspeed", "--master_port", "29500", "launch/train.py"], {}, False),
        (["deepspeed", "--master_port=29500", "launch/train.py"], {}, False),
        (["deepspeed", "launch/train.py"], {"MASTER_PORT": "29501"}, False),
        (["deepspeed", "launch/train.py"], {"CROSS_SIZE": "2", "LOCAL_SIZE": "2"}, False),
        (None, {}, False),
    ],
)
def test_runs_of_deepspeed_on_one_machine_meet_at_different_ports(
    monkeypatch: pytest.MonkeyPatch,
    command: list[str] | None,
    changes: dict[str, str],
    own: bool,
) -> None:
    """All ranks of one launcher at the same; where a port was typed, or ranks of other hosts have
    to know it, at that.
    """
    monkeypatch.setattr(launchers, "command_of_launcher", lambda: command)
    ports = []
    for number in (4711, 4711, 4712):
        monkeypatch.setattr(launchers, "launcher_number", lambda number=number: number)
        environment = ONE_HOST | {"LOCAL_RANK": "1"} | changes
        adopt_launch(environment)
        adopt_launch(environment)
        ports.append(environment["MASTER_PORT"])
    assert ports[0] == ports[1]
    assert (ports[0] != ports[2]) == own
    assert own == (int(ports[0]) in OWN_PORTS)
    assert own or ports[0] == (ONE_HOST | changes)["MASTER_PORT"]


def test_a_rank_alone_takes_a_port_that_is_free() -> None:
    """Also one that DeepSpeed's launcher has sent to a port in use; but torchrun's agent serves
    its own.
    """
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        environment = {"MASTER_PORT": taken}
        take_free_port(environment)
        with socket.socket() as free:
            free.bind(("127.0.0.1", int(environment["MASTER_PORT"])))
        assert environment["MASTER_PORT"] != taken
        environment = {"MASTER_PORT": taken, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        take_free_port(environment)
        assert environment["MASTER_PORT"] == taken


def test_a_meeting_place_of_the_job_script_is_kept() -> None:
    environment = slurm(MASTER_ADDR="gpu09-ib", MASTER_PORT="6000")
    adopt_launch(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu09-ib", "6000")


@pytest.mark.parametrize("missing", OF_A_RANK)
def test_half_of_the_variables_is_no_start(missing: str) -> None:
    said = refusal({name: value for name, value in BY_HAND.items() if name != missing})
    assert (
        f"but {missing} missing: unset all of them, or start with deepspeed launch/train.py" in said
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (BY_HAND | {"RANK": "4"}, "RANK=4 is not among the 4 ranks"),
        (BY_HAND | {"RANK": "-1"}, "RANK='-1' is not a whole number"),
        (BY_HAND | {"WORLD_SIZE": "four"}, "WORLD_SIZE='four' is not a whole number"),
        (BY_HAND | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not among the 2 ranks of this host"),
        (DEEPSPEED | {"WORLD_SIZE": "5"}, "5 on 2 hosts; give every host the same number"),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "3"},
            "3 ranks on host .*, but 4 on 2 hosts; give every host the same number",
        ),
        (
            slurm(SLURM_STEP_TASKS_PER_NODE="2,1"),
            "gpu10 has 1 slots and most hosts have 2; give every host the same",
        ),
        (
            slurm(1, SLURM_LOCALID="0", SLURM_NODEID="1"),
            "srun assigned ranks cyclically; use --distribution=block",
        ),
        (
            slurm(SLURM_STEP_NODELIST="gpu[09-11]"),
            "has 3 hosts, but SLURM_STEP_TASKS_PER_NODE=2.x2. has 2",
        ),
        (slurm(SLURM_NODEID="2"), "SLURM_NODEID=2 is not among the hosts"),
        (
            slurm(CUDA_VISIBLE_DEVICES="1"),
            "--gpus-per-node=2 instead of --gpus-per-task, or --gpu-bind=none",
        ),
        (slurm(WORLD_SIZE="8"), "WORLD_SIZE=8, but the launcher says 4: unset WORLD_SIZE"),
        (slurm(SLURM_PROCID=""), "SLURM_PROCID missing: start with"),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},
            "granted 8 tasks, but this is the only .*: start all with srun",
        ),
        (
            {"PMI_SIZE": "2"},
            "PMI_SIZE=2, but no RANK: each process would train alone",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK, .* missing: start with mpirun",
        ),
        (mpi(1, local_size=2), "mpirun: the ranks of several hosts do not know .* -x MASTER_ADDR="),
        (
            mpi(1, local_size=2, OMPI_COMM_WORLD_LOCAL_RANK="0"),
            "mpirun: neighbouring ranks are on different hosts; use --map-by slot",
        ),
    ],
)
def test_variables_that_make_no_sense_are_named(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        adopt_launch(dict(environment))


def test_uneven_hosts_of_deepspeed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher starts them, and numbers the local ranks of the second host from the middle."""
    monkeypatch.setattr(
        launchers,
        "hosts_of_launcher",
        lambda: [Host("host-a", 2), Host("host-b", 2), Host("host-c", 1)],
    )
    assert refusal(DEEPSPEED | {"WORLD_SIZE": "5", "CROSS_SIZE": "3"}) == (
        "deepspeed: host-c has 1 slots and most hosts have 2; give every host the same number"
    )


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("login1", ["login1"]),
        ("gpu[01-03]", ["gpu01", "gpu02", "gpu03"]),
        (
            "gpu[1,8-11],x,rack[1-2]node[07-08]",
            [
                "gpu1",
                "gpu8",
                "gpu9",
                "gpu10",
                "gpu11",
                "x",
                "rack1node07",
                "rack1node08",
                "rack2node07",
                "rack2node08",
            ],
        ),
        ("a.cluster.example,b-2", ["a.cluster.example", "b-2"]),
    ],
)
def test_lists_of_hosts(nodes: str, hosts: list[str]) -> None:
    assert expand_hosts(nodes) == hosts


@pytest.mark.parametrize(
    "nodes",
    [
        "",
        "gpu[1-2",
        "gpu]1[",
        "gpu[]",
        "gpu[1-]",
        "gpu[a-b]",
        "gpu[3-1]",
        "gpu[1-999999999]",
        "a[1-90000]b[1-90000]",
        "-oX=y",
        "a,,b",
        "a;b",
    ],
)
def test_damaged_lists_of_hosts_are_refused(nodes: str) -> None:
    with pytest.raises(UserError, match="is not a list of hosts"):
        expand_hosts(nodes)


@given(st.text("gpu0123456789-,[]", max_size=12))
def test_any_text_is_a_list_of_hosts_or_refused(nodes: str) -> None:
    try:
        hosts = expand_hosts(nodes)
    except UserError:
        return
    assert all(host and host[0].isalnum() and not {*host} & {*"[],"} for host in hosts)


@pytest.mark.parametrize(
    ("tasks", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2", [1, 2])]
)
def test_lists_of_tasks(tasks: str, counts: list[int]) -> None:
    assert expand_tasks(tasks) == counts


@pytest.mark.parametrize("tasks", ["", "x", "2(x)", "2(x3", "2(x9999999999)", "2,"])
def test_damaged_lists_of_tasks_are_refused(tasks: str) -> None:
    with pytest.raises(UserError, match="is not a list of task counts"):
        expand_tasks(tasks)


def test_the_process_itself_is_what_is_adopted_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BY_HAND.items():
        monkeypatch.setenv(name, value)
    for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    expected: dict[str, Any] = {"rank": 3, "world_size": 4}
    assert {name: getattr(adopt_launch(), name) for name in expected} == expected
