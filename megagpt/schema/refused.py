"""DeepSpeed keys that this trainer rejects, and what to use instead.

DeepSpeed 0.19.8 ignores many of these silently; others would interfere with the trainer. A test
compares this table and the accepted keys with what the installed DeepSpeed reads, so that keys of a
new version are noticed.
"""

from __future__ import annotations

_REMOVED = "removed from DeepSpeed; delete it"
_OWN_CHECKPOINTS = "checkpoints are this trainer's own: use megagpt.checkpoint"
_OWN_REPORTS = (
    "use megagpt.monitor.log_interval_steps; metrics.jsonl holds times, memory and FLOP utilisation"
)
_MEAN_ONLY = "gradients are always the mean over the data axis, whatever the mesh; delete it"
_NOT_EXACT = "approximate: results differ from a single process; delete it"
_FP32_STATE = "checkpoints store master weights and moments in fp32; delete it"
_DEPRECATED = "deprecated in DeepSpeed; use "
_NOT_A_LANGUAGE_MODEL = "this model does not use it; delete it"

REFUSED_TOP_LEVEL: dict[str, str] = {
    "activation_checkpointing": "use megagpt.training.recompute",
    "amp": "removed from DeepSpeed; use bf16 or fp16",
    "autotuning": "it starts its own runs; vary keys with --set instead",
    "bfloat16": 'old spelling; use "bf16"',
    "checkpoint": _OWN_CHECKPOINTS,
    "comet": "use wandb or tensorboard; metrics.jsonl is always written",
    "comms_logger": _OWN_REPORTS,
    "compile": "DeepCompile does not compose with this trainer's schedules; delete it",
    "compression_training": _REMOVED,
    "csv_monitor": "metrics.jsonl is always written; delete it",
    "curriculum_learning": _REMOVED,
    "data_efficiency": "megagpt.data sets the order of the data; delete it",
    "dataloader_drop_last": "samples are never dropped: batches come from one endless order; "
    "delete it",
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "disable_allgather": "DeepSpeed ignores it; delete it",
    "disable_python_gc": "the trainer does not change the garbage collector; delete it",
    "dump_state": _OWN_REPORTS,
    "eigenvalue": _REMOVED,
    "elasticity": "removed from DeepSpeed; a run resumes on another world size by itself; delete "
    "it",
    "expert_parallel": _NOT_A_LANGUAGE_MODEL,
    "flops_profiler": "metrics.jsonl holds the model's FLOP utilisation; delete it",
    "gradient_allreduce_op": _MEAN_ONLY,
    "gradient_predivide_factor": _MEAN_ONLY,
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "use launch/generate.py",
    "log_level": "this trainer's log has one level; delete it",
    "managed_gradient_accumulation": "the trainer controls gradient accumulation; delete it",
    "memory_breakdown": _OWN_REPORTS,
    "nebula": _OWN_CHECKPOINTS,
    "pipeline": "use megagpt.parallel.pipeline and megagpt.parallel.schedule",
    "prescale_gradients": _MEAN_ONLY,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "seq_parallel_communication_data_type": "Ulysses sequence parallelism is not used; see "
    "megagpt.parallel.sequence",
    "sequence_parallel_size": "Ulysses sequence parallelism is not used; see "
    "megagpt.parallel.sequence",
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "steps_per_print": "use megagpt.monitor.log_interval_steps",
    "tensor_parallel": "AutoTP cannot join a pipeline; use megagpt.parallel.tensor",
    "timers": _OWN_REPORTS,
    "torch_autocast": "use bf16 or fp16",
    "use_data_before_expert_parallelism": _NOT_A_LANGUAGE_MODEL,
    "vocabulary_size": "use megagpt.model.vocab_size",
    "wall_clock_breakdown": _OWN_REPORTS,
    "weight_quantization": "it is for inference only; delete it",
    "zero_allow_untested_optimizer": "only Adam and AdamW are supported, and both are tested; "
    "delete it",
    "zero_force_ds_cpu_optimizer": "use optimizer.params.torch_adam",
}

