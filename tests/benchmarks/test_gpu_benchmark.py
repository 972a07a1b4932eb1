"""python -m benchmarks.gpu without a GPU: its flow with cases that end in every way, and the
real cases, tiny.
"""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import (
    assembler,
    first_light,
    host_time,
    machine,
    offload,
    parts,
    speed,
    store,
    suite,
    targets,
)
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.case import NOT_RUN, RIGHT, WRONG, Case, Verdict
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.report import SCREEN_LINES, Report
from benchmarks.gpu.run import Outcome
from kernels.bench.cases import VARIANTS, Sizes, cases
from kernels.bench.report import BenchmarkRow
from kernels.costs import OPERATIONS
from tests.benchmarks.gpu_cases import CPU, TINY, context, stand_in
from tests.support.ranks import RankPool


@pytest.fixture(autouse=True)
def clean_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the state of the repository that is tested."""
    monkeypatch.setattr(machine, "_commit", lambda: ("0123456789ab", "clean"))


def call(
    directory: Path,
    *given: Case,
    minutes: float = 5.0,
    on: Machine = CPU,
    options: Sequence[str] = (),
) -> int:
    """One call of the command."""
    arguments = ["all", "--minutes", str(minutes), "--output", str(directory), *options]
    return main(arguments, machine=on, parts=[("a part", given)])


def ends(directory: Path) -> dict[str, str]:
    """The last verdict and reason of each case, as the file has them."""
    records = [record for record in store.read(directory / store.FILE) if record["kind"] == "end"]
    return {
        record["case"]: f"{record['verdict']}: {record['reason']}".rstrip(": ")
        for record in records
    }


# --------------------------------------------------------------------------------------------- flow


def test_each_end_has_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Right only where something was found to be right; what is absent is not wrong; the rest
    goes on.
    """
    code = call(
        tmp_path,
        stand_in("passes", "passes"),
        stand_in("is wrong", "is_wrong"),
        stand_in("raises", "raises"),
        stand_in("crashes", "crashes", arguments={"by": "SIGSEGV"}),
        stand_in("no memory on the host", "crashes", arguments={"by": "SIGKILL"}),
        stand_in("hangs", "hangs", limit_s=4.0),
        stand_in("memory", "lacks", arguments={"what": "memory"}),
        stand_in("a package", "lacks", arguments={"what": "a package"}),
        stand_in("anything", "lacks", arguments={"what": "anything"}),
        stand_in("half", "half"),
        stand_in("nothing", "finds_nothing"),
        stand_in("last", "passes"),
    )
    assert code == 1
    found = {case: verdict.partition("; see")[0] for case, verdict in ends(tmp_path).items()}
    assert found == {
        "passes": "right",
        "is wrong": "WRONG: another: 2 + 2 = 5",
        "raises": "WRONG: case: AttributeError: no such function",
        "crashes": "WRONG: crashed, SIGSEGV",
        "no memory on the host": "not run: killed by the system, usually out of host memory",
        "hangs": "WRONG: no end within 4 s",
        "memory": "not run: too little memory: MemoryError: full",
        "a package": "not run: missing package no_such_package",
        "anything": "not run: there is none",
        "half": "right: but 1 not run: flash-attn is not installed",
        "nothing": "not run: it found nothing",
        "last": "right",
    }
    screen = capsys.readouterr().out
    assert "a part: 3 right, 4 WRONG, 5 not run" in screen
    assert "nothing to say" in (tmp_path / "logs" / "a_part.nothing.log").read_text()
    assert not alive(int((tmp_path / "pid").read_text())), (
        "what a hanging case had started outlives it"
    )


