"""The model against transformers' GPT-2 and Llama with the same random weights: logits and every gradient."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megagpt.config import ModelConfig
from megagpt.model import GPT

LAYERS, VOCABULARY, LENGTH = 2, 128, 24
GPT2 = ModelConfig(vocab_size=VOCABULARY, num_layers=LAYERS, hidden_size=48, num_heads=4, sequence_length=LENGTH)
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


def grouped(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """Rows of separate projections in our order: the queries of a key-value group, then its k, then its v."""
    per_group = [rows.unflatten(0, (config.num_kv_heads, -1)) for rows in (q, k, v)]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def from_gpt2(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors (weights, or their gradients) under our names; its projections are stored (inputs, outputs)."""
    ours = {
        "embedding.tokens.weight": theirs["transformer.wte.weight"],
        "embedding.positions.weight": theirs["transformer.wpe.weight"],
    }
    pairs = {"head.norm": "transformer.ln_f"}
    for layer in range(LAYERS):
        mine, its = f"blocks.{layer}", f"transformer.h.{layer}"
        pairs |= {f"{mine}.attention_norm": f"{its}.ln_1", f"{mine}.attention.output": f"{its}.attn.c_proj"}
        pairs |= {f"{mine}.mlp_norm": f"{its}.ln_2", f"{mine}.mlp.up": f"{its}.mlp.c_fc"}
        pairs |= {f"{mine}.mlp.down": f"{its}.mlp.c_proj"}
        for kind in ("weight", "bias"):
            fused = theirs[f"{its}.attn.c_attn.{kind}"]
            ours[f"{mine}.attention.qkv.{kind}"] = grouped(*fused.movedim(-1, 0).chunk(3), GPT2)
    for mine, its in pairs.items():
        for kind in ("weight", "bias"):
            ours[f"{mine}.{kind}"] = theirs[f"{its}.{kind}"].movedim(-1, 0)
    return ours


def from_llama(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Llama's tensors (weights, or their gradients) under our names; the gate and the value of SwiGLU alternate."""
    ours = {
        "embedding.tokens.weight": theirs["model.embed_tokens.weight"],
        "head.norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for layer in range(LAYERS):
        mine, its = f"blocks.{layer}", f"model.layers.{layer}"
        q, k, v = (theirs[f"{its}.self_attn.{which}_proj.weight"] for which in "qkv")
        gate, value = theirs[f"{its}.mlp.gate_proj.weight"], theirs[f"{its}.mlp.up_proj.weight"]
        ours |= {
            f"{mine}.attention_norm.weight": theirs[f"{its}.input_layernorm.weight"],
            f"{mine}.attention.qkv.weight": grouped(q, k, v, LLAMA),
            f"{mine}.attention.output.weight": theirs[f"{its}.self_attn.o_proj.weight"],
            f"{mine}.mlp_norm.weight": theirs[f"{its}.post_attention_layernorm.weight"],
            f"{mine}.mlp.up.weight": torch.stack((gate, value), dim=1).flatten(0, 1),
            f"{mine}.mlp.down.weight": theirs[f"{its}.mlp.down_proj.weight"],
        }
    return ours


def their_gpt2() -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_layer": LAYERS, "n_embd": 48, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def their_llama() -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
    mlp_size = {"intermediate_size": LLAMA.mlp_size}
    return LlamaForCausalLM(LlamaConfig(**shape, **mlp_size, num_key_value_heads=2, rms_norm_eps=1e-5))


def randomise_(model: nn.Module) -> None:
    """Values far from the usual start, norms and biases included, so that no tensor could be swapped unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)


# Llama's angles are fp32 in both models, each with its own rounding of the frequencies: 24 positions x 6e-8.
@pytest.mark.parametrize(
    ("config", "their_model", "to_ours", "dtype", "tolerance"),
    [
        pytest.param(GPT2, their_gpt2, from_gpt2, torch.float64, 1e-12, id="gpt2-fp64"),
        pytest.param(GPT2, their_gpt2, from_gpt2, torch.float32, 1e-5, id="gpt2-fp32"),
        pytest.param(LLAMA, their_llama, from_llama, torch.float64, 1e-5, id="llama-fp64"),
        pytest.param(LLAMA, their_llama, from_llama, torch.float32, 2e-5, id="llama-fp32"),
    ],
)
def test_logits_and_gradients_are_those_of_transformers(config, their_model, to_ours, dtype, tolerance):
    theirs = their_model()
    randomise_(theirs)
    theirs.to(dtype)
    ours = GPT(config).to(dtype)
    missing, unexpected = ours.load_state_dict(to_ours(dict(theirs.named_parameters())), strict=False)
    assert missing == (["head.weight"] if config.tie_embeddings else [])
    assert unexpected == []

    tokens, targets = torch.randint(VOCABULARY, (2, 3, LENGTH), generator=torch.Generator().manual_seed(1))
    logits, expected = ours(tokens), theirs(tokens).logits
    assert_near(logits, expected, tolerance, "logits")
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()

    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their_gradients = to_ours({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, their_gradients[name], tolerance, name)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Equal within a tolerance relative to the largest value."""
    scale = expected.abs().max()
    assert scale > 0, name
    assert (actual - expected).abs().max() <= tolerance * scale, name
