"""The model against transformers' models of each family with the same random weights: logits,
every gradient, the text that they write.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from megagpt.config import ModelConfig
from megagpt.huggingface import architectures
from megagpt.model import GPT, KeyValueCache

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
STARCODER2 = ModelConfig(
    vocab_size=VOCABULARY,
    num_layers=LAYERS,
    hidden_size=48,
    num_heads=6,
    num_kv_heads=2,
    sequence_length=LENGTH,
    position="rotary",
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
    names = {
        part.name: [architecture.stored_name(name, theirs) for name in part.theirs]
        for part in parts
    }
    assert {name for of_part in names.values() for name in of_part} == theirs.keys()
    return {
        part.name: part.relation.join([theirs[name] for name in names[part.name]], model)
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


# ------------------------------------------------------------------------------------ more families


class Family(NamedTuple):
    """A class of transformers, the keys of its config.json, and ours."""

    theirs: type[PreTrainedModel]
    their_keys: dict[str, Any]
    our_keys: dict[str, Any]

    @property
    def architecture(self) -> architectures.Architecture:
        """Which tensor is which."""
        (found,) = (a for a in architectures.ARCHITECTURES if a.name == self.theirs.__name__)
        return found


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": LENGTH,
}
GROUPED = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
LLAMA_KEYS = {
    "num_kv_heads": 2,
    "mlp_size": 80,
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}
LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PHI3_FACTORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 4.0]}


def scaled(theirs: dict[str, Any], ours: dict[str, Any], **shape: Any) -> Family:
    """Llama with a rotary scaling; the text is longer than the original context."""
    rope = {"rope_theta": 10_000.0, **theirs}
    return Family(
        LlamaForCausalLM,
        SHAPE | GROUPED | {"rope_parameters": rope} | shape,
        LLAMA_KEYS | {"rope_scaling": ours},
    )


FAMILIES = {
    "llama3.1": scaled(
        {"rope_type": "llama3", **LLAMA3_SCALING, "original_max_position_embeddings": 64},
        {"type": "llama3", **LLAMA3_SCALING, "original_length": 64},
    ),
    "linear": scaled({"rope_type": "linear", "factor": 3.0}, {"type": "linear", "factor": 3.0}),
    "dynamic": scaled(
        {"rope_type": "dynamic", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0, "original_length": 16},
        max_position_embeddings=16,
    ),
    "yarn": scaled(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"type": "yarn", "factor": 4.0, "original_length": 64},
    ),
    "yarn-untruncated": scaled(
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "truncate": False,
            "attention_factor": 1.25,
        },
        {
            "type": "yarn",
            "factor": 4.0,
            "original_length": 64,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "truncate": False,
            "attention_factor": 1.25,
        },
    ),
    "mistral": Family(
        MistralForCausalLM,
        SHAPE | GROUPED | {"sliding_window": 7, "rope_parameters": {"rope_theta": 1e6}},
        LLAMA_KEYS | {"sliding_window": 7, "rope_base": 1e6},
    ),
    "qwen2": Family(
        Qwen2ForCausalLM,
        SHAPE
        | GROUPED
        | {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
        LLAMA_KEYS
        | {
            "norm_epsilon": 1e-6,
            "qkv_bias": True,
            "tie_embeddings": True,
            "sliding_window": 5,
            "sliding_window_pattern": ["full", "full", "sliding"],
        },
    ),
    "qwen3": Family(
        Qwen3ForCausalLM,
        SHAPE | GROUPED | {"head_dim": 12},
        LLAMA_KEYS | {"head_size": 12, "qk_norm": "per_head"},
    ),
    "olmo2": Family(
        Olmo2ForCausalLM,
        SHAPE | GROUPED,
        LLAMA_KEYS | {"qk_norm": "whole", "post_norm": "instead"},
    ),
    "gemma2": Family(
        Gemma2ForCausalLM,
        SHAPE
        | GROUPED
        | {
            "head_dim": 10,
            "query_pre_attn_scalar": 7,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
        },
        LLAMA_KEYS
        | {
            "head_size": 10,
            "activation": "geglu",
            "norm_weight_offset": 1,
            "post_norm": "both",
            "score_scale": 7**-0.5,
            "score_softcap": 3.0,
            "logit_softcap": 2.0,
            "sliding_window": 6,
            "sliding_window_pattern": ["sliding", "full"],
            "embedding_scale": 48**0.5,
            "tie_embeddings": True,
        },
    ),
    "phi3": Family(
        Phi3ForCausalLM,
        SHAPE
        | GROUPED
        | {
            "sliding_window": 9,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                **PHI3_FACTORS,
            },
        },
        LLAMA_KEYS
        | {
            "sliding_window": 9,
            "rope_fraction": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "factor": LENGTH / 16,
                "original_length": 16,
                **PHI3_FACTORS,
            },
        },
    ),
    "starcoder2": Family(
        Starcoder2ForCausalLM,
        SHAPE | {"num_key_value_heads": 2, "sliding_window": 6, "use_bias": False},
        LLAMA_KEYS
        | {
            "norm": "layernorm",
            "norm_bias": True,
            "activation": "gelu",
            "tie_embeddings": True,
            "sliding_window": 6,
        },
    ),
    **{
        name: Family(
            GPTNeoXForCausalLM,
            SHAPE | {"use_parallel_residual": parallel, "rotary_pct": 0.5},
            {
                "mlp_size": 80,
                "position": "rotary",
                "rope_fraction": 0.5,
                "activation": "gelu_exact",
                "parallel_residual": parallel,
                "tie_embeddings": False,
            },
        )
        for name, parallel in {"neox": True, "neox-serial": False}.items()
    },
}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Family, PreTrainedModel, GPT]:
    """A small random model of transformers, and ours with its weights."""
    family: Family = request.param
    shape = {"num_layers": 3, "hidden_size": 48, "num_heads": 6, "sequence_length": LENGTH}
    config = ModelConfig(vocab_size=VOCABULARY, **shape, **family.our_keys)
    kind = family.theirs.config_class
    theirs = family.theirs(
        kind(**family.their_keys, attn_implementation="eager", pad_token_id=None)
    )
    randomise_(theirs)
    ours = GPT(config)
    ours.load_state_dict(
        to_ours(family.architecture, dict(theirs.named_parameters()), config), strict=False
    )
    return family, theirs, ours


def test_every_family_computes_what_transformers_does(
    pair: tuple[Family, PreTrainedModel, GPT],
) -> None:
    """Logits within 1e-5 of the largest in fp32, and every gradient."""
    family, theirs, ours = pair
    tokens, targets = torch.randint(
        VOCABULARY, (2, 3, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    logits, expected = ours(tokens), theirs(tokens).logits
    assert_near(logits, expected, 1e-5, "logits")
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()
    expected_gradients = to_ours(
        family.architecture, {name: p.grad for name, p in theirs.named_parameters()}, ours.config
    )
    for name, parameter in ours.named_parameters():
        assert_near(parameter.grad, expected_gradients[name], 1e-4, name)


@torch.no_grad()
def test_every_family_reads_on_from_its_cache_as_transformers_does(
    pair: tuple[Family, PreTrainedModel, GPT],
) -> None:
    """Token by token, past windows and past the original length of a scaling."""
    _, theirs, ours = pair
    text = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    cache, their_cache = KeyValueCache(LENGTH), None
    for piece in text.split([5] + [1] * (LENGTH - 5), dim=1):
        expected = theirs(piece, past_key_values=their_cache, use_cache=True)
        their_cache = expected.past_key_values
        assert_near(ours(piece, cache=cache), expected.logits, 1e-5, f"position {cache.length}")
