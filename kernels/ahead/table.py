"""The table of compiled kernels: one CSV row for each kernel, GPU and Triton."""

import csv
from pathlib import Path

KEY = ("triton", "gpu", "kernel")  # such as 3.7.1, sm_90, attention_forward_64_bf16

Table = dict[tuple[str, str, str], dict[str, int]]  # (triton, gpu, kernel) -> figure -> value


def read_table(path: Path) -> Table:
    """Return the rows of a table; none if there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (row["triton"], row["gpu"], row["kernel"]): {
                name: int(value) for name, value in row.items() if name not in KEY
            }
            for row in csv.DictReader(file)
        }


def write_table(path: Path, table: Table) -> None:
    """Write the rows in the order of their keys, with the figures in the order of the first row."""
    figures = list(next(iter(table.values()))) if table else []
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, *figures])
        for key in sorted(table):
            writer.writerow([*key, *(table[key][name] for name in figures)])
