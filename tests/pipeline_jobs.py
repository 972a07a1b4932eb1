"""What the ranks of a pool do for the tests of pipelines: train while someone counts."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megagpt.compat import EngineStage
from tests.jobs import build, destroy, train_steps


class Kept:
    """A tensor that autograd keeps for the backward of a micro-batch on one of this rank's chunks."""

    def __init__(self, tensor: Tensor, of: tuple[int, int]) -> None:
        self.tensor, self.of = tensor, of


class Activations:
    """Counts the forwards whose saved tensors are alive, after each forward and backward."""

    def __init__(self) -> None:
        self.kept: WeakSet[Kept] = WeakSet()
        self.forwards = 0
        self.counts: list[int] = []

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


def live_micro_batches(config: dict[str, Any]) -> list[int]:
    """How many forwards of this rank's chunks are held, after each forward and backward of a step that is not the
    first: autograd's own saved tensors, counted while they live."""
    engine = build(config)
    activations = Activations()
    methods = {"forward_maybe_with_nosync": activations.forward, "backward_maybe_with_nosync": activations.backward}
    try:
        train_steps(engine, range(1))
        with patch.multiple(EngineStage, **{name: of(getattr(EngineStage, name)) for name, of in methods.items()}):
            train_steps(engine, range(1, 2))
        return activations.counts
    finally:
        destroy(engine)
