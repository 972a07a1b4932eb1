"""DeepSpeed's keys that this trainer has no field for, in four classes: one table, `FOREIGN`.

* acts: another spelling of a key that the trainer has; the value moves there.
* changes nothing at its value: accepted in silence (`wall_clock_breakdown: false`).
* hint: serves another program, or asks for speed or a report that the trainer arranges by itself.
  Accepted and not handed to DeepSpeed; one line at the start says why.
* refused: it would be ignored although it matters, act behind the trainer's back, or change the
  result. The message says what to use instead.

The verdicts are of DeepSpeed 0.19.8. A test compares the table and the accepted keys with what the
installed DeepSpeed reads, so that keys of a new version are noticed. Values of `null` and "auto"
are absent to DeepSpeed and change nothing at any key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

OFF = "a section that is not enabled"
ALL_FALSE = "a section whose values are false, 0 or null"


@dataclass(frozen=True)
class ForeignKey:
    """One row: the values that change nothing, and what any other value is.

    `nothing_at` holds values, or `OFF` or `ALL_FALSE`; a section may have any part of one. A row
    that acts puts its value, or `value` if that is given, at the key `becomes`. Where both keys are
    given, the other decides if this one `yields`; if not, they must agree.
    """

    key: str
    otherwise: Literal["acts", "hint", "refused"]
    reason: str
    nothing_at: tuple[Any, ...] = ()
    becomes: str = ""
    value: Any = None
    yields: bool = False

    def changes_nothing(self, value: Any) -> bool:
        """Return whether DeepSpeed or this trainer would do the same without the key."""
        return value in (None, "auto") or any(_matches(value, known) for known in self.nothing_at)

    @property
    def path(self) -> tuple[str, ...]:
        """The key as names from the top of the file."""
        return tuple(self.key.split("."))


def _matches(value: Any, known: Any) -> bool:
    if known == OFF:
        return isinstance(value, Mapping) and not _is_on(value)
    if known == ALL_FALSE:
        return isinstance(value, Mapping) and all(
            not leaf or leaf == "auto" for leaf in value.values()
        )
    if isinstance(known, Mapping):
        return isinstance(value, Mapping) and all(
            name in known and same_value(leaf, known[name]) for name, leaf in value.items()
        )
    return same_value(value, known)


def same_value(value: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; 1 and true differ, 1 and 1.0 do not."""
    return (isinstance(value, bool), value) == (isinstance(other, bool), other)


def _is_on(section: Mapping[str, Any]) -> bool:
    """Return whether a section, or if that does not say so one below it, is enabled."""
    if "enabled" in section:
        return section["enabled"] not in (False, None, "auto")
    return any(isinstance(below, Mapping) and _is_on(below) for below in section.values())


def _acts(key: str, becomes: str, *, reason: str = "", **more: Any) -> ForeignKey:
    return ForeignKey(key, "acts", reason, becomes=becomes, **more)


def _hint(key: str, reason: str, *nothing_at: Any) -> ForeignKey:
    return ForeignKey(key, "hint", reason, nothing_at)


def _refused(key: str, reason: str, *nothing_at: Any) -> ForeignKey:
    return ForeignKey(key, "refused", reason, nothing_at)


_REMOVED = "removed from DeepSpeed; delete it"
_OWN_CHECKPOINTS = "checkpoints are this trainer's own: use megagpt.checkpoint"
_OWN_FORMAT = "it serves DeepSpeed's checkpoints; this trainer writes its own"
_OWN_REPORTS = "metrics.jsonl has times, memory and FLOP utilisation of the logged steps"
_MEAN_ONLY = "gradients are the mean over the data axis, in whatever order they are scaled"
_NOT_EXACT = "approximate: results differ from a single process; delete it"
_FP32_STATE = "checkpoints store master weights and moments in fp32; delete it"
_NOT_A_LANGUAGE_MODEL = "it is for mixture-of-experts models; delete it"
_PRECISION = "bf16 and fp16 determine it; delete it"
_ULYSSES = "Ulysses sequence parallelism is not used; see megagpt.parallel.sequence"
_CHOSEN = "the trainer chooses it"
_NO_SUCH_KEY = "DeepSpeed 0.19.8 reads no such key"