def alive(pid: int) -> bool:
    """Running, not only waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_budget_ends_and_the_next_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cases that fit are done; one under way is cut short, keeps its findings and does not make
    them again.
    """
    given = [
        stand_in("first", "passes"),
        stand_in("cut", "hangs", limit_s=900.0, arguments={"findings": 1}),
        stand_in("long", "passes", expected_s=200.0),
    ]
    assert call(tmp_path, *given, minutes=0.05) == 0
    told = capsys.readouterr().out
    assert "left: 2 cases (2 of a part), about 3 min 20 s; run the same command to continue" in told
    assert ends(tmp_path) == {"first": "right", "cut": "not run: no time left"}
    given[1] = stand_in("cut", "passes", arguments={"findings": 2})
    assert call(tmp_path, *given) == 0
    assert "a part: 3 right, 0 WRONG, 0 not run (1 taken over)" in capsys.readouterr().out
    runs = (tmp_path / "runs").read_text().splitlines()
    assert sorted(runs) == ["cut finding 0", "cut finding 1", "first finding 0", "long finding 0"]
    assert call(tmp_path, *given, minutes=1e-6) == 0
    assert "(3 taken over)" in capsys.readouterr().out
    assert call(tmp_path, given[0], options=["--again"]) == 0
    assert (tmp_path / "runs").read_text().splitlines() == [*runs, "first finding 0"]


INTERRUPTED = """
import sys
from benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu_cases import CPU, stand_in
hangs = stand_in("hangs", "hangs", limit_s=900.0)
given = [stand_in("passes", "passes"), hangs, stand_in("next", "passes")]
raise SystemExit(main(["--output", sys.argv[1]], machine=CPU, parts=[("a part", given)]))
"""


def test_a_command_that_is_ended_ends_its_case_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=machine.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted" in errors
    assert "a part: 1 right, 0 WRONG, 0 not run" in told
    assert not alive(int((tmp_path / "pid").read_text()))


def test_parts_share_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part that hangs leaves the next its share."""
    given = [
        ("a part", [stand_in("cut", "hangs", limit_s=900.0)]),
        ("another", [stand_in("passes", "passes")]),
    ]
    began = time.monotonic()
    assert main(["--minutes", "0.1", "--output", str(tmp_path)], machine=CPU, parts=given) == 0
    assert ends(tmp_path) == {"cut": "not run: no time left", "passes": "right"}
    assert time.monotonic() - began >= 3.0  # it had half of the six seconds


@pytest.mark.parametrize("what", ["commit", "versions", "ptxas", "device"])
def test_only_what_is_comparable_is_taken_over(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = stand_in("passes", "passes")
    assert call(tmp_path, case) == 0
    on = CPU
    if what == "commit":
        monkeypatch.setattr(machine, "_commit", lambda: ("ba9876543210", "clean"))
    elif what == "versions":
        on = dataclasses.replace(CPU, versions={"torch": "99"})
    elif what == "ptxas":
        monkeypatch.setattr(
            assembler, "in_use", lambda: assembler.Assembler("another", "/ptxas", "99.0.1")
        )
    else:
        on = dataclasses.replace(CPU, name="another")
    capsys.readouterr()
    assert call(tmp_path, case, on=on) == 0
    told = capsys.readouterr().out
    assert "not taken over: 1 cases of another commit, versions or device (0123456789ab)" in told
    assert len((tmp_path / "runs").read_text().splitlines()) == 2


def test_a_dirty_tree_is_named_and_takes_nothing_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        machine, "_commit", lambda: ("0123456789ab", "dirty: kernels/fused/norms.py")
    )
    case = stand_in("passes", "passes")
    assert call(tmp_path, case) == call(tmp_path, case) == 0
    assert "dirty: kernels/fused/norms.py" in capsys.readouterr().out
    assert len((tmp_path / "runs").read_text().splitlines()) == 2


def test_the_code_itself_is_part_of_the_identity() -> None:
    """Which serves a copy without git; there is a digest of every source that a case runs."""
    found = machine.identity_of(CPU)
    assert found.reusable
    assert found.key == machine.identity_of(CPU).key
    assert dataclasses.replace(found, sources="other").key != found.key


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert call(tmp_path / "file" / "below", stand_in("passes", "passes")) == 2
    told = capsys.readouterr().out
    assert "a part: 0 right, 0 WRONG, 1 not run" in told
    assert "below: Not a directory; give another DIR" in told


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be written is not called right; what is wrong stays wrong; the rest goes on."""
    (tmp_path / store.FILE).symlink_to("/dev/full")
    assert call(tmp_path, stand_in("passes", "passes")) == 2
    told = capsys.readouterr().out
    assert "not run: 1 cases: its findings could not be written" in told
    assert "results.jsonl: No space left on device" in told
    assert call(tmp_path, stand_in("is wrong", "is_wrong"), stand_in("passes", "passes")) == 1
    assert "a part: 0 right, 1 WRONG, 1 not run" in capsys.readouterr().out


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / store.FILE
    store.append(path, {"kind": "end", "case": "one"})
    with path.open("a") as file:
        file.write('{"kind": "end", "case": "tw')
    store.append(path, {"kind": "end", "case": "three"})
    assert [record["case"] for record in store.read(path)] == ["one", "three"]


