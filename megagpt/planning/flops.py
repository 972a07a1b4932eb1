"""Model FLOPs of a GPT: what the mathematics needs, whatever the program recomputes or skips.

The count follows PaLM (arXiv 2204.02311, appendix B): a token costs 6 FLOPs for each weight that
multiplies it (2 forward, 4 backward) plus 12 x layers x heads x head size x sequence length for the
two products of attention. Embedding and position tables are looked up and count nothing. The head
counts, tied or not. Norms, biases and the softmax are left out. PaLM counts attention in FULL
although half of it is masked. `model_flops_per_token` does the same unless `causal=True`, so that
our MFU compares with published ones.
"""

from __future__ import annotations

from functools import cache

from megagpt.config import ModelConfig

FORWARD_AND_BACKWARD = 3  # backward computes two products for each one of the forward pass
FLOPS_PER_MULTIPLY_ADD = 2


@cache
def layer_flops(model: ModelConfig, *, causal: bool = False) -> tuple[float, ...]:
    """Return the forward FLOPs of one token by layer: the embedding, each block, the head."""
    attention = attention_flops_per_token(model, causal=causal) / model.num_layers
    block = FLOPS_PER_MULTIPLY_ADD * model.block_matmul_parameters + attention
    head = FLOPS_PER_MULTIPLY_ADD * model.vocab_size * model.hidden_size
    return (0.0, *[float(block)] * model.num_layers, float(head))


def attention_flops_per_token(model: ModelConfig, *, causal: bool = False) -> float:
    """Return the forward FLOPs of the two attention products, averaged over a sequence's positions.

    With `causal` a query at position i attends to i + 1 keys, (sequence length + 1) / 2 on
    average.
    """
    keys = (model.sequence_length + 1) / 2 if causal else model.sequence_length
    products = 2
    return (
        products
        * FLOPS_PER_MULTIPLY_ADD
        * model.num_layers
        * model.num_heads
        * model.head_size
        * keys
    )


def model_flops_per_token(model: ModelConfig, *, causal: bool = False) -> float:
    """Return the forward and backward FLOPs of one trained token.

    Attention counts in full, or its causal half with `causal`.
    """
    return FORWARD_AND_BACKWARD * sum(layer_flops(model, causal=causal))


def model_flops_utilisation(
    model: ModelConfig,
    *,
    tokens_per_s_per_device: float,
    peak_flops_per_s: float,
    causal: bool = False,
) -> float:
    """Return the MFU: the share of a device's peak that the model's mathematics uses, 0 to 1."""
    return tokens_per_s_per_device * model_flops_per_token(model, causal=causal) / peak_flops_per_s
