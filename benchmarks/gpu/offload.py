"""Train the largest model whose optimizer fits in host memory, for a few steps under ZeRO 3."""

import time
from typing import Any

import torch

from benchmarks.gpu import training
from benchmarks.gpu.case import NotRun
from benchmarks.gpu.child import Context
from benchmarks.gpu.machine import GIB, free_host_gib
from megagpt.config import ResolvedConfig
from megagpt.planning.cost.memory import rank_memory
from megagpt.planning.layout import Layout
from megagpt.planning.plan import RESERVE_GIB

LEFT_TO_HOST_GIB = 6.0  # Python, libraries, one parameter in transfer, page cache


def measure(
    context: Context,
    model: dict[str, Any],
    pin_memory: bool,
    steps: int,
    host_gib: float | None = None,
    **settings: Any,
) -> None:
    """Train ``model``, or as many of its layers as fit in free memory, and report how many.

    ``host_gib`` replaces the host's free memory. Right if the loss falls and Adam's moments are in
    host memory.
    """
    free_gib = free_host_gib() if host_gib is None else host_gib
    config = largest(model, pin_memory, free_gib, free_device_gib(context.device), **settings)
    layers = config.megagpt.model.num_layers
    figures: dict[str, Any] = {
        "layers": layers,
        "pin_memory": pin_memory,
        "free_host_gib": round(free_gib, 1),
    }
    figures |= training.planned(config, context.device)
    began = time.perf_counter()
    engine, step, _ = training.trainer(config)
    figures["built_s"] = round(time.perf_counter() - began, 1)
    try:
        optimizer = engine.deepspeed.optimizer.optimizer
        done = training.run_steps(step, steps)
        held = {
            t.device.type
            for state in optimizer.state.values()
            for t in state.values()
            if torch.is_tensor(t) and t.dim()
        }
    finally:
        engine.close()
    figures |= training.speed(config, done, context.device) | training.peaks(context.device)
    reason = done.learnt or (
        "" if held == {"cpu"} else f"Adam's moments are on {', '.join(sorted(held)) or 'nothing'}"
    )
    context.judge("offload", not reason, reason, **figures)


def largest(
    model: dict[str, Any], pin_memory: bool, host_gib: float, device_gib: float, **settings: Any
) -> ResolvedConfig:
    """Return the configuration with the most layers, at most the model's, that fits.

    Raises NotRun if not even one layer fits.
    """
    whole = _configuration(model, pin_memory, **settings)
    for layers in range(whole.megagpt.model.num_layers, 0, -1):
        config = _configuration(model | {"num_layers": layers}, pin_memory, **settings)
        if fits(config, host_gib, device_gib):
            return config
    raise NotRun(
        f"too little memory even for one layer: {host_gib:.0f} GiB free on the host, "
        f"{device_gib:.0f} on the device"
    )


def _configuration(model: dict[str, Any], pin_memory: bool, **settings: Any) -> ResolvedConfig:
    offload = {"device": "cpu", "pin_memory": pin_memory}
    return training.configuration(model, stage=3, offload_optimizer=offload, **settings)


def fits(config: ResolvedConfig, host_gib: float, device_gib: float) -> bool:
    """Return whether the plan's peaks fit, with a reserve."""
    peak = rank_memory(Layout.of(config, pins="torch"), 0).peak
    in_host = peak.host / GIB
    return in_host + LEFT_TO_HOST_GIB <= host_gib and peak.device / GIB + RESERVE_GIB <= device_gib


def free_device_gib(device: str) -> float:
    """Return the free memory of the GPU; a CPU stands in with its host's memory."""
    return torch.cuda.mem_get_info()[0] / GIB if device == "cuda" else free_host_gib() + RESERVE_GIB
