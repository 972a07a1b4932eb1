"""The kernel benchmark: its command line, its report, its costs, and that a fast wrong kernel is
shown as wrong.
"""

import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import benchmark, costs, dispatch, reference
from kernels.bench import providers as benchmark_providers
from kernels.bench import report as benchmark_report
from kernels.bench import run as benchmark_run
from kernels.bench import timing as benchmark_timing
from kernels.bench.cases import CHECK_SIZES, Case, cases
from kernels.bench.providers import Provider, UnavailableError
from kernels.bench.report import BenchmarkRow, Heading, as_markdown, write_report
from kernels.bench.timing import errors, expected, measure, step
from kernels.costs import OPERATIONS, Cost
from tests import REPOSITORY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def first_case(op: str) -> Case:
    return next(cases(op, CHECK_SIZES, torch.float32, DEVICE))


def row(**changes: object) -> BenchmarkRow:
    timed = {
        "p20_ms": 1.0,
        "p50_ms": 2.0,
        "p80_ms": 3.0,
        "gb_per_s": 40.0,
        "fraction_of_ceiling": 0.5,
    }
    return replace(
        BenchmarkRow(
            "rms_norm", "torch", "fwd", "rows 8, width 16", 16, "fp32", 0.5, True, "a CPU", "torch"
        ),
        **timed | changes,
    )


