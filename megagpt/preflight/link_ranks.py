"""The program of each rank for `link.py`: all-reduce a number and a large tensor.

Rank 0 prints the times.
"""

import json
import os
import signal
import time

import torch
import torch.distributed as dist

DEADLINE_S = 90
REPEATS = 5  # the fastest counts; other traffic only slows it down
TENSOR_BYTES = 64 * 1024**2


def main() -> None:
    signal.alarm(DEADLINE_S)  # do not leave a rank behind whose peers never come
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    latency_s = fastest_s(torch.zeros(1, device=device))
    large_s = fastest_s(torch.zeros(TENSOR_BYTES // 4, device=device))
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        carried = 2 * (ranks - 1) / ranks * TENSOR_BYTES
        result = {
            "ranks": ranks,
            "backend": dist.get_backend(),
            "latency_s": latency_s,
            "tensor_bytes": TENSOR_BYTES,
        }
        print(json.dumps(result | {"bus_bytes_per_s": carried / large_s}), flush=True)
    dist.destroy_process_group()


def fastest_s(tensor: torch.Tensor) -> float:
    """Return the shortest time of several all-reduces, after one that sets up the connections."""
    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


if __name__ == "__main__":
    main()
