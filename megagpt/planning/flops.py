"""Model FLOPs of a GPT: what the mathematics needs, whatever the program recomputes or skips.

The count follows PaLM (arXiv 2204.02311, appendix B): a token costs 6 FLOPs for each weight that
multiplies it (2 forward, 4 backward) plus 12 x layers x heads x head size x sequence length for the
two products of attention. Embedding and position tables are looked up and count nothing. The head
counts, tied or not. Norms, biases and the softmax are left out. PaLM counts attention in FULL
although half of it is masked. `model_flops_per_token` does the same unless `causal=True`, so that
our MFU compares with published ones. A layer with a sliding window counts its window in place of
the sequence length, or with `causal` the keys that its queries see.
"""

from __future__ import annotations

from functools import cache

from megagpt.config import ModelConfig
from megagpt.schema.lora import LoraConfig, projection

FORWARD_AND_BACKWARD = 3  # backward computes two products for each one of the forward pass
FLOPS_PER_MULTIPLY_ADD = 2


@cache
def layer_flops(model: ModelConfig, *, causal: bool = False) -> tuple[float, ...]:
    """Return the forward FLOPs of one token by layer: the embedding, each block, the head."""
    matrices = FLOPS_PER_MULTIPLY_ADD * model.block_matmul_parameters
    blocks = (
        float(matrices + _attention_flops(model, layer, causal))
        for layer in range(model.num_layers)
    )
    head = FLOPS_PER_MULTIPLY_ADD * model.vocab_size * model.hidden_size
    return (0.0, *blocks, float(head))


def attention_flops_per_token(model: ModelConfig, *, causal: bool = False) -> float:
    """Return the forward FLOPs of the two attention products in all layers.

    Averaged over a sequence's positions.
    """
    return sum(_attention_flops(model, layer, causal) for layer in range(model.num_layers))


def _attention_flops(model: ModelConfig, layer: int, causal: bool) -> float:
    products = 2
    keys = keys_seen(model.sequence_length, model.window(layer), causal=causal)
    return products * FLOPS_PER_MULTIPLY_ADD * model.query_size * keys


def keys_seen(length: int, window: int | None, *, causal: bool) -> float:
    """Return the keys that a query attends to, averaged over a sequence's positions.

    In full they are as many as the last query sees. With `causal` a query at position i attends to
    i + 1 keys, at most the window.
    """
    most = length if window is None else min(window, length)
    if not causal:
        return most
    return (most * (most + 1) / 2 + (length - most) * most) / length


def model_flops_per_token(
    model: ModelConfig, *, causal: bool = False, lora: LoraConfig | None = None
) -> float:
    """Return the forward and backward FLOPs of one trained token.

    Attention counts in full, or its causal half with `causal`. With adapters, backward computes no
    product for the gradient of a frozen weight; the adapters' own products count.
    """
    forward = sum(layer_flops(model, causal=causal))
    if lora is None:
        return FORWARD_AND_BACKWARD * forward
    attention = attention_flops_per_token(model, causal=causal)
    own = FLOPS_PER_MULTIPLY_ADD * model.num_layers * adapter_elements(lora, model)
    frozen = forward - attention
    return FORWARD_AND_BACKWARD * (attention + own) + (FORWARD_AND_BACKWARD - 1) * frozen


def adapter_elements(lora: LoraConfig, model: ModelConfig) -> int:
    """Return the elements of the adapters of one block."""
    targets = (projection(name, model) for name in lora.projections(model))
    return sum(lora.rank * (target.inputs + target.outputs) for target in targets)


def model_flops_utilisation(
    model: ModelConfig,
    *,
    tokens_per_s_per_device: float,
    peak_flops_per_s: float,
    causal: bool = False,
    lora: LoraConfig | None = None,
) -> float:
    """Return the MFU: the share of a device's peak that the model's mathematics uses, 0 to 1."""
    needed = model_flops_per_token(model, causal=causal, lora=lora)
    return tokens_per_s_per_device * needed / peak_flops_per_s
