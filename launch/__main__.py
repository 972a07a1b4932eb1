"""The console script: `megagpt COMMAND ...` does what `python launch/COMMAND.py ...` does."""

import ast
import re
import runpy
import sys
from pathlib import Path

from megagpt.common.arguments import version_text
from megagpt.utils import ExitCode, did_you_mean

SCRIPTS = Path(__file__).resolve().parent
EXAMPLE = re.compile(r"(?::|,[^,:]*:)?\s+(?:python|deepspeed) ")


def commands() -> dict[str, str]:
    """Return what each command does: the docstring of its script, up to its example."""
    found = {}
    for path in sorted(SCRIPTS.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = EXAMPLE.split(text, maxsplit=1)[0].rstrip(".").replace("\n", " ")
    return found


def usage() -> str:
    """Return the usage text with the list of commands."""
    lines = [f"  {name:<14} {text}" for name, text in commands().items()]
    return "\n".join(
        [
            "usage: megagpt COMMAND [options]; megagpt COMMAND --help; megagpt --version",
            "",
            *lines,
            "",
            f"Several ranks: deepspeed {SCRIPTS / 'train.py'}",
        ]
    )


def main() -> int:
    """Run the command that the first word names, as a script of its own."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return ExitCode.DONE if words else ExitCode.BAD_INPUT
    if words[0] == "--version":
        print(version_text())
        return ExitCode.DONE
    name = words[0].replace("-", "_")
    if name not in commands():
        print(
            f"megagpt {words[0]}: unknown command{did_you_mean(name, commands())}; "
            f"megagpt --help lists all",
            file=sys.stderr,
        )
        return ExitCode.BAD_INPUT
    script = SCRIPTS / f"{name}.py"
    sys.argv = [str(script), *words[1:]]
    runpy.run_path(str(script), run_name="__main__")
    return ExitCode.DONE  # a command that returns has ended well; others raise SystemExit


if __name__ == "__main__":
    raise SystemExit(main())
