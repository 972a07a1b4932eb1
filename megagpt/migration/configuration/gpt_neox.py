"""gpt-neox's YAML, key by key."""

from __future__ import annotations

import math
from typing import Any

from megagpt.migration.configuration.deepspeed_json import take_deepspeed
from megagpt.migration.configuration.ledger import Ledger
from megagpt.migration.configuration.megatron_family import (
    CHANGES_NOTHING,
    MODEL,
    Options,
    by_name,
    take_data,
    take_dropout,
    take_positions,
    take_schedule,
    take_vocabulary_file,
    take_zero_stage,
)
from megagpt.schema.foreign import FOREIGN
from megagpt.utils import UserError

# gpt-neox's defaults that are not ours (configs/neox_arguments.md).
DEFAULTS: Options = {
    "norm": "layernorm",
    "pos_emb": "learned",
    "activation": "gelu",
    "weight_decay": 0.01,
    "gradient_clipping": 1.0,
    "seed": 1234,
    "eval_interval": 1000,
    "eval_iters": 100,
}
DROPOUT = 0.1
SPLIT = "969,30,1"
WARMUP = 0.01
BELONGING = (
    *("num_layers", "hidden_size", "train_iters", "pipe_parallel_size", "model_parallel_size"),
    *("lr_decay_style", "num_attention_heads", "seq_length", "data_path", "vocab_file"),
)
DEEPSPEED = {row.path[0] for row in FOREIGN} | {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "scheduler", "fp16", "bf16", "data_types", "communication_data_type"),
    *("zero_optimization", "aio", "wandb", "tensorboard"),
}
DROPPED = {
    "init_method": "initial weights are normal, of standard deviation megagpt.model.init_std",
    "output_layer_init_method": "output projections begin at init_std / sqrt(2 x num_layers)",
    "checkpoint_scale": "checkpoints are equally far apart: megagpt.checkpoint.interval_steps",
    "extra_save_iters": "checkpoints are equally far apart: megagpt.checkpoint.interval_steps",
    "finetune": "launch/import_checkpoint.py starts a run from the weights of another",
    "eval_tasks": "launch/evaluate.py --tasks",
    "test_data_paths": "launch/evaluate.py evaluates on what megagpt.data.validation names",
    "test_data_weights": "each validation set has its own loss",
    "override_lr_scheduler": "a run goes on with another schedule by --allow_change scheduler",
    "use_checkpoint_lr_scheduler": "a resumed run has its own schedule",
    "eod_mask_loss": "the end of a document is a target like others",
}


def take_gpt_neox(given: dict[str, Any], ledger: Ledger, source: str) -> None:
    """Move gpt-neox's keys into the ledger; raise UserError if they are not gpt-neox's."""
    options = {_name(key): _plain(value) for key, value in given.items()}
    _require_ours(options, source)
    for key, value in DEFAULTS.items():
        options.setdefault(key, value)
    _take_model(options, ledger)
    _take_precision(options, ledger)
    _take_optimizer(options, ledger)
    take_data(options, ledger, SPLIT)
    take_vocabulary_file(options, ledger)
    _take_run(options, ledger)
    _take_rest(options, ledger, source)
    take_zero_stage(ledger)


def _name(key: Any) -> str:
    return str(key).replace("-", "_")