@pytest.mark.parametrize(
    ("on", "case", "reason"),
    [
        ({"capability": (7, 5)}, {"capability": (8, 0)}, "compute capability 7.5 is below 8.0"),
        (
            {"device_gib": 10.0},
            {"device_gib": 60.0},
            "too little device memory: 10 GiB free, needs 60",
        ),
        ({}, {"host_gib": 1e9}, "too little host memory: "),
        (
            {},
            {"packages": ("triton", "no_such_package")},
            "missing package; type: pip install no_such_package",
        ),
        (
            {"assembler_problem": "/x: tells no version"},
            {"compiles": True},
            "unknown ptxas: /x: tells no version",
        ),
        ({}, {"refusal": "unknown ptxas: /y"}, "unknown ptxas: /y"),
    ],
)
def test_what_a_case_needs_and_is_not_here(
    on: dict[str, Any], case: dict[str, Any], reason: str
) -> None:
    gpu = dataclasses.replace(Machine("cuda", "a GPU", (9, 0), 139.0), **on)
    assert gpu.refusal(stand_in("any", "passes", **case)).startswith(reason)
    other = stand_in("any", "passes", environment={assembler.VARIABLE: "/z"}, **case)
    assert bool(gpu.refusal(other)) == ("assembler_problem" not in on), (
        "a case with a ptxas of its own needs no other"
    )


