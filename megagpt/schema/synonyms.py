"""What other trainers call our keys: nanoGPT, Hugging Face, Megatron-LM, gpt-neox, llm.c.

An unknown key of this table gets the right suggestion, which no similarity of letters would give.
"""

from __future__ import annotations

_LAYERS = "megagpt.model.num_layers"
_WIDTH = "megagpt.model.hidden_size"
_HEADS = "megagpt.model.num_heads"
_KV_HEADS = "megagpt.model.num_kv_heads"
_MLP = "megagpt.model.mlp_size"
_EPSILON = "megagpt.model.norm_epsilon"
_LENGTH = "megagpt.model.sequence_length"
_STEPS = "megagpt.training.total_steps"
_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_ACCUMULATION = "gradient_accumulation_steps"
_RATE = "optimizer.params.lr"
_DECAY = "optimizer.params.weight_decay"
_WARMUP = "scheduler.params.warmup_num_steps"
_EVALUATION = "megagpt.training.eval_interval_steps"
_RECOMPUTE = "megagpt.training.recompute"

SYNONYMS: dict[str, str] = {
    # model
    "n_layer": _LAYERS,
    "n_layers": _LAYERS,
    "num_hidden_layers": _LAYERS,
    "depth": _LAYERS,
    "n_embd": _WIDTH,
    "d_model": _WIDTH,
    "dim": _WIDTH,
    "embed_dim": _WIDTH,
    "channels": _WIDTH,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "num_attention_heads": _HEADS,
    "n_kv_head": _KV_HEADS,
    "n_kv_heads": _KV_HEADS,
    "num_key_value_heads": _KV_HEADS,
    "num_query_groups": _KV_HEADS,
    "head_dim": "megagpt.model.head_size",
    "kv_channels": "megagpt.model.head_size",
    "ffn_hidden_size": _MLP,
    "intermediate_size": _MLP,
    "n_inner": _MLP,
    "rope_theta": "megagpt.model.rope_base",
    "rotary_base": "megagpt.model.rope_base",
    "rotary_pct": "megagpt.model.rope_fraction",
    "rotary_percent": "megagpt.model.rope_fraction",
    "partial_rotary_factor": "megagpt.model.rope_fraction",
    "layer_norm_eps": _EPSILON,
    "layer_norm_epsilon": _EPSILON,
    "layernorm_epsilon": _EPSILON,
    "rms_norm_eps": _EPSILON,
    "qk_layernorm": "megagpt.model.qk_norm",
    "add_qkv_bias": "megagpt.model.qkv_bias",
    "use_parallel_residual": "megagpt.model.parallel_residual",
    "window_size": "megagpt.model.sliding_window",
    "attn_logit_softcapping": "megagpt.model.score_softcap",
    "final_logit_softcapping": "megagpt.model.logit_softcap",
    "block_size": _LENGTH,
    "n_ctx": _LENGTH,
    "n_positions": _LENGTH,
    "max_position_embeddings": _LENGTH,
    "max_seq_len": _LENGTH,
    "max_sequence_length": _LENGTH,
    "seq_len": _LENGTH,
    "seq_length": _LENGTH,
    "seqlen": _LENGTH,
    "padded_vocab_size": "megagpt.model.vocab_size",
    "pos_emb": "megagpt.model.position",
    "position_embedding_type": "megagpt.model.position",
    "normalization": "megagpt.model.norm",
    "hidden_act": "megagpt.model.activation",
    "activation_function": "megagpt.model.activation",
    "attention_dropout": "megagpt.model.dropout",
    "attn_pdrop": "megagpt.model.dropout",
    "embd_pdrop": "megagpt.model.dropout",
    "hidden_dropout": "megagpt.model.dropout",
    "resid_pdrop": "megagpt.model.dropout",
    "add_bias_linear": "megagpt.model.bias",
    "tie_word_embeddings": "megagpt.model.tie_embeddings",
    "init_method_std": "megagpt.model.init_std",
    "initializer_range": "megagpt.model.init_std",
    # mesh
    "tp": "megagpt.parallel.tensor",
    "tp_size": "megagpt.parallel.tensor",
    "tensor_parallel_size": "megagpt.parallel.tensor",
    "tensor_model_parallel_size": "megagpt.parallel.tensor",
    "model_parallel_size": "megagpt.parallel.tensor",
    "pp": "megagpt.parallel.pipeline",
    "pp_size": "megagpt.parallel.pipeline",
    "pipe_parallel_size": "megagpt.parallel.pipeline",
    "pipeline_parallel_size": "megagpt.parallel.pipeline",
    "pipeline_model_parallel_size": "megagpt.parallel.pipeline",
    # batch and length of the run
    "batch_size": _MICRO_BATCH,
    "micro_batch_size": _MICRO_BATCH,
    "per_device_train_batch_size": _MICRO_BATCH,
    "global_batch_size": "train_batch_size",
    "grad_accum_steps": _ACCUMULATION,
    "accumulation_steps": _ACCUMULATION,
    "max_iters": _STEPS,
    "max_steps": _STEPS,
    "num_iterations": _STEPS,
    "num_steps": _STEPS,
    "train_iters": _STEPS,
    "train_steps": _STEPS,
    "max_tokens": "megagpt.training.total_tokens",
    "train_tokens": "megagpt.training.total_tokens",
    "num_train_epochs": "megagpt.training.total_epochs",
    # optimizer and schedule
    "learning_rate": _RATE,
    "lr": _RATE,
    "max_lr": _RATE,
    "adam_beta1": "optimizer.params.betas",
    "adam_beta2": "optimizer.params.betas",
    "beta1": "optimizer.params.betas",
    "beta2": "optimizer.params.betas",
    "adam_eps": "optimizer.params.eps",
    "adam_epsilon": "optimizer.params.eps",
    "weight_decay": _DECAY,
    "clip_grad": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "lr_decay_iters": "scheduler.params.total_num_steps",
    "lr_decay_style": "scheduler.type",
    "lr_scheduler_type": "scheduler.type",
    "lr_warmup_iters": _WARMUP,
    "warmup_iters": _WARMUP,
    "warmup_steps": _WARMUP,
    "min_lr": "scheduler.params.cos_min_ratio",
    "lora_r": "megagpt.training.lora.rank",
    "lora_rank": "megagpt.training.lora.rank",
    "lora_alpha": "megagpt.training.lora.alpha",
    "lora_dropout": "megagpt.training.lora.dropout",
    "target_modules": "megagpt.training.lora.targets",
    "lora_target_modules": "megagpt.training.lora.targets",
    # evaluation, saving, logging
    "eval_interval": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_iters": "megagpt.training.eval_batches",
    "activations_checkpoint_method": _RECOMPUTE,
    "checkpoint_activations": _RECOMPUTE,
    "gradient_checkpointing": _RECOMPUTE,
    "recompute_activations": _RECOMPUTE,
    "recompute_granularity": _RECOMPUTE,
    "checkpoint_interval": "megagpt.checkpoint.interval_steps",
    "save_interval": "megagpt.checkpoint.interval_steps",
    "save_steps": "megagpt.checkpoint.interval_steps",
    "save_total_limit": "megagpt.checkpoint.keep",
    "log_interval": "megagpt.monitor.log_interval_steps",
    "logging_steps": "megagpt.monitor.log_interval_steps",
    "data_path": "megagpt.data.path",
    **dict.fromkeys(
        ("valid_data_path", "valid_data_paths", "test_data_path", "validation_file", "eval_data"),
        "megagpt.data.validation",
    ),
    "dataset": "megagpt.data.path",
    "wandb_project": "wandb.project",
}

# Names of what is not a key here, and why.
WITHOUT_A_KEY: dict[str, str] = {
    "dtype": "use bf16.enabled or fp16.enabled",
    "precision": "use bf16.enabled or fp16.enabled",
    "torch_dtype": "use bf16.enabled or fp16.enabled",
}

# Values of megagpt.model.preset: other names of the published models.
PRESET_SYNONYMS: dict[str, str] = {
    "gpt-2": "gpt2",
    "gpt2-small": "gpt2",
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2-medium",
    "openai-community/gpt2-large": "gpt2-large",
    "openai-community/gpt2-xl": "gpt2-xl",
    "gpt-3": "gpt3-175b",
    "gpt3": "gpt3-175b",
    "gpt3-small": "gpt3-125m",
    "gpt3-medium": "gpt3-350m",
    "gpt3-large": "gpt3-760m",
    "gpt3-xl": "gpt3-1.3b",
}