def _plain(value: Any) -> Any:
    """Return a value of YAML 1.1, in which 1e-8 is a text and not a number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _require_ours(options: Options, source: str) -> None:
    if not any(key in options for key in BELONGING):
        named = ", ".join(list(options)[:4]) or "nothing"
        raise UserError(
            f"{source}: not a configuration of gpt-neox (found {named}; need some of "
            f"{', '.join(BELONGING[:5])})"
        )


def _take_model(options: Options, ledger: Ledger) -> None:
    take_positions(options, ledger)
    take_dropout(options, ledger, DROPOUT)
    _take_norm(options, ledger)
    _take_mlp(options, ledger)
    _take_bias(options, ledger)
    untied = bool(options.pop("no_weight_tying", False))
    ledger.take("no_weight_tying", untied, f"{MODEL}.tie_embeddings", not untied)
    parallel = bool(options.pop("gpt_j_residual", False))
    ledger.take("gpt_j_residual", parallel, f"{MODEL}.parallel_residual")
    if (tied := options.pop("gpt_j_tied", False)) and parallel:
        why = "attention and MLP have a norm each"
        ledger.need("gpt_j_tied", tied, f"{MODEL}.parallel_residual", why)
    kinds = options.pop("attention_config", None)
    if kinds and {kind for names, _ in kinds for kind in names} - {"global", "flash"}:
        why = "attention is causal over all tokens, or over megagpt.model.sliding_window"
        ledger.need("attention_config", kinds, f"{MODEL}.sliding_window", why)
    elif kinds:
        ledger.nothing("attention_config", kinds, "every layer attends to all tokens")
    small = options.get("init_method") == "small_init" and "hidden_size" in options
    if small:
        options.pop("init_method")
        std = round(math.sqrt(2 / (5 * options["hidden_size"])), 6)
        ledger.take("init_method", "small_init", f"{MODEL}.init_std", std, "sqrt(2 / (5 x width))")


def _take_norm(options: Options, ledger: Ledger) -> None:
    kind = options.pop("norm")
    epsilons = {"layernorm": ("layernorm_epsilon", 1e-5), "rmsnorm": ("rms_norm_epsilon", 1e-8)}
    kind = {"te_layernorm": "layernorm", "te_rmsnorm": "rmsnorm"}.get(kind, kind)
    if kind not in epsilons:
        ledger.need("norm", kind, f"{MODEL}.norm", "norms are layernorm and rmsnorm")
        return
    ledger.take("norm", kind, f"{MODEL}.norm")
    key, default = epsilons[kind]
    ledger.take(key, float(options.pop(key, default)), f"{MODEL}.norm_epsilon")
    for other in ("layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon"):
        if other in options:
            ledger.nothing(other, options.pop(other), f"the norm is {kind}")


def _take_mlp(options: Options, ledger: Ledger) -> None:
    kind = options.pop("mlp_type", "regular")
    name = options.pop("activation")
    fused = options.pop("bias_gelu_fusion", False)
    width = options.get("hidden_size")
    if kind == "llama" or name == "swiglu":
        ledger.take("activation", name, f"{MODEL}.activation", "swiglu")
        if kind == "llama":
            ledger.took("mlp_type", kind, f"as {MODEL}.activation, without biases")
            ledger.put(f"{MODEL}.mlp_bias", False)
        if "intermediate_size" not in options and width:
            size = 256 * math.ceil(int(8 * width / 3) / 256)
            ledger.put(f"{MODEL}.mlp_size", size)
    elif name == "gelu":
        # The fused kernel is the tanh form, torch's own the exact one.
        meant = "gelu" if fused else "gelu_exact"
        ledger.take(
            "activation", name, f"{MODEL}.activation", meant, f"bias_gelu_fusion is {fused}"
        )
    else:
        why = "activations are gelu, gelu_exact, squared_relu, swiglu, geglu in its tanh form"
        ledger.need("activation", name, f"{MODEL}.activation", why)
    if fused:
        ledger.took("bias_gelu_fusion", fused, "with activation")


def _take_bias(options: Options, ledger: Ledger) -> None:
    places = {
        "use_bias_in_norms": ("norm_bias",),
        "use_bias_in_attn_linear": ("qkv_bias", "output_bias"),
        "use_bias_in_mlp": ("mlp_bias",),
    }
    for key, names in places.items():
        if key not in options:
            continue
        value = options.pop(key)
        if key == "use_bias_in_norms" and ledger.get(f"{MODEL}.norm") == "rmsnorm":
            ledger.nothing(key, value, "an RMS norm has none")
            continue
        for name in names:
            ledger.take(key, value, f"{MODEL}.{name}")


def _take_precision(options: Options, ledger: Ledger) -> None:
    """Take fp16's section, in which `type` may say bfloat16, and the one word of `precision`."""
    half = options.get("fp16")
    if isinstance(half, dict):
        half.pop("fp16", None)  # read by nobody
        if half.pop("type", "") == "bfloat16" and half.get("enabled"):
            ledger.take("fp16.type", "bfloat16", "bf16.enabled", True)
            options.pop("fp16")
    word = options.pop("precision", None)
    if word in ("bfloat16", "fp16"):
        ledger.take("precision", word, f"{'bf16' if word == 'bfloat16' else word}.enabled", True)
    elif word is not None:
        ledger.nothing("precision", word, "weights are fp32 unless bf16 or fp16 is enabled")
    if "fp32_allreduce" in options:
        value = options.pop("fp32_allreduce")
        if value:
            ledger.take("fp32_allreduce", value, "communication_data_type", "fp32")
        else:
            ledger.nothing("fp32_allreduce", value, "at this value")