def test_an_unknown_ptxas_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that TRITON_PTXAS_PATH names does not work: its self-check is not run, that of
    triton's own is.
    """
    broken = tmp_path / "ptxas"
    broken.write_text("#!/bin/sh\necho nothing\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(assembler.VARIABLE, str(broken))
    first, second, *_ = parts.self_checks()
    assert (
        first.refusal
        == f"unknown ptxas: TRITON_PTXAS_PATH, {broken}: cannot be run, or prints no version"
    )
    assert not second.refusal
    assert second.environment[assembler.VARIABLE].endswith("backends/nvidia/bin/ptxas")
    assert first.cache != second.cache
    monkeypatch.setenv(assembler.VARIABLE, str(tmp_path / "absent"))
    assert "cannot be run" in parts.self_checks()[0].refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_case_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command as typed, to its end: nothing is right, nothing is wrong, and every case has a
    name of its own.
    """
    assert main(["all", "--output", str(tmp_path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= SCREEN_LINES
    listed = [case for make in parts.PARTS.values() for case in make(16)]
    assert len({(case.part, case.name) for case in listed}) == len(listed)
    assert f"not run: {len(listed)} cases: no GPU" in lines
    records = [record for record in store.read(tmp_path / store.FILE) if record["kind"] == "end"]
    assert {(record["verdict"], record["reason"]) for record in records} == {(NOT_RUN, "no GPU")}
    assert len(records) == len(listed)
    assert "| environment | not run: no GPU |" in (tmp_path / "report.md").read_text()


def test_the_screen_has_forty_lines_and_says_what_matters(tmp_path: Path) -> None:
    case = stand_in("any", "passes")
    outcome = Outcome(
        [Verdict(case, WRONG, f"reason {n}") for n in range(90)] + [Verdict(case, RIGHT)], [case]
    )
    lines = Report.of(machine.identity_of(CPU), outcome, tmp_path).screen()
    assert len(lines) == SCREEN_LINES
    assert "a part: 1 right, 90 WRONG, 0 not run" in lines
    assert any(line.endswith("more lines: see report.md") for line in lines)
    assert lines[-2].startswith("left: 1 cases")


def test_every_call_of_a_case_exists() -> None:
    """With the arguments that the case gives it: a GPU's time is too dear for a typo."""
    import importlib
    import inspect

    for make in parts.PARTS.values():
        for case in make(16):
            module, _, function = case.call.partition(":")
            called = getattr(importlib.import_module(module), function)
            inspect.signature(called).bind(None, **json.loads(json.dumps(case.arguments)))
            assert case.expected_s <= case.limit_s


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = sys.modules["pydantic"] = sys.modules["matplotlib"] = None
import benchmarks.gpu.__main__
assert "torch" not in sys.modules, "the command's own process imports torch"
from benchmarks.gpu import first_light, host_time, parts, small, speed, suite
import pytest
files = [f"tests/{name}.py" for name in (*parts.KERNEL_TESTS, parts.LARGE_TESTS)]
options = ["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
raise SystemExit(pytest.main([*options, *files]))
"""


@pytest.mark.slow
@pytest.mark.both_stacks
def test_what_concerns_kernels_needs_no_deepspeed() -> None:
    """Nor anything else that only training needs: torch and triton, and pytest and hypothesis
    for the tests.
    """
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED],
        cwd=machine.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/kernels/test_large_tensors.py::test_attention" in done.stdout


def test_every_file_with_tests_of_the_gpu_is_named() -> None:
    """Each that asks for ``fused_device`` or marks a test with gpu; this one only names the
    mark.
    """
    folder = machine.REPOSITORY / "tests"
    found = {
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("test_*.py")
        if "mark.gpu" in (text := path.read_text()) or "fused_device:" in text
    }
    assert found - {"benchmarks/test_gpu_benchmark"} == {
        *parts.KERNEL_TESTS,
        *parts.MODEL_TESTS,
        parts.LARGE_TESTS,
    }


# ----------------------------------------------------------------------------- the real cases, tiny


def findings(directory: Path) -> dict[str, dict[str, Any]]:
    """By the name of case and finding."""
    records = [
        record for record in store.read(directory / store.FILE) if record["kind"] == "finding"
    ]
    return {f"{record['case']}: {record['name']}": record for record in records}


def test_first_light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code in this process: every variant of attention, every operation, both ceilings."""
    monkeypatch.setattr("kernels.bench.timing._BUDGET_S", 0.0)
    here = context(tmp_path)
    first_light.environment(here)
    first_light.self_check(here, [("fp32", 8, variant) for variant in VARIANTS])
    first_light.operations(here, ["fp32"])
    first_light.ceilings(here, "fp32")
    found = findings(tmp_path)
    assert {record["verdict"] for record in found.values()} == {RIGHT}
    assert {f"a case: attention, fp32, head_dim 8, {variant}" for variant in VARIANTS} <= set(found)
    assert {f"a case: {op}, fp32" for op in OPERATIONS} <= set(found)
    assert found["a case: matrix product"]["figures"]["tflops"] > 0
    assert found["a case: the ptxas that triton calls"]["figures"]["path"].endswith("ptxas")


@pytest.mark.parametrize(
    ("explained", "verdict"),
    [
        ("attention: torch (hopper, triton: self-check: output is wrong for equal weights)", WRONG),
        ("attention: triton (hopper: self-check: OutOfResources: shared memory)", WRONG),
        ("attention: torch (hopper, triton: self-check: no memory for it now)", NOT_RUN),
        ("attention: triton (hopper: it has no dropout)", RIGHT),
        ("attention: torch (hopper, triton: MEGAGPT_KERNELS=torch)", NOT_RUN),
    ],
)
def test_a_self_check_that_failed_is_wrong(
    explained: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another implementation then computes the right numbers; the plain twin alone
    shows nothing.
    """
    monkeypatch.setattr("benchmarks.gpu.small.chosen", lambda case: explained)
    case = next(cases("attention", Sizes((16,), (8,), (), 16, 0, 16), torch.float32, "cpu"))
    gpu = dataclasses.replace(context(tmp_path), device="cuda")
    first_light._check(gpu, "it", case)
    assert findings(tmp_path)["a case: it"]["verdict"] == verdict


def test_a_wrong_operation_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels

    right = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda *x, **options: right(*x, **options) * 1.01)
    host_time.measure(context(tmp_path), repeats=1, dtype="fp32", ops=["rms_norm", "dropout"])
    found = findings(tmp_path)
    assert found["a case: rms_norm"]["verdict"] == WRONG
    assert found["a case: dropout"]["verdict"] == RIGHT
    assert all(
        found["a case: dropout"]["figures"][f"{who}_{mode}_us"] > 0
        for who in ("ours", "torch")
        for mode in ("fwd", "both")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_beside_its_rivals(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every provider that a CPU has computes every variant; what was measured before is not
    measured again.
    """
    monkeypatch.setattr("kernels.bench.timing._BUDGET_S", 0.0)
    monkeypatch.setattr("kernels.bench.run.gemm_ceiling_tflops", lambda *_: 1.0)
    monkeypatch.setattr("kernels.bench.run.copy_ceiling_gb_per_s", lambda *_: 1.0)
    sizes = {
        "lengths": [32],
        "head_dims": [8],
        "tokens": 64,
        "attention_width": 64,
        "variant": variant,
    }
    speed.measure(
        context(tmp_path), "attention", ["fwd", "both"], "fp32", ["torch", "sdpa"], **sizes
    )
    found = findings(tmp_path)
    ran = {name: record for name, record in found.items() if record["verdict"] != NOT_RUN}
    assert {record["verdict"] for record in ran.values()} == {RIGHT}, found
    rivals = {"torch"} if variant == "softcap" else {"torch", "sdpa math"}  # SDPA has no soft cap
    assert {record["figures"]["provider"] for record in ran.values()} >= rivals
    assert {record["figures"]["mode"] for record in ran.values()} == {"fwd", "both"}
    done = frozenset(record["name"] for record in ran.values())
    again = tmp_path / "again"
    again.mkdir()
    earlier = dataclasses.replace(context(again), done=done)
    speed.measure(earlier, "attention", ["fwd", "both"], "fp32", ["torch", "sdpa"], **sizes)
    assert not {record["name"] for record in findings(again).values()} & done


def test_a_file_of_tests(tmp_path: Path) -> None:
    """Counted; a file whose tests are all skipped is not right; one that fails is wrong."""
    file = tmp_path / "test_it.py"
    file.write_text("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no')\n")
    suite.run_tests(context(tmp_path), str(file), workers=2, marker="not slow")
    (tmp_path / "test_skipped.py").write_text("import pytest\ndef test_a(): pytest.skip('no')\n")
    with pytest.raises(suite.NotRun, match="1 tests skipped, none passed"):
        suite.run_tests(
            context(tmp_path), str(tmp_path / "test_skipped.py"), workers=1, marker="not slow"
        )
    noise = "import atexit, os\natexit.register(os.write, 2, b'a worker says goodbye\\n')\n"
    file.write_text(noise + "def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): assert 0\n")
    suite.run_tests(context(tmp_path, "failing"), str(file), workers=1, marker="not slow")
    file.write_text("import os\ndef test_a(): os.abort()\n")
    with pytest.raises(RuntimeError, match="ended by SIGABRT"):
        suite.run_tests(context(tmp_path, "crashing"), str(file), workers=1, marker="not slow")
    found = {record["case"]: record for record in findings(tmp_path).values()}
    assert found["a case"]["figures"] == {"passed": 1, "failed": 0, "skipped": 1}
    assert (found["failing"]["verdict"], found["failing"]["reason"]) == (WRONG, "2 of 3 failed")


def test_compute_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that runs the program it is given: the small case runs; what it finds is wrong."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\nshift 4\n[ $FOUND != 0 ] || "$@" || exit 8\necho "========= ERROR SUMMARY: 3 '
        'errors"\nexit $FOUND\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FOUND", "0")
    suite.sanitize(context(tmp_path), "rms_norm", "memcheck")
    monkeypatch.setenv("FOUND", "99")
    suite.sanitize(context(tmp_path, "another"), "rms_norm", "memcheck")
    right, wrong = findings(tmp_path).values()
    assert right["verdict"] == RIGHT
    assert (wrong["verdict"], wrong["reason"]) == (WRONG, "ERROR SUMMARY: 3 errors")
    monkeypatch.setenv("FOUND", "7")
    with pytest.raises(suite.NotRun, match="exit code 7"):
        suite.sanitize(context(tmp_path), "rms_norm", "memcheck")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(suite.NotRun, match="pip install nvidia-cuda-sanitizer-api"):
        suite.find_sanitizer()


@pytest.mark.slow
@pytest.mark.both_stacks
def test_training_and_offload(tmp_path: Path, one_rank: RankPool) -> None:
    """The real engine at ZeRO 0, 1 and 3, the plain compiled loop, a trace, and Adam in host
    memory.
    """
    one_rank.run("tests.benchmarks.gpu_cases:train", directory=str(tmp_path))
    found = findings(tmp_path)
    assert {record["verdict"] for record in found.values()} == {RIGHT}, found
    stages = [found[f"ZeRO {stage}: training"]["figures"] for stage in (0, 1, 3)]
    losses = [run["last_loss"] for run in [*stages, found["plain: training"]["figures"]]]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    for figures in stages:
        assert figures["parameters"] == 30_080
        assert all(
            figures[name] > 0
            for name in ("mfu", "tokens_per_s", "first_step_s", "planned_gib", "host_gib")
        )
    trace = found["trace: trace"]["figures"]
    assert (tmp_path / trace["file"]).stat().st_size > 1000
    assert 0 < trace["busy_share"] < 1
    for pinned in (False, True):
        figures = found[f"offload, {pinned}: offload"]["figures"]
        assert (figures["layers"], figures["pin_memory"]) == (2, pinned)
        assert figures["planned_host_gib"] > 0


def test_offload_shrinks_to_what_fits() -> None:
    """6.7B needs more than 128 GiB; page-locked memory counts up to twice its size."""
    model = {"preset": "gpt3-6.7b"}
    settings = {"micro_batch": 4, "recompute": "full", "sub_group_size": 200_000_000}
    chosen = {
        (pinned, host): offload.largest(
            model, pinned, host, 139.0, **settings
        ).megagpt.model.num_layers
        for pinned, host in ((False, 500.0), (False, 60.0), (True, 60.0))
    }
    assert chosen[False, 500.0] == 32
    assert 0 < chosen[True, 60.0] < chosen[False, 60.0] < 32
    with pytest.raises(suite.NotRun, match="too little memory even for one layer"):
        offload.largest(model, True, 7.0, 139.0, **settings)


@pytest.mark.slow
@pytest.mark.both_stacks
def test_a_training_case_as_the_command_runs_it(tmp_path: Path, compiled_ops: None) -> None:
    """In a process of its own, which joins alone; another kernels' choice comes by its
    environment.
    """
    shared: dict[str, Any] = {
        "model": TINY,
        "stage": 1,
        "micro_batch": 2,
        "steps": 4,
        "bf16": False,
    }
    case = Case(
        "a part",
        "one",
        "benchmarks.gpu.training:measure",
        shared,
        environment={"MEGAGPT_KERNELS": "torch"},
        compiles=False,
    )
    assert call(tmp_path, case) == 0, (tmp_path / "logs" / "a_part.one.log").read_text()
    assert findings(tmp_path)["one: training"]["figures"]["kernels"] == "torch"


def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would say of one, through the same code."""
    gpu = {
        "is_available": lambda: True,
        "mem_get_info": lambda: (2**37, 2**37),
        "get_device_capability": lambda: (9, 0),
        "get_device_name": lambda: "NVIDIA H200",
    }
    for name, answer in gpu.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = machine._ask_torch()
    assert (found.device, found.name, found.capability, found.device_gib) == (
        "cuda",
        "NVIDIA H200",
        (9, 0),
        128.0,
    )
    answer = json.dumps(dataclasses.asdict(found))
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=answer)
    )
    assert machine.this_machine().capability == (9, 0)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr="a\nlibcuda is broken"),
    )
    assert machine.this_machine().lack == "torch cannot be asked for a GPU: libcuda is broken"


def test_memory_of_a_gpu_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the plan says does not fit is not begun."""
    from benchmarks.gpu import training

    for name, answer in {
        "mem_get_info": (40 * 2**30, 0),
        "max_memory_allocated": 2**30,
        "max_memory_reserved": 2**31,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    memory = training.planned(
        training.configuration({"preset": "gpt2-124m"}, stage=1, micro_batch=8), "cuda"
    )
    assert 4.0 < memory["planned_gib"] < 10.0
    peaks = training.peaks("cuda")
    assert (peaks["allocated_gib"], peaks["reserved_gib"]) == (1.0, 2.0)
    with pytest.raises(suite.NotRun, match="too little device memory: 40 GiB free, needs"):
        training.planned(
            training.configuration({"preset": "gpt3-6.7b"}, stage=3, micro_batch=8), "cuda"
        )


# ------------------------------------------------------------------------------------------ targets

ROW = dataclasses.asdict(
    BenchmarkRow(
        "attention", "megagpt triton", "fwd", "batch 1, length 4096, head_dim 64, causal", 4096,
        "bf16", 0.5, True,
        "a GPU", "torch", 1.0, 1.0, 1.0, tflops=345.0, fraction_of_ceiling=0.5, peak_mib=10.0,
    )
)  # fmt: skip


def compared(
    *rows: dict[str, Any], measured: str = "megagpt triton", of: str = ""
) -> list[dict[str, Any]]:
    """The targets' lines about the operation and mode of the first row."""
    operation = f"{rows[0]['op']} {rows[0]['mode']}"
    found = [line for line in targets.compare(rows) if line["operation"] == operation]
    return [
        line for line in found if line["measured"].startswith(measured) and of in line["measured"]
    ]


def test_a_ratio_to_the_rival_of_the_same_shape() -> None:
    rival = ROW | {"provider": "sdpa flash", "tflops": 300.0}
    line, other = compared(ROW, rival, rival | {"shape": "another, causal", "tflops": 1.0})
    assert (line["ratio"], line["wanted"], line["verdict"]) == ("1.15", 1.15, "met")
    assert (line["ours_ms"], line["rival_ms"]) == ("1.0000", "1.0000")
    assert (other["shape"], other["verdict"]) == (
        "another, causal",
        "not run: no row of megagpt triton",
    )
    (line,) = compared(ROW, rival | {"tflops": 301.0})
    assert line["verdict"] == "not met"
    (line,) = compared(ROW)
    assert line["verdict"] == "not run: no row of sdpa flash"


def test_a_target_never_disappears_and_nothing_wrong_meets_one() -> None:
    rival = ROW | {"provider": "sdpa flash", "tflops": 300.0}
    failed = ROW | {"correct": False, "tflops": None, "p50_ms": None, "failure": "OutOfResources"}
    (line,) = compared(rival, failed)
    assert line["verdict"] == "not met: OutOfResources"
    (line,) = compared(ROW | {"correct": False}, rival)
    assert line["verdict"] == "not met: its result is wrong"
    assert len(targets.compare([])) == len(targets.TARGETS)
    assert {line["verdict"].partition(":")[0] for line in targets.compare([])} == {NOT_RUN}


def test_the_hopper_kernel_is_held_against_cudnn_by_head_dimension_and_in_training() -> None:
    hopper = ROW | {"provider": "megagpt hopper"}
    cudnn = ROW | {"provider": "sdpa cudnn 91900", "tflops": 350.0}
    line, nothing = compared(hopper, cudnn, measured="megagpt hopper")
    assert (line["ratio"], line["wanted"], line["verdict"]) == ("0.99", 1.0, "not met")
    assert (nothing["shape"], nothing["ratio"]) == ("head_dim 128, causal", "")
    both = {"mode": "both"}
    line, _ = compared(hopper | both, cudnn | both, measured="megagpt hopper")
    assert (line["measured"], line["verdict"]) == ("megagpt hopper, rate / sdpa cudnn", "not met")


def test_bandwidth_and_memory() -> None:
    norm = ROW | {
        "op": "layer_norm",
        "tflops": None,
        "gb_per_s": 3900.0,
        "fraction_of_ceiling": 0.91,
    }
    (line,) = compared(norm | {"shape": "rows 65536, width 768"})
    assert (line["ratio"], line["wanted"], line["verdict"]) == ("0.91", 0.9, "met")
    (line,) = compared(norm | {"shape": "rows 16384, width 768"})
    assert line["verdict"].startswith(NOT_RUN), "at this size nobody reaches the ceiling"
    loss = ROW | {
        "op": "linear_cross_entropy",
        "mode": "both",
        "shape": "rows 16384, width 768, vocabulary 50304",
    }
    faster, _, smaller = compared(loss, loss | {"provider": "torch", "peak_mib": 99.0})
    assert (faster["ratio"], faster["verdict"]) == ("1.00", "met")
    assert (smaller["ratio"], smaller["verdict"]) == ("9.90", "not met")
