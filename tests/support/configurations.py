"""Small configurations for tests, as the dicts that a JSON file would hold."""

from typing import Any

Config = dict[str, Any]


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
