"""A published model as the beginning of a run; the outside reference is transformers, offline."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from megagpt.checkpoint.safetensors_file import StoredFile
from megagpt.config import RunConfig
from megagpt.dataset import SampleStream, open_dataset
from megagpt.huggingface.export import export
from megagpt.huggingface.importing import import_model
from megagpt.inference.stored_model import load_model
from megagpt.monitoring.metrics import read_metrics
from megagpt.utils import UserError
from tests.conftest import _Pools
from tests.support.exported_models import TRAIN, VOCABULARY, assert_near, import_into, tokens_of
from tests.support.jobs.checkpoint import SCHEDULE_STEPS, assert_same_state, gathered, run_config
from tests.support.trained_run import write_dataset, write_run

STEPS = 3
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PUBLISHED: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=128, num_key_value_heads=2, rms_norm_eps=1e-5)
    ),
    "starcoder2": lambda: Starcoder2ForCausalLM(
        Starcoder2Config(
            **SHAPE,
            intermediate_size=128,
            num_key_value_heads=2,
            bos_token_id=256,
            eos_token_id=256,
        )
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A directory as transformers writes it, and its model; every tensor is far from the usual
    start.
    """
    model = PUBLISHED[request.param]()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(tmp_path / "published")
    return tmp_path / "published", model


@torch.no_grad()
def assert_same_logits(run: Path, theirs: PreTrainedModel, data: Path) -> None:
    tokens = tokens_of(data)
    ours = load_model(run)[0](tokens)
    assert_near(ours[..., :VOCABULARY], theirs.eval()(tokens).logits)
    assert not ours[..., VOCABULARY:].any()  # rows that pad are zero


def test_what_transformers_saved_goes_on_here(
    published: tuple[Path, PreTrainedModel], data: Path, tmp_path: Path
) -> None:
    directory, theirs = published
    made = import_model(
        directory, RunConfig.from_json(json.dumps(run_config(data, STEPS))), tmp_path / "run"
    )
    assert made.architecture == type(theirs).__name__
    assert not made.tokenizer_compared  # there is none
    assert_same_logits(tmp_path / "run", theirs, data)


@pytest.mark.parametrize("published", ["gpt2"], indirect=True)
def test_files_of_the_model_without_its_head_are_read(
    published: tuple[Path, PreTrainedModel], data: Path, tmp_path: Path
) -> None:
    """As GPT-2 was published: shorter names, the mask of attention among the tensors; and a copy
    of the tied weight.
    """
    directory, theirs = published
    tensors = load_file(directory / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {
        "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(),
        "lm_head.weight": tensors["transformer.wte.weight"].clone(),
    }
    save_file(old, directory / "model.safetensors")
    import_into(tmp_path / "run", directory, run_config(data, STEPS))
    assert_same_logits(tmp_path / "run", theirs, data)
    save_file(old | {"lm_head.weight": old["lm_head.weight"] * 2}, directory / "model.safetensors")
    assert "lm_head.weight: megagpt has no such tensor" in refusal(
        directory, data, tmp_path / "another"
    )


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {}), pytest.param(4, {"pipeline": 2, "tensor": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_training_begins_with_the_loss_that_transformers_computes(
    pools: _Pools,
    published: tuple[Path, PreTrainedModel],
    data: Path,
    tmp_path: Path,
    ranks: int,
    parallel: dict[str, int],
) -> None:
    directory, theirs = published
    config = run_config(data, STEPS, (1, "none", "none"))
    config["megagpt"]["parallel"] = parallel
    imported = import_into(tmp_path / "run", directory, config)
    pools.get(ranks).run(TRAIN, config=imported, directory=tmp_path / "run")
    stream = SampleStream.open(
        [(data, 1.0)], split="train", sequence_length=16, seed=0, document_mask=False
    )
    batch = stream.batch(range(imported["train_batch_size"]))
    logits = theirs.eval()(torch.from_numpy(batch.tokens)).logits
    expected = F.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.targets).long().flatten()
    )
    assert read_metrics(tmp_path / "run").steps[0].loss == pytest.approx(expected.item(), rel=1e-6)


COSINE = {
    "type": "WarmupCosineLR",
    "params": {"total_num_steps": SCHEDULE_STEPS, "warmup_num_steps": 2, "warmup_min_ratio": 0.5},
}
LINEAR = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": SCHEDULE_STEPS, "warmup_num_steps": 2, "warmup_min_lr": 0.0005},
}


