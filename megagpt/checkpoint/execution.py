"""How a run is laid out and computed, for the record: what a result's last bits depend on, and
its values do not.
"""

import os
from typing import Any

import deepspeed
import torch

from megagpt import __version__
from megagpt.parallel.engine import Engine, compute_dtype

VERSIONS = {"megagpt": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def topology(engine: Engine) -> dict[str, Any]:
    """The mesh, the ZeRO stage and where state is offloaded to."""
    mesh, zero = engine.mesh, engine.config.zero_optimization
    return {
        "pipeline": mesh.pipeline_size,
        "data": mesh.data_size,
        "tensor": mesh.tensor_size,
        "zero_stage": zero.stage,
        "optimizer_device": zero.optimizer_device,
        "parameter_device": zero.parameter_device,
    }


def conditions(engine: Engine) -> dict[str, Any]:
    """Where these are alike, the same step from the same state gives the same bits (on a CPU)."""
    config = engine.config
    parallel = config.megagpt.parallel
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
    }
