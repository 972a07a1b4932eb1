"""What the ranks of a pool do for the tests of what DeepSpeed would wait for without an end."""

from typing import Any
from unittest.mock import patch

from megagpt import compat
from megagpt.utils import UserError
from tests.jobs import build, destroy, train_steps


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
    """How training ends where the second data replica takes its first two blocks in the other order.

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
