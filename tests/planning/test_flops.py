"""Model FLOPs against counts done by hand and against published training costs."""

from __future__ import annotations

import pytest

from megagpt.config import ModelConfig
from megagpt.planning.flops import (
    attention_flops_per_token,
    layer_flops,
    model_flops_per_token,
    model_flops_utilisation,
)

TINY = ModelConfig(
    vocab_size=128,
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    sequence_length=4,
    activation="swiglu",
)


def test_matrices_are_counted_one_by_one() -> None:
    query, key_value, output = 8 * 8, 2 * 8 * 4, 8 * 8
    mlp = 3 * 8 * 128  # gate, up, down; 8/3 x 8 rounded up to 128
    attention = attention_flops_per_token(TINY) / 2
    block = 2 * (query + key_value + output + mlp) + attention
    assert layer_flops(TINY) == (0, block, block, 2 * 128 * 8)


def test_attention_is_counted_in_full_or_causal() -> None:
    scores_and_values = 2 * 2 * 8 * 4  # two products, two FLOPs, 8 wide, 4 keys
    assert attention_flops_per_token(TINY) == 2 * scores_and_values
    assert attention_flops_per_token(TINY, causal=True) == 2 * (2 * 2 * 8 * (1 + 2 + 3 + 4) / 4)


def test_a_window_is_counted_by_the_keys_that_its_layers_show() -> None:
    """A mask counts them: two layers of four see 3 of 10 keys, the others all."""
    length, window = 10, 3
    shape = {"num_layers": 4, "hidden_size": 8, "num_heads": 2, "head_size": 16, "vocab_size": 128}
    pattern = {"sliding_window": window, "sliding_window_pattern": ["sliding", "full"]}
    model = ModelConfig.model_validate({**shape, **pattern, "sequence_length": length})
    seen = [[q - window < k <= q for k in range(length)] for q in range(length)]
    sliding, full = sum(map(sum, seen)) / length, (length + 1) / 2
    key = 2 * 2 * 2 * 16  # two products, two FLOPs, two heads of 16
    assert attention_flops_per_token(model, causal=True) == pytest.approx(
        2 * key * (sliding + full)
    )
    assert attention_flops_per_token(model) == 2 * key * (window + length)
    costs = layer_flops(model)
    assert costs[1] == costs[3] < costs[2] == costs[4]
    wider = model.model_validate({**model.model_dump(exclude_unset=True), "sliding_window": length})
    whole = ModelConfig.model_validate({**shape, "sequence_length": length})
    assert layer_flops(wider) == layer_flops(whole)


def test_a_trained_token_costs_three_forward_passes() -> None:
    weights = 2 * TINY.block_matmul_parameters + 128 * 8
    assert model_flops_per_token(TINY) == 6 * weights + 12 * 2 * 2 * 4 * 4


def test_palm_appendix_b_on_gpt3() -> None:
    """Table D.1 of arXiv 2005.14165: 3.14e23 FLOPs for 300 billion tokens of GPT-3 175B,
    attention left out.
    """
    model = ModelConfig.model_validate({"preset": "gpt3-175b", "vocab_size": 50257})
    without_attention = model_flops_per_token(model) - 3 * attention_flops_per_token(model)
    assert without_attention * 300e9 == pytest.approx(3.14e23, rel=0.01)


def test_grouped_keys_do_not_cheapen_attention_itself() -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 8, "vocab_size": 128}
    full, grouped = (
        ModelConfig.model_validate(shape),
        ModelConfig.model_validate({**shape, "num_kv_heads": 2}),
    )
    assert attention_flops_per_token(full) == attention_flops_per_token(grouped)
    assert model_flops_per_token(grouped) < model_flops_per_token(full)


def test_a_tied_head_still_multiplies() -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 8, "vocab_size": 128}
    tied, untied = (
        ModelConfig.model_validate(shape),
        ModelConfig.model_validate({**shape, "tie_embeddings": False}),
    )
    assert model_flops_per_token(tied) == model_flops_per_token(untied)
    assert untied.num_parameters - tied.num_parameters == 128 * 64


def test_utilisation_is_a_share_of_the_peak() -> None:
    flops = model_flops_per_token(TINY)
    assert model_flops_utilisation(
        TINY, tokens_per_s_per_device=10, peak_flops_per_s=40 * flops
    ) == pytest.approx(0.25)
