"""One style of options, over every program of the tree: underscores, hyphens accepted and hidden,
numbers as people write them, `~` in paths; and what is said to words of other programs.
"""

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.options import OptionParser, count, with_underscores
from launch import train as train_command
from megagpt import download_data
from megagpt.common.arguments import command_parser
from megagpt.config import ConfigError, load_config
from megagpt.run.supervise import run_directory_of
from tests import REPOSITORY

SOURCES = {
    str(path.relative_to(REPOSITORY)): path.read_text()
    for folder in ("launch", "kernels", "benchmarks", "megagpt")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}
MADE = re.compile(r"(command_parser|OptionParser)\(")
PROGRAMS = [
    program
    for program, source in SOURCES.items()
    if 'if __name__ == "__main__"' in source
    and (MADE.search(source) or program == "launch/download_data.py")
]
PATH_OPTIONS = {
    *("deepspeed_config", "run_dir", "output", "model", "hostfile", "nvme_path", "directory"),
    *("dataset", "text", "ptx", "write"),
}


class Found(Exception):  # noqa: N818  # no error: the parser that a program was about to use
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(program: str) -> argparse.ArgumentParser:
    def found(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Found(parser)

    module = program.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    sys.modules.pop(module, None)  # runpy warns of a module that is imported already
    run = partial(runpy.run_module, module, run_name="__main__")
    if program.startswith("launch/"):  # a script: it puts the repository on the path itself
        run = partial(runpy.run_path, str(REPOSITORY / program), run_name="__main__")
    with (
        patch.object(OptionParser, "parse_known_args", found),
        patch("sys.argv", [program]),
        patch("sys.path", [str(REPOSITORY), *sys.path]),
        pytest.raises(Found) as caught,
    ):
        run()
    return caught.value.parser


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in parser._actions if action.dest != "help")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_one_style(program: str) -> None:
    parser = parser_of(program)
    assert isinstance(parser, OptionParser)
    shown = parser.format_help()
    for action in options_of(parser):
        for option in action.option_strings:
            name = option.lstrip("-")
            assert "-" not in name, f"{option}: underscores"
            hyphens = option[:2] + name.replace("_", "-")
            assert parser._parse_optional(with_underscores([hyphens])[0])
            assert "_" not in name or hyphens not in shown
        read = action.type if callable(action.type) else str
        if action.dest in PATH_OPTIONS and not action.choices:  # choices are names
            assert not str(read("~/x")).startswith("~"), action.dest
        assert read not in (int, float, Path), f"{action.dest}: use the types of arguments.py"
        if action.choices is None and isinstance(number := number_read(action), int):
            assert number == 4000, action.dest


def number_read(action: argparse.Action) -> object:
    """What an option makes of 4k; None where it refuses it, as one that wants a text may."""
    try:
        return action.type("4k") if callable(action.type) else None
    except (argparse.ArgumentTypeError, ValueError):
        assert "whole number" not in str(action.type)
        return None


def test_no_program_has_a_parser_of_its_own() -> None:
    """Also where it is made by a function that no command line reaches."""
    made = [
        program
        for program, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
    ]
    assert made == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1000", 1000),
        ("1_000", 1000),
        ("1,000,000", 10**6),
        ("1e9", 10**9),
        ("1.5e3", 1500),
        ("10B", 10**10),
        ("10b", 10**10),
        ("4k", 4000),
        ("4K", 4000),
        ("4Ki", 4096),
        ("2.5M", 2_500_000),
        ("1T", 10**12),
        ("300 M", 3 * 10**8),
        ("-1", -1),
        ("0", 0),
        *[(text, None) for text in ("", "k", "1.5", "1e-1", "1e999", "ten", "1..5", "0x10", "1_0")],
        *[(text, None) for text in ("1k5", "4kk", "4Bi", "inf", "nan", "٣", "9" * 5000)],
    ],
)
def test_numbers_as_people_write_them(text: str, number: int | None) -> None:
    assert count(text) == number


