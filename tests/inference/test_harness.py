"""lm-evaluation-harness on our model; the reference is its own runner on the exported one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (make setup-eval)")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from megagpt.data.tokenizer import load_tokenizer
from megagpt.huggingface.export import export
from megagpt.inference.harness import scores_of
from tests import REPOSITORY
from tests.conftest import _Pools
from tests.data.model_tokenizers import write_tokenizer
from tests.support.jobs.evaluation import answers, answers_in, evaluate
from tests.support.trained_run import TEXTS, write_dataset, write_run

LENGTH = 64
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": ["A", "B", "C"],  # a token each
        "metric_list": [{"metric": "acc"}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}} The",  # its runner cannot continue an empty prompt
        "doc_to_target": "{{page}}",
        "generation_kwargs": {"until": [" ", "\n"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = [
    {
        # The second is longer than the context with its answers, the third is empty.
        "question": ["The quick", TEXTS[1][:70], "", "Ärger im ", "日本"][number % 5],
        "choices": [" brown", "fox.\n", " im Zug" * (number % 3 + 1)],
        "answer": number % 3,
        "page": TEXTS[number % 3][number : 20 + 17 * number],
    }
    for number in range(7)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command itself does where the hub cannot be reached."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_dataset(tmp_path_factory.mktemp("dataset"))
    return write_run(tmp_path_factory.mktemp("runs") / "small", data, sequence_length=LENGTH)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    (directory / "documents.jsonl").write_text(lines)
    files = {"test": str(directory / "documents.jsonl")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(directory / "cache")},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))
    return [str(directory / f"{name}.yaml") for name in TASKS]


@pytest.fixture(scope="module")
def expected(run: Path, tasks: list[str]) -> dict[str, Any]:
    return of_its_own_runner(run, tasks)


def of_its_own_runner(run: Path, tasks: list[str]) -> dict[str, Any]:
    """What the harness's own runner finds on the exported model."""
    export(run, run.parent / "exported")
    given = {"pretrained": str(run.parent / "exported"), "dtype": "float32"}
    own = TaskManager(include_defaults=False)  # without reading the harness's tasks
    results = simple_evaluate(
        "hf", given, tasks=tasks, device="cpu", batch_size=3, task_manager=own
    )
    assert results is not None
    return answers_in(results) | {"scores": scores_of(results)}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["words"] == expected["words"]
    assert any(word for (word,) in found["words"])
    for name in ("choices", "letters", "pages"):
        for own, theirs in zip(found[name], expected[name], strict=True):
            for answer, other in zip(own, theirs, strict=True):
                assert answer == pytest.approx(other, rel=1e-6)
    assert found["scores"] == {
        task: pytest.approx(scores, rel=1e-6) for task, scores in expected["scores"].items()
    }
    assert len(found["choices"]) == len(DOCUMENTS)


def test_each_document_is_answered_as_by_the_harness_itself(
    run: Path, tasks: list[str], expected: dict[str, Any]
) -> None:
    assert_equal(answers(run_dir=run, tasks=tasks), expected)


@pytest.mark.slow  # its own runner loads two more models
@pytest.mark.parametrize(("kind", "named"), [("mistral", "<s>"), ("qwen", "<|begin_of_text|>")])
def test_prompts_begin_as_a_models_tokenizer_begins_them(
    tasks: list[str], tmp_path: Path, kind: str, named: str
) -> None:
    """With a token before each, or with one that is only named: then an empty prompt has it."""
    source = write_tokenizer(tmp_path / "model", kind)
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"bos_token": named}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(source)
    assert tokenizer.start_of_document == ((tokenizer.prefix,) if kind == "mistral" else ())
    assert tokenizer.prefix != tokenizer.end_of_document
    data = write_dataset(tmp_path / "dataset", str(source))
    run = write_run(tmp_path / "run", data, vocab_size=512, sequence_length=LENGTH)
    assert_equal(answers(run_dir=run, tasks=tasks), of_its_own_runner(run, tasks))


@pytest.mark.rotate(3)
@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (2, {"pipeline": 2}),
        (2, {"tensor": 2}),
        (2, {}),
        pytest.param(4, {"pipeline": 2}, marks=pytest.mark.slow),  # each rank imports the harness
    ],
    ids=str,
)
def test_ranks_answer_as_one_process(
    pools: _Pools,
    run: Path,
    tasks: list[str],
    expected: dict[str, Any],
    ranks: int,
    axes: dict[str, int],
) -> None:
    found = pools.get(ranks).run(
        "tests.support.jobs.evaluation:answers", run_dir=run, tasks=tasks, **axes
    )
    assert_equal(found[0], expected)
    for answered in found[1:]:  # standard errors are computed once
        assert [answered[task] for task in TASKS] == [found[0][task] for task in TASKS]


def test_the_command_prints_a_line_of_json_a_task(
    run: Path, tasks: list[str], expected: dict[str, Any]
) -> None:
    lines = evaluate(run_dir=run, tasks=tasks[:1])["lines"]
    scores = {key: pytest.approx(value) for key, value in expected["scores"]["choices"].items()}
    assert lines == [{"step": 10, "task": "choices", **scores}]


def test_answers_of_one_token_to_a_question_are_read_together(run: Path, tasks: list[str]) -> None:
    found = evaluate(run_dir=run, tasks=tasks[1:2], batch_size=1)
    assert found["batches"] == len({document["question"] for document in DOCUMENTS})


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"dataset_path": "nobody/nothing"}, "the data cannot be loaded (Couldn't reach"),
        (
            {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
            "the data cannot be loaded (Unable to find ",
        ),
        ({"generation_kwargs": {"max_gen_toks": LENGTH}}, "a task generates 64 tokens, but "),
        ({"unsafe_code": True}, "odd runs code that the model writes, which this command does not"),
    ],
    ids=str,
)
def test_a_task_that_cannot_run_is_one_line(
    run: Path,
    tasks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    given = yaml.safe_load(Path(tasks[-1]).read_text())
    if "dataset_path" in task:
        given["dataset_kwargs"] = {}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(given | {"task": "odd"} | task))
    refused = evaluate(run_dir=run, tasks=[str(tmp_path / "odd.yaml")])["refused"]
    assert refused.startswith("--tasks")
    assert reason in refused
    assert "\n" not in refused


@pytest.mark.slow  # the harness reads all its tasks
def test_an_unknown_task_is_one_line(run: Path) -> None:
    refused = evaluate(run_dir=run, tasks=["helaswag"])["refused"]
    assert refused.startswith('--tasks helaswag: unknown task, did you mean "hellaswag"?; name ')
    known = evaluate(run_dir=run, tasks=["arc_eas*"])["refused"]
    assert known.startswith("--tasks arc_easy: the data cannot be loaded (")


def test_without_the_package_the_command_says_what_to_install() -> None:
    code = (
        "import runpy, sys; sys.modules['lm_eval'] = None; "
        "sys.argv[:] = ['evaluate.py', '--run_dir', 'any', '--tasks', 'hellaswag']; "
        "runpy.run_path('launch/evaluate.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("--tasks: needs lm-evaluation-harness, which is not installed ")
    assert "(no lm_eval); python -m pip install lm_eval==" in done.stderr
