"""Two hosts on one machine: network namespaces joined by a cable, an ssh daemon and a host name in
each.

They share the file system, as hosts of a cluster share the directory of a run. Nothing outside the
temporary directory is written: keys, known hosts and ssh's configuration lie in it, and an `ssh` in
front of the system's reads them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import REPOSITORY

ADDRESSES = {
    "host-a": "192.0.2.1",
    "host-b": "192.0.2.2",
}  # of documentation (RFC 5737), in namespaces of their own
DEAD = "192.0.2.9"  # nobody is there, and the network says so
SILENT, SILENT_MAC = (
    "192.0.2.10",
    "02:00:00:00:00:0a",
)  # nobody answers there: what is sent there is swallowed
SSH_GIVES_UP_S = (
    5  # on a host that does not answer, as docs/clusters.md recommends it; else two minutes
)
SSHD = "/usr/sbin/sshd"
START_S = 60.0
PREFIX = "megagpt-"  # then the number of the process that made it
# In the new UTS namespace: the host's own name, then the daemon, which is this process from there
# on.
BECOME_SSHD = (
    "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
)


def why_not_here() -> str | None:
    """What keeps this machine from having two hosts, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [
        program
        for program in ("ip", "pdsh", "ssh", "ssh-keygen", "unshare")
        if shutil.which(program) is None
    ]
    missing += [] if Path(SSHD).exists() else ["sshd"]
    if missing:
        return (
            f"{', '.join(missing)} missing (Debian, Ubuntu: apt install pdsh openssh-server "
            f"iproute2)"
        )
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], check=False, capture_output=True)
    return None if probe.returncode == 0 else "this container may not make namespaces"


