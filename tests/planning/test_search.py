"""The search finds what trying every layout finds; what it prints can be typed."""

import itertools
import json
import math
import random
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import ConfigError, RunConfig, load_config
from megagpt.planning.cost.accelerators import ACCELERATORS, find, read_devices
from megagpt.planning.cost.memory import rank_memory
from megagpt.planning.cost.performance import Assumptions, Estimate, estimate
from megagpt.planning.layout import Layout
from megagpt.planning.legality import World, judge
from megagpt.planning.placement import Placement, hosts_of
from megagpt.planning.plan import Limits, assume, make_plan
from megagpt.planning.price import Budget
from megagpt.planning.search.ask import search_file, search_preset
from megagpt.planning.search.report import text, write_winner
from megagpt.utils import GIB, UserError, run_command
from tests import REPOSITORY
from tests.support.configurations import KINDS, tiny

H100 = ACCELERATORS["H100"]


def file_of(tmp_path: Path, document: dict[str, Any]) -> str:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    return str(path)


def drawn(seed: int) -> tuple[dict[str, Any], float, float]:
    """A model and batch, and memory of a device and of a host that some of its layouts fit into."""
    draw = random.Random(seed)
    heads = draw.choice([4, 8, 16])
    model = KINDS[draw.choice(sorted(KINDS))] | {
        "num_layers": draw.choice([4, 8, 9, 12]),
        "num_heads": heads,
        "num_kv_heads": draw.choice([heads, heads // 2]),
        "hidden_size": heads * draw.choice([64, 128]),
        "head_size": 64,
        "mlp_size": 128 * draw.choice([8, 11, 32]),
        "sequence_length": draw.choice([512, 2048]),
        "vocab_size": draw.choice([4096, 50257]),
        "tie_embeddings": draw.random() < 0.5,
    }
    document = tiny(batch=draw.choice([16, 32, 48]), micro=1, **model)
    document["bf16"] = {"enabled": draw.choice([True, "auto"])}
    document["zero_optimization"] = {"stage": 1, "reduce_bucket_size": 10_000_000}
    if draw.random() < 0.5:
        document["megagpt"]["checkpoint"] = {"asynchronous": True}
    return document, draw.uniform(1.2, 12), draw.choice([1, 1024])


def tried(path: str, ranks: int, slots: int, limits: Limits, rates: Assumptions) -> list[Any]:
    """Every layout that is legal and fits, by (step time, host GiB, device GiB), none left out."""
    written = load_config(path, for_plan=True)
    batch = written.train_batch_size
    blocks = written.megagpt.model.num_layers
    found = []
    sizes = range(1, ranks + 1)
    places = ("none", "cpu")
    for tensor, pipeline in itertools.product(sizes, sizes):
        if tensor > slots or pipeline > blocks or ranks % (tensor * pipeline):
            continue
        equal = [v for v in range(2, 9) if v == 2 or blocks % (pipeline * v) == 0]
        virtual = [v for v in equal if pipeline * v <= blocks] if pipeline > 1 else []
        orders = [("1f1b", 1), ("gpipe", 1), *(("interleaved", v) for v in virtual)]
        for micro, order, recompute, stage, optimizer, parameters, sequence in itertools.product(
            (size for size in range(1, batch + 1) if batch % size == 0),
            orders,
            ("none", "selective", "full"),
            range(4),
            places,
            places,
            ("false", "true"),
        ):
            items = [
                f"megagpt.parallel.tensor={tensor}",
                f"megagpt.parallel.pipeline={pipeline}",
                f"megagpt.parallel.schedule={order[0]}",
                f"megagpt.parallel.virtual_stages={order[1]}",
                f"megagpt.parallel.sequence={sequence}",
                f"megagpt.training.recompute={recompute}",
                f"train_micro_batch_size_per_gpu={micro}",
                f"zero_optimization.stage={stage}",
                f"zero_optimization.offload_optimizer.device={optimizer}",
                f"zero_optimization.offload_param.device={parameters}",
            ]
            if (one := judged(written, items, ranks, slots, limits, rates)) is not None:
                found.append(one)
    return found


def judged(
    written: RunConfig,
    items: list[str],
    ranks: int,
    slots: int,
    limits: Limits,
    rates: Assumptions,
) -> tuple[float, float, float] | None:
    try:
        verdict = judge(written.changed(items), World(ranks, None, bf16_native=True))
    except ConfigError:
        return None
    if verdict.refused or verdict.impossible:
        return None
    layout = Layout.of(verdict.config, pins="torch")  # type: ignore[arg-type]  # nothing is impossible
    memory = [rank_memory(layout, rank) for rank in range(layout.pipeline)]
    device = max(rank.peak.device for rank in memory) / GIB
    by_host: dict[str, float] = {}
    for place in Placement.of(layout, hosts_of(ranks, slots)).places:
        host = memory[place.pipeline].peak.host / GIB
        by_host[place.host] = by_host.get(place.host, 0) + host
    if device > limits.device_gib - limits.reserve_gib or max(by_host.values()) > limits.host_gib:
        return None
    return estimate(layout, rates).step_s, max(by_host.values()), device


def first_ten(tried: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """The ten shortest times, each with the least memory that a layout of this time needs."""
    by_time: list[list[tuple[float, float, float]]] = []
    for one in sorted(tried):
        if by_time and math.isclose(one[0], by_time[-1][0][0], rel_tol=1e-9):
            by_time[-1].append(one)
        else:
            by_time.append([one])
    return [min(group, key=lambda one: one[1:]) for group in by_time[:10]]


def compare(tmp_path: Path, seed: int, ranks: int, slots: int) -> None:
    document, device_gib, host_gib = drawn(seed)
    path = file_of(tmp_path, document)
    limits = Limits(device_gib, host_gib, 0)
    rates = assume(H100, slots)
    answer = search_file(path, [], hosts_of(ranks, slots), limits, rates)
    expected = first_ten(tried(path, ranks, slots, limits, rates))
    found = [(one.estimate.step_s, one.host_gib, one.device_gib) for one in answer.found]
    assert found == [pytest.approx(one, rel=1e-9) for one in expected]
    for one in answer.found:
        again = make_plan(path, one.items, hosts_of(ranks, slots), limits, rates)
        assert again.good
        assert again.estimate.step_s == one.estimate.step_s


@pytest.mark.rotate(4)
@pytest.mark.parametrize("seed", range(4))
def test_the_ten_best_are_those_of_trying_everything_on_two_ranks(
    tmp_path: Path, seed: int
) -> None:
    compare(tmp_path, 100 + seed, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_the_ten_best_are_those_of_trying_everything_on_16_ranks(tmp_path: Path, seed: int) -> None:
    compare(tmp_path, seed, 16, 8)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("gpt3_13b_3d_zero3", 16),
        pytest.param("gpt3_175b_3d", 1024, marks=pytest.mark.slow),
        pytest.param("gpt3_13b_zero3_offload_nvme", 16, marks=pytest.mark.slow),
    ],
)
def test_every_line_is_legal_and_fits_when_it_is_asked_again(name: str, ranks: int) -> None:
    path = str(REPOSITORY / "ds_configs" / f"{name}.json")
    hosts, rates = hosts_of(ranks, 8), assume(H100, 8)
    answer = search_file(path, [], hosts, Limits(80), rates)
    shown = text(answer, Budget())
    lines = [line.strip() for line in shown.splitlines() if line.strip().startswith("--set")]
    assert len(lines) == len(answer.found) == 10
    for line, one in zip(lines, answer.found, strict=True):
        again = make_plan(path, shlex.split(line)[1:], hosts, Limits(80), rates)
        assert (again.good, again.estimate.step_s) == (True, one.estimate.step_s)
        assert again.host_gib == pytest.approx(one.host_gib)
        assert sum(one.estimate.parts.values()) == pytest.approx(one.estimate.step_s)
    steps = [one.estimate.step_s for one in answer.found]
    assert steps == sorted(set(steps))


def test_it_says_why_the_file_s_own_layout_loses() -> None:
    path = str(REPOSITORY / "ds_configs" / "gpt2_124m.json")
    hosts, rates = hosts_of(2, 2), assume(H100, 2)

    def own(device_gib: float, *items: str) -> str:
        answer = search_file(path, items, hosts, Limits(device_gib), rates)
        return text(answer, Budget()).partition("your own: ")[2].partition("\n")[0]

    slow = ["megagpt.parallel.tensor=2", "train_micro_batch_size_per_gpu=1"]
    assert "% slower than the first: tensor axis +" in own(80, *slow)
    assert own(9).startswith("does not fit: ")
    assert own(80, "zero_optimization.stage=0", "bf16.enabled=true").startswith("refused: zero_op")
    assert own(80, "megagpt.parallel.tensor=3").startswith("impossible: ")
    first = search_file(path, [], hosts, Limits(80), rates).found[0]
    assert own(80, *first.items).startswith("is as fast as the first")


def test_no_step_is_shorter_than_its_bound() -> None:
    path = str(REPOSITORY / "ds_configs" / "gpt3_175b_3d.json")
    config = load_config(path).resolved(world_size=1024, vocabulary=None, bf16_native=True)
    layout = Layout.of(config)
    rates = assume(H100, 8)

    def both(of: Layout) -> tuple[Estimate, Estimate]:
        return estimate(of, rates, simulated=False), estimate(of, rates)

    for schedule, virtual in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("interleaved", 3)):
        bound, exact = both(layout.with_parallel(schedule=schedule, virtual_stages=virtual))
        assert bound.step_s <= exact.step_s * (1 + 1e-12)
        assert exact.step_s <= 1.1 * bound.step_s


def test_the_winner_can_be_written_and_planned(tmp_path: Path) -> None:
    hosts, rates = hosts_of(2, 2), assume(H100, 2)
    answer = search_preset("gpt2", [], hosts, Limits(80), rates, device=H100)
    path = tmp_path / "winner.json"
    write_winner(answer, path)
    plan = make_plan(str(path), [], hosts, Limits(80), rates)
    assert plan.good
    assert plan.notes == []
    assert plan.estimate.step_s == answer.found[0].estimate.step_s
    with pytest.raises(UserError, match="the file exists; remove it, or name another"):
        write_winner(answer, path)


Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `launch/plan.py` with words; return its exit code and what it prints."""
    from launch import plan

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        try:
            code = run_command(plan.main)
        except SystemExit as exit_:
            code = int(str(exit_.code))
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--search --device gtx1080 --ranks 8", "'gtx1080' is not known"),
        ("--search --ranks 8 --device_memory_gib 5", "6 GiB of it are reserved"),
        ("--model gpt2 --hosts 1 --tokens 0", "0 is below 1"),
        ("--model gpt2 --hosts 1 --cost -1", "-1 is below 0"),
        ("--model gpt2", "give --hosts 4"),
        ("--model gpt5 --hosts 1", "invalid choice: 'gpt5'"),
        ("--ranks 8 --write out.json", "--write needs --search or --model"),
        (
            "--search --hosts 1 --set megagpt.parallel.world_size=16",
            "expects 16 ranks and 8 started",
        ),
        ("--search --hostfile {empty}", "no hosts; write one line a host"),
        ("--search --ranks 8 --devices {empty}", "not a table of devices"),
    ],
)
def test_bad_input_is_answered_in_a_line(
    words: str, said: str, tmp_path: Path, typed: Typed
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    code, out, wrong = typed(*words.format(empty=empty).split())
    assert (code, out, wrong.count("\n")) == (2, "", 1), wrong
    assert said in wrong


def test_the_command_prices_a_preset_without_a_file(typed: Typed) -> None:
    words = "--model llama3-8b --tokens 1e12 --hosts 1 --device h100 --cost 2.5 --json"
    code, out, wrong = typed(*words.split())
    assert (code, wrong) == (0, "")
    answer = json.loads(out)
    days = 1e12 / answer["found"][0]["estimate"]["tokens_per_s"] / 86_400
    expected = {"tokens": 10**12, "days": days, "money": days * 24 * 8 * 2.5}
    assert (len(answer["found"]), answer["batch"] % 8) == (10, 0)
    assert answer["budget"] == pytest.approx(expected)
    best = Estimate(**answer["found"][0]["estimate"])
    line = f"1T tokens take {days:.3g} days and cost {expected['money']:,.0f} at 2.5 per device"
    assert line in Budget(10**12, 2.5).line(best, 8)


def test_what_never_fits_ends_with_what_to_change(typed: Typed, tmp_path: Path) -> None:
    words = f"--model gpt3-175b --hosts 1 --slots 2 --device t4 --write {tmp_path / 'none.json'}"
    code, out, wrong = typed(*words.split())
    assert (code, "no legal layout fits; use more ranks" in out) == (2, True)
    assert ("nothing to write" in wrong, list(tmp_path.iterdir())) == (True, [])


class TestDevices:
    def test_each_has_a_source(self) -> None:
        for name, device in ACCELERATORS.items():
            assert device.source, name
            assert device.checked, name
            assert find(name) is device

    def test_a_table_of_the_user_s_comes_first(self, tmp_path: Path, typed: Typed) -> None:
        rates = ("peak_tflops", "memory_gib", "memory_gb_per_s", "link_gb_per_s", "host_gb_per_s")
        table = tmp_path / "mine.json"
        table.write_text(json.dumps({"devices": {"XPU 9": dict.fromkeys(rates, 100.0)}}))
        words = f"--model gpt2 --hosts 1 --json --devices {table} --device xpu-9"
        code, out, _ = typed(*words.split())
        assert (code, json.loads(out)["assumptions"]["peak_tflops"]) == (0, 100.0)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"peak_tflops": 0}, "devices.X.peak_tflops: 0 is not a number above 0"),
            ({"peak_tflop": 1}, 'devices.X.peak_tflop: unknown key, did you mean "peak_tflops"?'),
            ({"peak_tflops": 1}, "devices.X: memory_gib, memory_gb_per_s, link_gb_per_s, host_gb"),
        ],
    )
    def test_a_wrong_row_is_named(self, row: dict[str, Any], said: str, tmp_path: Path) -> None:
        table = tmp_path / "mine.json"
        table.write_text(json.dumps({"devices": {"X": row}}))
        with pytest.raises(UserError) as caught:
            read_devices(table)
        assert said in str(caught.value)
