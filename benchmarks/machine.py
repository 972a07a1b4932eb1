"""What a measurement says about where and when it was made, and how its table is written."""

import csv
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def provenance(module: str) -> str:
    """One line: date, machine, versions, command."""
    import deepspeed
    import torch

    arguments = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", module, *arguments])
    today = datetime.datetime.now(datetime.UTC).date()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    return f"{today}; {processor()}; {versions}; `{command}`"


def write_table(name: str, module: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as NAME.csv with the provenance as a comment above; print them as Markdown."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    columns = list(rows[0])
    with path.open("w", newline="") as file:
        file.write(f"# {provenance(module)}\n")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(columns, rows))
    return path


def markdown(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
