"""A model's own tokenizer from its directory through data, evaluation and text, and out again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megagpt.config import RunConfig
from megagpt.data.tokenizer import load_tokenizer
from megagpt.dataset import open_dataset, verify
from megagpt.download_data import PreparationRequest, prepare
from megagpt.huggingface.export import export
from megagpt.huggingface.importing import Imported, import_model
from megagpt.inference.evaluate import evaluate, open_validation
from megagpt.inference.generate import generate, open_tokenizer
from megagpt.inference.placed_model import place_model
from megagpt.inference.stored_model import load_model
from megagpt.model import KeyValueCache
from megagpt.utils import UserError
from tests.data.model_tokenizers import write_tokenizer
from tests.support.jobs.checkpoint import run_config
from tests.support.trained_run import SEQUENCE_LENGTH, TEXTS, write_dataset, write_run

LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tokenizer(tmp_path_factory.mktemp(request.param) / "model", request.param)
    (directory / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    return directory


@pytest.fixture(scope="module")
def data(source: Path) -> Path:
    return write_dataset(source.parent / "dataset", str(source))


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return write_run(data.parent.parent / "run", data, vocab_size=512, **LLAMA)


def test_the_dataset_has_the_models_files_and_its_documents(source: Path, data: Path) -> None:
    for name in FILES:
        assert (data / name).read_bytes() == (source / name).read_bytes()
    manifest = verify(data, full=True)
    assert manifest.tokenizer.name == "model"
    assert sorted(record.file for record in manifest.tokenizer.files) == sorted(FILES)
    theirs = AutoTokenizer.from_pretrained(source)
    assert manifest.end_of_document == theirs.eos_token_id
    assert manifest.vocabulary == len(theirs)
    dataset = open_dataset(data)
    train, val = dataset.split("train"), dataset.split("val")
    first, second = (theirs(text)["input_ids"] for text in TEXTS[:2])
    expected = [*first, theirs.eos_token_id, *second, theirs.eos_token_id]
    assert train.read(0, len(expected)).tolist() == expected
    # The last document is cut in two: each part is a document.
    assert val.read(0, 1)[0] == theirs.bos_token_id


@pytest.mark.parametrize("spoilt", ["tokenizer_config.json", "tokenizer.json"])
def test_a_changed_file_is_found_before_a_run(data: Path, tmp_path: Path, spoilt: str) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / spoilt).write_bytes((copy / spoilt).read_bytes() + b" ")
    with pytest.raises(UserError, match=spoilt):
        open_dataset(copy)


def test_the_same_command_keeps_the_dataset_and_another_tokenizer_does_not(
    source: Path, data: Path, tmp_path: Path
) -> None:
    texts = str(data.parent / "texts" / "*.txt")
    before = (data / "manifest.json").read_bytes()
    prepare(PreparationRequest(texts, data, tokenizer=str(source)), report=lambda line: None)
    other = shutil.copytree(source, tmp_path / "model")  # the same name, and another template
    (other / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(UserError, match="differs in tokenizer_files"):
        prepare(PreparationRequest(texts, data, tokenizer=str(other)), report=lambda line: None)
    assert (data / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("source", ["llama2"], indirect=True)
def test_worker_processes_give_the_same_bytes(source: Path, data: Path, tmp_path: Path) -> None:
    texts = str(data.parent / "texts" / "*.txt")
    out = tmp_path / "two"
    request = PreparationRequest(texts, out, tokenizer=str(source), workers=2)
    made = prepare(request, report=lambda line: None)
    assert made.fingerprint == open_dataset(data).fingerprint


def test_text_without_an_id_is_counted_and_said(tmp_path: Path) -> None:
    """BERT's kind has no bytes to fall back to."""
    source = write_tokenizer(tmp_path / "bert", "wordpiece")
    (tmp_path / "a.txt").write_text("the lazy dog\n" * 50 + "§ the ¤ fox\n")
    lines: list[str] = []
    request = PreparationRequest(
        str(tmp_path / "a.txt"), tmp_path / "data", tokenizer=str(source), validation_fraction=0.5
    )
    manifest = prepare(request, report=lines.append)
    assert manifest.source["unknown_tokens"] == 2
    assert any("no id for some of the text: 2 tokens" in line for line in lines)


@torch.no_grad()
def test_text_and_bits_per_byte(run: Path, data: Path) -> None:
    model, config, _ = load_model(run)
    tokenizer = open_tokenizer(config.megagpt, run)
    ((_, stream),) = open_validation(config.megagpt)
    placed = place_model(run, step=None, device=torch.device("cpu"))
    result = evaluate(placed, stream, tokenizer, batch_size=2)
    val = open_dataset(data).split("val")
    whole = val.read(0, result.tokens + 1).tolist()
    text = tokenizer.decode(whole)  # one document, in windows; the first token is no target
    complete = text.rstrip("\ufffd")  # the last window may end within a character
    assert complete in TEXTS[2]
    cut = len(text) - len(complete)  # each stands for one to three bytes of a cut character
    assert 0 <= result.text_bytes - len(complete.encode()) <= 3 * cut
    pieces: list[str] = []
    (written,) = generate(
        lambda new, cache: model(new, cache=cache),
        tokenizer,
        ["Ärger </s>"],
        sequence_length=SEQUENCE_LENGTH,
        max_new_tokens=40,
        on_text=lambda _, piece: pieces.append(piece),
    )
    assert "".join(pieces) == written


