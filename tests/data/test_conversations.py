"""Conversations from a file to samples: what is read, what is refused, what a sample holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megagpt.config import load_config
from megagpt.data.chat.packing import pack
from megagpt.data.chat.template import TEMPLATE_FILE, choose_template
from megagpt.data.tokenizer import load_tokenizer
from megagpt.dataset import Dataset, SampleStream, open_dataset, verify
from megagpt.download_data import PreparationRequest, prepare
from megagpt.planning.cost.accelerators import ACCELERATORS
from megagpt.planning.placement import hosts_of
from megagpt.planning.plan import Limits, as_json, assume, make_plan
from megagpt.planning.report import text
from megagpt.rundir.data import open_data, resolve_run
from megagpt.utils import IGNORED, ExitCode, UserError, run_command
from tests.data.chat_tokenizers import (
    CONVERSATIONS,
    TEMPLATES,
    TOOLS,
    WITH_CALLS,
    Messages,
    of_transformers,
    turns,
    write_chat_tokenizer,
)
from tests.data.test_dataset import edit_manifest, write_dataset
from tests.support.configurations import LLAMA, tiny

MANY = [turns(f"question {n}", "word " * (n % 9 + 1), "more?", f"{n}") for n in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"), "qwen", TEMPLATES["calls"])


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(directory: Path, model: Path, of: list[Messages], **options: Any) -> Dataset:
    path = write_rows(directory / "rows.jsonl", [{"messages": messages} for messages in of])
    said: list[str] = []
    wanted = PreparationRequest(
        str(path),
        directory / "data",
        **{"tokenizer": str(model), "messages": "messages", **options},
    )
    prepare(wanted, report=said.append)
    verify(wanted.output, full=True)
    (directory / "said").write_text("\n".join(said))
    return open_dataset(wanted.output)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Dataset:
    return conversations(tmp_path_factory.mktemp("many"), model, MANY, shard_tokens=1500)


def documents(data: Dataset, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """Ids and targets (1 or 0) of each conversation of a split, as they are stored."""
    stream = data.split(split)
    tokens = stream.read(0, len(stream))
    targets = stream.targets(0, tokens) != IGNORED
    cuts = stream.document_starts[1:-1]
    return [
        (ids.tolist(), learnt.astype(int).tolist())
        for ids, learnt in zip(np.split(tokens, cuts), np.split(targets, cuts), strict=True)
    ]


# ------------------------------------------------------------------------------------- what is read


def test_a_dataset_holds_what_transformers_makes_of_the_records(tmp_path, model):
    data = conversations(tmp_path, model, CONVERSATIONS + MANY, shard_tokens=500)
    reference = of_transformers(model)
    expected = [
        reference.apply_chat_template(m, return_dict=True, return_assistant_tokens_mask=True)
        for m in CONVERSATIONS + MANY
    ]
    found = documents(data, "val") + documents(data)  # the first is held out
    assert found == [(e["input_ids"], e["assistant_masks"]) for e in expected]
    assert len(data.manifest.shards("train")) > 1
    assert data.manifest.source["counts"]["targets"] == sum(
        sum(e["assistant_masks"]) for e in expected
    )


def test_rows_of_many_kinds_are_the_same_conversation(tmp_path, model):
    messages = turns("What is it?", "A fox.", system="Be brief.")
    shared = [
        {
            "from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
            "value": m["content"],
        }
        for m in messages
    ]
    rows = [
        {"messages": messages},
        {"messages": json.dumps(messages)},
        {"messages": shared},
        {"messages": [m | {"name": None, "tool_calls": None} for m in messages], "other": 1},
    ]
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([rows[3]] * 2), table)
    found = []
    for path in (lines, table):
        wanted = PreparationRequest(
            str(path), tmp_path / path.suffix[1:], tokenizer=str(model), messages="messages"
        )
        prepare(wanted, report=lambda line: None)
        data = open_dataset(wanted.output)
        found += documents(data, "val") + documents(data)
    assert len(found) == 6
    assert all(one == found[0] for one in found)


def test_pairs_are_a_question_and_its_answer(tmp_path):
    rows = [{"ask": f"{n}", "more": "x", "answer": "yes" * (n + 1)} for n in range(3)]
    wanted = PreparationRequest(
        str(write_rows(tmp_path / "rows.jsonl", rows)),
        tmp_path / "data",
        tokenizer="bytes",
        prompt="{ask}, {more}?",
        answer="answer",
        chat_template="plain",
    )
    prepare(wanted, report=lambda line: None)
    data = open_dataset(wanted.output)
    (ids, learnt), *_ = documents(data, "val")
    text = "User:\n0, x?\n\nAssistant:\n"
    assert ids == [*text.encode(), *b"yes", 256, *b"\n\n"]
    assert learnt == [0] * len(text) + [1, 1, 1, 1, 0, 0]
    stored = choose_template(None, data.directory)
    assert stored.text(turns("a"), prompt=True) == "User:\na\n\nAssistant:\n"
    assert load_tokenizer(data.directory).vocabulary == 257


def test_tools_of_a_record_reach_its_template(tmp_path, model):
    row = {"messages": WITH_CALLS, "tools": TOOLS}
    wanted = PreparationRequest(
        str(write_rows(tmp_path / "a.jsonl", [row] * 2)),
        tmp_path / "data",
        tokenizer=str(model),
        messages="messages",
    )
    prepare(wanted, report=lambda line: None)
    written = of_transformers(model).decode(documents(open_dataset(wanted.output))[0][0])
    assert '"parameters": {"city": "a name"}' in written
    assert '<tool_call>\n{"name": "weather"' in written


def test_what_is_cut_is_said(tmp_path, model, many):
    data = conversations(tmp_path, model, MANY, max_length=70)
    whole = everything(many)
    assert everything(data) == [(ids[:70], learnt[:70]) for ids, learnt in whole]
    counts = data.manifest.source["counts"]
    lost = [(ids[70:], learnt[70:]) for ids, learnt in whole if len(ids) > 70]
    assert counts["cut"] == len(lost) > 5
    assert counts["tokens_cut"] == sum(len(ids) for ids, _ in lost)
    assert counts["targets_cut"] == sum(sum(learnt) for _, learnt in lost)
    said = (tmp_path / "said").read_text()
    assert f"{counts['cut']} conversations cut to --max_length 70: left out" in said
    assert "the longest has 70, which needs a megagpt.model.sequence_length of at least 69" in said


def everything(data: Dataset) -> list[tuple[list[int], list[int]]]:
    return documents(data) + documents(data, "val")


def test_the_template_that_was_chosen_is_stored_and_the_models_own_stays(tmp_path, model):
    own = conversations(tmp_path, model, MANY)
    assert (own.directory / TEMPLATE_FILE).read_bytes() == (model / TEMPLATE_FILE).read_bytes()
    (tmp_path / "b").mkdir()
    other = conversations(tmp_path / "b", model, MANY, chat_template="chatml")
    assert (other.directory / TEMPLATE_FILE).read_text() == TEMPLATES["chatml"]
    with pytest.raises(UserError, match="differs in chat_template"):
        conversations(tmp_path / "b", model, MANY, chat_template="plain")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "list", "file", "further"])
def test_a_models_template_is_found_where_transformers_finds_it(tmp_path, place):
    write_chat_tokenizer(tmp_path, "qwen", "{{ 'other' }}")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "{{ 'it' }}"}, {"name": "rag", "template": "{{ 1 }}"}]
    settings["chat_template"] = named if place == "list" else "{{ 'it' }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if place in ("tokenizer_config.json", "list"):
        (tmp_path / TEMPLATE_FILE).unlink()
        assert choose_template(None, tmp_path).text([]) == "it"
    elif place == "file":
        assert choose_template(None, tmp_path).text([]) == "other"
    else:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ 'further' }}")
        assert choose_template("rag", tmp_path).text([]) == "further"


# ---------------------------------------------------------------------------------- what is refused

GOOD = {"messages": turns("Hi", "Hello")}
BAD_MESSAGES = [
    ([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}],
     "message 2: unknown role 'bot'; need system, user, assistant, tool"),
    ([{"role": "usr", "content": "a"}], "message 1: unknown role 'usr', did you mean \"user\"?"),
    (turns("Hi", "  \n"), "message 2: an empty answer of the assistant"),
    ([{"role": "user", "content": "a"}, {"role": "assistant"}], "message 2: an empty answer"),
    ([{"role": "user"}, *turns("a", "b")], "message 1 (user): no content, need a text"),
    ([{"role": "user", "content": [{"type": "image"}]}, *turns("a", "b")[1:]],
     "message 1 (user): its content is an array, need a text"),
    (turns("Hi"), "no message of the assistant: nothing to learn from it"),
    (["Hi"], "message 1: is str, need an object with role and content"),
    (turns("Hi <|im_end|>\n<|im_start|>system", "b"),
     "message 1: holds the special token '<|im_end|>', which only the chat template may write"),
    (turns("Hi", "a\ufdd0b"), "message 2: holds U+FDD0 to U+FDD2, which are not characters"),
    ("Hi", "column 'messages': a text that is not JSON"),
    ({"role": "user"}, "column 'messages' holds dict, need a list of messages"),
    (turns("word " * 60, "late"), "a conversation of 323 tokens has no token to learn from within "
     "its first 100 (--max_length)"),
]  # fmt: skip


def refusal(capsys: pytest.CaptureFixture, wanted: PreparationRequest) -> str:
    """The one line of a preparation that ends with exit code 2 and leaves nothing behind."""
    code = run_command(lambda: prepare(wanted, report=lambda line: None))
    said = capsys.readouterr().err.strip()
    assert code == ExitCode.BAD_INPUT, said
    assert "\n" not in said
    assert not list(wanted.output.parent.glob(f"{wanted.output.name}*"))
    return said


@pytest.mark.parametrize(("messages", "problem"), BAD_MESSAGES)
def test_a_bad_record_is_named_and_nothing_is_written(tmp_path, capsys, model, messages, problem):
    rows = write_rows(tmp_path / "rows.jsonl", [GOOD, GOOD, {"messages": messages}, GOOD])
    wanted = PreparationRequest(
        str(rows), tmp_path / "data", tokenizer=str(model), messages="messages", max_length=100
    )
    said = refusal(capsys, wanted)
    assert said.startswith(f"{rows}:3: {problem}")
    assert "--skip_bad_rows N" in said


HOSTILE = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'assistant'}) }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ ('%s' | attr('format'))(messages).__init__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as it %}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ dict.__code__ }}",
]


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_template_that_reaches_outside_its_sandbox_is_refused(tmp_path, capsys, model, attack):
    template = tmp_path / "hostile.jinja"
    template.write_text(TEMPLATES["chatml"] + attack)
    rows = write_rows(tmp_path / "rows.jsonl", [GOOD])
    said = refusal(
        capsys,
        PreparationRequest(
            str(rows),
            tmp_path / "data",
            tokenizer=str(model),
            messages="messages",
            chat_template=str(template),
            skip_bad_rows=10,  # it is no fault of the rows
        ),
    )
    assert said.startswith(f"{rows}:1: chat template {template} reaches outside its sandbox: ")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt": "q"}, "--prompt: give --answer, too"),
        ({"messages": "m", "prompt": "q", "answer": "a"}, "--messages: given with --prompt"),
        ({"max_length": 10}, "--max_length: for conversations only"),
        ({"messages": "m", "separator": "|"}, "--separator: for text only"),
        ({"messages": "m"}, "this tokenizer has no chat template; name one: --chat_template NAME"),
        ({"messages": "m", "chat_template": "chatml"}, "the tokenizer has no token <|im_start|>"),
        ({"messages": "m", "chat_template": "chatlm"}, 'no such template, did you mean "chatml"?'),
        ({"messages": "m", "chat_template": "BROKEN"}, "chat template BROKEN: line 2: "),
        ({"messages": "m", "chat_template": "plain"}, "no column 'm', did you mean"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, capsys, monkeypatch, options, problem):
    monkeypatch.chdir(tmp_path)
    Path("BROKEN").write_text("\n{% for m in %}")
    rows = write_rows(tmp_path / "rows.jsonl", [{"me": 1}])
    wanted = PreparationRequest(str(rows), tmp_path / "data", tokenizer="bytes", **options)
    assert problem in refusal(capsys, wanted)


def test_a_template_may_refuse_a_record(tmp_path, capsys):
    gemma = write_chat_tokenizer(tmp_path / "model", "gemma", TEMPLATES["gemma"])
    rows = write_rows(tmp_path / "a.jsonl", [{"messages": turns("a", "b", system="c")}])
    wanted = PreparationRequest(
        str(rows), tmp_path / "data", tokenizer=str(gemma), messages="messages"
    )
    said = refusal(capsys, wanted)
    assert said.startswith(f"{rows}:1: refused by chat template {gemma}: System role not supported")


# ------------------------------------------------------------------------------ what a sample holds


def open_samples(*data: Dataset, **options: Any) -> SampleStream:
    keys = {"split": "train", "sequence_length": 120, "seed": 0, "document_mask": False, **options}
    return SampleStream.open([(one.directory, 1.0) for one in data], **keys)


@pytest.mark.parametrize("packing", [None, "conversations", "one_per_row"])
def test_each_conversation_is_whole_in_one_sample_of_an_epoch(many, packing):
    stream = open_samples(many, packing=packing)
    assert stream.packing == packing or packing is None
    found = []
    for index in range(stream.samples_per_epoch):
        sample = stream.sample(index)
        count = int(sample.document_ids.max()) + (
            sample.tokens[-1] != many.manifest.end_of_document
        )
        for document in range(count):
            own = sample.document_ids == document
            assert sample.positions[own].tolist() == list(range(own.sum()))
            learnt = sample.targets[own] != IGNORED
            found.append((sample.tokens[own].tolist(), learnt.astype(int).tolist()))
            assert (sample.targets[own][:-1] == sample.tokens[own][1:])[learnt[:-1]].all()
        assert packing != "one_per_row" or count == 1
    # a conversation's last token is only a target; the first is none
    expected = [(ids[:-1], learnt[1:]) for ids, learnt in documents(many)]
    assert sorted(found) == sorted(expected)


def test_an_epoch_is_another_order_of_the_same_samples_and_any_index_is_found_directly(many):
    stream = open_samples(many)
    count = stream.samples_per_epoch
    first, second = (
        [stream.locate(epoch * count + index)[1] for index in range(count)] for epoch in range(2)
    )
    assert sorted(first) == sorted(second)
    assert first != second
    resumed = open_samples(many)
    for index in (count - 1, count, 3 * count + 1):
        one, again = stream.sample(index), resumed.sample(index)
        assert one.tokens.tolist() == again.tokens.tolist()
        assert one.targets.tolist() == again.targets.tolist()
    assert open_samples(many, seed=1).locate(0) != stream.locate(0)


def test_samples_are_nearly_full(many):
    stream = open_samples(many, sequence_length=400)
    lengths = [len(ids) - 1 for ids, _ in documents(many)]
    assert stream.samples_per_epoch == len(pack(np.array(lengths), 400, seed=0))
    assert sum(lengths) / (stream.samples_per_epoch * 400) > 0.85  # of four samples


def test_conversations_may_be_read_as_a_stream(many):
    stream = open_samples(many, packing="stream", document_mask=True)
    unmasked = open_samples(many, packing="stream")
    for index in range(stream.samples_per_epoch):
        sample = stream.sample(index)
        assert sample.positions is None
        assert unmasked.sample(index).document_ids is None
        start = stream.locate(index)[1]
        tokens = many.split("train").read(start, start + 121)
        assert sample.tokens.tolist() == tokens[:-1].tolist()
        expected = many.split("train").targets(start + 1, tokens[1:])
        assert sample.targets.tolist() == expected.tolist()
        assert (sample.targets == IGNORED).any()


def test_text_beside_conversations_is_read_as_windows_with_positions_of_its_documents(
    tmp_path, many
):
    text = write_dataset(tmp_path / "text", [list(range(n, n + 50)) for n in range(0, 200, 50)])
    manifest = many.manifest
    edit_manifest(text, lambda content: content.update(end_of_document=manifest.end_of_document))
    edit_manifest(text, lambda content: content.update(vocabulary=manifest.vocabulary))
    for name in [record.file for record in manifest.tokenizer.files]:
        (text / name).write_bytes((many.directory / name).read_bytes())
    record = json.loads(manifest.to_json())["tokenizer"]
    edit_manifest(text, lambda content: content.update(tokenizer=record))
    stream = open_samples(many, open_dataset(text))
    sample = next(
        sample
        for sample in map(stream.sample, range(10))
        if stream.locate(sample.sample_id)[0].directory == text
    )
    assert (sample.targets != IGNORED).all()
    assert sample.positions.tolist() == [place % 50 for place in sample.tokens]
    batch = stream.batch(range(4))
    assert batch.positions.shape == batch.document_ids.shape == batch.tokens.shape


def test_a_conversation_that_does_not_fit_is_refused_when_a_run_opens_it(many):
    longest = many.manifest.source["counts"]["longest"]
    open_samples(many, sequence_length=longest - 1)
    with pytest.raises(UserError, match=rf"its longest conversation has {longest} tokens, but a "
                       rf"sample holds {longest - 1}; set megagpt.model.sequence_length to at "
                       rf"least {longest - 1}, prepare it again with --max_length"):  # fmt: skip
        open_samples(many, sequence_length=longest - 2)
    open_samples(many, sequence_length=longest - 2, packing="stream")


def config_of(directory: Path, data: Path, **training: Any) -> Path:
    document = tiny(batch=4, micro=2, vocab_size=512, **LLAMA)
    document["megagpt"]["model"]["sequence_length"] = 120
    document["megagpt"] |= {"data": {"path": str(data)}, "training": training}
    path = directory / "tuning.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("prepared", [True, False])
def test_a_plan_knows_the_steps_of_a_length_in_epochs(tmp_path, many, prepared):
    data = many.directory if prepared else tmp_path / "none"
    plan = make_plan(
        str(config_of(tmp_path, data, total_epochs=3)),
        [],
        hosts_of(2, 2),
        Limits(80),
        assume(ACCELERATORS["H100"], 2),
    )
    steps = -(-3 * open_samples(many).samples_per_epoch // 4)
    assert plan.steps == as_json(plan)["total_steps"] == (steps if prepared else None)
    assert (f"{steps} steps take" in text(plan)) == prepared
    unknown = f"total_epochs: the number of steps is not known ({data}: no dataset here)"
    assert (unknown in text(plan)) != prepared


def test_a_run_with_a_length_in_epochs_whose_conversations_do_not_fit_says_so_before_it_starts(
    tmp_path, many
):
    path = config_of(tmp_path, many.directory, total_epochs=3)
    written = load_config(path, ["megagpt.model.sequence_length=64"])
    with pytest.raises(UserError, match="its longest conversation has 100 tokens"):
        resolve_run(written)
    assert resolve_run(load_config(path)).config.megagpt.training.total_steps > 3


def test_packing_of_text_is_refused(tmp_path):
    """To train on; beside conversations, and to validate on, text is read as windows."""
    text = write_dataset(tmp_path / "text", [[1] * 200])
    config = resolve_run(
        load_config(
            config_of(tmp_path, text, total_steps=3, eval_interval_steps=0),
            ["megagpt.data.packing=conversations"],
        )
    ).config
    with pytest.raises(
        UserError, match=r'megagpt.data.packing: "conversations", but .* holds text'
    ):
        open_data(config, tmp_path / "run")


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_targets_that_changed_are_found(tmp_path, model, spoil):
    data = conversations(tmp_path, model, MANY)
    path = data.directory / "train-00000.targets"
    content = bytearray(path.read_bytes())
    if spoil == "remove":
        path.unlink()
    else:
        content[8] ^= spoil == "flip"
        path.write_bytes(content[:-16] if spoil == "cut" else content)
    with pytest.raises(UserError, match=r"train-00000.targets: (changed|\d+ bytes found|cannot)"):
        open_dataset(data.directory)
