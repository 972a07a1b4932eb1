"""Training in bf16 loses no more than a plain process does, also where gradients add up in fp32
(the matrix, tests/equality/test_matrix.py, has the others): `megagpt/parity/tolerance.py` says
how far it may stray.
"""

from functools import cache
from typing import Any

import pytest
import torch

from megagpt.parity.plain import PlainRun
from tests.support import plain
from tests.support.configurations import tiny, with_zero
from tests.support.equality import WRAPPERS, assert_strays_no_further_than_bf16
from tests.support.ranks import RankPool

STEPS, SAMPLES, LENGTH = 4, 16, 16
CONFIG = tiny(batch=SAMPLES, micro=2, steps=STEPS, num_layers=4, tie_embeddings=False)


@cache
def plain_runs() -> tuple[PlainRun, PlainRun]:
    """The plain process in fp32, and in bf16."""
    return plain.train(CONFIG, STEPS), plain.train(CONFIG, STEPS, torch.bfloat16)


PIPELINE = {"pipeline": 2, "gradient_reduction": "per_micro_batch"}
INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}
MESHES = [  # ranks, ZeRO stage, where the optimizer works, mesh
    ("two_ranks", 2, "none", {}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("four_ranks", 1, "cpu", PIPELINE),
            ("four_ranks", 2, "none", PIPELINE),
            ("four_ranks", 2, "none", PIPELINE | INTERLEAVED),
            ("four_ranks", 3, "none", PIPELINE),
            ("four_ranks", 3, "cpu", PIPELINE | INTERLEAVED),
        )
    ),
]


@pytest.mark.parametrize(("pool", "stage", "optimizer", "parallel"), MESHES, ids=str)
def test_gradients_that_accumulate_in_fp32_stray_no_more_than_twice_as_far_as_in_a_plain_process(
    request: pytest.FixtureRequest,
    pool: str,
    stage: int,
    optimizer: str,
    parallel: dict[str, Any],
) -> None:
    ranks: RankPool = request.getfixturevalue(pool)
    exact, rounded = plain_runs()
    config = with_zero(CONFIG | {"bf16": {"enabled": True}}, stage, optimizer)
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    config["megagpt"] = CONFIG["megagpt"] | {"parallel": parallel}
    found = ranks.run("tests.support.jobs.training:train", config=config, steps=STEPS)
    assert_strays_no_further_than_bf16(found, exact, rounded, SAMPLES * LENGTH)
    for rank in found:
        assert rank["evidence"]["parameter_type"] == "torch.bfloat16"
        assert rank["evidence"]["wrapper"] == WRAPPERS[stage]
        assert rank["evidence"]["accumulates_in"] == "torch.float32"
        if parallel:
            assert rank["evidence"]["stage_elements"] < 0.62 * rank["evidence"]["whole_elements"]
