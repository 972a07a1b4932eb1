"""Rotary frequencies, bit for bit those of transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import kernels
from megagpt.config import ModelConfig
from megagpt.rotary import frequencies, rotary_angles

HEAD_SIZE, ORIGINAL, LENGTH = 32, 64, 256
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "short_factor": [1.0 + 0.1 * pair for pair in range(HEAD_SIZE // 2)],
    "long_factor": [1.5**pair for pair in range(HEAD_SIZE // 2)],
}
# ours; in theirs the original length has a longer name
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0, "original_length": ORIGINAL},
    "yarn": {"factor": 4.0, "original_length": ORIGINAL},
    "llama3": {"factor": 8.0, "original_length": ORIGINAL, **LLAMA3},
    "longrope": {"factor": LENGTH / ORIGINAL, "original_length": ORIGINAL, **LONG},
}


def ours(scaling: dict[str, Any] | None, **keys: Any) -> ModelConfig:
    shape = {"vocab_size": 128, "num_layers": 1, "hidden_size": 64, "num_heads": 2}
    return ModelConfig.model_validate(
        {**shape, "position": "rotary", "rope_base": 500_000.0, "rope_scaling": scaling, **keys}
    )


@pytest.mark.parametrize("length", [ORIGINAL // 2, LENGTH])
@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_those_of_transformers(kind: str, length: int) -> None:
    keys = dict(SCALINGS[kind])
    config = ours({"type": kind, **keys})
    if "original_length" in keys:
        keys["original_max_position_embeddings"] = keys.pop("original_length")
    theirs = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        # dynamic scaling takes this for the original length
        max_position_embeddings=ORIGINAL if kind == "dynamic" else LENGTH,
        rope_parameters={"rope_type": kind, "rope_theta": 500_000.0, **keys},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
    found = frequencies(config, length, torch.device("cpu"))
    assert torch.equal(found, expected)
    assert not torch.equal(found, frequencies(ours(None), length, torch.device("cpu"))) or (
        kind == "dynamic" and length < ORIGINAL
    )
    cosine, sine = rotary_angles(config, length - 1, 1, torch.device("cpu"))
    assert torch.equal(cosine[0], (expected * (length - 1)).cos() * factor)
    assert torch.equal(sine[0], (expected * (length - 1)).sin() * factor)


def test_only_a_fraction_of_the_channels_is_rotated() -> None:
    config = ours(None, rope_fraction=0.25)
    x = torch.randn(1, 1, 5, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    rotated = kernels.rotary(x, *rotary_angles(config, 0, 5, x.device))
    assert torch.equal(rotated[..., 8:], x[..., 8:])
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert (rotated[:, :, 1:, :8] != x[:, :, 1:, :8]).all()
    # a rotation keeps the length of each pair
    torch.testing.assert_close(
        rotated[..., :8].unflatten(-1, (2, 4)).norm(dim=-2),
        x[..., :8].unflatten(-1, (2, 4)).norm(dim=-2),
    )
