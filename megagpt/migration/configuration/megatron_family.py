"""Keys that gpt-neox and Megatron-DeepSpeed share, for both are Megatron-LM at heart.

Names have underscores here; both accept hyphens too. Sources: megatron/neox_arguments/neox_args.py
and configs/neox_arguments.md of gpt-neox, megatron/arguments.py of Megatron-DeepSpeed.
"""

from __future__ import annotations

from typing import Any

from megagpt.migration.configuration.ledger import Ledger
from megagpt.schema.synonyms import SYNONYMS

Options = dict[str, Any]

MODEL = "megagpt.model"
# Names that are neither ours nor among the synonyms.
NAMES = {
    "num_layers": f"{MODEL}.num_layers",
    "hidden_size": f"{MODEL}.hidden_size",
    "num_kv_heads": f"{MODEL}.num_kv_heads",
    "feedforward_size": f"{MODEL}.mlp_size",
    "rotary_emb_base": f"{MODEL}.rope_base",
    "sliding_window_width": f"{MODEL}.sliding_window",
    "vocab_size": f"{MODEL}.vocabulary",
    "sequence_parallel": "megagpt.parallel.sequence",
    "wandb_group": "wandb.group",
    "wandb_team": "wandb.team",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "gas": "gradient_accumulation_steps",
}
# Keys that need more than another name have a function of their own.
NOT_BY_NAME = {
    *("pos_emb", "position_embedding_type", "max_position_embeddings", "normalization", "norm"),
    *("layernorm_epsilon", "activation", "attention_dropout", "hidden_dropout", "qk_layernorm"),
    *("add_bias_linear", "lr", "learning_rate", "min_lr", "lr_decay_style", "lr_decay_iters"),
    *("lr_warmup_iters", "weight_decay", "adam_beta1", "adam_beta2", "data_path", "precision"),
    *("checkpoint_activations", "recompute_granularity", "recompute_activations"),
    *("activations_checkpoint_method", "pipe_parallel_size", "wandb_project"),
}
NO_POSITIONS = "megagpt.model.position is learned or rotary"
IN_ONE_FILE = "files are always memory-mapped"
OWN_FORMAT = "checkpoints are this trainer's own, in the run directory (--run_dir)"
OWN_KERNELS = "its kernels choose by device, and `kernels.explain` says why"
OWN_LAUNCH = "the launcher's: deepspeed --hostfile, --num_gpus, --master_port (docs/clusters.md)"
OWN_TOKENIZER = "token files do not need it, their ids are made"
RECOMPUTED = "whole blocks are recomputed at once; see megagpt.training.recompute"
GENERATION = "of generation: launch/generate.py has its own options"
CHANGES_NOTHING: dict[str, str] = {
    **dict.fromkeys(("data_impl", "mmap_warmup", "num_workers", "dataloader_type"), IN_ONE_FILE),
    **dict.fromkeys(("save", "load", "no_save_optim", "no_save_rng"), OWN_FORMAT),
    **dict.fromkeys(("no_load_optim", "no_load_rng", "config_files"), OWN_FORMAT),
    **dict.fromkeys(("scaled_upper_triang_masked_softmax_fusion",), OWN_KERNELS),
    **dict.fromkeys(("scaled_masked_softmax_fusion", "bias_dropout_fusion"), OWN_KERNELS),
    **dict.fromkeys(("rope_fusion", "layernorm_fusion", "rmsnorm_fusion"), OWN_KERNELS),
    **dict.fromkeys(("use_flash_attn", "use_flash_attn_v2", "use_qk_fusion"), OWN_KERNELS),
    **dict.fromkeys(("no_masked_softmax_fusion", "no_bias_gelu_fusion"), OWN_KERNELS),
    **dict.fromkeys(("hostfile", "include", "exclude", "num_nodes", "num_gpus"), OWN_LAUNCH),
    **dict.fromkeys(("master_port", "master_addr", "launcher", "force_multi"), OWN_LAUNCH),
    **dict.fromkeys(("no_ssh_check", "comment", "deepspeed_mpi", "deepspeed_slurm"), OWN_LAUNCH),
    **dict.fromkeys(("distributed_backend", "local_rank", "deepspeed"), OWN_LAUNCH),
    **dict.fromkeys(("merge_file", "tokenizer_type"), OWN_TOKENIZER),
    **dict.fromkeys(("checkpoint_num_layers", "synchronize_each_layer"), RECOMPUTED),
    **dict.fromkeys(("contiguous_checkpointing", "checkpoint_in_cpu"), RECOMPUTED),
    **dict.fromkeys(("deepspeed_activation_checkpointing",), RECOMPUTED),
    **dict.fromkeys(("profile_backward", "recompute_method", "recompute_num_layers"), RECOMPUTED),
    **dict.fromkeys(("text_gen_type", "temperature", "top_p", "top_k"), GENERATION),
    **dict.fromkeys(("maximum_tokens", "num_samples", "recompute"), GENERATION),
    **dict.fromkeys(("sample_input_file", "sample_output_file", "prompt_end"), GENERATION),
    "output_layer_parallelism": "the head is split over the vocabulary",
    "attention_softmax_in_fp32": "attention accumulates in fp32",
    "log_dir": "logs are in the run directory",
    "use_cpu_initialization": "one seed gives one model on any number of ranks",
    "pipe_partition_method": "stages get blocks by their cost; launch/plan.py shows them",
    "partition_activations": "megagpt.parallel.sequence partitions them over the tensor axis",
    "use_shared_fs": "every host reads the data from its own path",
    "make_vocab_size_divisible_by": "rows of the embedding are a multiple of 128",
    "eval_results_prefix": "launch/evaluate.py prints its results",
    "exit_interval": "the stop file ends a run (docs/reliability.md)",
    "char_level_ppl": "launch/evaluate.py gives bits per byte",
    "log_grad_norm": "metrics.jsonl has the gradient norm",
}


