"""Blocks under torch.compile train as one plain, uncompiled process does, and evaluation does not
compile.
"""

from typing import Any

import pytest

from tests.support import plain
from tests.support.configurations import KINDS, tiny, with_zero
from tests.support.equality import assert_equal_training
from tests.support.ranks import RankPool

STEPS = 3
LAYERS = 3
TRAIN = "tests.support.jobs.training:train_compiled"
CASES = [  # ZeRO stage, kind of model, parallel, recompute, graphs of a rank
    (0, "llama3", {}, "none", 1),  # blocks that are alike share one
    pytest.param(1, "gemma2", {"pipeline": 2}, "selective", None, marks=pytest.mark.slow),
    pytest.param(2, "gpt2", {}, "full", None, marks=pytest.mark.slow),
    pytest.param(2, "qwen3", {"pipeline": 2}, "full", None, marks=pytest.mark.slow),
]


def compiled_run(
    pool: RankPool, stage: int, kind: str, parallel: Any, recompute: str, backend: str
) -> list[dict[str, Any]]:
    config = with_zero(tiny(steps=STEPS, num_layers=LAYERS, **KINDS[kind]), stage)
    config["optimizer"]["params"]["eps"] = 1e-6  # above the rounding of a gradient
    config["megagpt"]["parallel"] = parallel
    config["megagpt"]["training"] |= {"compile": "blocks", "recompute": recompute}
    ranks = pool.run(TRAIN, config=config, steps=STEPS, backend=backend, deadline_s=500)
    head_size = KINDS[kind].get("head_size", 8) if kind in ("gpt2", "neox") else None
    assert_equal_training(ranks, plain.train(config, STEPS), head_size, tolerance=2e-5)
    return ranks


@pytest.mark.parametrize(("stage", "kind", "parallel", "recompute", "graphs"), CASES)
def test_compiled_blocks_train_alike(
    two_ranks: RankPool,
    stage: int,
    kind: str,
    parallel: dict[str, int],
    recompute: str,
    graphs: int | None,
) -> None:
    """Compiled forward and backward, executed by torch's own operators."""
    for rank in compiled_run(two_ranks, stage, kind, parallel, recompute, "aot_eager"):
        assert rank["graphs"] == graphs or (graphs is None and rank["graphs"] >= 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_inductor_trains_alike(one_rank: RankPool, kind: str) -> None:
    (rank,) = compiled_run(one_rank, 1, kind, {}, "none", "inductor")
    assert rank["graphs"] >= 1
