"""What the ranks of a pool do for the tests of what DeepSpeed would wait for without an end."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from megagpt.parallel import compat
from megagpt.utils import UserError
from tests.support.jobs.training import build, destroy, train_steps


def refused_tiles(config: dict[str, Any]) -> str:
    """What building an engine says of a configuration that passed by the planner."""
    built = []
    check = compat.require_equal_tiles

    def noted(engine: Any, mesh: Any) -> None:
        built.append((engine, mesh))
        check(engine, mesh)

    with patch.object(compat, "require_equal_tiles", noted):
        try:
            build(config)
        except UserError as error:
            return str(error)
        finally:
            ((engine, mesh),) = built
            compat.destroy(engine)
            mesh.close()
    raise AssertionError("not refused")


def end_with_other_modules(config: dict[str, Any]) -> str:
    """How training ends where the second data replica takes its first two blocks in the other
    order.

    They have the same shapes, so that every gather finds its partner: only the order tells.
    """
    engine = build(config)
    try:
        if engine.mesh.data_rank == 1:
            for part in engine.chunks:
                first, second, *_ = part.blocks
                part.blocks[first], part.blocks[second] = part.blocks[second], part.blocks[first]
        train_steps(engine, range(3))
    except RuntimeError as error:
        return str(error)
    finally:
        destroy(engine)
    raise AssertionError("trained")


def copies_of_tied_gradients(config: dict[str, Any], steps: int) -> list[str]:
    """Train with the optimizer in host memory; what becomes of a tied weight's gradient, and the
    updates, in order.
    """
    engine = build(config)
    zero, said = engine.deepspeed.optimizer, list[str]()
    stream = SimpleNamespace(synchronize=lambda: said.append("synchronised"))

    def noted(name: str, method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            said.append(name)
            return method(*arguments, **options)

        return call

    try:
        with (
            patch.object(
                compat, "get_accelerator", lambda: SimpleNamespace(current_stream=lambda: stream)
            ),
            patch.object(zero, "step", noted("updated", zero.step)),
            patch.object(
                zero,
                "_offload_grad_partition_at_boundary",
                noted("copied", zero._offload_grad_partition_at_boundary),
            ),
        ):
            train_steps(engine, range(steps))
        return said
    finally:
        destroy(engine)
