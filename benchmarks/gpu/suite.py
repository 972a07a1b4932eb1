"""Cases that run other programs: a file of tests under pytest, a small kernel under compute-sanitizer."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.case import NotRun
from benchmarks.gpu.child import Context
from benchmarks.gpu.machine import REPOSITORY

SANITIZER_FOUND = 99  # the exit code that it is told to give
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")  # of pytest's summary,
_SUMMARY = re.compile(_COUNTS.pattern + r".* in [\d.]+s\b")  # behind which workers may still print


def run_tests(context: Context, file: str, workers: int, marker: str = "gpu") -> None:
    """The tests of one file that bear the marker; right where some passed and none failed."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", marker, "-p", "no:cacheprovider", file]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    code, lines = _watched(command)
    last = next((line for line in reversed(lines) if _SUMMARY.search(line)), _last_line("\n".join(lines)))
    if code < 0 and code != -signal.SIGKILL:
        raise RuntimeError(f"pytest {file}: ended by {signal.Signals(-code).name}; the last line: {last}")
    if code not in (0, 1):
        raise NotRun(f"pytest {file}: exit code {code}: {last}")
    counts = {word.rstrip("s"): int(number) for number, word in _COUNTS.findall(last)}
    wrong = counts.get("failed", 0) + counts.get("error", 0)
    passed, skipped = counts.get("passed", 0), counts.get("skipped", 0)
    if not wrong and not passed:
        raise NotRun(f"{skipped} tests skipped, none passed")
    context.judge(file, not wrong, f"{wrong} of {wrong + passed} failed", passed=passed, failed=wrong, skipped=skipped)


def _watched(command: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines of a command; each is printed at once, so that the log of a killed case names its tests."""
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, lines


def sanitize(context: Context, op: str, tool: str) -> None:
    """The small case of one operation under compute-sanitizer's memcheck, racecheck or synccheck."""
    sanitizer = find_sanitizer()
    program = [sys.executable, "-m", "benchmarks.gpu.small", op, context.device]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), *program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:], flush=True)
    if done.returncode not in (0, SANITIZER_FOUND):
        raise NotRun(f"compute-sanitizer: exit code {done.returncode}: {_last_line(done.stdout + done.stderr)}")
    found = next((line for line in done.stdout.splitlines() if line.startswith("========= ") and "rror" in line), "")
    context.judge(f"{tool}, {op}", done.returncode == 0, found.strip("= ") or "it found an error", sanitizer=sanitizer)


def find_sanitizer() -> str:
    """In PATH, in the CUDA toolkit, in the wheel nvidia-cuda-sanitizer-api. Raises NotRun where there is none."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    places = [home / "bin", home / "compute-sanitizer"]
    # The wheel's file in bin is a script that may lack its executable bit.
    places += [place for folder in folders for place in sorted(folder.glob("*/compute-sanitizer"))]
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, places)])
    found = shutil.which("compute-sanitizer", path=search)
    if found is None:
        raise NotRun("compute-sanitizer is not installed; type: pip install nvidia-cuda-sanitizer-api")
    return found


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