_TOP_LEVEL = (
    _acts(
        "steps_per_print",
        "megagpt.monitor.log_interval_steps",
        reason="it is the number of steps between log lines here; for another: "
        "--set megagpt.monitor.log_interval_steps=10",
        yields=True,
    ),
    _acts("bfloat16", "bf16"),
    _refused("activation_checkpointing", "use megagpt.training.recompute", ALL_FALSE),
    _refused("amp", "removed from DeepSpeed; use bf16 or fp16", OFF),
    _refused("autotuning", "it starts its own runs; vary keys with --set instead", OFF),
    _hint("checkpoint.tag_validation", _OWN_FORMAT),
    _hint("checkpoint.parallel_write", _OWN_FORMAT),
    _hint("checkpoint.checkpoint_serialization", _OWN_FORMAT),
    _hint("checkpoint.writer", _OWN_FORMAT),
    _refused("checkpoint", _OWN_CHECKPOINTS, ALL_FALSE),
    _refused("comet", "use wandb or tensorboard; metrics.jsonl is always written", OFF),
    _hint("comms_config", f"{_NO_SUCH_KEY} (it reads comms_logger)"),
    _hint("comms_logger", f"the trainer does not use DeepSpeed's; {_OWN_REPORTS}", OFF),
    _hint(
        "compile",
        "DeepCompile does not compose with this trainer's schedules; it has kernels of its own",
        ALL_FALSE,
    ),
    _refused("compression_training", _REMOVED, OFF),
    _refused("csv_monitor", "metrics.jsonl is always written; delete it", OFF),
    _refused("curriculum_learning", _REMOVED, OFF),
    _refused("data_efficiency", "megagpt.data sets the order of the data; delete it", OFF),
    _hint("dataloader_drop_last", "batches come from one endless order and are all whole", False),
    _refused("datastates_ckpt", _OWN_CHECKPOINTS),
    _hint("disable_allgather", "DeepSpeed itself ignores it", False),
    _hint("disable_python_gc", "the trainer leaves the garbage collector on", False),
    _hint("dump_state", _OWN_REPORTS, False),
    _refused("eigenvalue", _REMOVED, OFF),
    _refused(
        "elasticity",
        "removed from DeepSpeed; a run resumes on another world size by itself; delete it",
        OFF,
    ),
    _refused("expert_parallel", _NOT_A_LANGUAGE_MODEL, OFF),
    _hint("flops_profiler", _OWN_REPORTS, OFF),
    _refused(
        "gradient_allreduce_op",
        "gradients are always the mean over the data axis, whatever the mesh; delete it",
        "mean",
    ),
    _hint("gradient_predivide_factor", _MEAN_ONLY, 1.0),
    _refused("graph_harvesting", _REMOVED, False),
    _refused("hybrid_engine", "use launch/generate.py", OFF),
    _hint("log_level", "this trainer's log has one level"),
    _refused(
        "managed_gradient_accumulation",
        "the trainer controls gradient accumulation; delete it",
        True,
    ),
    _hint("memory_breakdown", _OWN_REPORTS, False),
    _hint("monitor_config", f"{_NO_SUCH_KEY} (it reads wandb and tensorboard)"),
    _refused("nebula", _OWN_CHECKPOINTS, OFF),
    _refused(
        "pipeline",
        "use megagpt.parallel.pipeline and megagpt.parallel.schedule",
        {
            "stages": "auto",
            "partition": "best",
            "seed_layers": False,
            "activation_checkpoint_interval": 0,
            "pipe_partitioned": True,
            "grad_partitioned": True,
        },
    ),
    _hint("prescale_gradients", _MEAN_ONLY, False),
    _refused("progressive_layer_drop", _REMOVED, OFF),
    _refused("quantize_training", _REMOVED, OFF),
    _hint("seq_parallel_communication_data_type", _ULYSSES),
    _refused("sequence_parallel_size", _ULYSSES, 1),
    _refused("sparse_attention", _REMOVED),
    _refused("sparse_gradients", _REMOVED, False),
    _refused(
        "tensor_parallel",
        "AutoTP cannot join a pipeline; use megagpt.parallel.tensor",
        {"autotp_size": 1},
        ALL_FALSE,
    ),
    _hint("timers", _OWN_REPORTS),
    _refused("torch_autocast", "use bf16 or fp16", OFF),
    _hint("use_data_before_expert_parallelism", "the model has no experts", False),
    _refused("vocabulary_size", "use megagpt.model.vocab_size"),
    _hint("wall_clock_breakdown", _OWN_REPORTS, False),
    _refused("weight_quantization", "it is for inference only; delete it", {}),
    _hint("zero_allow_untested_optimizer", "Adam and AdamW are tested; nothing to allow", False),
    _hint("zero_force_ds_cpu_optimizer", "optimizer.params.torch_adam decides it", True),
)

