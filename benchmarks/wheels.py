"""Collect the wheels that a bare GPU image lacks, so that training starts there without a network.

    python -m benchmarks.wheels DIR

The image has Python, torch, triton and numpy. The wheels have the versions that are installed here,
for the Python and machine of the image. DeepSpeed's is built without ops. The last line printed is
the command to type on the image.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megagpt.common.arguments import command_parser, user_path
from megagpt.utils import UserError, run_command

# What megagpt and kernels import in a run.
TRAINING = ("deepspeed", "pydantic", "rich", "safetensors", "tiktoken")
PROVIDED = frozenset({"torch", "triton", "numpy"})  # by the image, with what these require
LIMIT_MB = 15.0
# Wheels of newer Linux (glibc 2.28) down to the oldest; pip itself adds the older names of 2.17 and
# below.
GLIBC = ("2_34", "2_31", "2_28", "2_24", "2_17")


@dataclass(frozen=True)
class Target:
    """The image: its Python as `3.12`, its machine as `x86_64`.

    Linux with glibc 2.34 or newer, CPython.
    """

    python: str = "3.12"
    machine: str = "x86_64"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment in which requirement markers are evaluated."""
        linux = {"os_name": "posix", "platform_system": "Linux", "sys_platform": "linux"}
        python = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        here = {name: str(value) for name, value in default_environment().items()}
        return here | linux | python | {"platform_machine": self.machine}

    @property
    def options(self) -> list[str]:
        """Return pip's options that select wheels for the image."""
        platforms = [f"--platform=manylinux_{glibc}_{self.machine}" for glibc in GLIBC]
        platforms.append(f"--platform=manylinux2014_{self.machine}")
        return [
            f"--python-version={self.python}",
            "--implementation=cp",
            "--only-binary=:all:",
            *platforms,
        ]


def main() -> None:
    """Fill the directory; print its files and the command that installs them."""
    arguments = parse_arguments()
    roots = [*TRAINING, *arguments.also]
    wheels = collect(arguments.directory, roots, Target(arguments.python, arguments.machine))
    for wheel in sorted(wheels, key=size_mb, reverse=True):
        print(f"{size_mb(wheel):6.2f} MB  {wheel.name}")
    print(
        f"{sum(map(size_mb, wheels)):6.2f} MB  in {len(wheels)} wheels (limit {LIMIT_MB:g} MB); "
        f"on the image type:"
    )
    pins = " ".join(f"{name}=={version(name)}" for name in roots)
    print(f"pip install --no-index --find-links {arguments.directory} {pins}")


def collect(directory: Path, roots: Sequence[str], target: Target) -> list[Path]:
    """Put the wheels of the roots and of all they require into a directory; return their paths.

    Raises UserError if pip fails, if the wheels are larger than the limit (the directory is then
    unchanged), or if the directory cannot be written.
    """
    pins = [f"{name}=={version(name)}" for name in closure(roots, target.environment)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".wheels_") as staging:
            built = [pin for pin in pins if pin.startswith("deepspeed==")]
            build_without_ops(built, Path(staging))
            download([pin for pin in pins if pin not in built], Path(staging), target)
            wheels = sorted(Path(staging).glob("*.whl"))
            require_small(wheels)
            return [wheel.rename(directory / wheel.name) for wheel in wheels]
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written ({error.strerror}); name another directory"
        ) from error


def closure(
    roots: Iterable[str],
    environment: dict[str, str],
    *,
    provided: Collection[str] = PROVIDED,
    requires: Callable[[str], Sequence[str]] | None = None,
) -> list[str]:
    """Return the sorted names of the roots and of all that they require, without what is provided.

    ``requires`` returns a distribution's requirements (`Requires-Dist`); None reads them from what
    is installed here.
    """
    requires = requires or required_here
    waiting = [Requirement(root) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in provided or (name, extras) in seen:
            continue
        seen.add((name, extras))
        for further in map(Requirement, requires(name)):
            marker = further.marker
            if marker is None or any(
                marker.evaluate({**environment, "extra": extra}) for extra in {"", *extras}
            ):
                waiting.append(further)
    return sorted({name for name, _ in seen})


def required_here(name: str) -> list[str]:
    """Return the requirements of an installed distribution."""
    version(name)
    return metadata.requires(name) or []


def version(name: str) -> str:
    """Return the version that is installed here, which the tests ran with.

    Raises UserError if there is none.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        message = (
            f"{name}: not installed here, so no version of it has been tested; type: pip "
            f"install {name}"
        )
        raise UserError(message) from None


def build_without_ops(pins: Sequence[str], directory: Path) -> None:
    """Build wheels for any Python and machine from source.

    Ops are compiled on the machine that runs them. pip's cache is not used: it may hold a wheel
    that was built with ops.
    """
    without = {
        name: value for name, value in os.environ.items() if not name.startswith("DS_BUILD_")
    }
    for pin in pins:
        pip(
            "wheel",
            "--no-deps",
            "--no-cache-dir",
            f"--wheel-dir={directory}",
            pin,
            environment=without | {"DS_BUILD_OPS": "0"},
        )
    if bound := [
        wheel.name for wheel in directory.glob("*.whl") if not wheel.name.endswith("-none-any.whl")
    ]:
        raise UserError(
            f"{bound[0]}: built for this machine, expected py3-none-any; report the output of "
            f"{pins[0]}'s build"
        )


def download(pins: Sequence[str], directory: Path, target: Target) -> None:
    """Download wheels for the target."""
    pip(
        "download",
        "--no-deps",
        f"--dest={directory}",
        *target.options,
        *pins,
        environment=dict(os.environ),
    )


def pip(*arguments: str, environment: dict[str, str]) -> None:
    """Run pip. Raises UserError with its last errors if it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = (
            re.findall(r"^ERROR: (.*)$", done.stderr, re.MULTILINE)
            or done.stderr.strip().splitlines()[-1:]
        )
        said = "; ".join(errors[-2:]) or f"exit code {done.returncode}"
        raise UserError(
            f"pip {arguments[0]}: {said}; check the network, --python and --machine, then run "
            f"the same command again"
        )


def require_small(wheels: Sequence[Path]) -> None:
    """Raise UserError if the wheels together are larger than the limit."""
    total = sum(map(size_mb, wheels))
    if total > LIMIT_MB:
        largest = ", ".join(
            f"{wheel.name} {size_mb(wheel):.1f} MB" for wheel in sorted(wheels, key=size_mb)[:-4:-1]
        )
        raise UserError(
            f"{total:.1f} MB of wheels, limit {LIMIT_MB:g} MB (largest: {largest}); ask for less "
            f"with --also"
        )


def size_mb(path: Path) -> float:
    """Return the size of a file in millions of bytes."""
    return path.stat().st_size / 1e6


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        prog="python -m benchmarks.wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", type=user_path, metavar="DIR", help="where the wheels go; created if missing"
    )
    parser.add_argument(
        "--python", type=python_version, default="3.12", metavar="X.Y", help="of the image [3.12]"
    )
    parser.add_argument(
        "--machine", default="x86_64", choices=["x86_64", "aarch64"], help="of the image [x86_64]"
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME",
        help="more packages: pytest pytest-xdist hypothesis for the tests",
    )
    return parser.parse_args()


def python_version(text: str) -> str:
    """Return the text if it is a Python version from 3.11 up; a type for argparse."""
    if not re.fullmatch(r"3\.\d+", text) or int(text.partition(".")[2]) < 11:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a Python version from 3.11 up, such as 3.12"
        )
    return text


if __name__ == "__main__":
    sys.exit(run_command(main))
