"""Training in bf16 on a mesh loses no more than one plain process loses by computing in bf16.

That process is the reference in fp32 with one change: every matrix product, norm and activation sees weights and hidden
states rounded to bf16, master weights and Adam stay in fp32. How far it strays from fp32 is bf16's own rounding, R. A
mesh rounds as often, and once more wherever partial results meet (micro-batches, data replicas, tensor shards): few
roundings beside the dozens of a forward and backward, so that 2 R is allowed. R of a single number may be small by
chance; it counts as one rounding at least, of a norm 2^-9, of a loss that over the root of its tokens' number.
"""

import math
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from megagpt import plain as plain_process
from megagpt.model import GPT
from megagpt.plain import PlainRun
from tests import plain
from tests.configurations import tiny, with_zero
from tests.equality import WRAPPERS
from tests.ranks import RankPool
from tests.shards import whole_tensors

STEPS, SAMPLES, LENGTH = 4, 16, 16
CONFIG = tiny(batch=SAMPLES, micro=2, steps=STEPS, num_layers=4, tie_embeddings=False)
ROUNDING = 2.0**-9  # the largest relative error of one rounding to bf16's 8 bits


class ComputesInBf16(GPT):
    """Parameters in fp32, of which forward and backward see bf16 copies."""

    def forward(self, *inputs: Tensor, **context: Any) -> Tensor:
        if next(self.parameters()).dtype == torch.bfloat16:
            return super().forward(*inputs, **context)
        rounded = {name: parameter.to(torch.bfloat16) for name, parameter in self.named_parameters()}
        return functional_call(self, rounded, inputs, context)


@cache
def plain_runs() -> tuple[PlainRun, PlainRun]:
    """The plain process in fp32, and in bf16."""
    exact = plain.train(CONFIG, STEPS)
    with patch.object(plain_process, "GPT", ComputesInBf16):
        return exact, plain.train(CONFIG, STEPS)


def straying(found: list[float], exact: list[float]) -> float:
    """The largest relative difference of a step's number."""
    return max(abs(value - expected) / abs(expected) for value, expected in zip(found, exact, strict=True))


def weights_straying(found: dict[str, Tensor], exact: PlainRun) -> float:
    """The norm of the difference of all weights as a share of the norm of all changes."""
    weights = exact.state["weight"]
    off = sum((found[name] - weights[name]).double().square().sum() for name in weights)
    change = sum((weights[name] - exact.start[name]).double().square().sum() for name in weights)
    return float(off / change) ** 0.5


PER_MICRO_BATCH, SEQUENCE = {"gradient_reduction": "per_micro_batch"}, {"sequence": True}
PIPELINE, INTERLEAVED = {"pipeline": 2} | PER_MICRO_BATCH, {"schedule": "interleaved", "virtual_stages": 2}
MESHES = [  # ranks, ZeRO stage, where the optimizer works, in what gradients accumulate, mesh
    ("four_ranks", 3, "none", None, {"pipeline": 2}),
    ("two_ranks", 1, "none", None, {"tensor": 2}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("four_ranks", 3, "none", None, PIPELINE),
            ("four_ranks", 1, "none", None, {"pipeline": 2, "tensor": 2} | SEQUENCE),
            ("two_ranks", 2, "none", "fp32", {}),
            ("four_ranks", 1, "cpu", "fp32", PIPELINE),
            ("four_ranks", 2, "none", "fp32", PIPELINE),
            ("four_ranks", 2, "none", "fp32", PIPELINE | INTERLEAVED),
            ("four_ranks", 3, "none", "fp32", PIPELINE),
            ("four_ranks", 3, "cpu", "fp32", PIPELINE | INTERLEAVED),
        )
    ),
]


@pytest.mark.parametrize(("pool", "stage", "optimizer", "accumulation", "parallel"), MESHES, ids=str)
def test_a_mesh_in_bf16_strays_from_fp32_no_more_than_twice_as_far_as_a_plain_process(
    request: pytest.FixtureRequest,
    pool: str,
    stage: int,
    optimizer: str,
    accumulation: str | None,
    parallel: dict[str, Any],
) -> None:
    ranks: RankPool = request.getfixturevalue(pool)
    exact, rounded = plain_runs()
    config = with_zero(CONFIG | {"bf16": {"enabled": True}}, stage, optimizer)
    if accumulation is not None:
        config["data_types"] = {"grad_accum_dtype": accumulation}
    config["megagpt"] = CONFIG["megagpt"] | {"parallel": parallel}
    found = ranks.run("tests.jobs:train", config=config, steps=STEPS)
    state = whole_tensors(rank["state"] for rank in found)
    weights = {name: values for (kind, name), values in state.items() if kind == "weight"}
    of_losses = max(straying(rounded.losses, exact.losses), ROUNDING / math.sqrt(SAMPLES * LENGTH))
    of_norms = max(straying(rounded.norms, exact.norms), ROUNDING)
    for results in (rank["results"] for rank in found):
        assert straying([step.loss for step in results], exact.losses) <= 2 * of_losses
        assert straying([step.grad_norm for step in results], exact.norms) <= 2 * of_norms
    own_rounding = weights_straying(rounded.state["weight"], exact)
    assert 0 < own_rounding < 0.1
    assert weights_straying(weights, exact) <= 2 * own_rounding
    for rank in found:
        assert rank["evidence"]["parameter_type"] == "torch.bfloat16"
        assert rank["evidence"]["wrapper"] == WRAPPERS[stage]
        assert rank["evidence"]["accumulates_in"] == ("torch.float32" if accumulation else "torch.bfloat16")
        if parallel:
            assert rank["evidence"]["stage_elements"] < 0.62 * rank["evidence"]["whole_elements"]
