"""The model against transformers' GPT-2, Llama and StarCoder 2 with the same random weights:
logits, every gradient.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from megagpt.config import ModelConfig
from megagpt.huggingface import architectures
from megagpt.model import GPT

LAYERS, VOCABULARY, LENGTH = 2, 128, 24
GPT2 = ModelConfig(
    vocab_size=VOCABULARY, num_layers=LAYERS, hidden_size=48, num_heads=4, sequence_length=LENGTH
)
LLAMA = ModelConfig(
    vocab_size=VOCABULARY,
    num_layers=LAYERS,
    hidden_size=48,
    num_heads=6,
    num_kv_heads=2,
    sequence_length=LENGTH,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
STARCODER2 = LLAMA.model_copy(
    update={"norm": "layernorm", "activation": "gelu", "bias": True, "tie_embeddings": True}
)


def their_gpt2() -> nn.Module:
    shape = {
        "vocab_size": VOCABULARY,
        "n_positions": LENGTH,
        "n_layer": LAYERS,
        "n_embd": 48,
        "n_head": 4,
    }
    return GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def their_llama() -> nn.Module:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
    }
    mlp_size = {"intermediate_size": LLAMA.mlp_size}
    return LlamaForCausalLM(
        LlamaConfig(**shape, **mlp_size, num_key_value_heads=2, rms_norm_eps=1e-5)
    )


def their_starcoder2() -> nn.Module:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
    }
    return Starcoder2ForCausalLM(
        Starcoder2Config(**shape, intermediate_size=192, num_key_value_heads=2)
    )


def to_ours(
    architecture: architectures.Architecture, theirs: dict[str, Tensor], model: ModelConfig
) -> dict[str, Tensor]:
    """A whole model's tensors (weights, or their gradients) under our names."""
    parts = [part for part in architecture.parts(model) if part.stored]
    return {
        part.name: part.relation.join([theirs[name] for name in part.theirs], model)
        for part in parts
    }


def randomise_(model: nn.Module) -> None:
    """Values far from the usual start, norms and biases included, so that no tensor could be
    swapped unnoticed.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)


# Llama's angles are fp32 in both models, each with its own rounding of the frequencies: 24
# positions x 6e-8.
@pytest.mark.parametrize(
    ("architecture", "config", "their_model", "dtype", "tolerance"),
    [
        pytest.param(architectures.GPT2, GPT2, their_gpt2, torch.float64, 1e-12, id="gpt2-fp64"),
        pytest.param(architectures.GPT2, GPT2, their_gpt2, torch.float32, 1e-5, id="gpt2-fp32"),
        pytest.param(architectures.LLAMA, LLAMA, their_llama, torch.float64, 1e-5, id="llama-fp64"),
        pytest.param(architectures.LLAMA, LLAMA, their_llama, torch.float32, 2e-5, id="llama-fp32"),
        pytest.param(
            architectures.STARCODER2,
            STARCODER2,
            their_starcoder2,
            torch.float64,
            1e-5,
            id="starcoder2-fp64",
        ),
    ],
)
def test_logits_and_gradients_are_those_of_transformers(
    architecture, config, their_model, dtype, tolerance
):
    theirs = their_model()
    randomise_(theirs)
    theirs.to(dtype)
    ours = GPT(config).to(dtype)
    missing, unexpected = ours.load_state_dict(
        to_ours(architecture, dict(theirs.named_parameters()), config), strict=False
    )
    assert missing == (["head.weight"] if config.tie_embeddings else [])
    assert unexpected == []

    tokens, targets = torch.randint(
        VOCABULARY, (2, 3, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    logits, expected = ours(tokens), theirs(tokens).logits
    assert_near(logits, expected, tolerance, "logits")
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()

    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their_gradients = to_ours(
        architecture, {n: p.grad for n, p in theirs.named_parameters()}, config
    )
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, their_gradients[name], tolerance, name)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Equal within a tolerance relative to the largest value."""
    scale = expected.abs().max()
    assert scale > 0, name
    assert (actual - expected).abs().max() <= tolerance * scale, name
