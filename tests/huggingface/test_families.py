"""Every family in and out again; the outside reference is transformers, offline."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Starcoder2ForCausalLM,
)

from megagpt.data.tokenizer import load_tokenizer
from megagpt.huggingface.export import export
from megagpt.inference.generate import generate
from megagpt.inference.stored_model import load_model
from tests.support.exported_models import VOCABULARY, assert_near, import_into, tokens_of
from tests.support.jobs.checkpoint import run_config
from tests.support.trained_run import SEQUENCE_LENGTH, write_dataset

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 32,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
}
NEOX = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
PHI3_FACTORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 4.0]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


PROMPTS = ["The q", "\u00c4rger", "import"]


class Family(NamedTuple):
    """A class of transformers, its config.json beside the shape, and how the file was written."""

    theirs: type[PreTrainedModel]
    keys: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shards: bool = False  # written in several files
    old: bool = False  # config.json as transformers 4 wrote it


FAMILIES = {
    "gpt2": Family(
        GPT2LMHeadModel,
        {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 48, "n_layer": 3, "n_head": 6}
        | {"n_inner": 80, "bos_token_id": 256, "eos_token_id": 256},
    ),
    "llama2": Family(LlamaForCausalLM, SHAPE | {"rms_norm_eps": 1e-5}, torch.float16),
    "llama3": Family(
        LlamaForCausalLM,
        SHAPE | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 500_000.0}},
        torch.bfloat16,
        shards=True,
    ),
    "llama3.1-tied": Family(
        LlamaForCausalLM,
        SHAPE | {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        torch.bfloat16,
        old=True,
    ),
    "llama-linear": Family(
        LlamaForCausalLM,
        SHAPE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama-yarn": Family(
        LlamaForCausalLM,
        SHAPE
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 8,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "truncate": False,
            }
        },
    ),
    "llama-biased-dynamic": Family(
        LlamaForCausalLM,
        SHAPE
        | {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 8}
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral": Family(MistralForCausalLM, SHAPE | {"sliding_window": 7}, torch.bfloat16),
    "mistral-0.3": Family(MistralForCausalLM, SHAPE | {"sliding_window": None}),
    "qwen2": Family(
        Qwen2ForCausalLM,
        SHAPE
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
        | {"tie_word_embeddings": True},
        torch.bfloat16,
    ),
    "qwen2.5-yarn": Family(
        Qwen2ForCausalLM,
        SHAPE
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}
        | {"max_position_embeddings": 32},
    ),
    "qwen3": Family(
        Qwen3ForCausalLM, SHAPE | {"head_dim": 12, "attention_bias": True}, shards=True
    ),
    "olmo2": Family(Olmo2ForCausalLM, SHAPE),
    "neox": Family(
        GPTNeoXForCausalLM,
        NEOX | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 2e4}},
        torch.float16,
        old=True,
    ),
    "neox-serial": Family(
        GPTNeoXForCausalLM,
        NEOX
        | {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False}
        | {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 1e4}},
    ),
    "starcoder2": Family(Starcoder2ForCausalLM, SHAPE | {"sliding_window": 6}),
    "starcoder2-unbiased": Family(Starcoder2ForCausalLM, SHAPE | {"use_bias": False}),
    "phi3": Family(Phi3ForCausalLM, SHAPE | {"sliding_window": 9}, torch.bfloat16),
    "phi3-longrope": Family(
        Phi3ForCausalLM,
        SHAPE
        | {
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                **PHI3_FACTORS,
            },
        },
        old=True,
    ),
    "gemma2": Family(
        Gemma2ForCausalLM,
        SHAPE
        | {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 6}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        torch.bfloat16,
    ),
}


class Published(NamedTuple):
    """What transformers wrote, in the state it has in memory."""

    directory: Path
    theirs: PreTrainedModel


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def publish(directory: Path, family: Family) -> Published:
    """A small random model of the family; no tensor is near its usual start."""
    config = family.theirs.config_class(**family.keys)
    theirs = family.theirs._from_config(config, attn_implementation="eager", dtype=family.dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        drawn = torch.empty(parameter.shape).normal_(0.0, 0.2, generator=generator)
        parameter.data = (drawn + 1 if "norm" in name else drawn).to(family.dtype)
    theirs.tie_weights()
    theirs.save_pretrained(directory, max_shard_size=30_000 if family.shards else "5GB")
    assert len(list(directory.glob("*.safetensors"))) > (3 if family.shards else 0)
    if family.old:
        in_old_form(directory / "config.json")
    theirs = family.theirs.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    return Published(directory, theirs.eval())


def in_old_form(path: Path) -> None:
    """Rewrite config.json with the keys of transformers 4, and the first names of Phi-3."""
    document = json.loads(path.read_text())
    rope = document.pop("rope_parameters")
    neox = document["model_type"] == "gpt_neox"
    document["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        name = "rotary_pct" if neox else "partial_rotary_factor"
        document[name] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    rope.pop("type", None)
    if kind != "default":
        document["rope_scaling"] = rope | {"type": {"longrope": "su"}.get(kind, kind)}
    path.write_text(json.dumps(document, indent=2))


@pytest.fixture(scope="module", params=FAMILIES)
def imported(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Published, Path]:
    """A published model and the run that began with it."""
    place = tmp_path_factory.mktemp("family")
    published = publish(place / "published", FAMILIES[request.param])
    import_into(place / "run", published.directory, run_config(data, 3))
    return published, place / "run"


@torch.no_grad()
def test_a_family_computes_here_what_it_computes_in_transformers(
    imported: tuple[Published, Path], data: Path
) -> None:
    """Logits within 1e-5 of the largest in fp32, and the same greedy text."""
    (_, theirs), run = imported
    ours, config, _ = load_model(run)
    tokens = tokens_of(data)
    logits = ours(tokens)
    assert_near(logits[..., :VOCABULARY], theirs(tokens).logits)
    texts = generate(
        lambda new, cache: ours(new, cache=cache),
        load_tokenizer(data),
        PROMPTS,
        sequence_length=SEQUENCE_LENGTH,
        reread_after=config.megagpt.model.reread_after,
        max_new_tokens=8,
        temperature=0,
    )
    assert texts == [greedy(theirs, prompt, 8) for prompt in PROMPTS]
    assert len("".join(texts)) > 8


def greedy(theirs: PreTrainedModel, prompt: str, tokens: int) -> str:
    """What transformers writes after a prompt of bytes, up to the end of the document."""
    ids = torch.tensor([list(prompt.encode())])
    written = theirs.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return bytes(token for token in written.tolist() if token < 256).decode(errors="replace")


def test_a_family_comes_out_as_it_went_in(imported: tuple[Published, Path], tmp_path: Path) -> None:
    """Each file to the byte: weights, their formats and order, index, both config.json."""
    (published, _), run = imported
    export(run, tmp_path / "out")
    files = sorted(path.name for path in published.iterdir())
    assert {"config.json", "generation_config.json"} < {*files}
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes(), name
    written = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    assert written == {name for name in files if ".safetensors" in name}
