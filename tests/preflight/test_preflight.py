"""What is said of hosts before a run: sound ones, those that differ, and those that cannot be
reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.cluster.hosts import Host
from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.preflight import checks as preflight
from megagpt.preflight import forwarded, ssh
from megagpt.utils import GIB, MIB
from tests import REPOSITORY
from tests.support.monitoring import CANARY, ENVIRONMENT

HOSTS = [Host("host-a", 2), Host("host-b", 2)]
STATED = "megagpt.parallel.world_size=4"


def config(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "ds_configs" / "default.json", overrides or [STATED])


def sound(name: str, *, clock_ahead_s: float = 0.0, **changes: Any) -> dict[str, Any]:
    """What a host answers that nothing is wrong with."""
    place = {"path": "/shared", "writable": True, "free_bytes": 100 * GIB}
    return {
        "name": name,
        "machine": name,
        "clock_s": preflight.time.time() + clock_ahead_s,
        "directory": True,
        "software": {"Python": "3.12.1", "torch": "2.13.0", "deepspeed": "0.19.8"},
        "memory_bytes": 64 * GIB,
        "memlock_bytes": None,
        "pins": "torch",
        "shared_memory_bytes": 32 * GIB,
        "place": place,
        "disks": {},
        "code": "0123456789abcdef",
        "devices": ["NVIDIA H200"] * 2,
        "ops": {"CPUAdamBuilder": "built"},
    } | changes


Answers = dict[str, Callable[[dict[str, Any]], ssh.Reply]]


def examined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: dict[str, Any], *overrides: str
) -> tuple[list[str], list[str], str]:
    """Problems, notes and table of a preflight in which each host answers as given; a text is
    its failure.
    """
    marks: set[str] = set()

    def run_python(host: str | None, source: str, *, timeout_s: float) -> ssh.Reply:
        answer = answers[host or "this machine"]
        if isinstance(answer, str):
            return ssh.Reply("", answer)
        request = json.loads(
            literal_eval(source.rpartition("answer(json.loads(")[2].removesuffix("))\n"))
        )
        if request["task"] == "facts":
            return ssh.Reply(f"a login script says hello\n{json.dumps(answer)}\n", None)
        if request["task"] == "leave_mark":
            marks.add(request["path"])
        if request["task"] == "wipe_mark":
            marks.remove(request["path"])
        seen = request["path"] in marks and not answer.get("apart", False)
        return ssh.Reply(json.dumps(seen or request["task"] != "see_mark"), None)

    monkeypatch.setattr(preflight.ssh, "run_python", run_python)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    reports = preflight.examine(HOSTS, config(*overrides), tmp_path / "run")
    assert not marks, "a mark stayed behind"
    problems = [problem for report in reports for problem in report.problems]
    return problems, [note for report in reports for note in report.notes], preflight.table(reports)


def test_host_memory_is_that_of_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """6.7B offloaded on four ranks: 112 GiB, page-locked in powers of two on a GPU only."""
    large = [
        STATED,
        "megagpt.model.preset=gpt3-6.7b",
        *(f"megagpt.model.{key}=null" for key in ("num_layers", "hidden_size", "num_heads")),
        "zero_optimization.offload_param.device=none",
    ]
    on_gpu = sound("a", memory_bytes=80 * GIB, memlock_bytes=MIB, pins="native")
    on_cpu = sound("b", memory_bytes=80 * GIB, devices=[], memlock_bytes=MIB, pins="native")
    problems, _, _ = examined(monkeypatch, tmp_path, {"host-a": on_gpu, "host-b": on_cpu}, *large)
    (locked,) = (line for line in problems if "ulimit -l" in line)
    assert locked.startswith("host-a: a rank locks ")
    (short,) = (line for line in problems if "of host memory" in line)
    assert short.startswith("host-b: 2 ranks take ")
    assert short.endswith("python launch/plan.py --search --host_memory_gib 80")
    rounded = sound("a", memory_bytes=60 * GIB)
    problems, _, _ = examined(
        monkeypatch,
        tmp_path,
        {"host-a": rounded, "host-b": sound("b", memory_bytes=90 * GIB)},
        *large,
    )
    assert [line.partition(":")[0] for line in problems] == ["host-a"]


def test_sound_hosts_have_no_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problems, notes, table = examined(
        monkeypatch, tmp_path, {"host-a": sound("a"), "host-b": sound("b")}
    )
    assert (problems, notes) == ([], [])
    rows = [line.split() for line in table.splitlines()]
    assert [row[:2] for row in rows] == [["host", "state"], ["host-a", "ok"], ["host-b", "ok"]]
    assert rows[2][-3] == "yes"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"software": {"Python": "3.12.1", "torch": "2.12.0", "deepspeed": "0.19.8"}},
            "torch 2.12.0, but host-a has 2.13.0: install",
        ),
        ({"code": "fedcba"}, "its code differs from that of host-a; run git pull"),
        ({"directory": False}, "is missing; every host needs the same paths"),
        (
            {"failure": "ImportError: libcuda.so.1"},
            "cannot be imported: 'ImportError: libcuda.so.1'",
        ),
        ({"devices": ["NVIDIA H200"]}, "2 slots, but 1 GPUs; write slots=1"),
        (
            {"ops": {"AsyncIOBuilder": "there is no C++ compiler (apt install g++)"}},
            "AsyncIO: there is no C.. compiler",
        ),
        ({"memory_bytes": GIB}, "1.00 GiB of memory left"),
        (
            {"shared_memory_bytes": 64 * MIB},
            "/dev/shm has 64.00 MiB, NCCL needs 1 GiB: docker run --shm-size",
        ),
        (
            {"place": {"path": "/shared", "writable": False, "free_bytes": GIB}},
            "/shared cannot be written: chown it",
        ),
        (
            {"place": {"path": "/shared", "writable": True, "free_bytes": MIB}},
            "1.00 MiB left on the disk of /shared",
        ),
        (
            {"disks": {"/nvme": {"path": "/nvme", "writable": True, "free_bytes": 0}}},
            "0 B left on the disk of /nvme",
        ),
        (
            {"apart": True},
            "/shared is not the same directory as on host-a, but every host writes its part",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_host_that_a_run_would_fail_on_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    problems, _, table = examined(
        monkeypatch, tmp_path, {"host-a": sound("a"), "host-b": sound("b", **changes)}
    )
    assert len(problems) == 1
    assert problems[0].startswith("host-b: ")
    assert reason.replace("C.. ", "C++ ") in problems[0]
    assert table.splitlines()[2].split()[:2] == ["host-b", "PROBLEM"]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"clock_ahead_s": 3600.0}, "its clock is +3"),
        ({"ops": {"CPUAdamBuilder": "not yet"}}, "CPUAdam will be compiled at the first start"),
        ({"devices": ["NVIDIA A100"] * 2}, "other devices than host-a; the slowest sets the pace"),
    ],
    ids=["clock", "ops", "devices"],
)
def test_what_a_run_survives_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], note: str
) -> None:
    problems, notes, _ = examined(
        monkeypatch, tmp_path, {"host-a": sound("a"), "host-b": sound("b", **changes)}
    )
    assert problems == []
    assert len(notes) == 1
    assert notes[0].startswith(f"host-b: {note}")


def test_hosts_that_do_not_answer_are_named_and_the_others_still_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problems, _, table = examined(
        monkeypatch, tmp_path, {"host-a": "ssh: no", "host-b": sound("b", memory_bytes=0)}
    )
    assert problems == ["host-a: ssh: no", "host-b: 0 B of memory left; stop what uses it"]
    assert table.splitlines()[1].split()[:3] == ["host-a", "NO", "ANSWER"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            "megagpt.parallel.world_size=8",
            "the hostfile has 4 ranks, but megagpt.parallel.world_size is 8: --set "
            "megagpt.parallel.world_size=4, or add the missing hosts",
        ),
        (
            "megagpt.parallel.world_size=2",
            "the hostfile has 4 ranks, but megagpt.parallel.world_size is 2: --set "
            "megagpt.parallel.world_size=4, or remove the hosts beyond them",
        ),
        (
            "train_batch_size=16",
            "megagpt.parallel.world_size is missing: --set megagpt.parallel.world_size=4",
        ),
    ],
)
def test_a_world_that_would_be_refused_is_refused_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, reason: str
) -> None:
    problems, _, _ = examined(
        monkeypatch, tmp_path, {"host-a": sound("a"), "host-b": sound("b")}, override
    )
    assert len(problems) == 1
    assert problems[0].startswith(reason)


@pytest.mark.parametrize(
    ("hosts", "lines"),
    [
        ([], "must divide num_kv_heads and the MLP .*--set megagpt.parallel.tensor=4$"),
        (HOSTS, "(?s)4 ranks is not a multiple of tensor 6 .*--set megagpt.parallel.tensor=4$"),
        ([Host("a", 6)], "must divide num_kv_heads and the MLP .*--set megagpt.parallel.tensor=2$"),
    ],
)
def test_a_run_is_judged_as_it_will_be_on_these_hosts(hosts: list[Host], lines: str) -> None:
    """Heads are known once a run is resolved, and whether a mesh divides the ranks once these
    are counted.
    """
    with pytest.raises(ConfigError, match=lines):
        preflight.require_legal_on(
            hosts, config("megagpt.parallel.tensor=6", "train_batch_size=12"), "x.json"
        )


# ---------------------------------------------------------------------------------------------- ssh


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put an `ssh` in front of the system's that does what a shell text says; its arguments go
    to a file.
    """

    def install(script: str) -> None:
        (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\n{script}\n')
        (tmp_path / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


@pytest.mark.parametrize(
    ("stderr", "code", "remedy"),
    [
        ("root@host-b: Permission denied (publickey).", 255, "ssh-copy-id host-b"),
        ("Host key verification failed.", 255, "ssh host-b once, compare the fingerprint"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            255,
            "ssh-keygen -R host-b",
        ),
        (
            "ssh: Could not resolve hostname host-b: Name or service not known",
            255,
            "correct the hostfile",
        ),
        ("ssh: connect to host host-b port 22: Connection refused", 255, "systemctl start ssh"),
        (
            "ssh: connect to host host-b port 22: Connection timed out",
            255,
            "or remove it from the hostfile",
        ),
        (
            "ssh: connect to host host-b port 22: No route to host",
            255,
            "or remove it from the hostfile",
        ),
        ("something new\x1b[2J", 255, "ssh -o BatchMode=yes host-b true"),
        ("sh: python: not found", 127, "install it at the same path"),
        ("Traceback ...\nSyntaxError: no", 1, "Python failed there: SyntaxError: no"),
    ],
)
def test_failures_of_ssh_are_explained(
    fake_ssh: Callable[[str], None], stderr: str, code: int, remedy: str
) -> None:
    fake_ssh(f"cat >/dev/null\ncat >&2 <<'END'\n{stderr}\nEND\nexit {code}")
    failure = ssh.run_python("host-b", "", timeout_s=10).failure
    assert failure is not None
    assert remedy in failure
    assert failure.isprintable()


def test_a_host_that_hangs_is_given_up(fake_ssh: Callable[[str], None]) -> None:
    fake_ssh("exec sleep 60")
    assert ssh.run_python("host-b", "", timeout_s=0.5).failure == (
        "no answer within 0 s: the host, or the disk with Python, hangs"
    )


def test_what_is_asked_is_on_no_command_line(
    fake_ssh: Callable[[str], None], tmp_path: Path
) -> None:
    fake_ssh('eval "exec $6"')  # ssh -o BatchMode=yes -o ConnectTimeout=5 HOST COMMAND
    reply = ssh.run_python("host-b", f"print({CANARY!r}[::-1])", timeout_s=60)
    assert reply == ssh.Reply(CANARY[::-1] + "\n", None)
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("-o BatchMode=yes -o ConnectTimeout=5 host-b ")
    assert CANARY not in arguments


# ----------------------------------------------------------------------------------- .deepspeed_env


def test_variables_that_the_launcher_would_break_off_at_or_show_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / ".deepspeed_env").write_text(
        f"NCCL_DEBUG=INFO\n\n# note\nWANDB_API_KEY={CANARY}\nexport A=1\n"
    )
    variables, problems = forwarded.read()
    assert variables == {"NCCL_DEBUG": "INFO"}
    assert [problem.split(": ")[1] for problem in problems] == [
        "line 2",
        "line 3",
        "line 4",
        "line 5",
    ]
    assert "WANDB_API_KEY would appear on a command line that all users can read" in problems[2]
    assert CANARY not in str(problems)


def test_no_such_file_forwards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert forwarded.read() == ({}, [])


# -------------------------------------------------------------------------------------- the command

WITHOUT_TORCH = """
import sys
sys.argv = ["preflight/checks.py", "--run_dir", {run!r}]
sys.path.insert(0, "")
from launch.preflight import main
code = main()
assert "torch" not in sys.modules and "deepspeed" not in sys.modules
sys.exit(code)
"""


def test_this_machine_is_looked_at_without_torch_in_the_command(tmp_path: Path) -> None:
    code = WITHOUT_TORCH.format(run=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=dict(preflight.forwarded.os.environ) | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("this machine")]
    assert row.split()[2:5][0] == "ok"
    assert "2.13.0" in row
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x' is not a host name"),
        (None, "no such hostfile"),
    ],
)
def test_a_hostfile_is_checked_before_ssh(
    fake_ssh: Callable[[str], None], tmp_path: Path, content: str | None, said: str
) -> None:
    fake_ssh("exit 1")
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    done = subprocess.run(
        [sys.executable, "launch/preflight.py", "--hostfile", str(tmp_path / "hosts")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "arguments").exists()
