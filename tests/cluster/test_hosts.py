"""The hostfile: what is accepted, and that nothing hostile reaches ssh (security row S5)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.cluster.hosts import (
    Host,
    HostfileError,
    parse_hostfile,
    read_hostfile,
    world_size,
)
from tests import REPOSITORY


def errors_of(text: str) -> list[str]:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(text, "hosts")
    return caught.value.errors


def test_names_addresses_comments_and_blank_lines() -> None:
    text = "# two nodes\n\nworker-1 slots=8\r\n  node2.cluster.example\tslots=8  \n10.0.0.3 slots=8"
    hosts = parse_hostfile(text)
    assert hosts == [Host("worker-1", 8), Host("node2.cluster.example", 8), Host("10.0.0.3", 8)]
    assert world_size(hosts) == 24


def test_the_example_file_is_valid() -> None:
    assert world_size(read_hostfile(REPOSITORY / "ds_configs" / "hosts.example")) == 16


ATTACKS = [
    "-oProxyCommand=touch${IFS}/tmp/owned slots=1",
    "--help slots=1",
    "host;reboot slots=1",
    "`reboot` slots=1",
    "$(reboot) slots=1",
    "host|cat slots=1",
    "host&& slots=1",
    "-user@host slots=1",
    "user@-host slots=1",
    "user@ slots=1",
    "a@b@c slots=1",
    "us;er@host slots=1",
    "host port=22 slots=1",
    "host slots=1 port=22",
    "host slots=1x",
    "fe80::1%eth0 slots=1",
    "h\u00f6st slots=1",
    "\u202ehost slots=1",
    "host\x1b[2J slots=1",
    "../../etc slots=1",
    "h" * 300 + " slots=1",
    "host- slots=1",
    ".host slots=1",
    "a..b slots=1",
    "host slots=1 -oProxyCommand=x",
    "host slots=1;reboot",
    "host\x0bslots=1",
]


@pytest.mark.parametrize("line", ATTACKS, ids=range(len(ATTACKS)))
def test_hostile_lines_are_refused(line: str) -> None:
    (error,) = errors_of(f"good slots=1\n{line}\n")
    assert error.startswith("hosts: line 2: ")
    assert error.isascii()
    assert error.isprintable()
    assert len(error) < 250


@pytest.mark.parametrize(
    "line", ["host", "host slots=", "host slots=0", "host slots=-1", "host slots=2.5", "host 8"]
)
def test_malformed_lines_say_what_is_expected(line: str) -> None:
    (error,) = errors_of(line)
    assert "expected `NAME slots=N`" in error


def test_all_errors_come_at_once_with_line_numbers() -> None:
    lines = errors_of("a slots=8\nb\nc;d slots=8\na slots=8\ne slots=4\n")
    assert [line.split(": ", 1)[1][:30] for line in lines] == [
        "line 2: expected `NAME slots=N"[:30],
        "line 3: 'c;d' is not a host na"[:30],
        "a is listed 2 times; keep one line"[:30],
        "e has 4 slots and most hosts have 8"[:30],
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_an_empty_hostfile(text: str) -> None:
    assert errors_of(text) == ["hosts: no hosts; write one line a host, such as `worker-1 slots=8`"]


def test_a_missing_hostfile_is_no_silent_single_node(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match="no such hostfile; write one line a host"):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HostfileError, match="cannot be read as text"):
        read_hostfile(tmp_path / "hosts")


@settings(deadline=None)
@given(st.text())
def test_accepted_names_are_always_plain(text: str) -> None:
    try:
        hosts = parse_hostfile(text + " slots=2")
    except HostfileError as error:
        names = []
        complaints = error.errors
    else:
        names, complaints = [host.name for host in hosts], []
    assert bool(names) != bool(complaints)
    assert all(PLAIN.fullmatch(name) for name in names)


# What is handed to ssh: no option, nothing that a shell would read otherwise.
PLAIN = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:@-]*")


def of_deepspeed(text: str) -> dict[str, int]:
    """What DeepSpeed's own parser reads."""
    from deepspeed.launcher.runner import _parse_hostfile

    return dict(_parse_hostfile(text.splitlines(keepends=True)))


@pytest.mark.parametrize(
    "text",
    [
        "# IP  slots(GPUs)  # note\n192.0.2.157 slots=1   # main\n192.0.2.156 slots=1\n",
        "gpu_node_1 slots=8\ngpu_node_2 slots=8\n",
        "ubuntu@node1 slots=8\nubuntu@192.0.2.7 slots=8\n",
        "node1 slots=4 max_slots=8\nnode2 slots=4 max-slots=8 # OpenMPI\n",
        "node1.cluster. slots=8\nnode2.cluster. slots=8\n",
        "fd00::1 slots=8\nfd00::2 slots=8\n",
        "192.0.2.30   slots=8\n192.0.2.220  slots=8\n192.0.2.57   slots=8",
        "node1 slots=8\n\n# spare\n#node2 slots=8\n\tnode3 slots=8\n",
        "localhost slots=2\n",
        "worker-1 slots=4\nlocalhost slots=4\n",
        "node1 slots=8#the first\n",
    ],
)
def test_what_deepspeed_runs_is_read_as_deepspeed_reads_it(text: str) -> None:
    hosts = parse_hostfile(text)
    assert {host.name: host.slots for host in hosts} == of_deepspeed(text)
    assert all(PLAIN.fullmatch(host.name) for host in hosts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1:22 slots=8", "write 'node1' alone, and its port as `Port 22` in ~/.ssh/config"),
        ("user@node1:2222 slots=8", "`Port 2222` in ~/.ssh/config"),
        ("[fd00::2] slots=8", "`HostName fd00::2` in ~/.ssh/config, and write the name"),
        ("2001:db8::1 slots=8", "an IPv6 address that pdsh cannot read: give it a name"),
        ("\ufeffnode1 slots=8\r\n", "begins with a byte-order mark"),
        ("node1 slots=8\nuser@node1. slots=8\n", "node1 is listed 2 times"),
        ("192.0.2.2 lots=8 ", "expected `NAME slots=N`"),
        ("node1 slots = 8", "expected `NAME slots=N`"),
        ("node54", "expected `NAME slots=N`"),
        ("trainer-28,192.0.2.149", "expected `NAME slots=N`"),
    ],
)
def test_what_ssh_or_pdsh_cannot_use_says_what_to_write(text: str, said: str) -> None:
    (error,) = errors_of(text)
    assert said in error


def test_a_byte_order_mark_would_be_a_part_of_the_name_that_deepspeed_hands_to_ssh() -> None:
    assert of_deepspeed("\ufeffnode1 slots=8") == {"\ufeffnode1": 8}


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_pdsh_hands_on_what_is_accepted_and_not_what_is_refused(tmp_path: Path) -> None:
    """pdsh itself, with an ssh that says what it was given."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "$@"\n')
    ssh.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PDSH_RCMD_TYPE": "ssh"}

    def reached(name: str) -> str:
        done = subprocess.run(
            ["pdsh", "-S", "-w", name, "true"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    for name in ("gpu_node_1", "node1.cluster.", "fd00::1", "::1", "user@node1"):
        (host,) = parse_hostfile(f"{name} slots=8")
        assert f" {host.address} true" in reached(name), name
    assert "-luser" in reached("user@node1")
    for name in ("2001:db8::1", "[fd00::2]", "node1:22"):
        assert reached(name) == ""
        assert errors_of(f"{name} slots=8")
