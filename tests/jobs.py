"""What the ranks of a pool do for the tests: train a small model for real and report what they hold."""

import gc
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megagpt import compat, pipeline
from megagpt.config import RunConfig
from megagpt.engine import Engine, build_engine, build_mesh
from megagpt.pipeline import MicroBatch, StepResult


def build(config: dict[str, Any]) -> Engine:
    """An engine of this rank for a configuration as a dict."""
    import json

    resolved = RunConfig.from_json(json.dumps(config)).resolved(
        world_size=dist.get_world_size(), vocabulary=config["megagpt"]["model"]["vocab_size"], bf16_native=True
    )
    return build_engine(resolved, build_mesh(resolved))


def destroy(engine: Engine) -> None:
    """Leave the process as if the engine had never been."""
    engine.deepspeed.destroy()
    gc.collect()


def global_batch(step: int, samples: int, length: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens and targets (samples, length) of a step: learnable, the same everywhere."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, vocabulary, (samples, length), generator=generator)
    return tokens, (tokens * 7 + 3) % vocabulary


def micro_batches(engine: Engine, step: int) -> list[MicroBatch]:
    """This replica's part of the global batch, cut as BatchLoader cuts it."""
    config, mesh = engine.config, engine.mesh
    model, size = config.megagpt.model, config.train_micro_batch_size_per_gpu
    tokens, targets = global_batch(step, config.train_batch_size, model.sequence_length, model.vocab_size)
    starts = [(index * mesh.data_size + mesh.data_rank) * size for index in range(config.gradient_accumulation_steps)]
    return [MicroBatch(tokens[start : start + size], targets[start : start + size]) for start in starts]


def train_steps(engine: Engine, steps: range) -> list[StepResult]:
    return [pipeline.train_step(engine, micro_batches(engine, step)) for step in steps]


def gradients_after_one_micro_batch(config: dict[str, Any]) -> int:
    """What ZeRO 2 partitions and ZeRO 1 does not, while a step accumulates."""
    engine = build(config)
    try:
        return gradient_elements(engine, 0)
    finally:
        destroy(engine)


def train(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train and return the results of each step, the state this rank holds and evidence of the mechanisms."""
    engine = build(config)
    try:
        return {
            "results": train_steps(engine, range(steps)),
            "state": held_state(engine),
            "evidence": evidence(engine),
        }
    finally:
        destroy(engine)


def gradient_elements(engine: Engine, step: int) -> int:
    """Elements of gradients alive on this rank after the first micro-batch of a step, wherever ZeRO keeps them."""
    first = micro_batches(engine, step)[0]
    engine.deepspeed.backward(engine.deepspeed(first.tokens, targets=first.targets))
    zero = engine.deepspeed.optimizer
    alive = {id(p.grad): p.grad for p in engine.names if p.grad is not None}
    for attribute in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(zero, attribute, {}).values():
            alive |= {id(gradient): gradient for gradient in group or []}
    return sum(gradient.numel() for gradient in alive.values())


def held_state(engine: Engine) -> list[tuple[str, str, int, torch.Tensor]]:
    """(kind, parameter, start, values) of everything this rank owns."""
    held = []
    for bucket in engine.buckets():
        with bucket.resident(False) as (master, state):
            for kind, flat in (("weight", master), *((moment, state[moment]) for moment in compat.MOMENTS)):
                for piece in bucket.owned_pieces:
                    run = flat.reshape(-1)[piece.offset : piece.offset + piece.numel]
                    held.append((kind, piece.name, piece.start, run.detach().clone().float()))
    return held


def evidence(engine: Engine) -> dict[str, Any]:
    """What shows that ZeRO and offload acted."""
    zero = engine.deepspeed.optimizer
    parameters = list(engine.names)
    offload = engine.config.zero_optimization
    swap_files = []
    for section in (offload.offload_optimizer, offload.offload_param):
        if section is not None and section.nvme_path:
            swap_files += [(path.name, path.stat().st_size) for path in Path(section.nvme_path).rglob("*.swp")]
    return {
        "wrapper": type(zero).__name__,
        "adam": type(compat.base_optimizer(engine.deepspeed)).__name__,
        "parameter_type": str(parameters[0].dtype),
        "whole_elements": engine.config.megagpt.model.num_parameters,
        "stage_elements": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "parameter_elements": sum(p.numel() for p in parameters),
        "shard_elements": sum(p.ds_tensor.numel() for p in parameters) if hasattr(parameters[0], "ds_tensor") else None,
        "parameters_offloaded": bool(getattr(zero, "offload_param", False)),
        "elements_on_nvme": sum(
            p.ds_tensor.ds_numel for p in parameters if hasattr(p, "ds_tensor") and p.ds_tensor.final_location == "nvme"
        ),
        "master_elements": sum(piece.numel for b in engine.buckets() for piece in b.pieces),
        "optimizer_offloaded": bool(getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False)),
        "swap_files": sorted(swap_files),
        "versions": deepspeed.__version__,
    }
