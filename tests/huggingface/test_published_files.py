"""Files as people have them: old names, copies, masks, without a head, in parts, damaged; and the
shapes of the models that are published.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from megagpt.config import ModelConfig, RunConfig
from megagpt.huggingface import importing
from megagpt.huggingface.architectures import ARCHITECTURES
from megagpt.huggingface.export import export
from megagpt.huggingface.importing import import_model
from megagpt.huggingface.published_config import PublishedConfig
from megagpt.inference.stored_model import load_model
from megagpt.planning.legality import World, resolve
from megagpt.utils import UserError
from tests.model.test_presets import PUBLISHED
from tests.support.exported_models import VOCABULARY, assert_near, import_into
from tests.support.jobs.checkpoint import run_config
from tests.support.trained_run import write_dataset

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def change_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors", {"format": "pt"})


def change_config(directory: Path, **keys: Any) -> None:
    document = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps(document, indent=1))


def assert_there_and_back(model: Path, data: Path, place: Path, **keys: Any) -> None:
    import_model(model, RunConfig.from_json(json.dumps(run_config(data, 3))), place / "run", **keys)
    export(place / "run", place / "out")
    for path in model.iterdir():
        assert (place / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_gpt2_as_it_was_published_comes_back(data: Path, tmp_path: Path) -> None:
    """Names without a prefix, masks of attention among the tensors, a copy of the tied weight."""
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ).half().save_pretrained(model)

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        more = {"h.0.attn.masked_bias": torch.tensor(-1e4)}
        return renamed | masks | more | {"lm_head.weight": renamed["wte.weight"].clone()}

    change_tensors(model, old)
    change_config(model, n_ctx=16, task_specific_params={"text-generation": {"max_length": 50}})
    assert_there_and_back(model, data, tmp_path)


def test_a_model_saved_without_its_head_comes_back(data: Path, tmp_path: Path) -> None:
    """The class that returns hidden states: its tensors have no prefix; a tied head is not lost."""
    LlamaModel(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    assert "embed_tokens.weight" in load_file(tmp_path / "model/model.safetensors")
    assert_there_and_back(tmp_path / "model", data, tmp_path)
    change_config(tmp_path / "model", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"safetensors: lm_head\.weight: missing; it was saved wi"):
        import_into(tmp_path / "another", tmp_path / "model", run_config(data, 3))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_what_changes_no_result_is_carried(llama: Path, data: Path, tmp_path: Path) -> None:
    change_config(
        llama,
        _num_labels=2,
        torch_dtype="bfloat16",
        auto_map={"AutoModel": "x.Y"},
        attention_dropout=0.25,
        rope_interleaved=False,
        **{"transformers.js_config": {"dtype": "q4"}},
    )
    assert_there_and_back(llama, data, tmp_path)


def test_an_unknown_key_is_carried_if_the_user_says_that_it_changes_nothing(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    change_config(llama, our_note={"trained on": ["a", 1.5]}, attn_variant=3, hidden_act="tanh")
    with pytest.raises(UserError) as refused:
        import_into(tmp_path / "run", llama, run_config(data, 3))
    assert [line.partition("json: ")[2][:30] for line in str(refused.value).splitlines()] == [
        'our_note {"trained on": ["a", ',
        "attn_variant 3: megagpt does n",
        'hidden_act "tanh": megagpt nee',
    ]
    assert "add --ignore_keys attn_variant" in str(refused.value)
    change_config(llama, hidden_act="silu")
    assert_there_and_back(llama, data, tmp_path, ignored=["our_note", "attn_variant"])


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_an_import_comes_out_in_another_format_on_demand(
    llama: Path, data: Path, tmp_path: Path, dtype: str, torch_dtype: str
) -> None:
    """In the same files; config.json says so, and the index counts the bytes."""
    model = LlamaForCausalLM.from_pretrained(llama)
    shutil.rmtree(llama)
    model.save_pretrained(llama, max_shard_size=10_000)
    import_into(tmp_path / "run", llama, run_config(data, 3))
    export(tmp_path / "run", tmp_path / "out", dtype=dtype)
    files = sorted(path.name for path in llama.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for name in files:
        before, after = load_file(llama / name), load_file(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n].to(after[n].dtype), after[n]) for n in before)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    wide = 4 if dtype == "fp32" else 2
    assert index["metadata"]["total_size"] == wide * sum(p.numel() for p in model.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(theirs.dtype) == f"torch.{torch_dtype}"


def test_a_large_model_is_read_tensor_by_tensor(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose tensors are all larger than what is read together; biases that are not ours
    among them.
    """
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ).save_pretrained(tmp_path / "gpt2")
    change_tensors(
        tmp_path / "gpt2",
        lambda tensors: {
            name: tensor * (not name.endswith(".bias")) for name, tensor in tensors.items()
        },
    )
    for model, keys in ((llama, {}), (tmp_path / "gpt2", {"bias": False})):
        import_into(tmp_path / "together", model, run_config(data, 3, **keys))
        with monkeypatch.context() as patched:
            patched.setattr(importing, "BATCH", 1)
            import_into(tmp_path / "alone", model, run_config(data, 3, **keys))
        files = list((tmp_path / "alone/checkpoints/step_00000000").glob("*.safetensors"))
        weights = dict(load_model(tmp_path / "alone")[0].named_parameters())
        assert len(files) == len(weights)
        for name, weight in load_model(tmp_path / "together")[0].named_parameters():
            assert torch.equal(weight, weights[name])
        shutil.rmtree(tmp_path / "together")
        shutil.rmtree(tmp_path / "alone")