def _take_optimizer(options: Options, ledger: Ledger) -> None:
    """Take Adam, which is AdamW there, its numbers, the weight decay and the schedule."""
    section = options.pop("optimizer", None) or {}
    kind = section.get("type", options.pop("optimizer_type", "Adam"))
    numbers = dict(section.get("params", {}))
    decay = numbers.pop("weight_decay", options.pop("weight_decay"))
    options.pop("weight_decay", None)
    if str(kind).lower() in ("adam", "adamw", "cpu_adam", "cpu_torch_adam"):
        why = "its Adam decouples the weight decay"
        ledger.take("optimizer.type", kind, "optimizer.type", "AdamW", why)
    else:
        ledger.need("optimizer.type", kind, "optimizer.type", "optimizers are Adam and AdamW")
    if (rate := numbers.pop("lr", options.pop("lr", None))) is not None:
        ledger.take("optimizer.params.lr", float(rate), "optimizer.params.lr")
    for name, value in numbers.items():
        if name in ("betas", "eps"):
            ledger.take(f"optimizer.params.{name}", value, f"optimizer.params.{name}")
        else:
            ledger.drop(f"optimizer.params.{name}", value, "the optimizer has no such number here")
    ledger.take("weight_decay", float(decay), "optimizer.params.weight_decay")
    if "scheduler" in options:
        for key in ("lr_decay_style", "lr_decay_iters", "min_lr", "warmup"):
            if key in options:
                ledger.nothing(key, options.pop(key), "scheduler says it")
        return
    share = options.pop("warmup", WARMUP)
    length = options.get("lr_decay_iters") or options.get("train_iters")
    warmup = int(share * length) if length else None
    if warmup is not None:
        ledger.took("warmup", share, f"as scheduler.params.warmup_num_steps {max(warmup, 2)}")
    take_schedule(options, ledger, rate=float(rate) if rate else None, warmup=warmup)


def _take_run(options: Options, ledger: Ledger) -> None:
    """Take the mesh, recomputation, checkpoints and logs."""
    stages = options.pop("pipe_parallel_size", 0)
    ledger.take("pipe_parallel_size", stages, "megagpt.parallel.pipeline", max(stages, 1))
    if (whole := options.pop("checkpoint_activations", None)) is not None:
        meant = "full" if whole else "none"
        ledger.take("checkpoint_activations", whole, "megagpt.training.recompute", meant)
    factor = options.pop("checkpoint_factor", None)
    if factor is not None and options.get("checkpoint_scale", "linear") == "linear":
        ledger.take("checkpoint_factor", factor, "megagpt.checkpoint.interval_steps")
    elif factor is not None:
        ledger.drop("checkpoint_factor", factor, DROPPED["checkpoint_scale"])
    if (kept := options.pop("keep_last_n_checkpoints", None)) is not None:
        why = "" if kept >= 2 else "one may be damaged"
        ledger.take("keep_last_n_checkpoints", kept, "megagpt.checkpoint.keep", max(kept, 2), why)
    seed = options.pop("seed")
    ledger.take("seed", seed, "megagpt.training.seed")
    ledger.put("megagpt.data.seed", seed)
    if (enabled := options.pop("use_wandb", None)) is not None:
        ledger.take("use_wandb", enabled, "wandb.enabled", bool(enabled))
    if (project := options.pop("wandb_project", None)) is not None:
        ledger.take("wandb_project", project, "wandb.project")
    if (directory := options.pop("tensorboard_dir", None)) is not None:
        ledger.take("tensorboard_dir", directory, "tensorboard.output_path")
        ledger.put("tensorboard.enabled", True)
    if "log_interval" in options and "steps_per_print" in options:
        ledger.nothing("steps_per_print", options.pop("steps_per_print"), "log_interval says it")


def _take_rest(options: Options, ledger: Ledger, source: str) -> None:
    """Take what needs another name only, DeepSpeed's sections, and name what is left."""
    of_deepspeed = {key: options.pop(key) for key in list(options) if key in DEEPSPEED}
    for key, value in options.items():
        if value is None:
            ledger.nothing(key, value, "absent")
        elif key in CHANGES_NOTHING:
            ledger.nothing(key, value, CHANGES_NOTHING[key])
        elif key in DROPPED:
            ledger.drop(key, value, DROPPED[key])
        elif ours := by_name(key):
            ledger.take(key, value, ours)
        elif value is False:
            ledger.nothing(key, value, "it is off")
        else:
            ledger.drop(key, value, "there is no such thing here")
    extra = of_deepspeed.pop("deepspeed_extra_args", None) or {}
    take_deepspeed({**of_deepspeed, **extra}, ledger, source)
