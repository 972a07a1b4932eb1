"""The presets of open models against transformers' models of their published config.json."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megagpt.config import ModelConfig
from megagpt.schema.presets import OPEN_MODELS, OPEN_VOCABULARIES

# The parameters that Hugging Face's page of each model states, and what its config.json says.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "llama3.2-1b": (
        1_235_814_400,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "llama3-8b": (
        8_030_261_248,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "llama3-70b": (
        70_553_706_496,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    "mistral-7b": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "qwen3-0.6b": (
        596_049_920,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        8_190_735_360,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "qwen3-32b": (
        32_762_123_264,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "smollm2-135m": (
        134_515_008,
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2-7b": (
        7_298_617_344,
        {
            "model_type": "olmo2",
            "vocab_size": 100352,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "pythia-1b": (
        1_011_781_632,
        {
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
        },
    ),
    "gemma2-2b": (
        2_614_341_888,
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
        },
    ),
}


def test_every_preset_is_counted() -> None:
    assert PUBLISHED.keys() == OPEN_MODELS.keys() == OPEN_VOCABULARIES.keys()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_parameters(preset: str) -> None:
    published, keys = PUBLISHED[preset]
    config = ModelConfig.model_validate({"preset": preset, "vocab_size": OPEN_VOCABULARIES[preset]})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    counted = sum(parameter.numel() for parameter in theirs.parameters())
    assert published == counted == config.num_parameters
