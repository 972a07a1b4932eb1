"""DeepSpeed files as people publish them: each has a verdict.

`tests/fixtures/deepspeed_files` holds 25 published files by value, with a `megagpt` object of two
layers added. `PUBLISHED` has the essence of others, by repository and path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.planning.legality import World, problems
from megagpt.schema.reference import schema_text
from tests import REPOSITORY
from tests.schema.json_schema import fits

FILES = sorted((REPOSITORY / "tests" / "fixtures" / "deepspeed_files").glob("*.json"))
EVERY = (8, 4, 1)

# Ranks on which a file is accepted once it has an optimizer and a batch, or why it is refused.
VERDICTS: dict[str, tuple[int, ...] | str] = {
    "accelerate_zero_stage1_config": EVERY,
    "accelerate_zero_stage2_config": EVERY,
    "accelerate_zero_stage3_offload_config": EVERY,
    "acceleratetest_ds_config_zero3": EVERY,
    "axolotl_zero1": EVERY,
    "axolotl_zero2": EVERY,
    "axolotl_zero3": EVERY,
    "axolotl_zero3_bf16_cpuoffload_all": EVERY,
    "dsex_pipeline": EVERY,
    # DeepSpeed rejects the misspelt key, and ignores aio.thread_count
    "dsex_zero_infinity": 'unknown key, did you mean "stage3_param_persistence_threshold"?',
    "dstest_compile_z3": EVERY,
    "dstest_ds_config_func_bs4_zero1": (4, 1),  # a batch of 4
    # this trainer's own limit: ZeRO 1 computes the same
    "dstest_ds_config_func_bs8_no_zero": "with 16-bit weights at ZeRO 0",
    "dstest_ds_config_func_scheduler": (4, 1),
    "hf_ds_config_zero2": EVERY,
    "llamafactory_ds_z0_config": EVERY,
    "llamafactory_ds_z2_config": EVERY,
    "llamafactory_ds_z3_config": EVERY,
    "llamafactory_ds_z3_fp8_config": EVERY,
    "megatronds_curriculum_learning_ds_zero_stage_1_config_baseline": EVERY,
    "megatronds_data_efficiency_gpt_eval_ds_config_eval_dummy": EVERY,
    "openinstruct_stage3_no_offloading": EVERY,
    "openinstruct_stage3_no_offloading_accelerate": EVERY,
    "openinstruct_stage3_offloading_accelerate": EVERY,
    # DeepSpeed ignores what would matter most: the memory
    "trlx_stage2": "DeepSpeed ignores parameter offload below ZeRO 3",
}

FP16 = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
ON_CPU = {"device": "cpu", "pin_memory": True}
NVME = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}
AUTO_BATCH = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
AUTO_ADAM = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
AUTO_WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
AUTO_STAGE3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
Published = tuple[dict[str, Any], tuple[int, ...] | str]
PUBLISHED: dict[str, Published] = {
    "lm-sys/FastChat playground/deepspeed_config_s3.json": (
        {
            "fp16": {"enabled": "auto", "initial_scale_power": 16} | FP16,
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": ON_CPU,
                "offload_param": ON_CPU,
                "overlap_comm": True,
                "stage3_prefetch_bucket_size": 5e8,
                "stage3_param_persistence_threshold": 1e6,
                "sub_group_size": 1e12,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "gradient_accumulation_steps": "auto",
        }
        | AUTO_BATCH,
        EVERY,
    ),
    "tatsu-lab/stanford_alpaca configs/default_offload_opt_param.json": (
        {
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": AUTO_ADAM},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"total_num_steps": "auto"} | AUTO_WARMUP,
            },
            "zero_optimization": AUTO_STAGE3
            | {
                "offload_optimizer": ON_CPU,
                "offload_param": ON_CPU,
                "stage3_gather_16bit_weights_on_model_save": False,
            },
            "gradient_clipping": "auto",
            "steps_per_print": 5,
            "wall_clock_breakdown": False,
        }
        | AUTO_BATCH,
        EVERY,
    ),
    "haotian-liu/LLaVA scripts/zero3_offload.json": (
        {
            "fp16": {"enabled": "auto"} | FP16,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": AUTO_ADAM},
            "scheduler": {"type": "WarmupLR", "params": AUTO_WARMUP},
            "zero_optimization": AUTO_STAGE3
            | {
                "offload_optimizer": ON_CPU,
                "offload_param": ON_CPU,
                "gather_16bit_weights_on_model_save": True,
            },
            "steps_per_print": 1e5,
        }
        | AUTO_BATCH,
        EVERY,
    ),
    "microsoft/Megatron-DeepSpeed ds_config.json": (
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 16,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_max_live_parameters": 3e9,
                "offload_optimizer": ON_CPU
                | {"buffer_count": 4, "pipeline_read": False, "pipeline_write": False},
            },
            "fp16": {"enabled": True, "initial_scale_power": 15, "loss_scale_window": 1000},
            "wall_clock_breakdown": True,
            "zero_allow_untested_optimizer": True,
            "aio": {"block_size": 1048576, "queue_depth": 16, "thread_count": 2},
        },
        (1,),  # a batch of one micro-batch
    ),
    "microsoft/Megatron-DeepSpeed sequence_parallel/ds_config_gbs256_mbs8_log1_zero3.json": (
        {
            "train_batch_size": 256,
            "train_micro_batch_size_per_gpu": 8,
            "steps_per_print": 1,
            "zero_optimization": {"stage": 3},
            "gradient_clipping": 1.0,
            "prescale_gradients": False,
            "fp16": {"enabled": True, "initial_scale_power": 11} | FP16,
            "wall_clock_breakdown": False,
        },
        EVERY,
    ),
    "microsoft/Megatron-DeepSpeed examples/MoE/ds_config_gpt3-0.125B-tokendropping.json": (
        {
            "train_batch_size": 256,
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 0, "elastic_checkpoint": True},
            "prescale_gradients": True,
            "fp16": {"enabled": True} | FP16,
            "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
        },
        "with 16-bit weights at ZeRO 0",
    ),
    "microsoft/Megatron-DeepSpeed ds_zero2_config_bf16.json": (  # rejected by DeepSpeed too
        {
            "train_batch_size": 96,
            "zero_optimization": {"stage": 2},
            "communication_data_type": "bfp16",
            "bfloat16": {"enabled": True, "loss_scale": 1.0},
            "activation_checkpointing": {"partition_activations": True},
            "flops_profiler": {"enabled": True, "profile_step": -1},
        },
        'expected one of "fp32", "fp16", "bf16"; got "bfp16", did you mean',
    ),
    "microsoft/DeepSpeedExamples cifar/ds_config.json": (
        {
            "train_batch_size": 4,
            "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999]}},
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
            },
            "fp16": {"enabled": True, "fp16_master_weights_and_grads": True} | FP16,
            "zero_optimization": {"stage": 2, "allgather_partitions": True, "cpu_offload": True},
        },
        "checkpoints store master weights and moments in fp32",  # another result
    ),
    "microsoft/DeepSpeedExamples Megatron-LM/scripts/ds_zero-offload_10B_config.json": (
        {
            "train_batch_size": 30,
            "gradient_accumulation_steps": 3,
            "zero_optimization": {"stage": 2, "cpu_offload": True, "comm_overlap": True},
            "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
            "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True},
        },
        "zero_optimization.comm_overlap: unknown key",  # rejected by DeepSpeed too
    ),
    "huggingface/accelerate examples/alst_ulysses_sequence_parallelism/sp-alst.ds-config.json": (
        {
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
            "gradient_accumulation_steps": 1,
            "seq_parallel_communication_data_type": "bf16",
        }
        | AUTO_BATCH,
        EVERY,
    ),
    "huggingface/transformers tests/deepspeed/ds_config_zero3.json": (
        {
            "fp16": {"enabled": True} | FP16,
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": 1e14,
                "reduce_bucket_size": 0,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_fp16_weights_on_model_save": True,
            },
        },
        "zero_optimization.reduce_bucket_size: must be at least 1",  # DeepSpeed: greater than 0
    ),
    "axolotl-ai-cloud/axolotl deepspeed_configs/zero1_torch_compile.json": (
        {
            "zero_optimization": {"stage": 1, "overlap_comm": True},
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "auto_cast": False, "initial_scale_power": 32} | FP16,
            "compile": {"disable": False, "backend": "inductor"},
        }
        | AUTO_BATCH,
        EVERY,
    ),
    "nlpxucan/WizardLM WizardMath/config/deepspeed_config.json": (
        {
            "zero_optimization": AUTO_STAGE3
            | {
                "offload_optimizer": ON_CPU,
                "offload_param": ON_CPU,
                "sub_group_size": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "fp16": {"enabled": True, "auto_cast": False, "initial_scale_power": 32} | FP16,
        }
        | AUTO_BATCH,
        EVERY,
    ),
    "EleutherAI/gpt-neox examples/ds_zero_stage_2_config.json": (
        {
            "train_batch_size": 2048,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": 2, "allgather_bucket_size": 50000000},
            "optimizer": {
                "type": "Adam",
                "params": {"lr": 0.00015, "max_grad_norm": 1.0, "betas": [0.9, 0.95]},
            },
            "gradient_clipping": 1.0,
            "fp16": {"enabled": True} | FP16,
            "wall_clock_breakdown": True,
            "zero_allow_untested_optimizer": False,
        },
        EVERY,
    ),
    "EleutherAI/gpt-neox configs/deepspeed_zero2.json": (
        {
            "train_batch_size": 1280,
            "gradient_accumulation_steps": 80,
            "optimizer": {"type": "OneBitAdam", "params": {"lr": 2e-4, "freeze_step": 2}},
            "fp16": {"enabled": True},
            "zero_optimization": {"stage": 2, "cpu_offload": True},
            "logging": {"steps_per_print": 100, "wall_clock_breakdown": True},
        },
        'expected one of "Adam", "AdamW"; got "OneBitAdam"',  # removed from DeepSpeed
    ),
    "CarperAI/trlx examples/summarize_rlhf/sft/ds_config_gptj.json": (
        {
            "train_batch_size": 128,
            "fp16": {"enabled": True, "min_loss_scale": 1, "opt_level": "O2"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        },
        "fp16.opt_level: unknown key",  # rejected by DeepSpeed too
    ),
    "huggingface/transformers docs/source/en/deepspeed.md, NVMe (from memory)": (
        {
            "bf16": {"enabled": "auto"},
            "zero_optimization": AUTO_STAGE3
            | {
                "offload_optimizer": NVME | {"buffer_count": 4, "fast_init": False},
                "offload_param": NVME | {"buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9},
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "aio": {
                "block_size": 262144,
                "queue_depth": 32,
                "thread_count": 1,
                "single_submit": False,
                "overlap_events": True,
            },
        }
        | AUTO_BATCH,
        EVERY,
    ),
    "microsoft/DeepSpeedExamples DeepSpeed-Chat dschat/utils/ds_utils.py (from memory)": (
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "steps_per_print": 10,
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "none"},
                "offload_optimizer": {"device": "none"},
                "stage3_param_persistence_threshold": 1e4,
                "stage3_max_live_parameters": 3e7,
                "stage3_prefetch_bucket_size": 3e7,
                "memory_efficient_linear": False,
                "zero_quantized_gradients": False,
                "zero_hpz_partition_size": 1,
            },
            "fp16": {"enabled": True, "loss_scale_window": 100},
            "gradient_clipping": 1.0,
            "prescale_gradients": False,
            "wall_clock_breakdown": False,
            "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "pin_parameters": True},
            "tensorboard": {"enabled": False, "output_path": "logs", "job_name": "step1"},
        },
        EVERY,
    ),
    "bigscience-workshop/Megatron-DeepSpeed tests/ds_config_bf16.json": (
        {
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": 16,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "steps_per_print": 2000,
        },
        EVERY,
    ),
}
OURS = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "sequence_length": 64},
    "training": {"total_steps": 2000},
}


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """The file with what its own trainer takes from the command line: a rate and a batch."""
    optimizer = document.get("optimizer", {"type": "AdamW", "params": {}})
    params = optimizer["params"]
    if params.get("lr", "auto") == "auto":
        maximum = document.get("scheduler", {}).get("params", {}).get("warmup_max_lr", "auto")
        params = params | {"lr": 3e-4 if maximum == "auto" else maximum}
    result = document | {"optimizer": optimizer | {"params": params}}
    sizes = [
        result.get(f"train_{size}", "auto") for size in ("batch_size", "micro_batch_size_per_gpu")
    ]
    return result | ({"train_micro_batch_size_per_gpu": 2} if sizes == ["auto"] * 2 else {})


def verdict(path: Path) -> list[int] | str:
    """The ranks on which a file is accepted, or what is said against it."""
    try:
        config = load_config(path)
    except ConfigError as error:
        return str(error)
    against = {ranks: problems(config, World(ranks, 50257, bf16_native=True)) for ranks in EVERY}
    accepted = [ranks for ranks, lines in against.items() if not lines]
    return accepted or "\n".join(line for lines in against.values() for line in lines)


def require_verdict(path: Path, document: dict[str, Any], expected: tuple[int, ...] | str) -> None:
    path.write_text(json.dumps(completed(document)))
    found = verdict(path)
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert expected in found
    else:
        assert found == list(expected)
        schema = json.loads(schema_text())
        assert fits(completed(document), schema, schema), "the JSON Schema refuses it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_published_file_has_its_verdict(tmp_path: Path, file: Path) -> None:
    require_verdict(tmp_path / "x.json", json.loads(file.read_text()), VERDICTS[file.stem])


@pytest.mark.parametrize(("source", "published"), PUBLISHED.items(), ids=list(PUBLISHED))
def test_another_published_file_has_its_verdict(
    tmp_path: Path, source: str, published: Published
) -> None:
    document, expected = published
    require_verdict(tmp_path / "x.json", document | {"megagpt": OURS}, expected)


def test_most_published_files_are_accepted() -> None:
    assert {file.stem for file in FILES} == VERDICTS.keys()
    assert sum(not isinstance(verdict, str) for verdict in VERDICTS.values()) >= 22


def test_a_file_without_optimizer_and_batch_can_be_planned_as_it_is() -> None:
    for file in FILES:
        if not isinstance(VERDICTS[file.stem], str):
            config = load_config(file, for_plan=True)
            ranks = VERDICTS[file.stem][0]
            assert problems(config, World(ranks, 50257, bf16_native=True)) == []


def test_the_schema_refuses_what_the_reader_refuses() -> None:
    schema = json.loads(schema_text())
    good = RunConfig.from_json(json.dumps(OURS_COMPLETE)).as_written()
    assert fits(good, schema, schema)
    for change in (
        {"zero_optimization": {"stge": 3}},
        {"gradient_allreduce_op": "sum"},
        {"zero_optimization": {"zero_quantized_weights": True}},
        {"optimizer": {"type": "Lion", "params": {"lr": 1}}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        {"train_batch_size": 0},
        {"comment": "no mark"},
    ):
        assert not fits(good | change, schema, schema), change


OURS_COMPLETE = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "megagpt": OURS,
}
