"""Measure how fast the ranks of all hosts reach each other: a small and a large all-reduce.

torchrun is started on each host through ssh, one rank a slot, with `link_ranks.py`. torch is
imported only there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megagpt.cluster.hosts import Host
from megagpt.preflight import forwarded, ssh
from megagpt.utils import UserError, human_bytes

TIMEOUT_S = 90
PORT = 29_400  # not torch's default, 29500
RANKS = Path(__file__).with_name("link_ranks.py")
# the call that DeepSpeed uses
ADDRESS = "import subprocess; print(subprocess.check_output(['hostname', '-I'], text=True))"
START = """
import os, signal
signal.alarm({timeout})  # leave no process behind if the connection breaks
os.chdir({directory!r})
os.environ.update({variables!r})
from torch.distributed.run import main
main({words!r})
"""


@dataclass(frozen=True)
class Link:
    """Times over all ranks.

    ``bus_bytes_per_s`` is that of the slowest link, as NCCL's tests define it: each of n ranks
    passes 2 (n - 1) / n of the tensor.
    """

    ranks: int
    backend: str
    latency_s: float
    tensor_bytes: int
    bus_bytes_per_s: float


def measure_links(hosts: Sequence[Host]) -> Link:
    """Run an all-reduce over one rank a slot of every host; raise UserError if it fails."""
    if sum(host.slots for host in hosts) < 2:
        raise UserError(
            "--bandwidth: nothing to measure with one rank: give --hostfile, with two slots or more"
        )
    variables, _ = forwarded.read()
    address = _address_of(hosts[0].name)
    with ThreadPoolExecutor(len(hosts)) as threads:
        replies = list(
            threads.map(lambda node: _start(hosts, node, address, variables), range(len(hosts)))
        )
    for host, reply in zip(hosts, replies, strict=True):
        if reply.failure is not None:
            raise UserError(
                f"{host.name}: no all-reduce with the others: {reply.failure}\n"
                f"check that every port of {address} is open to the others; NCCL_SOCKET_IFNAME (on "
                "CPUs GLOO_SOCKET_IFNAME) in .deepspeed_env selects the network device"
            )
    return Link(**json.loads(replies[0].output.splitlines()[-1]))


def describe_links(link: Link) -> str:
    return (
        f"all-reduce over {link.ranks} ranks ({link.backend}): {1e6 * link.latency_s:.0f} us for a "
        f"number, {human_bytes(link.bus_bytes_per_s)}/s a link for {human_bytes(link.tensor_bytes)}"
    )


def _address_of(host: str) -> str:
    """Return the first address of a host, where the others will find rank 0."""
    reply = ssh.run_python(host, ADDRESS, timeout_s=TIMEOUT_S)
    if reply.failure is not None or not reply.output.split():
        raise UserError(
            f"{host}: {reply.failure or '`hostname -I` gives no address: configure its network'}"
        )
    return reply.output.split()[0]


def _start(
    hosts: Sequence[Host], node: int, address: str, variables: Mapping[str, str]
) -> ssh.Reply:
    """Run the ranks of one host until they end."""
    words = [
        "--nnodes",
        str(len(hosts)),
        "--nproc-per-node",
        str(hosts[node].slots),
        "--node-rank",
        str(node),
    ]
    words += ["--master-addr", address, "--master-port", str(PORT), str(RANKS)]
    source = START.format(
        timeout=TIMEOUT_S, directory=str(Path.cwd()), variables=dict(variables), words=words
    )
    return ssh.run_python(hosts[node].name, source, timeout_s=TIMEOUT_S + ssh.CONNECT_S)
