"""What the ranks of a pool do for the tests: train a small model for real and report what they
hold.
"""

import gc
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist

from megagpt.config import RunConfig
from megagpt.parallel import compat, pipeline
from megagpt.parallel.engine import Engine, build_engine, build_mesh
from megagpt.parallel.pipeline import StepResult
from megagpt.parallel.rectangles import Box
from megagpt.parity.compare import micro_batches
from megagpt.planning.flops import adapter_elements
from tests.support.collectives import counted
from tests.support.plain import adapters_that_act


def build(config: dict[str, Any]) -> Engine:
    """An engine of this rank for a configuration as a dict."""
    import json

    resolved = RunConfig.from_json(json.dumps(config)).resolved(
        world_size=dist.get_world_size(), vocabulary=None, bf16_native=True
    )
    return build_engine(resolved, build_mesh(resolved))


def destroy(engine: Engine) -> None:
    """Leave the process as if the engine had never been."""
    engine.close()


def train_steps(engine: Engine, steps: range) -> list[StepResult]:
    return [pipeline.train_step(engine, micro_batches(engine, step)) for step in steps]


def gradients_after_one_micro_batch(config: dict[str, Any]) -> int:
    """What ZeRO 2 partitions and ZeRO 1 does not, while a step accumulates."""
    engine = build(config)
    try:
        return gradient_elements(engine, 0)
    finally:
        destroy(engine)


def train(config: dict[str, Any], steps: int, evaluate: bool = False) -> dict[str, Any]:
    """Train and return the results of each step, the state this rank holds and evidence of the
    mechanisms.

    ``evaluate``: the mean loss of another batch is computed before the last step, as a validation
    does.
    """
    engine = build(config)
    try:
        results = train_steps(engine, range(steps - 1))
        if evaluate:
            pipeline.evaluate(engine, micro_batches(engine, steps))
        with (
            counted(engine.mesh) as traffic,
            recorded_passes() as passes,
            counted_document_bounds() as bounds,
        ):
            results += train_steps(engine, range(steps - 1, steps))
        return {
            "results": results,
            "traffic": traffic,
            "passes": passes,
            "document_bounds": len(bounds),
            "state": held_state(engine),
            "evidence": evidence(engine),
        }
    finally:
        destroy(engine)


@contextmanager
def counted_document_bounds() -> Iterator[list[torch.Size]]:
    """The shape of the ids of each computation of document bounds, which is the one sort of a
    step.
    """
    shapes, sort = [], torch.Tensor.sort

    def sorting(ids: torch.Tensor, **options: Any) -> Any:
        shapes.append(ids.shape)
        return sort(ids, **options)

    with patch.object(torch.Tensor, "sort", sorting):
        yield shapes


@contextmanager
def recorded_passes() -> Iterator[list[tuple[bool, int]]]:
    """(whether forward, pipeline stage) of each pass that a schedule lets this rank make."""
    passes: list[tuple[bool, int]] = []

    def recording(method: Callable[..., Any], forward: bool) -> Callable[..., Any]:
        def call(stage: compat.EngineStage, *arguments: Any, **options: Any) -> Any:
            passes.append((forward, stage.stage_index))
            return method(stage, *arguments, **options)

        return call

    methods = {"forward_maybe_with_nosync": True, "backward_maybe_with_nosync": False}
    with ExitStack() as stack:
        for name, forward in methods.items():
            method = recording(getattr(compat.EngineStage, name), forward)
            stack.enter_context(patch.object(compat.EngineStage, name, method))
        yield passes


def train_compiled(config: dict[str, Any], steps: int, backend: str) -> dict[str, Any]:
    """As ``train``, with blocks compiled by a backend of torch; how many graphs that made, too.

    A validation between the steps must make none.
    """
    import torch._dynamo

    from megagpt.model import compile_blocks
    from megagpt.parallel import engine

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        with patch.object(engine, "compile_blocks", lambda part: compile_blocks(part, backend)):
            done = train(config, steps, evaluate=True)
        return done | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
    finally:
        torch._dynamo.reset()


def allowing_fp16(of: str, **arguments: Any) -> Any:
    """Do another job where DeepSpeed may say that this CPU cannot compute in fp16; torch can,
    slowly.
    """
    from deepspeed.accelerator import get_accelerator

    module, _, function = of.partition(":")
    with patch.object(type(get_accelerator()), "is_fp16_supported", lambda accelerator: True):
        return getattr(importlib.import_module(module), function)(**arguments)


