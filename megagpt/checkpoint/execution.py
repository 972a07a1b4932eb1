"""The layout and conditions of a run, which determine the last bits of its results."""

import os
from typing import Any

import deepspeed
import torch

from megagpt import __version__
from megagpt.parallel.engine import Engine, compute_dtype

VERSIONS = {"megagpt": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def topology(engine: Engine) -> dict[str, Any]:
    """Return the mesh, the ZeRO stage and the offload devices."""
    mesh = engine.mesh
    zero = engine.config.zero_optimization
    return {
        "pipeline": mesh.pipeline_size,
        "data": mesh.data_size,
        "tensor": mesh.tensor_size,
        "zero_stage": zero.stage,
        "optimizer_device": zero.optimizer_device,
        "parameter_device": zero.parameter_device,
    }


def conditions(engine: Engine) -> dict[str, Any]:
    """Return what determines the bits of a step.

    On a CPU, the same step from the same state under equal conditions gives the same bits.
    """
    config = engine.config
    parallel = config.megagpt.parallel
    compiled = config.megagpt.training.compile
    return {
        **topology(engine),
        "schedule": parallel.schedule,
        "virtual_stages": parallel.virtual_stages,
        "sequence": parallel.sequence,
        "gradient_reduction": parallel.gradient_reduction,
        "micro_batch": config.train_micro_batch_size_per_gpu,
        "recompute": config.megagpt.training.recompute,
        "precision": str(compute_dtype(config)).removeprefix("torch."),
        "device": engine.device.type,
        "threads": torch.get_num_threads(),
        "kernels": os.environ.get("MEGAGPT_KERNELS", ""),
        "versions": VERSIONS,
        **({} if compiled == "none" else {"compile": compiled}),  # a key of later versions
    }