@pytest.mark.parametrize(
    ("zero", "keys"),
    [
        ((3, "none", "none"), {"scheduler": COSINE}),
        pytest.param((0, "none", "none"), {"scheduler": None}, marks=pytest.mark.slow),
        pytest.param((1, "none", "none"), {"scheduler": LINEAR}, marks=pytest.mark.slow),
        pytest.param(
            (1, "none", "none"),
            {"scheduler": LINEAR, "fp16": {"enabled": True}},
            marks=pytest.mark.slow,
        ),
        pytest.param((3, "cpu", "cpu"), {"scheduler": LINEAR}, marks=pytest.mark.slow),
    ],
    ids=["zero-3", "zero-0", "zero-1", "zero-1-fp16", "zero-3-offload"],
)
def test_it_is_the_run_that_would_have_begun_with_these_weights(
    pools: _Pools, data: Path, tmp_path: Path, zero: tuple[int, str, str], keys: dict[str, Any]
) -> None:
    """Bit for bit, moments and learning rates too: the model of a seed, imported, against a run
    from that seed.

    DeepSpeed takes its first master weights from what the model computes in, so in fp16 the model
    is exported in it.
    """
    seed, dtype = 10, "fp16" if "fp16" in keys else "fp32"
    export(write_run(tmp_path / "initial", data, steps=(seed,)), tmp_path / "model", dtype=dtype)
    config = run_config(data, STEPS, zero, init_std=0.2) | keys
    if config["scheduler"] is None:
        del config["scheduler"]
    config["megagpt"]["training"]["seed"] = seed
    imported = import_into(tmp_path / "imported", tmp_path / "model", config)
    ends = [
        pools.get(2).run(
            "tests.support.jobs.training:allowing_fp16",
            of=TRAIN,
            config=of_run,
            directory=tmp_path / name,
        )
        for name, of_run in [("imported", imported), ("fresh", config)]
    ]
    assert_same_state(*(gathered(ranks, "at_end") for ranks in ends))
    assert ends[0][0]["state"] == ends[1][0]["state"]
    assert ends[0][0]["scaler_at_end"] == ends[1][0]["scaler_at_end"]
    imported_steps, fresh_steps = (
        read_metrics(tmp_path / name).steps for name in ("imported", "fresh")
    )
    assert [(s.loss, s.grad_norm, s.learning_rate) for s in imported_steps] == [
        (s.loss, s.grad_norm, s.learning_rate) for s in fresh_steps
    ]


# ----------------------------------------------------------------------------- what is not imported

