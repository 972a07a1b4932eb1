"""The README is true: its commands exist and take these options, its examples say what the
program says.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from kernels.dispatch import TABLE as OPERATIONS
from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.download_data import EMBEDDED_TOKENIZER
from megagpt.planning.explain import full_key
from megagpt.utils import ExitCode, human_count
from tests import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
SYMPTOMS = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SCRIPTS = sorted(
    path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "launch").glob("[!_]*.py")
)
HELP_WITHOUT_TORCH = """
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


def section(title: str, document: str = README) -> str:
    """The text between a heading and the next."""
    return document.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(document: str = README) -> list[list[str]]:
    """Every command of ours that a document shows, in blocks and in backquotes."""
    in_blocks = [
        line.strip().removeprefix("$ ")
        for _, block in BLOCK.findall(document)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    in_text = re.findall(r"`([^`\n]+)`", BLOCK.sub("", document))
    ours = ("python launch/", "python -m ", "deepspeed ", "make ")
    return [
        shlex.split(text, comments=True) for text in [*in_blocks, *in_text] if text.startswith(ours)
    ]


def launches(document: str = README) -> list[list[str]]:
    """The commands that start a script: the script and its own arguments, without the
    launcher's.
    """
    shown = commands(document)
    starts = [(command, [word.startswith("launch/") for word in command]) for command in shown]
    return [command[found.index(True) :] for command, found in starts if True in found]


def values_of(option: str, arguments: list[str]) -> list[str]:
    """The words behind an option, up to the next one."""
    if option not in arguments:
        return []
    words = arguments[arguments.index(option) + 1 :]
    ends = [index for index, word in enumerate(words) if word.startswith("--")]
    return words[: ends[0]] if ends else words


def overrides_shown_to_fail() -> list[str]:
    """The items of the one `--set` that the README shows with its errors."""
    return values_of(
        "--set", shlex.split(section("Configuration").partition("\n$ ")[2].partition("\n")[0])
    )


def trainings() -> list[list[str]]:
    """The trainings that the README says work."""
    shown = [launch for launch in launches() if launch[0] == "launch/train.py"]
    return [launch for launch in shown if values_of("--set", launch) != overrides_shown_to_fail()]


@cache
def help_of(script: str) -> str:
    """What `--help` prints; fails where the script imports torch to say it."""
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH, script, "--help"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_shows_commands_at_all() -> None:
    assert len(launches()) >= len(SCRIPTS)
    assert len(commands()) > len(launches())


def test_the_table_of_commands_is_that_of_the_scripts() -> None:
    assert sorted(set(re.findall(r"launch/\w+\.py", section("Commands")))) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script: str) -> None:
    assert help_of(script).startswith("usage: ")


@pytest.mark.parametrize("launch", [*launches(), *launches(SYMPTOMS)], ids=shlex.join)
def test_options_exist(launch: list[str]) -> None:
    known = set(re.findall(r"--[a-z][\w-]*", help_of(launch[0])))
    own = (
        launch[: launch.index("--")] if "--" in launch else launch
    )  # behind it stands another command
    assert {word for word in own if word.startswith("--")} <= known


@pytest.mark.parametrize("launch", launches(SYMPTOMS), ids=shlex.join)
def test_what_is_typed_for_a_symptom_is_accepted(launch: list[str]) -> None:
    """Its keys and values are, on a file of a small GPT; what is explained exists."""
    items = values_of("--set", launch)
    if items:
        load_config(REPOSITORY / "ds_configs" / "gpt2_124m.json", items)
    for key in values_of("--explain", launch):
        assert key == "KEY" or full_key(key)


def test_every_module_for_a_symptom_exists() -> None:
    modules = [words[2] for words in commands(SYMPTOMS) if words[:2] == ["python", "-m"]]
    assert modules
    assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("launch", trainings(), ids=shlex.join)
def test_configurations_are_accepted(launch: list[str]) -> None:
    path, *_ = [*values_of("--deepspeed_config", launch), "ds_configs/default.json"]
    if path.endswith("/imported.json"):  # as import_hf writes it: that configuration and a model
        path = "ds_configs/default.json"
    assert load_config(REPOSITORY / path, values_of("--set", launch)).megagpt.training.total_steps


def test_modules_that_are_run_exist() -> None:
    modules = [command[2] for command in commands() if command[:2] == ["python", "-m"]]
    assert modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_make_targets_exist() -> None:
    targets = set(
        re.findall(
            r"^([a-z0-9.-]+):.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE
        )
    )
    named = {word for command in commands() if command[0] == "make" for word in command[1:2]}
    assert {"train", "test"} <= named <= targets


def test_the_example_is_a_configuration() -> None:
    (example,) = [text for language, text in BLOCK.findall(README) if language == "json"]
    assert RunConfig.from_json(example).zero_optimization.optimizer_device == "cpu"


def test_the_errors_shown_are_those_reported() -> None:
    shown = section("Configuration").partition("\n$ ")[2].partition("\n")[2].partition("\n```")[0]
    with pytest.raises(ConfigError) as caught:
        load_config(REPOSITORY / "ds_configs/default.json", overrides_shown_to_fail())
    assert shown == str(caught.value)


def test_the_fused_operations_that_the_model_calls_are_those_said_to_be() -> None:
    sources = [path.read_text() for path in (REPOSITORY / "megagpt").rglob("*.py")]
    called = {name for source in sources for name in re.findall(r"\bkernels\.(\w+)\(", source)}
    table = section("Operations", (REPOSITORY / "docs/kernels.md").read_text())
    rows = re.findall(r"^\| (.*?) \| (yes|no) \|", table, flags=re.MULTILINE)
    told = {name: answer for names, answer in rows for name in re.findall(r"`(\w+)`", names)}
    assert told == {name: "yes" if name in called else "no" for name in OPERATIONS}
    assert set(told.values()) == {"yes"}, "README's What it does names all of them"


def test_the_first_run_is_as_told() -> None:
    default = load_config(REPOSITORY / "ds_configs/default.json")
    vocabulary = int(EMBEDDED_TOKENIZER.removeprefix("bpe:"))
    run = default.resolved(world_size=1, vocabulary=vocabulary, bf16_native=False)
    steps = run.megagpt.training.total_steps
    assert f"done: step {steps}, {human_count(steps * run.tokens_per_step)} tokens" in README
    assert f"{run.megagpt.model.num_parameters / 1e6:.2f} million parameters" in README


def test_the_first_screen_fits() -> None:
    first = README.partition("\n## ")[0].splitlines()
    assert len(first) <= 45
    assert sum("make train" in line or "make test" in line for line in first) >= 2


def test_exit_codes_are_those_in_use() -> None:
    sources = [
        path.read_text()
        for folder in ("megagpt", "launch")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    used = {
        ExitCode[name] for source in sources for name in re.findall(r"ExitCode\.([A-Z_]+)", source)
    }
    assert {
        int(code)
        for code in re.findall(r"^\| (\d) \|", section("A run directory"), flags=re.MULTILINE)
    } == used


def anchors(document: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert link.startswith("https://") or target.exists(), link
        if anchor and not link.startswith("https://"):
            assert anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_it_names_exist(document: Path) -> None:
    folders = "megagpt|kernels|launch|tests|docs|ds_configs|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", document.read_text())
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