def train_with_loss_scale(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """The results of each step, and the loss scale that each began with."""
    engine = build(config)
    try:
        results, scales = [], []
        for step in range(steps):
            scales.append(compat.loss_scaler_state(engine.deepspeed)["cur_scale"])
            results += train_steps(engine, range(step, step + 1))
        return {"results": results, "scales": scales, "evidence": evidence(engine)}
    finally:
        destroy(engine)


def left_after_training(config: dict[str, Any], steps: int) -> tuple[int, int, bool]:
    """DeepSpeed engines that are still alive after a training that has ended, threads of gloo
    groups, and whether torch's functions are its own again.
    """
    train(config, steps)
    own = torch.nn.functional.linear is torch._C._nn.linear
    engines = sum(isinstance(item, deepspeed.DeepSpeedEngine) for item in gc.get_objects())
    threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return engines, threads.count("gloo_tcp_loop\n"), own


def train_on_interpreted_kernels(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """As ``train``, with the Triton functions under their interpreter; how often each was
    launched, too.
    """
    import kernels
    from kernels.launcher import reset_launches

    reset_launches()
    with patch.dict(os.environ, MEGAGPT_KERNELS="interpret"):
        return train(config, steps) | {"launches": dict(kernels.launches())}


def run_parity(
    config: str, few: Sequence[Any] | None = None, sabotage: bool = False, **request: Any
) -> tuple[bool, str, list[dict[str, Any]]]:
    """``parity.run`` of ``few`` strategies beside the file's own, or all; what it prints, and
    evidence of each.

    ``sabotage``: sums over the tensor axis leave the other ranks out.
    """
    from megagpt.config import load_config
    from megagpt.parallel import tensor_parallel
    from megagpt.parity import cases as parity_plan
    from megagpt.parity import compare as parity

    said, seen, compare_weights = io.StringIO(), [], parity._compare_weights

    def compare(engine: Engine, *against: Any) -> Any:
        seen.append(evidence(engine))
        return compare_weights(engine, *against)

    silent = patch.object(tensor_parallel._Sum, "apply", lambda partial, axis: partial)
    chosen = patch.object(parity_plan, "strategies", lambda *world: iter(few or ()))
    watched = patch.object(parity, "_compare_weights", compare)
    with (
        redirect_stdout(said),
        watched,
        silent if sabotage else nullcontext(),
        chosen if few else nullcontext(),
    ):
        try:
            equal = parity.run(parity_plan.ParityRequest(load_config(config), config, **request))
        finally:
            logging.disable(logging.NOTSET)
    return equal, said.getvalue(), seen


def gradient_elements(engine: Engine, step: int) -> int:
    """Elements of gradients alive on this rank after the first micro-batch of a step, wherever
    ZeRO keeps them.
    """
    first = micro_batches(engine, step)[0]
    engine.deepspeed.backward(engine.deepspeed(first.tokens, targets=first.targets))
    zero = engine.deepspeed.optimizer
    alive = {id(p.grad): p.grad for p in engine.names if p.grad is not None}
    for attribute in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(zero, attribute, {}).values():
            alive |= {id(gradient): gradient for gradient in group or []}
    return sum(gradient.numel() for gradient in alive.values())


Held = list[tuple[str, str, Box, int, torch.Tensor]]


def held_state(engine: Engine) -> Held:
    """(kind, parameter, box, start, values) of everything this rank owns: a flat run of a box of
    the parameter.
    """
    held = []
    for bucket in engine.buckets():
        with bucket.resident(False) as (master, state):
            for kind, flat in (
                ("weight", master),
                *((moment, state[moment]) for moment in compat.MOMENTS),
            ):
                for piece in bucket.owned_pieces:
                    run = flat.reshape(-1)[piece.offset : piece.offset + piece.numel]
                    values = run.detach().clone().float()
                    held.append((kind, piece.name, engine.boxes[piece.name], piece.start, values))
    return held


def evidence(engine: Engine) -> dict[str, Any]:
    """What shows that ZeRO and offload acted."""
    zero = engine.deepspeed.optimizer
    parameters = list(engine.names)
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]  # of ZeRO 3
    zero_config = engine.config.zero_optimization
    sections = (zero_config.offload_optimizer, zero_config.offload_param)
    disks = {section.nvme_path for section in sections if section is not None and section.nvme_path}
    swap_files = [
        path for disk in disks for path in Path(disk).rglob(f"rank{dist.get_rank()}/*.swp")
    ]
    return {
        "wrapper": type(zero).__name__,
        "adam": type(compat.base_optimizer(engine.deepspeed)).__name__,
        "parameter_type": str(parameters[0].dtype),
        "accumulates_in": str(getattr(zero, "gradient_accumulation_dtype", None)),
        "whole_elements": whole_elements(engine),
        "stage_elements": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "trained_elements": sum(
            getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad
        ),
        "frozen_with_gradient": sum(not p.requires_grad and p.grad is not None for p in parameters),
        "parameter_elements": sum(p.numel() for p in parameters),
        "shard_elements": sum(shard.ds_numel for shard in shards),
        "shard_elements_in_memory": sum(shard.numel() for shard in shards),
        "parameters_offloaded": bool(getattr(zero, "offload_param", False)),
        "elements_on_nvme": sum(
            shard.ds_numel for shard in shards if shard.final_location == "nvme"
        ),
        "master_elements": sum(piece.numel for b in engine.buckets() for piece in b.pieces),
        "optimizer_offloaded": bool(
            getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False)
        ),
        "swap_files": sorted((path.name, path.stat().st_size) for path in swap_files),
        "devices": devices(engine),
        "versions": deepspeed.__version__,
    }


def whole_elements(engine: Engine) -> int:
    """Of the whole model, with its adapters if it has any."""
    model, lora = engine.config.megagpt.model, engine.config.megagpt.training.lora
    adapters = 0 if lora is None else model.num_layers * adapter_elements(lora, model)
    return model.num_parameters + adapters


def devices(engine: Engine) -> dict[str, list[str]]:
    """The types of the devices that tensors lie on between steps; of the optimizer's once it has
    made an update.
    """
    states = compat.base_optimizer(engine.deepspeed).state  # of each run of master weights
    moments = [state[moment] for state in states.values() for moment in compat.MOMENTS]
    shards = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.names]
    held = {"master_weights": states, "moments": moments, "parameter_shards": shards}
    return {
        kind: sorted({tensor.device.type for tensor in tensors}) for kind, tensors in held.items()
    }


def train_swapping_small_tensors(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """As ``train``; the disk takes whatever fills a block of its I/O, where DeepSpeed leaves
    less than 1 MiB alone.
    """
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    with (
        adapters_that_act(),
        patch.object(optimizer_utils, "MIN_AIO_BYTES", 0),
        patch.object(partitioned_param_swapper, "MIN_AIO_BYTES", 0),
    ):
        return train(config, steps)
