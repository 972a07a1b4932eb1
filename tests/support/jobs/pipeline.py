"""What the ranks of a pool do for the tests of pipelines: train while someone counts."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megagpt.model import KeyValueCache
from megagpt.parallel import pipeline
from megagpt.parallel.compat import EngineStage
from megagpt.parity.compare import micro_batches
from megagpt.run import assembly
from tests.support.jobs.training import build, destroy, train_steps


class Kept:
    """A tensor that autograd keeps for the backward of a micro-batch on one of this rank's
    chunks.
    """

    def __init__(self, tensor: Tensor, of: tuple[int, int]) -> None:
        self.tensor, self.of = tensor, of


class Activations:
    """Counts the forwards whose saved tensors are alive, after each forward and backward."""

    def __init__(self) -> None:
        self.kept: WeakSet[Kept] = WeakSet()
        self.forwards = 0
        self.counts: list[int] = []
        self.most_bytes = 0

    def forward(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(stage: EngineStage, *inputs: Tensor, **context: Any) -> Tensor:
            self.forwards += 1
            of = (stage.chunk, self.forwards)

            def keep(tensor: Tensor) -> Kept:
                self.kept.add(kept := Kept(tensor, of))
                return kept

            with saved_tensors_hooks(keep, lambda kept: kept.tensor):
                output = method(stage, *inputs, **context)
            self._count()
            return output

        return call

    def backward(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            self._count()
            return result

        return call

    def _count(self) -> None:
        self.counts.append(len({kept.of for kept in self.kept}))
        storages = {
            kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage()
            for kept in self.kept
        }
        self.most_bytes = max(
            self.most_bytes, sum(storage.nbytes() for storage in storages.values())
        )


def live_micro_batches(config: dict[str, Any]) -> list[int]:
    """How many forwards of this rank's chunks are held, after each forward and backward of a
    step.
    """
    return kept_activations(config).counts


def most_kept_bytes(config: dict[str, Any]) -> int:
    """The most bytes of what autograd keeps for backwards in a step, weights among them, on this
    rank.
    """
    return kept_activations(config).most_bytes


def kept_activations(config: dict[str, Any]) -> Activations:
    """Of a step that is not the first: autograd's own saved tensors, looked at while they live."""
    engine = build(config)
    activations = Activations()
    methods = {
        "forward_maybe_with_nosync": activations.forward,
        "backward_maybe_with_nosync": activations.backward,
    }
    try:
        train_steps(engine, range(1))
        with patch.multiple(
            EngineStage, **{name: of(getattr(EngineStage, name)) for name, of in methods.items()}
        ):
            train_steps(engine, range(1, 2))
        return activations
    finally:
        destroy(engine)


def losses_and_logits(config: dict[str, Any], prompt: list[int]) -> tuple[float, Tensor]:
    """Of the initial model: the mean loss of a step's batch, and the logits (prompt, vocabulary)
    token after token, the first half of the prompt at once.
    """
    engine = build(config)
    try:
        nats, targets = pipeline.evaluate(engine, micro_batches(engine, 0)).sum(1).tolist()
        loss = nats / targets
        cache = KeyValueCache(len(prompt))
        half = len(prompt) // 2
        pieces = [prompt[:half], *([token] for token in prompt[half:])]
        engine.deepspeed.eval()
        return loss, torch.cat(
            [pipeline.logits(engine, torch.tensor([piece]), cache)[0] for piece in pieces]
        )
    finally:
        destroy(engine)


def begun(config: dict[str, Any]) -> tuple[str, list[timedelta], str]:
    """What errors call this rank, how long it waits in each of its groups, and what is on its
    screen at the start.
    """
    engine = build(config)
    screen = io.StringIO()
    try:
        with redirect_stdout(screen):
            assembly._announce(engine, Path("runs/small"), "CPU")
        groups = [
            *engine.mesh.groups,
            *([engine.tied_group] if engine.tied_group is not None else []),
        ]
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        return engine.mesh.name, timeouts, screen.getvalue()
    finally:
        destroy(engine)