REFUSED_ZERO: dict[str, str] = {
    "allgather_partitions": "DeepSpeed ignores it; delete it",
    "compute_grad_norm": "the gradient norm is always reported; delete it",
    "cpu_offload": _DEPRECATED + 'offload_optimizer {"device": "cpu"}',
    "cpu_offload_param": _DEPRECATED + 'offload_param {"device": "cpu"}',
    "cpu_offload_use_pin_memory": _DEPRECATED + "pin_memory in the offload sections",
    "elastic_checkpoint": _OWN_CHECKPOINTS,
    "enable_sanity_checks": "it compares ranks that differ by design in a pipeline; delete it",
    "ignore_unused_parameters": "every parameter of the model is used; delete it",
    "leaf_module": "it is for mixture-of-experts models; delete it",
    "legacy_stage1": _REMOVED,
    "load_from_fp32_weights": _OWN_CHECKPOINTS,
    "log_trace_cache_warnings": _OWN_REPORTS,
    "memory_efficient_linear": "the trainer chooses it; delete it",
    "mics_hierarchical_params_gather": _REMOVED,
    "mics_shard_size": _REMOVED,
    "override_module_apply": "the trainer does not use Module.apply to initialise parameters; "
    "delete it",
    "parameter_alignment": "the trainer chooses it; delete it",
    "pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "round_robin_gradients": "DeepSpeed then gives parts of its partitions wrong names, "
    "in checkpoints too; delete it",
    "save_muon_momentum_buffer_in_memory": "Muon is not supported; delete it",
    "stage3_module_granularity_threshold": "it fails in the first backward of this model (tested); "
    "delete it",
    "stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
    "zenflow": _NOT_EXACT,
    "zero_hpz_partition_size": "secondary partitions (ZeRO++) were never tested here; delete it",
    "zero_quantized_gradients": _NOT_EXACT,
    "zero_quantized_nontrainable_weights": _NOT_EXACT,
    "zero_quantized_weights": _NOT_EXACT,
    "zeropp_loco_param": _REMOVED,
}

REFUSED: dict[str, str] = {
    **REFUSED_TOP_LEVEL,
    **{f"zero_optimization.{key}": reason for key, reason in REFUSED_ZERO.items()},
    "zero_optimization.offload_optimizer.ratio": "partial offload is not supported; delete it",
    "zero_optimization.offload_optimizer.super_offload": "it needs CUDA superchips and was "
    "never tested here; delete it",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it needs super_offload; delete it",
    "bf16.immediate_grad_update": "it affects only an optimizer that this trainer does not use; "
    "delete it",
    "bf16.check_grad_overflow": "use megagpt.training.on_nonfinite",
    "bf16.bf16_master_weights_and_grads": _FP32_STATE,
    "bf16.bf16_optimizer_states": _FP32_STATE,
    "fp16.auto_cast": "the model's inputs are token ids, which are never cast; delete it",
    "fp16.fp16_master_weights_and_grads": _FP32_STATE,
    "data_types.param_dtype": "bf16 and fp16 determine it; delete it",
    "data_types.buffer_dtype": "bf16 and fp16 determine it; delete it",
    "data_types.keep_in_fp32_modules": "bf16 and fp16 determine it; delete it",
    "aio.use_gds": "GPU direct storage was never tested here; delete it",
    "optimizer.legacy_fusion": "it affects only fp16 at ZeRO 0 and never changes the result; "
    "delete it",
    "optimizer.params.max_grad_norm": "use gradient_clipping",
    "optimizer.params.fp32_optimizer_states": _FP32_STATE,
    "optimizer.params.foreach": "torch chooses it; delete it",
    "optimizer.params.bias_correction": "Adam's bias correction is always on; delete it",
    "optimizer.params.amsgrad": "DeepSpeed's Adam has no amsgrad; delete it",
    "scheduler.params.last_batch_iteration": "a resumed run knows its step; delete it",
}