@given(st.integers(-(10**15), 10**15), st.sampled_from(["", "k", "M", "B"]))
def test_a_written_number_is_exact(number: int, multiple: str) -> None:
    exact = Fraction(number, 1000) * {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[multiple]
    text = f"{'-' * (number < 0)}{abs(number) // 1000}.{abs(number) % 1000:03d}{multiple}"
    assert count(text) == (int(exact) if exact.denominator == 1 else None)


def parsed(line: str) -> argparse.Namespace:
    with patch("sys.argv", ["launch/train.py", *shlex.split(line)]):
        return train_command.parse_arguments()


@pytest.mark.parametrize(
    "line",
    [
        "--deepspeed_config a.json",
        "--deepspeed-config a.json",
        "--deepspeed-config=a.json",
        "--deepspeed --deepspeed_config a.json",
        "--deepspeed_config a.json --deepspeed",
        "--deepspeed a.json",
        "--local-rank 0 --deepspeed_config a.json",
        "--local_rank=0 --deepspeed_config=a.json",
        "--local-rank=-1 --deepspeed --deepspeed-config a.json",
    ],
)
def test_what_scripts_for_deepspeed_are_given_is_taken(line: str) -> None:
    assert parsed(line).deepspeed_config == "a.json"
    assert run_directory_of(["deepspeed", "launch/train.py", *line.split()]) == Path("runs/a")


def test_hyphens_after_a_lone_double_hyphen_are_another_programs() -> None:
    words = ["--max-restarts=3", "--", "torchrun", "--nproc-per-node", "2"]
    assert with_underscores(words) == ["--max_restarts=3", *words[1:]]
    assert with_underscores(["--set", "a.b=--c-d", "-x-y"]) == ["--set", "a.b=--c-d", "-x-y"]


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    run = parsed("--run_dir=~/runs/a --deepspeed_config=~/a.json")
    assert run.run_dir == Path("/home/someone/runs/a")
    assert run.deepspeed_config == "/home/someone/a.json"
    words = ["deepspeed", "launch/train.py", "--run-dir=~/runs/a"]
    assert run_directory_of(words) == Path("/home/someone/runs/a")


def test_a_tilde_in_the_configuration_is_the_home_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    nvme = 'zero_optimization.offload_optimizer={"device": "nvme", "nvme_path": "~/swap"}'
    blend = 'megagpt.data.path=[{"path": "~/a", "weight": 2}]'
    for item, path in (("megagpt.data.path=~/a", "/home/someone/a"), (blend, "/home/someone/a")):
        config = load_config(REPOSITORY / "ds_configs" / "default.json", [item, nvme])
        assert [source.path for source in config.megagpt.data.sources] == [path]
        offload = config.deepspeed_dict()["zero_optimization"]["offload_optimizer"]
        assert offload["nvme_path"] == "/home/someone/swap"


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("megagpt.training.total_steps=4k", 4000),
        ("megagpt.training.total_steps=1_000", 1000),
        ("megagpt.training.total_steps=1e3", 1000),
        ("megagpt.model.vocab_size=50k", 50_000),
        ("train_batch_size=1_024", 1024),
        ("scheduler.params.total_num_steps=2k", 2000),
        ("megagpt.data.path=10B", "10B"),
        ("megagpt.data.path=1e9", None),  # JSON's number, which is no text
        ("megagpt.training.total_steps=1.5", None),
        ("megagpt.training.total_steps=4kk", None),
    ],
)
def test_keys_that_count_read_numbers_as_people_write_them(item: str, value: object) -> None:
    file = REPOSITORY / "ds_configs" / "default.json"
    if value is None:
        with pytest.raises(ConfigError, match="--set"):
            load_config(file, [item])
        return
    found: object = load_config(file, [item])
    for name in item.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.json", "a.json: belongs to no option; type --deepspeed_config a.json"),
        ("--config a.json", "--config: no such option; type --deepspeed_config a.json"),
        ("--resume /", "/: belongs to no option; type --run_dir /"),
        ("pyproject.toml", "pyproject.toml: belongs to no option; remove it"),  # no hostfile here
        ("--bf16", "type --set bf16.enabled=true"),
        ("--model gpt2", "type --set megagpt.model.preset=gpt2"),
        ("--run_dri x", "type --run_dir x"),
        ("--max_iters 100", "type --set megagpt.training.total_steps=100"),
        ("--max-iters=100", "type --set megagpt.training.total_steps=100"),
        ("--learning_rate 3e-4", "type --set optimizer.params.lr=3e-4"),
        ("--output_dir runs/a", "type --run_dir runs/a"),
        ("--zero_optimization.stage 2", "type --set zero_optimization.stage=2"),
        ("--data_path 'my data'", "type --set megagpt.data.path='my data'"),
        ("--num_gpus 4", "type deepspeed --num_gpus 4 launch/train.py ..."),
        ("--hostfile=h", "type deepspeed --hostfile h launch/train.py ..."),
        ("--deepspeed a.json --deepspeed_config b.json", "and --deepspeed_config b.json: name one"),
        ("--deepspeed_config b.json --deepspeed a.json", "and --deepspeed_config b.json: name one"),
        ("--frobnicate 3", "--frobnicate: no such option; remove it"),
        ("--local_rank x", "argument --local_rank: 'x' is not a whole number"),
    ],
)
def test_words_of_other_programs_are_answered_with_what_to_type(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(line)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_advice_names_an_option_of_the_same_program() -> None:
    parser = command_parser(prog="plan.py")
    for option in ("--ranks", "--hostfile"):
        parser.add_argument(option)
    assert parser.advice(["--num_gpus", "8"]) == "--num_gpus: no such option; type --ranks 8"
    hosts = str(REPOSITORY / "ds_configs" / "hosts.example")
    assert parser.advice([hosts]) == f"{hosts}: belongs to no option; type --hostfile {hosts}"
    assert parser.advice(["--hel_p"]) == "--hel_p: no such option; remove it"
    with patch("sys.argv", ["download_data", "--dataset=a", "--output=b", "--tokenizer=bpe:8k"]):
        assert download_data._parser().parse_args().tokenizer == "bpe:8000"
