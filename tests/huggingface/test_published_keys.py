"""Keys of published config.json files that change no result are accepted, and any other is not.
The outside reference is transformers: the same logits with such keys and without them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megagpt.config import ConfigError, RunConfig
from megagpt.huggingface.published_config import PublishedConfig
from megagpt.utils import UserError
from tests.support.configurations import tiny

# As in distilgpt2, gpt2-xl, DialoGPT, Llama 2 ports, fine-tuned and re-uploaded models.
EVERYWHERE: dict[str, Any] = {
    "_num_labels": 1,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "problem_type": None,
    "finetuning_task": "text-generation",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "output_past": True,
    "torchscript": False,
    "use_bfloat16": True,
    "_name_or_path": "someone/model",
    "_commit_hash": "0" * 40,
    "transformers.js_config": {"dtype": {"q4": 1}},
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "max_length": 50,
    "repetition_penalty": 1.2,
    "num_return_sequences": 3,
    "classifier_dropout": 0.3,
    "decoder_start_token_id": 1,
    "tokenizer_class": "SomeTokenizer",
    "prefix": "x",
}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16, "n_embd": 16} | {
    "n_layer": 1,
    "n_head": 2,
}
ROTARY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
LLAMA = ROTARY | {"model_type": "llama", "rms_norm_eps": 1e-5}
STARCODER2 = ROTARY | {"model_type": "starcoder2", "sliding_window": None}
NEOX = {key: value for key, value in ROTARY.items() if key != "num_key_value_heads"} | {
    "model_type": "gpt_neox"
}
MODELS = {
    "gpt2": (GPT2, {"n_ctx": 16, "predict_special_tokens": True, "summary_first_dropout": 0.9}),
    "llama": (LLAMA, {"pretraining_tp": 1}),
    "starcoder2": (
        STARCODER2,
        {
            "activation_function": "gelu",
            "attention_softmax_in_fp32": True,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
            "norm_type": "layer_norm",
            "mlp_type": "default",
            "layer_norm_epsilon": 0.5,
        },
    ),
    "mistral": (ROTARY | {"model_type": "mistral"}, {}),
    "qwen2": (ROTARY | {"model_type": "qwen2"}, {"max_window_layers": 1, "sliding_window": 3}),
    "qwen3": (ROTARY | {"model_type": "qwen3"}, {"max_window_layers": 0, "sliding_window": 3}),
    "olmo2": (ROTARY | {"model_type": "olmo2"}, {}),
    "gpt_neox": (NEOX, {"is_decoder": True}),
    "phi3": (ROTARY | {"model_type": "phi3", "pad_token_id": 0}, {"attention_bias": False}),
    "gemma2": (
        ROTARY | {"model_type": "gemma2"},
        {"hidden_act": "relu", "cache_implementation": "hybrid"},
    ),
}


def verdict(directory: Path, config: dict[str, Any]) -> list[str]:
    (directory / "config.json").write_text(json.dumps(config))
    return PublishedConfig(directory / "config.json").unlike_ours()


def logits(directory: Path, config: dict[str, Any]) -> torch.Tensor:
    """What transformers computes from a file with these keys, by weights of one seed."""
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).eval()
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("name", MODELS)
def test_keys_that_change_no_result_are_accepted(name: str, tmp_path: Path) -> None:
    plain, its_own = MODELS[name]
    with_keys = plain | EVERYWHERE | its_own
    assert verdict(tmp_path, with_keys) == []
    assert torch.equal(logits(tmp_path, with_keys), logits(tmp_path, plain))


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (GPT2, "activation_function", "relu"),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (LLAMA, "hidden_act", "relu"),
        (STARCODER2, "hidden_act", "tanh"),
    ],
)
def test_keys_that_change_it_are_not(
    config: dict[str, Any], key: str, value: Any, tmp_path: Path
) -> None:
    changed = config | {key: value}
    if key != "scale_attn_by_inverse_layer_idx":  # it acts from the second layer on
        assert not torch.equal(logits(tmp_path, changed), logits(tmp_path, config))
    (refused,) = verdict(tmp_path, changed)
    assert refused.startswith(f"{key} ")


def test_what_nobody_knows_is_refused(tmp_path: Path) -> None:
    (refused,) = verdict(tmp_path, GPT2 | {"num_labels_of_attention": 3})
    assert refused == (
        "num_labels_of_attention 3: megagpt does not support it; if it changes no result, add "
        "--ignore_keys num_labels_of_attention"
    )


@pytest.mark.parametrize(
    "named",
    [{"architectures": ["GPT2LMHeadModel"]}, {"architectures": ["GPT2Model"]}, {}, None],
    ids=["with a head", "without a head", "by its type", "by its keys"],
)
def test_how_files_name_their_architecture(named: dict[str, Any] | None, tmp_path: Path) -> None:
    config = {key: value for key, value in GPT2.items() if key != "model_type" or named is not None}
    assert verdict(tmp_path, config | (named or {})) == []
    assert PublishedConfig(tmp_path / "config.json").architecture.name == "GPT2LMHeadModel"


def test_another_head_is_another_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown .found .'GPT2ForSequenceClassification'"):
        verdict(tmp_path, GPT2 | {"architectures": ["GPT2ForSequenceClassification"]})


STRANGE = ("x", -1, 0, 0.5, 10**30, True, None, [], [[1]], {}, {"a": [1]}, ["sliding_attention"])


@pytest.mark.rotate(3)
@pytest.mark.parametrize("name", MODELS)
def test_a_strange_value_is_a_problem_of_the_file_and_no_crash(name: str, tmp_path: Path) -> None:
    """Of any key that is read, in a model that could be imported otherwise."""
    path = tmp_path / "config.json"
    written = RunConfig.from_json(json.dumps(tiny(sequence_length=16)))
    plain = MODELS[name][0]
    path.write_text(json.dumps(plain))
    published = PublishedConfig(path)
    assert published.run_config(written, 10**6).megagpt.model.num_layers == 1
    keys = {key for relation in published.architecture.keys for key in relation.names}
    inside = ("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings")
    scalings = [
        {"rope_type": kind, key: value}
        for kind in ("linear", "dynamic", "yarn", "llama3", "longrope", ["x"])
        for key in inside
        for value in STRANGE
    ]
    cases = [(key, value) for key in sorted(keys) for value in STRANGE]
    refused: list[str] = []
    for key, value in [*cases, *(("rope_scaling", scaling) for scaling in scalings)]:
        path.write_text(json.dumps(plain | {key: value}))
        try:
            PublishedConfig(path).run_config(written, 10**6)
        except ConfigError as error:
            refused += str(error).splitlines()
    assert [line for line in refused if not line.startswith(f"{path}: ")] == []
    assert len(refused) > len(keys)