@torch.no_grad()
def test_an_export_gives_the_files_back_and_transformers_the_same_text(
    run: Path, source: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    ours, config, _ = load_model(run)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text_of = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.config.bos_token_id == text_of.bos_token_id
    assert theirs.generation_config.eos_token_id == text_of.eos_token_id
    (text,) = generate(
        lambda new, cache: ours(new, cache=cache),
        open_tokenizer(config.megagpt, run),
        ["The q"],
        sequence_length=SEQUENCE_LENGTH,
        max_new_tokens=10,
        temperature=0,
    )
    prompt = text_of("The q", return_tensors="pt", return_token_type_ids=False)
    written = theirs.generate(**prompt, max_new_tokens=10, do_sample=False)[0]
    assert text_of.decode(written, skip_special_tokens=True) == "The q" + text
    following = text_of("The q over")["input_ids"][len(prompt["input_ids"][0]) :]

    def given(tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """The model that writes " over"."""
        cache.length += tokens.shape[1]
        step = cache.length - len(prompt["input_ids"][0])
        return one_hot(torch.tensor([[following[step]]]), 512).float()

    keywords = {"sequence_length": 64, "max_new_tokens": len(following), "temperature": 0}
    (text,) = generate(given, open_tokenizer(config.megagpt, run), ["The q"], **keywords)
    assert text == " over"
    export(run, tmp_path / "out", overwrite=True)  # its own files may be replaced


# ----------------------------------------------------------------------------------------- import


@pytest.fixture(scope="module")
def published(source: Path, data: Path) -> Path:
    """The model of this tokenizer."""
    directory = source.parent / "published"
    shutil.copytree(source, directory)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=open_dataset(data).vocabulary, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
            max_position_embeddings=16, rms_norm_eps=1e-5,
        )
    ).save_pretrained(directory)  # fmt: skip
    return directory


def imported(model: Path, data: Path, run_directory: Path) -> Imported:
    config = RunConfig.from_json(json.dumps(run_config(data, 3)))
    return import_model(model, config, run_directory)


def test_data_of_the_models_tokenizer_are_accepted(
    published: Path, data: Path, tmp_path: Path
) -> None:
    assert imported(published, data, tmp_path / "run").tokenizer_compared
    other = shutil.copytree(published, tmp_path / "published")
    content = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(content))  # written again: other bytes
    assert imported(other, data, tmp_path / "again").tokenizer_compared


def test_another_tokenizer_in_the_place_of_the_models_is_refused(
    published: Path, data: Path, tmp_path: Path
) -> None:
    """As many ids, and other text: nothing else would show it."""
    copy = shutil.copytree(data, tmp_path / "data")
    imported(published, copy, tmp_path / "run")
    _, config, _ = load_model(tmp_path / "run")
    open_tokenizer(config.megagpt, tmp_path / "run")
    content = json.loads((copy / "tokenizer.json").read_text())
    changed_ids(content)
    (copy / "tokenizer.json").write_text(json.dumps(content))
    for command in (
        lambda: open_tokenizer(config.megagpt, tmp_path / "run"),
        lambda: export(tmp_path / "run", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"is not that of the model in .*need") as refused:
            command()
        assert f"--tokenizer DIR --output {copy} --force" in str(refused.value)
    assert not (tmp_path / "out").exists()


def changed_ids(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def changed_merges(content: dict) -> None:
    content["model"]["merges"] = content["model"]["merges"][::-1]


def changed_normalizer(content: dict) -> None:
    content["normalizer"] = {"type": "NFKC"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_ids, r"'[ab]' is \d+ here, \d+ there"),
        (changed_merges, "another model in tokenizer.json"),
        (changed_normalizer, "another normalizer in tokenizer.json"),
    ],
)
def test_data_of_another_tokenizer_are_refused(
    published: Path, data: Path, tmp_path: Path, change, said: str
) -> None:
    other = shutil.copytree(published, tmp_path / "published")
    content = json.loads((other / "tokenizer.json").read_text())
    change(content)
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as refused:
        imported(other, data, tmp_path / "run")
    assert f"--tokenizer {other} --output {data} --force" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_ids_past_the_embedding_are_refused(published: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(published, tmp_path / "published")
    document = json.loads((other / "config.json").read_text())
    rows = document["vocab_size"]
    (other / "config.json").write_text(json.dumps(document | {"vocab_size": rows - 1}))
    with pytest.raises(UserError, match=f"found {rows} tokens, need at most {rows - 1}"):
        imported(other, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    tokens = np.array(load_tokenizer(data).text_ids)
    assert tokens.max() < rows
