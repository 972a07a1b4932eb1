"""Presets of open models: the values of their published config.json, by our keys.

`sequence_length` is the context that the model was pre-trained with. Most can be run at a longer
one. `OPEN_VOCABULARIES` are the rows of the published embeddings. The tests build transformers'
model of the same config.json and compare the number of parameters with it and with the published
one.
"""

from __future__ import annotations

from typing import Any

_LLAMA = {
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}
_LLAMA3 = {**_LLAMA, "num_kv_heads": 8, "rope_base": 500_000.0, "sequence_length": 8192}
# Qwen 3 technical report (arXiv 2505.09388), table 1; pre-trained with 32,768 tokens (section 3.2).
_QWEN3 = {
    **_LLAMA,
    "num_kv_heads": 8,
    "head_size": 128,
    "qk_norm": "per_head",
    "norm_epsilon": 1e-6,
    "rope_base": 1_000_000.0,
    "sequence_length": 32768,
}

OPEN_MODELS: dict[str, dict[str, Any]] = {
    # meta-llama/Llama-3.2-1B
    "llama3.2-1b": {
        **_LLAMA3,
        "num_layers": 16,
        "hidden_size": 2048,
        "num_heads": 32,
        "mlp_size": 8192,
        "tie_embeddings": True,
        "rope_scaling": {
            "type": "llama3",
            "factor": 32.0,
            "original_length": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    # meta-llama/Meta-Llama-3-8B and -70B (arXiv 2407.21783, table 3)
    "llama3-8b": {
        **_LLAMA3,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "mlp_size": 14336,
    },
    "llama3-70b": {
        **_LLAMA3,
        "num_layers": 80,
        "hidden_size": 8192,
        "num_heads": 64,
        "mlp_size": 28672,
    },
    # mistralai/Mistral-7B-v0.1 (arXiv 2310.06825, table 1)
    "mistral-7b": {
        **_LLAMA,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "mlp_size": 14336,
        "sliding_window": 4096,
        "sequence_length": 8192,
    },
    # Qwen/Qwen3-0.6B-Base, -8B-Base, Qwen3-32B
    "qwen3-0.6b": {
        **_QWEN3,
        "num_layers": 28,
        "hidden_size": 1024,
        "num_heads": 16,
        "mlp_size": 3072,
        "tie_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "num_layers": 36,
        "hidden_size": 4096,
        "num_heads": 32,
        "mlp_size": 12288,
    },
    "qwen3-32b": {
        **_QWEN3,
        "num_layers": 64,
        "hidden_size": 5120,
        "num_heads": 64,
        "mlp_size": 25600,
    },
    # HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": {
        **_LLAMA,
        "num_layers": 30,
        "hidden_size": 576,
        "num_heads": 9,
        "num_kv_heads": 3,
        "mlp_size": 1536,
        "rope_base": 100_000.0,
        "tie_embeddings": True,
        "sequence_length": 8192,
    },
    # allenai/OLMo-2-1124-7B (arXiv 2501.00656)
    "olmo2-7b": {
        **_LLAMA,
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "mlp_size": 11008,
        "norm_epsilon": 1e-6,
        "post_norm": "instead",
        "qk_norm": "whole",
        "rope_base": 500_000.0,
        "sequence_length": 4096,
    },
    # EleutherAI/pythia-1b (arXiv 2304.01373, table 1)
    "pythia-1b": {
        "num_layers": 16,
        "hidden_size": 2048,
        "num_heads": 8,
        "position": "rotary",
        "rope_fraction": 0.25,
        "activation": "gelu_exact",
        "parallel_residual": True,
        "tie_embeddings": False,
        "sequence_length": 2048,
    },
    # google/gemma-2-2b (arXiv 2408.00118, table 1)
    "gemma2-2b": {
        **_LLAMA,
        "num_layers": 26,
        "hidden_size": 2304,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_size": 256,
        "mlp_size": 9216,
        "activation": "geglu",
        "norm_epsilon": 1e-6,
        "norm_weight_offset": 1,
        "post_norm": "both",
        "sliding_window": 4096,
        "sliding_window_pattern": ["sliding", "full"],
        "score_softcap": 50.0,
        "logit_softcap": 30.0,
        "embedding_scale": 48.0,  # the root of hidden_size
        "tie_embeddings": True,
        "sequence_length": 8192,
    },
}
OPEN_VOCABULARIES = {
    "llama3.2-1b": 128_256,
    "llama3-8b": 128_256,
    "llama3-70b": 128_256,
    "mistral-7b": 32_000,
    "qwen3-0.6b": 151_936,
    "qwen3-8b": 151_936,
    "qwen3-32b": 151_936,
    "smollm2-135m": 49_152,
    "olmo2-7b": 100_352,
    "pythia-1b": 50_304,
    "gemma2-2b": 256_000,
}
