"""Megatron-DeepSpeed: the arguments of its command beside its DeepSpeed JSON.

Source: megatron/arguments.py of Megatron-DeepSpeed.
"""

from __future__ import annotations

import json
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
from megagpt.schema.json_reader import Document
from megagpt.utils import UserError

DROPOUT = 0.1
SPLIT = "969,30,1"
OF_THE_JSON = "the JSON file's section says it"


def read_words(words: list[str]) -> Options:
    """Return the arguments by name: one value, a list, or True for one without a value."""
    options: Options = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            options[key] = _value(value) if equals else True
        elif not key:
            raise UserError(f"{word}: not an argument of Megatron; write --KEY VALUE")
        elif options[key] is True:
            options[key] = _value(word)
        else:
            before = options[key] if isinstance(options[key], list) else [options[key]]
            options[key] = [*before, _value(word)]
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def take_megatron(document: Document, options: Options, ledger: Ledger, source: str) -> None:
    """Move Megatron-DeepSpeed's arguments and its DeepSpeed JSON into the ledger."""
    take_deepspeed(document, ledger, source)
    _take_model(options, ledger)
    _take_batch(options, ledger)
    _take_optimizer(options, ledger)
    take_data(options, ledger, SPLIT)
    take_vocabulary_file(options, ledger)
    _take_run(options, ledger)
    for key, value in options.items():
        if key in CHANGES_NOTHING:
            ledger.nothing(key, value, CHANGES_NOTHING[key])
        elif ours := by_name(key):
            ledger.take(key, value, ours)
        elif value is False:
            ledger.nothing(key, value, "it is off")
        else:
            ledger.drop(key, value, "there is no such thing here")
    take_zero_stage(ledger)


def _take_model(options: Options, ledger: Ledger) -> None:
    rotary = options.pop("use_rotary_position_embeddings", False)
    kind = options.pop("position_embedding_type", "learned_absolute")
    names = {"learned_absolute": "learned", "rope": "rotary"}
    options["pos_emb"] = "rotary" if rotary else names.get(kind, kind)
    take_positions(options, ledger)
    take_dropout(options, ledger, DROPOUT)
    norm = str(options.pop("normalization", "layernorm")).lower()
    if norm in ("layernorm", "rmsnorm"):
        ledger.take("normalization", norm, f"{MODEL}.norm")
    else:
        ledger.need("normalization", norm, f"{MODEL}.norm", "norms are layernorm and rmsnorm")
    epsilon = float(options.pop("layernorm_epsilon", 1e-5))
    ledger.take("layernorm_epsilon", epsilon, f"{MODEL}.norm_epsilon")
    _take_activation(options, ledger)
    untied = bool(options.pop("untie_embeddings_and_output_weights", False))
    ledger.take(
        "untie_embeddings_and_output_weights", untied, f"{MODEL}.tie_embeddings", not untied
    )
    if options.pop("disable_bias_linear", False):
        for name in ("qkv_bias", "output_bias", "mlp_bias"):
            ledger.take("disable_bias_linear", True, f"{MODEL}.{name}", False)


def _take_activation(options: Options, ledger: Ledger) -> None:
    """Take the one of its four; the fused gelu, its default, is the tanh form."""
    exact = options.pop("no_bias_gelu_fusion", False)
    chosen = next(
        (
            name
            for key, name in (("swiglu", "swiglu"), ("squared_relu", "squared_relu"))
            if options.pop(key, False)
        ),
        "gelu_exact" if exact else "gelu",
    )
    ledger.put(f"{MODEL}.activation", chosen)
    ledger.took("activation", chosen, f"as {MODEL}.activation", "gelu is fused, in its tanh form")
    for key in ("geglu", "openai_gelu", "onnx_safe"):
        if (value := options.pop(key, None)) and key == "geglu":
            ledger.need(key, value, f"{MODEL}.activation", "its gate is the exact gelu")


def _take_batch(options: Options, ledger: Ledger) -> None:
    for key, ours in (
        ("micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("global_batch_size", "train_batch_size"),
    ):
        if (value := options.pop(key, None)) is not None:
            ledger.take(key, value, ours)
    if (ramp := options.pop("rampup_batch_size", None)) is not None:
        ledger.drop("rampup_batch_size", ramp, "the batch has one size")
    samples = options.pop("train_samples", None)
    if samples is not None and (batch := ledger.get("train_batch_size")):
        steps = samples // batch
        options["train_iters"] = steps
        ledger.took("train_samples", samples, f"as train_iters {steps}")


def _take_optimizer(options: Options, ledger: Ledger) -> None:
    kind = options.pop("optimizer", "adam")
    if kind == "adam":
        why = "its Adam decouples the weight decay"
        ledger.take("optimizer", kind, "optimizer.type", "AdamW", why)
    else:
        ledger.need("optimizer", kind, "optimizer.type", "optimizers are Adam and AdamW")
    rate = options.pop("lr", None)
    if rate is not None:
        ledger.take("lr", rate, "optimizer.params.lr")
    betas = [options.pop("adam_beta1", 0.9), options.pop("adam_beta2", 0.999)]
    for key, value in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
        ledger.took(key, value, "as optimizer.params.betas")
    ledger.put("optimizer.params.betas", betas)
    decay = options.pop("weight_decay", 0.01)
    ledger.take("weight_decay", decay, "optimizer.params.weight_decay")
    length = options.get("lr_decay_iters") or options.get("train_iters")
    steps = options.pop("lr_warmup_iters", 0)
    if (share := options.pop("lr_warmup_fraction", None)) is not None and length:
        steps = int(share * length)
        ledger.took("lr_warmup_fraction", share, f"as scheduler.params.warmup_num_steps {steps}")
    else:
        ledger.took("lr_warmup_iters", steps, f"as scheduler.params.warmup_num_steps {steps or 2}")
    take_schedule(options, ledger, rate=rate, warmup=steps)


def _take_run(options: Options, ledger: Ledger) -> None:
    for key in ("fp16", "bf16"):
        if options.pop(key, False):
            ledger.take(key, True, f"{key}.enabled")
    if (stage := options.pop("zero_stage", None)) is not None:
        if ledger.get("zero_optimization.stage") is None:
            ledger.take("zero_stage", stage, "zero_optimization.stage")
        else:
            ledger.nothing("zero_stage", stage, OF_THE_JSON)
    for key in ("deepspeed_config", "deepspeed"):
        if key in options:
            ledger.nothing(key, options.pop(key), OF_THE_JSON)
    recomputed = [
        (key, options.pop(key))
        for key in ("checkpoint_activations", "recompute_activations", "recompute_granularity")
        if key in options
    ]
    for key, value in recomputed:
        meant = "selective" if value == "selective" or key == "recompute_activations" else "full"
        ledger.take(key, value, "megagpt.training.recompute", meant)
    seed = options.pop("seed", 1234)
    ledger.take("seed", seed, "megagpt.training.seed")
    ledger.put("megagpt.data.seed", seed)
    if (directory := options.pop("tensorboard_dir", None)) is not None:
        ledger.take("tensorboard_dir", directory, "tensorboard.output_path")
        ledger.put("tensorboard.enabled", True)
