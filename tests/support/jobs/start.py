"""What the ranks of a pool do for the tests of the start: build an engine while someone counts
bytes.
"""

from typing import Any
from unittest.mock import patch

from megagpt.parallel import engine as engine_module
from tests.support.jobs.training import Held, build, destroy
from tests.support.live_memory import LiveMemory


def memory_at_start(config: dict[str, Any]) -> dict[str, int]:
    """Bytes of tensors that building the model, and then the engine, held at most and holds in
    the end.
    """
    of_model: dict[str, int] = {}

    def build_model(*arguments: Any) -> Any:
        with LiveMemory() as memory:
            built = whole(*arguments)
            of_model.update(model_peak=memory.peak_bytes, model=memory.bytes)
        return built

    whole = engine_module.build_model
    with LiveMemory() as memory, patch.object(engine_module, "build_model", build_model):
        engine = build(config)
    try:
        return of_model | {
            "engine_peak": memory.peak_bytes,
            "engine": memory.bytes,
            "logical": 4 * engine.config.megagpt.model.num_parameters,
        }
    finally:
        destroy(engine)


def initial_weights(config: dict[str, Any]) -> Held:
    """The pieces of the weights that this rank owns before any training."""
    engine = build(config)
    try:
        held: Held = []
        for bucket in engine.buckets():
            with bucket.resident(False) as (master, _):
                for piece in bucket.owned_pieces:
                    values = (
                        master.reshape(-1)[piece.offset : piece.offset + piece.numel]
                        .detach()
                        .clone()
                    )
                    held.append(
                        ("weight", piece.name, engine.boxes[piece.name], piece.start, values)
                    )
        return held
    finally:
        destroy(engine)