@dataclass
class TwoHosts:
    """The hosts, and the place that everything about them lies in."""

    directory: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def namespace(self, host: str) -> str:
        return f"{PREFIX}{os.getpid()}-{host}"

    def on(self, host: str, *command: str) -> list[str]:
        """A command as it runs in the network of a host."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def bytes_sent(self, host: str) -> int:
        """What the host has put on the cable so far."""
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(subprocess.check_output(self.on(host, "cat", counter)))

    def processes(self, host: str) -> list[int]:
        """The numbers of all processes of a host."""
        return _processes(self.namespace(host))

    def start_daemon(self, host: str) -> None:
        """Let a host accept ssh; returns once it listens."""
        daemon = [SSHD, "-D", "-e", "-f", str(self.directory / f"sshd_{host}")]
        become = [sys.executable, "-c", BECOME_SSHD, host, *daemon]
        with (self.directory / f"sshd_{host}.log").open("ab") as log:
            self.daemons[host] = subprocess.Popen(
                self.on(host, "unshare", "--uts", *become), stdout=log, stderr=log
            )
        end = time.monotonic() + START_S
        while subprocess.run(
            [*self.on(host), *self._ssh(host), "true"], check=False, capture_output=True
        ).returncode:
            assert time.monotonic() < end, (self.directory / f"sshd_{host}.log").read_text()
            time.sleep(0.1)

    def stop_daemon(self, host: str) -> None:
        """Let a host refuse ssh."""
        self.daemons[host].terminate()
        self.daemons.pop(host).wait()

    def pull_cable(self, host: str) -> None:
        """From now on nothing that a host sends arrives anywhere, and nobody is told so."""
        self._set_link(host, "down")

    def plug_cable(self, host: str) -> None:
        """As it was before."""
        self._set_link(host, "up")

    def _set_link(self, host: str, state: str) -> None:
        _run("ip", "-n", self.namespace(host), "link", "set", "eth0", state)

    def write_hostfile(self, slots: dict[str, int]) -> Path:
        path = self.directory / "hosts"
        path.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
        return path

    def forward(self, **variables: str) -> None:
        """What DeepSpeed's launcher is to set for the ranks."""
        path = self.directory / "home" / ".deepspeed_env"
        own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        path.write_text("".join(f"{name}={value}\n" for name, value in (own | variables).items()))

    def start(self, host: str, command: Sequence[object]) -> subprocess.Popen[str]:
        """Start a command as typed on a host; what it shows comes in one pipe."""
        programs = f"{self.directory / 'bin'}:{Path(sys.executable).parent}"
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(self.directory / "home"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            self.on(host, *map(str, command)),
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _ssh(self, host: str) -> list[str]:
        return [str(self.directory / "bin" / "ssh"), "-o", "BatchMode=yes", host]


@contextmanager
def two_hosts(directory: Path) -> Iterator[TwoHosts]:
    """The hosts, joined and accepting ssh; whatever happens, they and their processes are gone
    afterwards.
    """
    _remove_leftovers()
    hosts = TwoHosts(directory)
    try:
        _lay_cable(hosts)
        _write_ssh_files(directory)
        hosts.forward()
        for host in ADDRESSES:
            hosts.start_daemon(host)
        yield hosts
    finally:
        for namespace in {*map(hosts.namespace, ADDRESSES)} & {*_namespaces()}:
            _remove(namespace)
        for daemon in hosts.daemons.values():
            daemon.wait()


def _lay_cable(hosts: TwoHosts) -> None:
    a, b = map(hosts.namespace, ADDRESSES)
    for namespace in (a, b):
        _run("ip", "netns", "add", namespace)
    _run(
        "ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b
    )
    for namespace, address in zip((a, b), ADDRESSES.values(), strict=True):
        _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", namespace, "link", "set", device, "up")
        _run("ip", "-n", namespace, "neighbour", "add", SILENT, "lladdr", SILENT_MAC, "dev", "eth0")


def _write_ssh_files(directory: Path) -> None:
    """A key for the user, one for each host, the daemons' and the client's configuration, and
    the client.
    """
    for folder in ("bin", "home"):
        (directory / folder).mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)  # the daemon insists on it; systemd makes it at boot
    for key in ("user", *ADDRESSES):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(directory / key))
    public = {host: (directory / f"{host}.pub").read_text() for host in ADDRESSES}
    (directory / "known_hosts").write_text(
        "".join(f"{ADDRESSES[host]} {key}" for host, key in public.items())
    )
    for host, address in ADDRESSES.items():
        (directory / f"sshd_{host}").write_text(
            f"ListenAddress {address}\nHostKey {directory / host}\nAuthorizedKeysFile "
            f"{directory / 'user.pub'}\n"
            f"PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
        )
    (directory / "ssh_config").write_text(
        "".join(f"Host {host}\n  HostName {address}\n" for host, address in ADDRESSES.items())
        + f"Host dead\n  HostName {DEAD}\nHost silent\n  HostName {SILENT}\n"
        + f"Host *\n  User root\n  IdentityFile {directory / 'user'}\n  IdentitiesOnly yes\n"
        + f"  ConnectTimeout {SSH_GIVES_UP_S}\n"
        + f"  StrictHostKeyChecking yes\n  UserKnownHostsFile {directory / 'known_hosts'}\n"
    )
    client = directory / "bin" / "ssh"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory / "ssh_config"} "$@"\n')
    client.chmod(0o755)


def _remove(namespace: str) -> None:
    """End every process of a host, then the host; its end of the cable goes with it."""
    for number in _processes(namespace):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    _run("ip", "netns", "delete", namespace)


def _remove_leftovers() -> None:
    """Remove the hosts of tests that were killed before they could do so."""
    for namespace in _namespaces():
        if namespace.startswith(PREFIX) and not Path("/proc", namespace.split("-")[1]).exists():
            _remove(namespace)


def _namespaces() -> list[str]:
    lines = subprocess.check_output(["ip", "netns", "list"], text=True).splitlines()
    return [line.split()[0] for line in lines if line]


def _processes(namespace: str) -> list[int]:
    return [
        int(number)
        for number in subprocess.check_output(["ip", "netns", "pids", namespace]).split()
    ]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