LLAMA_REFUSALS = [
    (
        {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_parameters": None},
        'rope_scaling.rope_type "mrope": megagpt has default, linear, dynamic, yarn, llama3, '
        "longrope",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor 0.5: megagpt needs 1.0",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 8}},
        "rope_parameters.beta_fast 8: megagpt does not support it with rope_type linear",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
        'rope_scaling: megagpt.model.rope_scaling.factor: expected a number, got "two"',
    ),
    ({"hidden_act": "gelu"}, 'hidden_act "gelu": megagpt needs "silu"'),
    ({"head_dim": 16}, "q_proj.weight: F32 of shape (32, 32), the model's is (64, 32)"),
    ({"intermediate_size": 96}, "gate_proj.weight: F32 of shape (128, 32), the model's is (96, 32"),
    ({"attention_bias": True}, "model.layers.1.self_attn.o_proj.bias: missing"),
    ({"sliding_window": 4096}, "sliding_window 4096: megagpt does not support it"),
    ({"num_local_experts": 8}, "num_local_experts 8: megagpt does not support it"),
    (
        {"quantization_config": {"bits": 4}},
        'quantization_config {"bits": 4}: megagpt does not support it',
    ),
    ({"max_position_embeddings": 8}, "max_position_embeddings 8: shorter than the run's sequences"),
    (
        {"num_attention_heads": 5, "head_dim": None, "num_key_value_heads": None},
        "num_attention_heads: megagpt.model.num_heads: 5 does not divide hidden_size 32: use 4 or",
    ),
    (
        {"num_hidden_layers": "two"},
        'num_hidden_layers: megagpt.model.num_layers: expected an integer, got "two"',
    ),
    ({"num_hidden_layers": ...}, "num_hidden_layers: missing; download it again"),
    ({"vocab_size": None}, "vocab_size: missing; download it again"),
    (
        {"hidden_size": [32]},
        "hidden_size: megagpt.model.hidden_size: expected an integer, got [32]",
    ),
    ({"hidden_size": -32}, "hidden_size: megagpt.model.hidden_size: must be at least 1, got -32"),
    ({"hidden_size": 10**30 + 1}, "its tensor files have only "),
    ({"hidden_size": 100_000}, "parameters: its tensor files have"),
    ({"num_hidden_layers": 100_000}, "parameters: its tensor files have"),
    (
        {"hidden_size": float("inf")},
        "config.json: not JSON (Infinity is not finite); download it again",
    ),
    ({"rope_scaling": "linear"}, 'rope_scaling "linear": megagpt does not support it'),
    ({"rope_parameters": [1, 2]}, "rope_parameters [1, 2]: megagpt does not support it"),
    ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight: megagpt has no such tensor"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight: missing"),
    (
        {"vocab_size": 256},
        "has ids beyond the embedding of\n*(found 257 tokens, need at most 256); prepare the data",
    ),
    (
        {"vocab_size": 258},
        "model.embed_tokens.weight: F32 of shape (257, 32), the model's is (258, 32)",
    ),
    (
        {"architectures": ["MixtralForCausalLM"]},
        "architectures: unknown (found ['MixtralForCausalLM'], need one of GPT2LMHeadModel, Llama",
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "llama"
    PUBLISHED["llama"]().save_pretrained(directory)
    return directory


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(saved, tmp_path / "llama")
    return tmp_path / "llama"


def refusal(model: Path, data: Path, run: Path, **keys: Any) -> str:
    """Why it is not imported; nothing may be left of the run."""
    with pytest.raises(UserError) as refused:
        import_into(
            run, model, {k: v for k, v in (run_config(data, STEPS) | keys).items() if v is not None}
        )
    assert not run.exists()
    assert not run.with_name(f".staging_{run.name}").exists()
    return str(refused.value)


@pytest.mark.parametrize(("changes", "said"), LLAMA_REFUSALS, ids=lambda value: str(value)[:40])
def test_what_computes_otherwise_is_refused(
    llama: Path, data: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    document = json.loads((llama / "config.json").read_text()) | changes
    (llama / "config.json").write_text(
        json.dumps({key: value for key, value in document.items() if value is not ...})
    )
    reason = refusal(llama, data, tmp_path / "run")
    assert all(line in reason for line in said.split("\n*")), reason


def test_all_that_differs_is_said_at_once(llama: Path, data: Path, tmp_path: Path) -> None:
    document = json.loads((llama / "config.json").read_text())
    document |= {"rope_scaling": {"type": "own"}, "hidden_act": "gelu", "sliding_window": 7}
    document["rope_parameters"] = None
    (llama / "config.json").write_text(json.dumps(document))
    lines = refusal(llama, data, tmp_path / "run").splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{llama / 'config.json'}: ") for line in lines)


def test_data_of_another_tokenizer_are_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "tokenizer.json", llama)
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (llama / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer is not that of" in (reason := refusal(llama, data, tmp_path / "run"))
    assert "'a' is 97 here, 98 there; prepare the data with the model's tokenizer" in reason


def test_weights_that_are_spoilt_or_missing_are_refused(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    weights = llama / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights)
    assert "model.norm.weight: not finite" in refusal(llama, data, tmp_path / "run")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors: cannot be read" in refusal(llama, data, tmp_path / "run")
    weights.rename(llama / "pytorch_model.bin")
    assert (
        "model.safetensors: not found; if the weights are in another format, such as pickle"
        in refusal(llama, data, tmp_path / "run")
    )
    outside = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(outside))
    assert "weight_map: not a map to file names" in refusal(llama, data, tmp_path / "run")


def test_an_index_that_names_the_wrong_files_is_refused(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    tensors = load_file(llama / "model.safetensors")
    index, places = (
        llama / "model.safetensors.index.json",
        dict.fromkeys(tensors, "model.safetensors"),
    )
    save_file({"another": torch.zeros(1)}, llama / "other.safetensors")
    for wrong, said in [
        ("other.safetensors", "model.norm.weight is not in other.safetensors"),
        ("absent.safetensors", "absent.safetensors: cannot be read"),
        (["model.safetensors"], "weight_map: not a map to file names; download it again"),
        (None, "weight_map: not a map to file names; download it again"),
    ]:
        index.write_text(json.dumps({"weight_map": {**places, "model.norm.weight": wrong}}))
        assert said in (reason := refusal(llama, data, tmp_path / "run"))
        assert "download" in reason
        assert len(reason.splitlines()) == 1


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (
            lambda tensor: tensor.long(),
            "model.norm.weight: I64 of shape (32,), the model's is (32,) in F64, F32, BF16",
        ),
        (
            lambda tensor: tensor.to(torch.float8_e4m3fn),
            "model.norm.weight: F8_E4M3 of shape (32,)",
        ),
        (
            lambda tensor: tensor[None],
            "model.norm.weight: F32 of shape (1, 32), the model's is (32,)",
        ),
        (lambda tensor: tensor.sum(), "model.norm.weight: F32 of shape (), the model's is (32,)"),
        (lambda tensor: tensor[:0], "model.norm.weight: F32 of shape (0,), the model's is (32,)"),
    ],
    ids=["integers", "float8", "more-dimensions", "none", "empty"],
)
def test_a_tensor_of_another_kind_is_refused(
    llama: Path,
    data: Path,
    tmp_path: Path,
    spoilt: Callable[[torch.Tensor], torch.Tensor],
    said: str,
) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = spoilt(tensors["model.norm.weight"]).contiguous().clone()
    save_file(tensors, llama / "model.safetensors")
    assert said in refusal(llama, data, tmp_path / "run")


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff" * 9], ids=repr)
def test_a_file_of_other_content_is_refused(
    llama: Path, data: Path, tmp_path: Path, file: str, content: bytes
) -> None:
    (llama / file).write_bytes(content)
    reason = refusal(llama, data, tmp_path / "run")
    assert f"{llama / file}: " in reason
    assert "download" in reason
    assert len(reason.splitlines()) == 1


@pytest.mark.parametrize("published", ["gpt2"], indirect=True)
def test_biases_are_not_dropped(
    published: tuple[Path, PreTrainedModel], data: Path, tmp_path: Path
) -> None:
    model = run_config(data, STEPS, bias=False)["megagpt"]
    reason = refusal(published[0], data, tmp_path / "run", megagpt=model)
    assert "not zero, so biases are needed; --set megagpt.model.bias=true" in reason


def test_a_run_is_never_replaced(llama: Path, data: Path, tmp_path: Path) -> None:
    import_into(tmp_path / "run", llama, run_config(data, STEPS))
    with pytest.raises(UserError, match="run: exists already; choose another --run_dir"):
        import_into(tmp_path / "run", llama, run_config(data, STEPS))


def test_the_batch_must_not_depend_on_the_number_of_ranks(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    assert "train_batch_size: missing" in refusal(
        llama, data, tmp_path / "run", train_batch_size=None
    )


def test_a_file_larger_than_memory_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    """A sparse file of twice the memory: Linux refuses to map it as torch's safe_open does."""
    path = tmp_path / "large.safetensors"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = 2 * memory // 2**22
    entries = {
        "first": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "huge": {"dtype": "F32", "shape": [rows, 2**20], "data_offsets": [12, 12 + rows * 2**22]},
        "last": {
            "dtype": "F64",
            "shape": [2],
            "data_offsets": [12 + rows * 2**22, 28 + rows * 2**22],
        },
    }
    header = json.dumps(entries).encode()
    first = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    last = torch.tensor([1.5, -2.5], dtype=torch.float64)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(first.view(torch.uint8).numpy().tobytes())
        file.seek(rows * 2**22, os.SEEK_CUR)
        file.write(last.numpy().tobytes())
    assert path.stat().st_size > memory
    stored = StoredFile(path)
    assert torch.equal(stored.slice("first").read(), first)
    assert torch.equal(stored.slice("last").read(), last)
    assert stored.slice("huge").shape == (rows, 2**20)
    with pytest.raises(SafetensorError, match="no tensor other"):
        stored.slice("other")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SafetensorError):
        StoredFile(path)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_those_that_safetensors_reads(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5).to(kind), "b": torch.randn(()).to(kind), "c": torch.empty(0)}
    save_file(tensors, tmp_path / "a.safetensors")
    stored = StoredFile(tmp_path / "a.safetensors")
    assert set(stored.keys()) == set(tensors)
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        found = stored.slice(name).read()
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_a_context_longer_than_the_data_is_said_at_the_import(
    data: Path, saved: Path, tmp_path: Path
) -> None:
    """Learned positions cannot be shortened; with rotary ones a run may have shorter samples."""
    tokens = open_dataset(data).manifest.tokens("val")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=tokens, n_embd=32, n_layer=1, n_head=4)
    ).save_pretrained(tmp_path / "gpt2")
    config = run_config(data, STEPS, sequence_length=tokens)
    config["megagpt"]["training"]["eval_interval_steps"] = 1
    reason = refusal(tmp_path / "gpt2", data, tmp_path / "run", **config)
    assert f"its context is {tokens} tokens, longer than the val split of {data}" in reason
    assert f"found {tokens} tokens, need {tokens + 1}" in reason
    assert "sequence_length" not in reason
    assert "--set megagpt.training.eval_interval_steps=0" in reason
    config["megagpt"]["training"]["eval_interval_steps"] = 0
    import_into(tmp_path / "run", tmp_path / "gpt2", config)
    document = json.loads((saved / "config.json").read_text())
    longest = document["max_position_embeddings"]
    assert longest > tokens
    config = run_config(data, STEPS, sequence_length=longest)
    config["megagpt"]["training"]["eval_interval_steps"] = 1
    reason = refusal(saved, data, tmp_path / "other", **config)
    assert f"--set megagpt.model.sequence_length={tokens - 1}" in reason
