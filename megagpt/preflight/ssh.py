"""Run Python on a host as DeepSpeed's launcher does, through non-interactive ssh.

Explains why that fails.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass

CONNECT_S = 5
SSH_FAILED = 255  # exit code of ssh itself; others are the command's
NOT_FOUND = (126, 127)  # exit codes of a shell if the command is missing or not executable

# What ssh prints, and the remedy; the first match is used.
SILENT = (
    "the host does not answer; check that it is up and that its address is right, or remove it "
    "from the hostfile"
)
REMEDIES = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its key has changed; if the host was "
    "reinstalled, run ssh-keygen -R {host}; if not, another machine may answer in its place",
    "Host key verification failed": "its key is unknown here; run ssh {host} once, compare the "
    "fingerprint and answer yes",
    "Permission denied": "it does not accept your key; run ssh-copy-id {host}",
    "Could not resolve hostname": "unknown name; correct the hostfile, or set its "
    "address in ~/.ssh/config",
    "Connection refused": "no ssh daemon listens on the host; run systemctl start ssh there",
    "timed out": SILENT,
    "No route to host": SILENT,
    "Network is unreachable": "there is no route to it; correct its address",
}
OTHERWISE = "try it by hand: ssh -o BatchMode=yes {host} true"


@dataclass(frozen=True)
class Reply:
    """The output of a host; ``failure`` is one line with the reason and the remedy, or None."""

    output: str
    failure: str | None


def run_python(host: str | None, source: str, *, timeout_s: float) -> Reply:
    """Run a program, sent through standard input, on a host or (None) on this machine.

    The interpreter is the path of this one, which DeepSpeed's launcher uses on every host.
    """
    command = [sys.executable, "-"]
    if host is not None:
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
        command = ["ssh", *options, host, shlex.join(command)]
    try:
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        return Reply("", "there is no ssh here (Debian, Ubuntu: apt install openssh-client)")
    except subprocess.TimeoutExpired:
        return Reply(
            "",
            f"no answer within {timeout_s:.0f} s: the host, or the disk with Python, hangs",
        )
    return Reply(
        done.stdout, _explain(host, done.returncode, done.stderr) if done.returncode else None
    )


def _explain(host: str | None, code: int, stderr: str) -> str:
    last = next(
        (line.strip() for line in reversed(stderr.splitlines()) if line.strip()),
        f"exit code {code}",
    )
    if code in NOT_FOUND:
        return (
            f"no {sys.executable} there; install it at the same path (make setup), or share "
            f"the directory"
        )
    if code != SSH_FAILED or host is None:
        return f"Python failed there: {last}"
    remedy = next((remedy for said, remedy in REMEDIES.items() if said in stderr), OTHERWISE)
    return f"ssh: {last!a}: {remedy.format(host=host)}"