_ZERO = (
    _hint("allgather_partitions", "DeepSpeed itself ignores it", True),
    _refused("compute_grad_norm", "the gradient norm is always reported; delete it", True),
    _acts("cpu_offload", "offload_optimizer", nothing_at=(False,), value={"device": "cpu"}),
    _acts("cpu_offload_param", "offload_param", nothing_at=(False,), value={"device": "cpu"}),
    _hint("cpu_offload_use_pin_memory", "DeepSpeed itself ignores it; see pin_memory", True),
    _hint("elastic_checkpoint", "this trainer's checkpoints load on any number of ranks", False),
    _hint(
        "enable_sanity_checks",
        "it compares ranks that differ by design in a pipeline; "
        "megagpt.training.drift_check_interval_steps compares replicas",
        False,
    ),
    _acts("gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
    _hint("ignore_unused_parameters", "the model uses all of its parameters", True),
    _refused("leaf_module", _NOT_A_LANGUAGE_MODEL, {}),
    _refused("legacy_stage1", _REMOVED, False),
    _hint("load_from_fp32_weights", _OWN_FORMAT, True),
    _hint("log_trace_cache_warnings", "DeepSpeed's trace of modules is not reported", False),
    _acts("max_live_parameters", "stage3_max_live_parameters"),
    _acts("max_reuse_distance", "stage3_max_reuse_distance"),
    _hint("memory_efficient_linear", _CHOSEN, True),
    _refused("mics_hierarchical_params_gather", _REMOVED, False),
    _refused("mics_shard_size", _REMOVED, -1),
    _acts("model_persistence_threshold", "stage3_model_persistence_threshold"),
    _acts("module_granularity_threshold", "stage3_module_granularity_threshold"),
    _hint("override_module_apply", "the trainer initialises parameters without Module.apply", True),
    _hint("parameter_alignment", _CHOSEN, False),
    _acts("param_persistence_threshold", "stage3_param_persistence_threshold"),
    _hint("pipeline_loading_checkpoint", _OWN_FORMAT, False),
    _acts("prefetch_bucket_size", "stage3_prefetch_bucket_size"),
    _hint(
        "round_robin_gradients",
        "it orders the copies of CPU offload; DeepSpeed then gives parts of its partitions wrong "
        "names, in checkpoints too",
        False,
    ),
    _hint("save_muon_momentum_buffer_in_memory", "Muon is not used", False),
    _hint(
        "stage3_module_granularity_threshold",
        "it saves work of hooks, but fails in the first backward of this model (tested)",
        0,
    ),
    _hint(
        "stage3_gather_16bit_weights_on_model_save",
        "checkpoints hold whole tensors, and launch/export.py writes Hugging Face files",
        False,
    ),
    _hint(
        "stage3_gather_fp16_weights_on_model_save",
        "checkpoints hold whole tensors, and launch/export.py writes Hugging Face files",
        False,
    ),
    _acts("use_all_reduce_for_fetch_params", "stage3_use_all_reduce_for_fetch_params"),
    _acts("allgather_sequential", "stage3_allgather_sequential"),
    _refused("zenflow", _NOT_EXACT),
    _refused(
        "zero_hpz_partition_size",
        "secondary partitions (ZeRO++) were never tested here; delete it",
        1,
    ),
    _refused("zero_quantized_gradients", _NOT_EXACT, False),
    _refused("zero_quantized_nontrainable_weights", _NOT_EXACT, False),
    _refused("zero_quantized_weights", _NOT_EXACT, False),
    _refused("zeropp_loco_param", _REMOVED),
)


def _below(section: str, row: ForeignKey) -> ForeignKey:
    becomes = row.becomes and f"{section}.{row.becomes}"
    return replace(row, key=f"{section}.{row.key}", becomes=becomes)


FOREIGN: tuple[ForeignKey, ...] = (
    *_TOP_LEVEL,
    *(_below("zero_optimization", row) for row in _ZERO),
    _refused(
        "zero_optimization.offload_optimizer.ratio",
        "partial offload is not supported; delete it",
        1.0,
    ),
    _refused(
        "zero_optimization.offload_optimizer.super_offload",
        "it needs CUDA superchips and was never tested here; delete it",
        False,
    ),
    _hint("zero_optimization.offload_optimizer.cpuadam_cores_perc", "it needs super_offload"),
    _hint(
        "bf16.immediate_grad_update", "it is of an optimizer that this trainer does not use", False
    ),
    _refused("bf16.check_grad_overflow", "use megagpt.training.on_nonfinite", True),
    _refused("bf16.bf16_master_weights_and_grads", _FP32_STATE, False),
    _refused("bf16.bf16_optimizer_states", _FP32_STATE, False),
    _hint("fp16.auto_cast", "the model's inputs are token ids, which are never cast", False),
    _refused("fp16.fp16_master_weights_and_grads", _FP32_STATE, False),
    _refused("data_types.param_dtype", _PRECISION),
    _refused("data_types.buffer_dtype", _PRECISION),
    _refused("data_types.keep_in_fp32_modules", _PRECISION),
    _refused("aio.use_gds", "GPU direct storage was never tested here; delete it", False),
    _refused(
        "aio.thread_count",
        "DeepSpeed ignores this old name; use intra_op_parallelism",
        1,
    ),
    _hint("optimizer.legacy_fusion", "it is of fp16 at ZeRO 0 and never changes the result", False),
    _acts("optimizer.params.max_grad_norm", "gradient_clipping"),
    _refused("optimizer.params.fp32_optimizer_states", _FP32_STATE, True),
    _hint("optimizer.params.foreach", "torch chooses it"),
    _refused(
        "optimizer.params.bias_correction",
        "Adam's bias correction is always on; delete it",
        True,
    ),
    _refused("optimizer.params.amsgrad", "DeepSpeed's Adam has no amsgrad; delete it", False),
    _refused(
        "scheduler.params.last_batch_iteration", "a resumed run knows its step; delete it", -1
    ),
)
REFUSED: dict[str, str] = {row.key: row.reason for row in FOREIGN if row.otherwise == "refused"}