def test_a_run_of_another_model_does_not_come_out_as_the_published_one(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    import_into(tmp_path / "run", llama, run_config(data, 3))
    change_config(tmp_path / "run/published", rms_norm_eps=1e-3)
    with pytest.raises(
        UserError, match=r"published/config\.json: not the run's model \(needs norm_epsilon 0\.001"
    ):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_longer_positions_come_out_in_config_json(llama: Path, data: Path, tmp_path: Path) -> None:
    """As a run has them that was continued with `--allow_change`; other keys stay."""
    change_config(llama, our_note="x")
    config = run_config(data, 3)
    import_model(
        llama, RunConfig.from_json(json.dumps(config)), tmp_path / "run", ignored=["our_note"]
    )
    document = json.loads((tmp_path / "run/config.json").read_text())
    scaling = {"type": "yarn", "factor": 4.0, "original_length": 32}
    document["megagpt"]["model"] |= {"sequence_length": 128, "rope_scaling": scaling}
    (tmp_path / "run/config.json").write_text(json.dumps(document))
    export(tmp_path / "run", tmp_path / "out")
    before = json.loads((llama / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after["max_position_embeddings"] == 128
    assert after.pop("rope_scaling")["rope_type"] == "yarn"
    assert {k for k in after if after[k] != before.get(k)} <= {
        "max_position_embeddings",
        "rope_theta",
    }
    assert before.keys() - after.keys() == {"rope_parameters"}
    ours = load_model(tmp_path / "run")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(0))
    assert_near(ours(tokens)[..., :VOCABULARY], theirs(tokens).logits)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff" * 99, None], ids=repr)
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "model-00002-of", "buffers.safetensors"]
)
def test_what_a_run_has_kept_may_be_damaged(
    data: Path, tmp_path: Path, kept: Path, file: str, content: bytes | None
) -> None:
    """The export says so in one line, and writes nothing."""
    shutil.copytree(kept, tmp_path / "run")
    (path,) = (tmp_path / "run/published").glob(f"{file}*")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(b"\0" * 8 * path.name.endswith(".header") + content)
    with pytest.raises(UserError) as refused:
        export(tmp_path / "run", tmp_path / "out")
    assert str(refused.value).startswith(f"{tmp_path / 'run/published'}")
    assert len(str(refused.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def kept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model in several files, one of which holds a mask."""
    place = tmp_path_factory.mktemp("kept")
    shape = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(place / "gpt2", max_shard_size=40_000)
    index = place / "gpt2/model.safetensors.index.json"
    document = json.loads(index.read_text())
    first = place / "gpt2" / next(iter(document["weight_map"].values()))
    save_file(load_file(first) | {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}, first)
    document["weight_map"]["h.0.attn.bias"] = first.name
    index.write_text(json.dumps(document))
    import_into(place / "run", place / "gpt2", run_config(data, 3))
    return place / "run"


# --------------------------------------------------------------------------------- damaged in parts


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("truncated", "{shard}: cannot be read ("),
        ("gone", "{shard}: cannot be read ("),
        ("two", "{index}: weight_map: does not name extra of {name}; download both again"),
        ("extra", "{shard}: extra: megagpt has no such tensor"),
        ("missing", "{index}: model.norm.weight: missing; download the model again"),
        ("shape", "{shard}: model.norm.weight: BF16 of shape (3,), the model's is (32,) in F64"),
    ],
)
def test_a_damaged_part_is_named(
    llama: Path, data: Path, tmp_path: Path, damage: str, said: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    shutil.rmtree(llama)
    model.save_pretrained(llama, max_shard_size=10_000)
    index = llama / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = document["weight_map"]["model.norm.weight"]
    shard = llama / name
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-10])
        case "gone":
            shard.unlink()
        case _:
            tensors = load_file(shard)
            if damage in ("two", "extra"):
                tensors["extra"] = torch.zeros(1)
            if damage == "extra":
                document["weight_map"]["extra"] = name
            if damage == "missing":
                del tensors["model.norm.weight"], document["weight_map"]["model.norm.weight"]
            if damage == "shape":
                tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].clone()
            save_file(tensors, shard)
            index.write_text(json.dumps(document))
    with pytest.raises(UserError) as refused:
        import_into(tmp_path / "run", llama, run_config(data, 3))
    assert str(refused.value).startswith(said.format(shard=shard, index=index, name=name))
    assert len(str(refused.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


# ------------------------------------------------------------------------ models that are published

LLAMA3_1B_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# What their config.json say beside the sizes, where that is not transformers' default.
BESIDE_SIZES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_1B_SCALING,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    "llama3-8b": {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192},
    "llama3-70b": {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192},
    "mistral-7b": {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "sliding_window": 4096},
    **{
        f"qwen3-{size}": {
            "rope_theta": 1000000,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "use_sliding_window": False,
            "sliding_window": None,
        }
        for size in ("0.6b", "8b", "32b")
    },
    "smollm2-135m": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "max_position_embeddings": 8192,
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "olmo2-7b": {"rms_norm_eps": 1e-6, "rope_theta": 500000, "max_position_embeddings": 4096},
    "pythia-1b": {"rotary_pct": 0.25, "rotary_emb_base": 10000, "classifier_dropout": 0.1},
    "gemma2-2b": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_model_has_the_tensors_that_we_expect(preset: str, tmp_path: Path) -> None:
    """By name and shape, on no device; a run of it is planned, and is that of its preset."""
    count, keys = PUBLISHED[preset]
    config = AutoConfig.for_model(**keys)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    document = {"architectures": [type(theirs).__name__], "torch_dtype": "bfloat16", **keys}
    document |= {"max_position_embeddings": config.max_position_embeddings, **BESIDE_SIZES[preset]}
    (tmp_path / "config.json").write_text(json.dumps(document))
    written = {
        "train_batch_size": 64,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "megagpt": {
            "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1},
            "parallel": {"pipeline": 2, "tensor": 1 if preset.startswith("smol") else 2},
            "training": {"total_steps": 10},
        },
    }
    published = PublishedConfig(tmp_path / "config.json")
    run = published.run_config(RunConfig.from_json(json.dumps(written)), 2 * count)
    resolved = resolve(run, world=World(64, None)).config.megagpt.model
    expected = {
        published.architecture.stored_name(name, names): shape
        for names in [{n for n, _ in theirs.named_parameters()}]
        for part in published.architecture.parts(resolved)
        for name, shape in part.theirs.items()
    }
    assert expected == {name: parameter.shape for name, parameter in theirs.named_parameters()}
    model = ModelConfig.model_validate({"preset": preset, "vocab_size": resolved.vocab_size})
    model = model.model_copy(update={"vocabulary": resolved.vocabulary})
    assert published.architecture.differences(published.document, model) == []


def test_the_table_has_no_two_alike() -> None:
    assert len({a.name for a in ARCHITECTURES}) == len({a.model_type for a in ARCHITECTURES}) == 10
