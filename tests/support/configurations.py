"""Small configurations for tests, as the dicts that a JSON file would hold."""

from typing import Any

Config = dict[str, Any]

LLAMA: Config = {
    "activation": "swiglu",
    "norm": "rmsnorm",
    "position": "rotary",
    "num_kv_heads": 2,
    "bias": False,
}
# Keys of a model that make a tiny one what the family's published ones are. Windows, and the
# lengths of a rotary scaling, are so short that they act within 16 tokens.
KINDS: dict[str, Config] = {
    "gpt2": {},
    "llama3": LLAMA
    | {
        "mlp_size": 160,
        "rope_base": 500_000.0,
        "rope_scaling": {"type": "llama3", "factor": 8.0, "original_length": 16},
        "z_loss": 1e-3,
    },
    "qwen3": LLAMA
    | {
        "head_size": 16,
        "qk_norm": "per_head",
        "qkv_bias": True,
        "norm_epsilon": 1e-6,
        "sliding_window": 6,
    },
    "gemma2": LLAMA
    | {
        "activation": "geglu",
        "head_size": 12,
        "norm_weight_offset": 1,
        "post_norm": "both",
        "score_scale": 0.25,
        "score_softcap": 2.0,
        "logit_softcap": 3.0,
        "sliding_window": 5,
        "sliding_window_pattern": ["sliding", "full"],
        "embedding_scale": 1.5,
    },
    "neox": {
        "position": "rotary",
        "rope_fraction": 0.5,
        "activation": "gelu_exact",
        "parallel_residual": True,
    },
    "olmo2": LLAMA | {"qk_norm": "whole", "post_norm": "instead", "activation": "squared_relu"},
}


def tiny(*, batch: int = 8, micro: int = 2, steps: int = 4, **model: Any) -> Config:
    """A GPT of some 30 thousand parameters with AdamW, clipping that acts, weight decay."""
    shape = {
        "vocab_size": 128,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "sequence_length": 16,
    }
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 0},
        "megagpt": {"model": shape | model, "training": {"total_steps": steps}},
    }


def with_zero(
    config: Config, stage: int, optimizer: str = "none", parameters: str = "none", **keys: Any
) -> Config:
    """The same run under a ZeRO stage with offload; small parameters are partitioned too."""
    zero: Config = {"stage": stage, **keys}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer}
    if parameters != "none":
        zero["offload_param"] = {"device": parameters}
    return config | {"zero_optimization": zero}