def by_name(key: str) -> str | None:
    """Return our key for one that needs another name only."""
    return None if key in NOT_BY_NAME else NAMES.get(key, SYNONYMS.get(key))


def take_positions(options: Options, ledger: Ledger) -> None:
    """Take the kind of positions, and the length that a learned table has."""
    kind = options.pop("pos_emb", "learned")
    if kind not in ("learned", "rotary"):
        ledger.need("pos_emb", kind, f"{MODEL}.position", NO_POSITIONS)
    else:
        ledger.take("pos_emb", kind, f"{MODEL}.position")
    rows = options.pop("max_position_embeddings", None)
    length = options.get("seq_length")
    if rows is None:
        return
    if kind == "rotary" or rows == length:
        ledger.nothing("max_position_embeddings", rows, "seq_length says it")
    else:
        ledger.drop(
            "max_position_embeddings",
            rows,
            f"a learned table has a row for each position of seq_length ({length})",
        )


def take_dropout(options: Options, ledger: Ledger, default: float) -> None:
    """Take the two dropouts as one; where they differ, one must be chosen."""
    given = {key: options.pop(key, default) for key in ("hidden_dropout", "attention_dropout")}
    if len(set(given.values())) == 1:
        for key, value in given.items():
            ledger.take(key, value, f"{MODEL}.dropout")
        return
    ours = f"{MODEL}.dropout"
    for key, value in given.items():
        ledger.need(key, value, ours, "attention and residual have one dropout here")


def take_schedule(
    options: Options, ledger: Ledger, *, rate: float | None, warmup: int | None
) -> None:
    """Take style, length, floor and warm-up of the learning rate as DeepSpeed's scheduler."""
    style = options.pop("lr_decay_style", "linear")
    least = _number(options.pop("min_lr", 0.0))
    length = options.pop("lr_decay_iters", None) or options.get("train_iters")
    kinds = {"cosine": "WarmupCosineLR", "linear": "WarmupDecayLR", "constant": "WarmupLR"}
    if style not in kinds:
        why = f"schedules are {', '.join(kinds.values())}"
        ledger.need("lr_decay_style", style, "scheduler.type", why)
        return
    if warmup is None:
        ledger.nothing("warmup", None, "without train_iters its length is not known")
    ledger.take("lr_decay_style", style, "scheduler.type", kinds[style])
    ledger.put("scheduler.params.warmup_num_steps", max(warmup or 0, 2))
    ledger.put("scheduler.params.warmup_type", "linear")
    if style != "constant" and length:
        ledger.take("lr_decay_iters", length, "scheduler.params.total_num_steps")
    if style == "cosine" and rate:
        ledger.take("min_lr", least, "scheduler.params.cos_min_ratio", least / rate)
    elif least:
        ledger.drop("min_lr", least, f"{kinds[style]} has no floor")