def test_a_run_writes_one_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command as typed: torch is timed, our kernel is in the same table (checked only,
    without a GPU).
    """
    monkeypatch.setattr("kernels.bench.timing._BUDGET_S", 0.0)
    arguments = [
        "rmsnorm",
        "attention",
        "--dtype",
        "fp32",
        "--lengths",
        "32",
        "--head-dim",
        "16",
        "--widths",
        "24",
    ]
    output = tmp_path / "new" / "folder"
    arguments += ["--providers", "torch", "sdpa", "--tokens", "64", "--output", str(output)]
    assert benchmark.main(arguments) == 0
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert {r["op"] for r in rows} == {"rms_norm", "attention"}
    assert {r["mode"] for r in rows} == {"fwd", "both"}
    assert all(r["correct"] == "True" for r in rows)
    ours = [r for r in rows if r["provider"].startswith("megagpt")]
    others = [r for r in rows if not r["provider"].startswith("megagpt")]
    assert {r["op"] for r in ours} == {"rms_norm", "attention"}
    assert all(float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) for r in others)
    assert all(r["tflops"] if r["op"] == "attention" else r["gb_per_s"] for r in others)
    assert {p.name for p in output.iterdir()} == {
        "results.csv", "results.md", "rms_norm_fwd.png", "rms_norm_both.png", "attention_fwd.png",
        "attention_both.png",
    }  # fmt: skip
    if DEVICE == "cpu":
        assert all(not r["p50_ms"] for r in ours)
        assert "No GPU found" in capsys.readouterr().out
        assert "No GPU found" in (output / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layernrom", "--output", "x"], "layernrom: unknown operation; choose from attention"),
        (["attention"], "--output"),
        (["--dtype", "fp64", "--output", "x"], "invalid choice: 'fp64'"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_and_costs_need_no_torch() -> None:
    code = (
        "import sys, kernels.benchmark, kernels.costs; sys.exit('torch' in sys.modules or "
        "'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_a_wrong_kernel_is_shown_as_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong in its row, in the table and in the exit code, however fast."""

    def half(
        x: Tensor, weight: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        result = reference.rms_norm(x, weight, residual=residual)
        return (result[0], result[1] * 0.5) if isinstance(result, tuple) else result * 0.5

    wrong = Provider(benchmark_run.OURS, lambda case: half)
    monkeypatch.setattr(benchmark_run, "providers", lambda op, device: [wrong])
    monkeypatch.setattr(benchmark_run, "_check_interpreted", lambda *arguments: None)
    assert benchmark_run.run(("rms_norm",), CHECK_SIZES, "fp32", ("fwd",), tmp_path, "command") == 1
    assert "**WRONG**" in (tmp_path / "results.md").read_text()
    assert next(csv.DictReader((tmp_path / "results.csv").open()))["correct"] == "False"


def test_a_provider_that_cannot_run_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(case: Case) -> None:
        raise UnavailableError("not installed (no module)")

    def fails(**arguments: object) -> None:
        raise RuntimeError("No available kernel.\nSecond line")

    def odd(**arguments: object) -> None:
        raise TypeError("no such argument")

    several = [
        Provider("absent", missing),
        Provider("broken", lambda case: fails),
        Provider("odd", lambda case: odd),
    ]
    monkeypatch.setattr(benchmark_run, "providers", lambda op, device: several)
    monkeypatch.setattr(benchmark_run, "_check_interpreted", lambda *arguments: None)
    assert benchmark_run.run(("dropout",), CHECK_SIZES, "fp32", ("fwd",), tmp_path, "command") == 0
    text = (tmp_path / "results.md").read_text()
    assert text.count("dropout: absent not run: not installed (no module)") == 1
    assert text.count("dropout: broken not run: RuntimeError: No available kernel.") == 1
    assert text.count("dropout: odd not run: TypeError: no such argument") == 1
    assert "Second line" not in text


class OutOfResources(Exception):  # noqa: N818
    """What triton raises is no RuntimeError."""


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_a_kernel_of_ours_that_fails_is_a_row_and_an_exit_code(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all the other rows are there."""

    def fail(*_: object, **arguments: object) -> Any:
        raise OutOfResources("shared memory, Required: 5 | 4")

    monkeypatch.setattr(benchmark_timing, "_BUDGET_S", 0.0)
    ours = Provider("megagpt triton", fail if where == "prepare" else lambda case: fail)
    others = [Provider("torch", lambda case: getattr(reference, case.op))]
    monkeypatch.setattr(benchmark_run, "providers", lambda op, device: [ours, *others])
    monkeypatch.setattr(benchmark_run, "_check_interpreted", lambda *arguments: None)
    assert (
        benchmark_run.run(
            ("dropout", "rms_norm"), CHECK_SIZES, "fp32", ("fwd",), tmp_path, "command"
        )
        == 1
    )
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {r["op"] for r in rows if r["provider"] == "torch" and r["p50_ms"]} == {
        "dropout",
        "rms_norm",
    }
    failed = [r for r in rows if r["provider"] == "megagpt triton"]
    assert {r["failure"] for r in failed} == {"OutOfResources: shared memory, Required: 5 / 4"}
    assert {r["correct"] for r in failed} == {"False"}
    assert "**FAILED**: OutOfResources" in (tmp_path / "results.md").read_text()


def test_what_the_self_check_finds_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        benchmark_providers, "row_refusal", lambda *_, **__: "self-check: output is wrong"
    )
    with pytest.raises(RuntimeError, match="self-check: output is wrong"):
        benchmark_providers._ours(first_case("attention"), dispatch.TABLE["attention"][1])


def test_an_operation_that_stops_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where matplotlib is not installed; the report is written after each operation."""

    def broken(case: Case, mode: str) -> Any:
        if case.op == "rms_norm":
            raise torch.OutOfMemoryError("full")
        return expected(case, mode)

    found = benchmark_report.importlib.util.find_spec
    monkeypatch.setattr(benchmark_run, "expected", broken)
    monkeypatch.setattr(benchmark_run, "_check_interpreted", lambda *arguments: None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    assert (
        benchmark_run.run(
            ("dropout", "rms_norm"), CHECK_SIZES, "fp32", ("fwd",), tmp_path, "command"
        )
        == 1
    )
    text = (tmp_path / "results.md").read_text()
    assert "## dropout, fwd" in text
    assert "* rms_norm: STOPPED: OutOfMemoryError: full" in text
    assert "* No plots: the package matplotlib is not installed." in text
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.md"}


def test_a_benchmark_that_is_killed_keeps_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the operation under way, too: the tables are written after each row."""

    def killed(case: Case) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_timing, "_BUDGET_S", 0.0)
    several = [
        Provider("torch", lambda case: getattr(reference, case.op)),
        Provider("next", killed),
    ]
    monkeypatch.setattr(benchmark_run, "providers", lambda op, device: several)
    with pytest.raises(KeyboardInterrupt):
        benchmark_run.run(("dropout",), CHECK_SIZES, "fp32", ("fwd",), tmp_path, "command")
    assert [r["provider"] for r in csv.DictReader((tmp_path / "results.csv").open())] == ["torch"]
    assert "| torch |" in (tmp_path / "results.md").read_text()


def test_documents_cost_what_is_visible() -> None:
    """Attention within documents counts the query-key pairs that it computes."""
    sizes = replace(CHECK_SIZES, lengths=(64,), tokens=128)
    whole, packed = (
        next(cases("attention", replace(sizes, variant=variant), torch.float32, "cpu"))
        for variant in ("causal", "documents")
    )
    ids = packed.options["document_ids"]
    seen = [
        reference.visible(64, 64, True, of, ids.device).sum() / len(ids)
        for of in (ids, torch.zeros_like(ids))
    ]
    assert 0.0 < seen[0] / seen[1] < 0.9
    assert packed.forward.flops == pytest.approx(
        whole.forward.flops * float(seen[0] / seen[1]), abs=1
    )


def test_a_gpu_waits_for_python_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or launches would be timed where a kernel is quicker than they are."""
    happened: list[str] = []
    event = SimpleNamespace(
        record=lambda: happened.append("record"), elapsed_time=lambda other: 1.0
    )
    gpu = SimpleNamespace(
        Event=lambda enable_timing: event,
        _sleep=lambda cycles: happened.append(f"sleep {cycles >= 2 * 2e9 * 0.001}"),
        synchronize=lambda: happened.append("wait"),
    )
    flush = SimpleNamespace(zero_=lambda: happened.append("flush"))
    stub = SimpleNamespace(cuda=gpu, empty=lambda *_, **__: flush, int8=None)
    monkeypatch.setattr(benchmark_timing, "torch", stub)

    def run() -> None:
        happened.append("run")
        time.sleep(0.001)

    assert benchmark_timing._repeat(run, 2, "cuda") == [1.0, 1.0]
    assert happened == [
        *["wait", "run"] * 3,
        *["flush", "sleep True", "record", "run", "record"] * 2,
        "wait",
    ]


def test_attention_is_held_against_every_backend_by_name() -> None:
    names = {provider.name for provider in benchmark_providers.providers("attention", "cuda")}
    assert names >= {
        "megagpt hopper", "megagpt triton", "torch", "torch.compile", "sdpa flash",
        "sdpa efficient", "sdpa math",
        "flex_attention", "flash-attn",
    }  # fmt: skip


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_cases_and_the_twin_passes(op: str) -> None:
    case = first_case(op)
    function = getattr(reference, op)
    assert errors(function, case, "both") <= 1.0
    assert case.cost("both") == case.cost("fwd") + case.cost("bwd")
    assert measure(step(function, case, "bwd"), DEVICE).p50_ms > 0


def test_not_a_number_is_an_infinite_error() -> None:
    case = first_case("rms_norm")
    assert errors(
        lambda x, weight: reference.rms_norm(x, weight) * float("nan"), case, "fwd"
    ) == float("inf")


def test_the_table_shows_conditions_times_and_checks() -> None:
    heading = Heading("the command", "2026-01-02", "a machine", "Ceilings.", ("a note",))
    text = as_markdown(
        heading, [row(), row(provider="other", p50_ms=None, gb_per_s=None), row(mode="both")]
    )
    assert "`the command`, 2026-01-02, on a machine. Ceilings." in text
    assert "* a note" in text
    assert (
        "| rows 8, width 16 | fp32 | torch | 1.000 / 2.000 / 3.000 | 40 GB/s | 50% |  | 0.50 |"
        in text
    )
    assert "| rows 8, width 16 | fp32 | other | not timed | | | | 0.50 |" in text
    assert text.index("## rms_norm, fwd") < text.index("## rms_norm, both")


def test_a_report_replaces_the_previous_one_whole(tmp_path: Path) -> None:
    heading = Heading("c", "d", "m", "", ())
    write_report(tmp_path, heading, [row(), row(mode="both")])
    write_report(tmp_path, heading, [row()])
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2
    assert not list(tmp_path.glob("*.new"))


# -------------------------------------------------------------------------------------------- costs


def test_attention_flops_follow_the_papers() -> None:
    """4 B H S^2 D forward, half of it causal, and 2.5 times that backward (FlashAttention-2,
    section 4.1).
    """
    shape = {"batch": 2, "heads": 3, "length": 64, "head_dim": 16, "itemsize": 2}
    full = costs.attention(**shape, causal=False)
    assert full.flops == 4 * 2 * 3 * 64**2 * 16
    assert costs.attention(**shape).flops == full.flops // 2
    assert costs.attention(**shape, causal=False, backward=True).flops == full.flops * 5 // 2
    assert full.bytes == 2 * 4 * (2 * 3 * 64 * 16) + 4 * 2 * 3 * 64


def test_one_query_of_many_keys_sees_them_all() -> None:
    seen = costs.attention(1, 1, 1, 8, key_length=1000, itemsize=2).flops
    assert seen == pytest.approx(
        costs.attention(1, 1, 1, 8, key_length=1000, causal=False, itemsize=2).flops, rel=1e-3
    )


@pytest.mark.parametrize(("length", "key_length"), [(64, 64), (5, 64), (1, 64), (64, 5)])
@pytest.mark.parametrize("window", [1, 7, 60, 64, 100])
def test_a_window_costs_what_is_visible(length: int, key_length: int, window: int) -> None:
    """Pairs as the mask has them, each query's first and last counted half, as without a window."""
    shape = {"batch": 2, "heads": 3, "length": length, "head_dim": 8, "key_length": key_length}
    mask = reference.visible(length, key_length, True, None, torch.device("cpu"), window)
    whole = reference.visible(length, key_length, True, None, torch.device("cpu"))
    cost = costs.attention(**shape, window=window, itemsize=2)
    hidden = int(whole.sum() - mask.sum())
    band = sum(p + 1 - window > 0 for p in range(max(0, key_length - length), key_length))
    pairs = costs.attention(**shape, itemsize=2).flops / (4 * 2 * 3 * 8) - hidden + band / 2
    assert cost.flops == round(4 * 2 * 3 * 8 * pairs)
    keys = int(mask.any(dim=(0, 1, 2)).sum())
    assert cost.bytes == 2 * 2 * 3 * 8 * (2 * length + 2 * keys) + 4 * 2 * 3 * length
    backward = costs.attention(**shape, window=window, itemsize=2, backward=True)
    assert backward.flops == cost.flops * 5 // 2
    assert backward.bytes == cost.bytes + 2 * 2 * 3 * 8 * (2 * length + 2 * key_length)


def test_full_attention_flops_equal_torchs_counter() -> None:
    q, k, v = (torch.randn(2, 3, 64, 16) for _ in range(3))
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # the CPU's flash is not counted
        reference.attention(q, k, v, causal=False)
    assert (
        counter.get_total_flops() == costs.attention(2, 3, 64, 16, causal=False, itemsize=4).flops
    )


def test_matmul_flops_equal_torchs_counter() -> None:
    a, b = torch.randn(5, 7, requires_grad=True), torch.randn(7, 11, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (a @ b).sum().backward()
    expected = costs.matmul(5, 7, 11, itemsize=4) + costs.matmul(
        5, 7, 11, itemsize=4, backward=True
    )
    assert counter.get_total_flops() == expected.flops


def test_norm_bytes_are_each_tensor_once() -> None:
    """Forward reads x and writes y, backward reads dy and x and writes dx; a residual moves one
    or two more.
    """
    rows, columns = 1000, 64
    element = 2 * rows * columns
    small = 0.02 * element  # parameters and statistics
    for residual, backward, passes in (
        (False, False, 2),
        (False, True, 3),
        (True, False, 4),
        (True, True, 4),
    ):
        cost = costs.layer_norm(rows, columns, residual=residual, itemsize=2, backward=backward)
        assert cost.bytes == pytest.approx(passes * element, abs=small + 8 * rows)
        assert cost.flops == 0


@pytest.mark.parametrize("backward", [False, True])
def test_norm_costs_count_the_bytes_of_each_dtype(backward: bool) -> None:
    """x and y in 16 bits, parameters, residual, sum and their gradients in fp32: counted tensor
    by tensor.
    """
    rows, columns = 5, 7
    narrow, wide = 2 * rows * columns, 4 * rows * columns
    # Forward: x, residual -> y, sum. Backward: dy, sum, its gradient -> dx, the residual's
    # gradient.
    tensors = 2 * narrow + (3 if backward else 2) * wide
    parameters = (3 if backward else 2) * 4 * columns
    itemsizes = {"itemsize": 2, "parameter_itemsize": 4, "residual_itemsize": 4}
    cost = costs.layer_norm(rows, columns, residual=True, backward=backward, **itemsizes)
    assert cost.bytes == tensors + parameters + 2 * 4 * rows


def test_costs_add() -> None:
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_our_kernels_run_in_the_benchmark_on_a_gpu() -> None:
    for op in OPERATIONS:
        case = first_case(op)
        assert not kernels.explain(op, **case.tensors, **case.options).startswith(f"{op}: torch")
        assert errors(getattr(kernels, op), case, "both") <= 2.0
