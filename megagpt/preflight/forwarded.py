"""`.deepspeed_env`: the variables that DeepSpeed's launcher sets for the ranks of other hosts.

The launcher reads it from the home directory and from the working directory (DS_ENV_FILE sets
another name). It stops at any line without `=`, also at a comment or a blank line. It puts every
value on a command line that it logs and that all users of all hosts can see.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megagpt.common.text import names_secret

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def files() -> list[Path]:
    """Return the files that the launcher would read here, in its order."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [path for directory in (Path.home(), Path()) if (path := directory / name).is_file()]


def read() -> tuple[dict[str, str], list[str]]:
    """Return the variables of all files, without secrets, and a line for each problem."""
    variables: dict[str, str] = {}
    problems: list[str] = []
    for path in files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            name, equals, value = line.partition("=")
            if not equals or NAME.fullmatch(name.strip()) is None:
                problems.append(
                    f"{path}: line {number}: the launcher accepts only NAME=VALUE, no comments or "
                    f"blank lines"
                )
            elif names_secret(name):
                problems.append(
                    f"{path}: line {number}: {name.strip()} would appear on a command line that "
                    "all users can read; set it on each host instead (docs/clusters.md)"
                )
            else:
                variables[name.strip()] = value.strip()
    return variables, problems
