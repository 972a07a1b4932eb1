"""The hostfile: what is accepted, and that nothing hostile reaches ssh (security row S5)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.cluster.hosts import (
    HOST_PATTERN,
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
    "user@host slots=1",
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
    assert all(
        name.isascii() and name[0].isalnum() and HOST_PATTERN.fullmatch(name) for name in names
    )
