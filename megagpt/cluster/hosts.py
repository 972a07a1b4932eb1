"""The hostfile, strictly checked before a host name is passed to ssh.

DeepSpeed's own parser takes any text without blanks as a name, so a line that began with
`-oProxyCommand=` became an ssh option and was executed. Here a name consists of letters, digits,
dots, hyphens and underscores, and begins with a letter or digit. `user@` may precede it. Whatever
DeepSpeed and pdsh run otherwise is accepted too, and what they cannot run is refused.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megagpt.utils import UserError

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?"
HOST_PATTERN = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")  # a dot at the end: an absolute name
USER_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
MAX_HOST_LENGTH = 253  # RFC 1035: the longest name that resolves
# DeepSpeed ignores what follows the slots; a comment and OpenMPI's upper limit are harmless.
LINE_PATTERN = re.compile(
    r"(\S+)[ \t]+slots=([1-9][0-9]{0,3})(?:[ \t]+max[_-]slots=[0-9]+)?(?:[ \t]*#.*)?"
)
PORT_PATTERN = re.compile(r"([^:]+):([0-9]{1,5})")
BYTE_ORDER_MARK = "\ufeff"
EXAMPLE = "worker-1 slots=8"


class HostfileError(UserError):
    """A hostfile that cannot be used; `errors` holds one line for each problem."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a machine and the number of its ranks."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """The name without `user@`, as ssh's command line has it."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: str | Path) -> list[Host]:
    """Return the hosts of a file, in order.

    Raises HostfileError with every problem and its line number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        advice = (
            f"write one line a host, such as `{EXAMPLE}` (DeepSpeed would train on this "
            f"machine alone)"
        )
        raise HostfileError([f"{path}: no such hostfile; {advice}"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError([f"{path}: cannot be read as text: {error}"]) from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, source: str = "hostfile") -> list[Host]:
    """Return the hosts of a hostfile's text, as `read_hostfile` does.

    Blank lines and lines that begin with # are comments.
    """
    hosts: list[Host] = []
    errors: list[str] = []
    if text.startswith(BYTE_ORDER_MARK):
        text = text.removeprefix(BYTE_ORDER_MARK)
        errors.append(
            f"{source}: begins with a byte-order mark, which DeepSpeed takes for a part of the "
            f"first name; remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' "
            f"{shlex.quote(source)}"
        )
    for number, line in enumerate(text.split("\n"), start=1):
        content = line.strip(" \t\r")
        if not content or content.startswith("#"):
            continue
        host = _parse_line(content)
        if isinstance(host, Host):
            hosts.append(host)
        else:
            errors.append(f"{source}: line {number}: {host}")
    errors += problems_between(hosts, source)
    if not hosts and not errors:
        errors.append(f"{source}: no hosts; write one line a host, such as `{EXAMPLE}`")
    if errors:
        raise HostfileError(errors)
    return hosts


def world_size(hosts: list[Host]) -> int:
    """Return the number of ranks of all hosts."""
    return sum(host.slots for host in hosts)


def problems_between(hosts: list[Host], source: str) -> list[str]:
    """Return errors for hosts listed twice and for unequal slots, which would break the mesh."""
    counts = Counter(host.address.lower().rstrip(".") for host in hosts)
    errors = [
        f"{source}: {name} is listed {count} times; keep one line"
        for name, count in counts.items()
        if count > 1
    ]
    usual = Counter(host.slots for host in hosts).most_common(1)[0][0] if hosts else 0
    errors += [
        f"{source}: {host.name} has {host.slots} slots and most hosts have {usual}; give every "
        f"host the same number"
        for host in hosts
        if host.slots != usual
    ]
    return errors


def _parse_line(content: str) -> Host | str:
    """Return the host, or what is wrong with the line.

    `ascii` keeps control characters of a hostile file off the terminal.
    """
    match = LINE_PATTERN.fullmatch(content)
    if match is None:
        return (
            f"expected `NAME slots=N` with N from 1 to 9999, such as `{EXAMPLE}`, got "
            f"{_shown(content)}"
        )
    name, slots = match.groups()
    if len(name) > MAX_HOST_LENGTH:
        return f"the host name has {len(name)} characters; at most {MAX_HOST_LENGTH} are possible"
    user, at, address = name.rpartition("@")
    if (at and USER_PATTERN.fullmatch(user) is None) or not _is_address(address):
        return f"{_shown(name)} {_wrong_with(address)}"
    return Host(name, int(slots))


def _is_address(text: str) -> bool:
    """Return whether pdsh and ssh take a text for a host.

    pdsh takes what precedes a single colon for one of its modules, so of IPv6 addresses it runs
    those whose first colon is double (fd00::1).
    """
    if HOST_PATTERN.fullmatch(text):
        return True
    return _is_ipv6(text) and text.find(":") == text.find("::")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return "%" not in text


def _wrong_with(address: str) -> str:
    """Return why a text is no host, and what to write."""
    if port := PORT_PATTERN.fullmatch(address):
        return (
            f"is not a host name: write {port[1]!a} alone, and its port as `Port {port[2]}` "
            f"in ~/.ssh/config"
        )
    if _is_ipv6(address.strip("[]")):
        return (
            "is an IPv6 address that pdsh cannot read: give it a name, with `HostName "
            f"{address.strip('[]')}` in ~/.ssh/config, and write the name"
        )
    return (
        "is not a host name: letters, digits, dots, hyphens and underscores, a letter or digit at "
        "both ends"
    )


def _shown(text: str) -> str:
    short = text if len(text) <= 60 else text[:57] + "..."
    return ascii(short)