def take_data(options: Options, ledger: Ledger, default_split: str) -> None:
    """Take the token files, where they are used in place, and the share that is held out."""
    path = options.pop("data_path", None)
    train = options.pop("train_data_paths", None)
    weights = options.pop("train_data_weights", None)
    if train:
        parts = _blend(train, weights)
        ledger.take("train_data_paths", train, "megagpt.data.path", parts)
        if weights:
            ledger.took("train_data_weights", weights, "as weights of megagpt.data.path")
    elif isinstance(path, str):
        ledger.take("data_path", path, "megagpt.data.path")
    elif path:
        ledger.take("data_path", path, "megagpt.data.path", _weighted(path))
    else:
        ledger.needed["megagpt.data.path"] = "data_path: not given"
    split = options.pop("split", default_split)
    held_out = options.pop("valid_data_paths", None)
    options.pop("valid_data_weights", None)
    if held_out:
        sets = {f"valid{number or ''}": path for number, path in enumerate(held_out)}
        ledger.take("valid_data_paths", held_out, "megagpt.data.validation", sets)
        ledger.put("megagpt.data.validation_fraction", 0.0)
        ledger.nothing("split", split, "valid_data_paths are the validation")
        return
    shares = [float(part) for part in str(split).replace("/", ",").split(",")]
    share = round(sum(shares[1:]) / sum(shares), 6)
    why = "" if not any(shares[2:]) else "validation and test together"
    ledger.take("split", split, "megagpt.data.validation_fraction", share, why)


def _blend(paths: Any, weights: Any) -> Any:
    listed = list(paths)
    if len(listed) == 1:
        return listed[0]
    shares = list(weights) if weights else [1.0] * len(listed)
    return [
        {"path": path, "weight": float(weight)} for path, weight in zip(listed, shares, strict=True)
    ]


def _weighted(words: Any) -> Any:
    """Return Megatron's list of weights and paths in turn, or of one path, as a blend."""
    listed = [str(word) for word in words]
    return listed[0] if len(listed) == 1 else _blend(listed[1::2], map(float, listed[::2]))


def take_vocabulary_file(options: Options, ledger: Ledger) -> None:
    """Take the directory of a tokenizer.json; of other files the tokenizer must be found."""
    path = options.pop("vocab_file", None)
    if path is None:
        return
    directory, _, name = str(path).rpartition("/")
    if name == "tokenizer.json":
        ledger.take("vocab_file", path, "megagpt.data.tokenizer", directory or ".")
    else:
        ledger.drop(
            "vocab_file",
            path,
            "a tokenizer is a directory with tokenizer.json: --set megagpt.data.tokenizer=DIR; "
            "without one the data are ids, of which megagpt.model.vocabulary says how many",
        )


def take_zero_stage(ledger: Ledger) -> None:
    """Raise ZeRO 0 to 1 where 16-bit weights or a pipeline need it: it computes the same."""
    enabled = [ledger.get(f"{name}.enabled") for name in ("bf16", "fp16")]
    stages = ledger.get("megagpt.parallel.pipeline") or 1
    if (ledger.get("zero_optimization.stage") or 0) == 0 and (any(enabled) or stages > 1):
        what = "16-bit weights" if any(enabled) else "a pipeline"
        why = f"{what} need ZeRO 1 here, which computes the same"
        ledger.take("zero_optimization.stage", 0, "zero_optimization.stage", 1, why)


def _number(value: Any) -> float:
    return float(value)
