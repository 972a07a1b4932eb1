"""Where and when a measurement was made, and how its table is written."""

import csv
import datetime
import importlib.metadata
import importlib.util
import io
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Return the processor's name and the number of cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def provenance(module: str) -> str:
    """Return one line: date, machine, versions, command.

    It names a GPU if there is one, and DeepSpeed if it is installed.
    """
    import torch

    from kernels.bench.machine import device_name, versions

    arguments = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", module, *arguments])
    today = datetime.datetime.now(datetime.UTC).date()
    machine = [processor(), *([device_name()] if torch.cuda.is_available() else [])]
    found = [f"Python {platform.python_version()}", versions()]
    if importlib.util.find_spec("deepspeed") is not None:
        found.append(f"deepspeed {importlib.metadata.version('deepspeed')}")
    return f"{today}; {', '.join(machine)}; {', '.join(found)}; `{command}`"


def write_table(name: str, module: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as NAME.csv, below a comment with the provenance; print them as Markdown."""
    columns = list(rows[0]) if rows else []
    text = io.StringIO()
    text.write(f"# {provenance(module)}\n")
    writer = csv.DictWriter(text, columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        file.write(text.getvalue())
    print(markdown(columns, rows))
    return path


def markdown(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    lines = [
        columns,
        ["---"] * len(columns),
        *([str(row[column]) for column in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
