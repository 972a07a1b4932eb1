"""Models for Hugging Face and back; the outside reference is transformers, offline."""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagpt.data.byte_level_bpe import ByteLevelTokenizer
from megagpt.data.tokenizer import load_tokenizer
from megagpt.huggingface import export as exporting
from megagpt.huggingface.export import export
from megagpt.huggingface.whole_directory import whole_directory
from megagpt.inference.generate import generate
from megagpt.inference.stored_model import load_model
from megagpt.rundir.directory import CONFIG_FILE
from megagpt.utils import UserError
from tests.conftest import _Pools
from tests.support.exported_models import (
    ROWS,
    TRAIN,
    VOCABULARY,
    assert_near,
    import_into,
    tokens_of,
)
from tests.support.jobs.checkpoint import full_disk, run_config, small_files
from tests.support.trained_run import SEQUENCE_LENGTH, write_dataset, write_run

STEPS = 3
LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu"}
STARCODER2 = {"position": "rotary", "norm": "layernorm", "activation": "gelu"}
# what transformers calls it, and what it is here
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied-unbiased": ("GPT2LMHeadModel", {"tie_embeddings": False, "bias": False}),
    "llama": (
        "LlamaForCausalLM",
        {**LLAMA, "num_kv_heads": 2, "bias": False, "tie_embeddings": False},
    ),
    "llama-tied-biased": ("LlamaForCausalLM", {**LLAMA, "num_kv_heads": 1, "bias": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {**STARCODER2, "num_kv_heads": 2, "bias": True}),
    "starcoder2-untied-unbiased": (
        "Starcoder2ForCausalLM",
        {**STARCODER2, "bias": False, "tie_embeddings": False},
    ),
}
LONGER = ("llama-tied-biased", "starcoder2")
EVERY_MODEL = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONGER else name for name in MODELS],
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def trained(
    pools: _Pools, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A run of two ranks by the name of its model, trained so fast that no bias and no norm
    stays what it was.
    """
    place, runs = tmp_path_factory.mktemp("runs"), {}

    def run(name: str) -> Path:
        if name not in runs:
            config = run_config(data, STEPS, (3, "none", "none"), **MODELS[name][1], init_std=0.2)
            config["optimizer"]["params"]["lr"] = 0.05
            pools.get(2).run(TRAIN, config=config, directory=place / name)
            runs[name] = place / name
        return runs[name]

    return run


def their_model(directory: Path) -> Any:
    """What transformers makes of a directory; every tensor must have found its place."""
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(
        loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ), loading
    return model


def stored_shapes(directory: Path) -> dict[str, list[int]]:
    shapes = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    return shapes


# ------------------------------------------------------------------------------------------- export


@torch.no_grad()
def assert_exported(run: Path, output: Path, data: Path, architecture: str) -> None:
    """Logits, vocabulary, greedy text."""
    assert export(run, output).architecture == architecture
    theirs, (ours, config, _) = their_model(output), load_model(run)
    assert type(theirs).__name__ == architecture
    tokens = tokens_of(data)
    assert_near(theirs(tokens).logits, ours(tokens)[..., :VOCABULARY])
    assert theirs.config.vocab_size == theirs.get_input_embeddings().num_embeddings == VOCABULARY
    assert config.megagpt.model.vocab_size == ROWS
    assert [name for name, shape in stored_shapes(output).items() if ROWS in shape] == []

    ours_of_text, theirs_of_text = load_tokenizer(data), AutoTokenizer.from_pretrained(output)
    (text,) = generate(
        lambda new, cache: ours(new, cache=cache),
        ours_of_text,
        ["The q"],
        sequence_length=SEQUENCE_LENGTH,
        max_new_tokens=10,
        temperature=0,
    )
    written = theirs.generate(
        **theirs_of_text("The q", return_tensors="pt"), max_new_tokens=10, do_sample=False
    )[0]
    assert theirs_of_text.decode(written, skip_special_tokens=True) == "The q" + text


@EVERY_MODEL
def test_transformers_computes_what_we_do(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, name: str
) -> None:
    assert_exported(trained(name), tmp_path / "out", data, MODELS[name][0])


RMS = {**LLAMA, "num_kv_heads": 2, "bias": False, "tie_embeddings": False}
# what transformers calls a model of our keys
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "LlamaForCausalLM",
        RMS
        | {"mlp_size": 96, "rope_base": 5e5, "norm_epsilon": 1e-6, "head_size": 12}
        | {"rope_scaling": {"type": "llama3", "factor": 8.0, "original_length": 16}},
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        RMS | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_length": 16}},
    ),
    "llama-dynamic": (
        "LlamaForCausalLM",
        RMS | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_length": 8}},
    ),
    "mistral": ("MistralForCausalLM", RMS | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", RMS | {"qkv_bias": True}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        RMS
        | {"qkv_bias": True, "sliding_window": 5, "sliding_window_pattern": ["full", "sliding"]},
    ),
    "qwen3": ("Qwen3ForCausalLM", RMS | {"qk_norm": "per_head", "head_size": 12}),
    "olmo2": ("Olmo2ForCausalLM", RMS | {"qk_norm": "whole", "post_norm": "instead"}),
    "neox": (
        "GPTNeoXForCausalLM",
        {"position": "rotary", "rope_fraction": 0.5, "activation": "gelu_exact"}
        | {"parallel_residual": True, "tie_embeddings": False},
    ),
    "phi3": ("Phi3ForCausalLM", RMS | {"rope_fraction": 0.5, "sliding_window": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        RMS
        | {"activation": "geglu", "head_size": 12, "norm_weight_offset": 1, "post_norm": "both"}
        | {"score_scale": 0.25, "score_softcap": 2.0, "logit_softcap": 3.0, "sliding_window": 5}
        | {"sliding_window_pattern": ["sliding", "full"], "embedding_scale": 32**0.5},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_so_it_does_for_every_other_family(data: Path, tmp_path: Path, name: str) -> None:
    architecture, keys = OTHERS[name]
    run = write_run(tmp_path / "run", data, **keys)
    assert_exported(run, tmp_path / "out", data, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_so_it_does_with_what_a_pipeline_of_tensor_shards_wrote(
    pools: _Pools, data: Path, tmp_path: Path, name: str
) -> None:
    config = run_config(data, STEPS, (1, "none", "none"), **MODELS[name][1], init_std=0.2)
    config["megagpt"]["parallel"] = {"pipeline": 2, "tensor": 2}
    pools.get(4).run(TRAIN, config=config, directory=tmp_path / "run")
    assert_exported(tmp_path / "run", tmp_path / "out", data, MODELS[name][0])


def test_the_head_says_no_more_than_the_tokenizer(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of an untied head, too."""
    export(trained("llama"), tmp_path / "out")
    shapes = stored_shapes(tmp_path / "out")
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == [VOCABULARY, 32]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_of_the_bytes(trained: Callable[[str], Path], tmp_path: Path, dtype: str) -> None:
    run, formats = trained("gpt2"), {"bf16": torch.bfloat16, "fp16": torch.float16}
    whole, half = export(run, tmp_path / "whole"), export(run, tmp_path / "half", dtype=dtype)
    assert (half.bytes, half.parameters) == (whole.bytes // 2, whole.parameters)
    exact, rounded = (
        load_file(tmp_path / "whole/model.safetensors"),
        load_file(tmp_path / "half/model.safetensors"),
    )
    assert all(torch.equal(rounded[name], exact[name].to(formats[dtype])) for name in exact)
    assert their_model(tmp_path / "half").dtype == formats[dtype]


def test_large_models_come_in_several_files(
    trained: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    whole = export(trained("llama"), tmp_path / "whole")
    export(trained("llama"), tmp_path / "cut", shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert files == [
        f"model-{index:05d}-of-{len(files):05d}.safetensors" for index in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.bytes
    tokens = tokens_of(data)
    assert torch.equal(
        their_model(tmp_path / "cut")(tokens).logits, their_model(tmp_path / "whole")(tokens).logits
    )
    for file in files:
        held = stored_shapes_of(tmp_path / "cut" / file)
        assert (
            4 * sum(torch.Size(shape).numel() for shape in held.values()) <= 40_000
            or len(held) == 1
        )
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()


def stored_shapes_of(path: Path) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in load_file(path).items()}


TRICKY = [
    "The quick brown fox.\n",
    "Ärger im Zug, 日本語のテキスト, 🙂🏽 e\u0301",
    "  leading, trailing  \n\n\n\ttabs\t\t \r\n \u00a0 \u2028 x",
    "don't we'LL I'm 1234567 3.14 a_b __init__ ...!!!",
    "",
    " ",
    "\x00\x7f\ufeff",
]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, tokenizer: str) -> None:
    data = write_dataset(tmp_path, tokenizer)
    export(write_run(tmp_path / "run", data), tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(data)
    assert isinstance(ours, ByteLevelTokenizer)
    for text in TRICKY:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == text
    two = "One document.<|endoftext|>Another one."
    assert theirs.encode(two) == ours.encoding.encode(two, allowed_special="all")
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == (
        "<|endoftext|>",
        ours.end_of_document,
        ours.vocabulary,
    )
    assert their_model(tmp_path / "out").generation_config.eos_token_id == ours.end_of_document


# ----------------------------------------------------------------------------- what is not exported


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"norm": "rmsnorm"}, "GPT2LMHeadModel needs norm layernorm (not rmsnorm)\n"),
        ({"num_kv_heads": 2}, "GPT2LMHeadModel needs num_kv_heads 4 (not 2)\n"),
        ({**LLAMA, "norm": "layernorm"}, "LlamaForCausalLM needs norm rmsnorm (not layernorm)\n"),
        (
            {**LLAMA, "position": "learned"},
            "LlamaForCausalLM needs position rotary (not learned)\n",
        ),
        (
            {**LLAMA, "bias": False, "qk_norm": "per_head", "parallel_residual": True},
            "Qwen3ForCausalLM needs parallel_residual False (not True)\n  LlamaForCausalLM needs "
            "qk_norm none (not per_head), parallel_residual False (not True)\n",
        ),
    ],
)
def test_a_mixture_that_nobody_published_is_refused(
    data: Path, tmp_path: Path, model: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        export(write_run(tmp_path / "run", data, **model), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    """An untrained one, alone in its directory."""
    return write_run(tmp_path / "run", data)


def test_what_is_there_stays(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(run, output)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"out: exists already; add --overwrite, or choose another --output"
    ):
        export(run, output, dtype="bf16")
    assert (output / "model.safetensors").read_bytes() == before
    export(run, output, dtype="bf16", overwrite=True)
    assert len((output / "model.safetensors").read_bytes()) < len(before)
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which no export wrote"):
        export(run, output, overwrite=True)
    assert (output / "thesis.txt").exists()


def test_a_weight_that_half_precision_cannot_hold_is_refused(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    step, weight = exporting.open_weights(run)
    monkeypatch.setattr(
        exporting, "open_weights", lambda *_: (step, lambda name: weight(name) * 1e6)
    )
    with pytest.raises(
        UserError, match=r"embedding\.tokens\.weight: \S+ does not fit into fp16; use --dtype bf16"
    ):
        export(run, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(
    run: Path, tmp_path: Path, monkeypatch: Any, value: float, dtype: str
) -> None:
    step, weight = exporting.open_weights(run)
    monkeypatch.setattr(
        exporting,
        "open_weights",
        lambda *_: (step, lambda name: weight(name).index_fill(0, torch.tensor(3), value)),
    )
    with pytest.raises(
        UserError, match=r"embedding\.tokens\.weight: not finite in the checkpoint; .* with --step"
    ):
        export(run, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    document = json.loads((run / CONFIG_FILE).read_text())
    document["megagpt"]["model"] |= {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 8}
    (run / CONFIG_FILE).write_text(json.dumps(document))
    with pytest.raises(
        UserError,
        match=r"checkpoint \(found \(384, 32\), config\.json needs \(384, 64\)\)",
    ):
        export(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (full_disk, r"too little room \(found 1000 B, need "),
        (small_files, r"\.safetensors: File too large; .*out is unchanged"),
    ],
)
def test_a_disk_that_is_full_shows_no_export(
    run: Path, tmp_path: Path, fault: Any, said: str
) -> None:
    with fault(), pytest.raises(UserError, match=said):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _killed_half_way(run: Path, output: Path) -> None:
    """The process dies when it asks for the second weight."""
    step, weight = exporting.open_weights(run)
    asked = []

    def deadly(name: str) -> torch.Tensor:
        asked.append(name)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return weight(name)

    exporting.open_weights = lambda *_: (step, deadly)
    export(run, output)


def test_a_kill_shows_no_export_and_the_next_one_clears_up(run: Path, tmp_path: Path) -> None:
    process = get_context("fork").Process(target=_killed_half_way, args=(run, tmp_path / "out"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging_out", "run"]
    (tmp_path / ".staging_out" / "of another export").touch()
    export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert not (tmp_path / "out" / "of another export").exists()


def test_what_cannot_be_read_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    source = tmp_path / "run" / "weights"
    failed = pytest.raises(
        UserError,
        match=rf"{source}: Input/output error; .* check the disk that was read",
    )
    with (
        failed,
        whole_directory(tmp_path / "new" / "out", option="--output", room_bytes=0) as staging,
    ):
        assert staging.is_dir()
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
    assert list(tmp_path.iterdir()) == []  # nor are the directories above it left


def test_two_at_once_do_not_mix(run: Path, tmp_path: Path) -> None:
    with whole_directory(tmp_path / "out", option="--output", room_bytes=0) as staging:
        (staging / "config.json").touch()
        with pytest.raises(
            UserError,
            match="another process is writing it; wait for it, or choose another --output",
        ):
            export(run, tmp_path / "out")
        assert (staging / "config.json").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


# ----------------------------------------------------------------------------------------- and back


@EVERY_MODEL
def test_there_and_back_again_is_byte_equal(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, name: str
) -> None:
    export(trained(name), tmp_path / "there")
    bias = {"bias": False} if "unbiased" in name else {}
    import_into(tmp_path / "run", tmp_path / "there", run_config(data, STEPS, **bias))
    export(tmp_path / "run", tmp_path / "again")
    assert sorted(os.listdir(tmp_path / "there")) == sorted(os.listdir(tmp_path / "again"))
    for path in (tmp_path / "there").glob("*"):
        if path.name != "config.json":  # a training's dropout and initial deviation are in it
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    model, _, step = load_model(tmp_path / "run")
    original = load_model(trained(name))[0]
    assert step == 0
    assert all(
        torch.equal(p, dict(original.named_parameters())[n]) for n, p in model.named_parameters()
    )
