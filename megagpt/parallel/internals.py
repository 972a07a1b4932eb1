"""The digests of the files that `compat.py` and `launch_command.py` rely on.

They are checked before any rank waits. A version number says what was installed, not what runs: a
vendored, patched or half-upgraded package keeps it. Before a digest is added, read the new file
against `compat.py`; `python -m megagpt.parallel.internals` prints the digests here.
"""

import hashlib
import os
from collections.abc import Collection, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from megagpt.config import RunConfig
from megagpt.utils import UserError

ALLOW_VARIABLE = "MEGAGPT_ALLOW_UNKNOWN"
# The first version is that of requirements.txt.
TESTED = {
    "deepspeed": ("0.19.8",),
    "torch": ("2.13.0", "2.11.0"),
}

# Part of the code that relies on the file -> file below site-packages -> first digits of the
# SHA-256 of each tested version.
DIGESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "engine": {
        "deepspeed/comm/torch.py": ("e1ed1e77862a",),
        "deepspeed/ops/__init__.py": ("1009dc476505",),
        "deepspeed/ops/adam/cpu_adam.py": ("634fc0da21d4",),
        "deepspeed/ops/adam/fused_adam.py": ("e7f24193f52f",),
        "deepspeed/ops/csrc/includes/cpu_adam.h": ("d269bd3a7adc",),
        "deepspeed/ops/op_builder/async_io.py": ("afc8ea38407d",),
        "deepspeed/ops/op_builder/builder.py": ("737f9a00e86a",),
        "deepspeed/ops/op_builder/pin_memory_load.py": ("4d3a06c74dbc",),
        "deepspeed/runtime/base_optimizer.py": ("b42fb2d11c61",),
        "deepspeed/runtime/compiler.py": ("519b1947e9fa",),
        "deepspeed/runtime/engine.py": ("e35eaa313874",),
        "deepspeed/runtime/fp16/loss_scaler.py": ("91a5886bcc79",),
        "deepspeed/runtime/utils.py": ("f50261801c34",),
        "deepspeed/runtime/zero/muon/original_muon.py": ("46541d5f682d",),
        "deepspeed/runtime/zero/parameter_offload.py": ("7fec7e04a5d0",),
        "deepspeed/runtime/zero/partition_parameters.py": ("c7866c302ef1",),
        "deepspeed/runtime/zero/partitioned_param_coordinator.py": ("a43fd966c88d",),
        "deepspeed/runtime/zero/stage3.py": ("4ff3fdb4cbab",),
        "deepspeed/runtime/zero/stage_1_and_2.py": ("752235af95d0",),
        "deepspeed/runtime/zero/utils.py": ("3211114393b1",),
        "deepspeed/utils/tensor_fragment.py": ("fdf7386ff95f",),
        "torch/distributed/distributed_c10d.py": ("cb2926a8eeaa", "796ffcd96647"),
    },
    "pipeline": {
        "torch/distributed/pipelining/schedules.py": ("98d4784a7d2c", "769f172de6f4"),
        "torch/distributed/pipelining/stage.py": ("9785de5f6082", "07e5408d99d6"),
    },
    "nvme": {
        "deepspeed/runtime/swap_tensor/optimizer_utils.py": ("08a9817649bc",),
        "deepspeed/runtime/swap_tensor/partitioned_optimizer_swapper.py": ("95352bf4a1e9",),
        "deepspeed/runtime/swap_tensor/partitioned_param_swapper.py": ("51469488efe8",),
        "deepspeed/runtime/swap_tensor/pipelined_optimizer_swapper.py": ("762aa49995f1",),
        "deepspeed/runtime/swap_tensor/utils.py": ("901afbc8ac93",),
    },
    "launcher": {
        "deepspeed/launcher/constants.py": ("e5fd93f8865a",),
        "deepspeed/launcher/launch.py": ("ea1e6888ce11",),
        "deepspeed/launcher/multinode_runner.py": ("888fe4888604",),
        "deepspeed/launcher/runner.py": ("956d554ea5c9",),
    },
}


def parts_used(config: RunConfig | None, launcher: str) -> list[str]:
    """Return the keys of `DIGESTS` that a run uses.

    `launcher` is that of `Launch`; `config` None stands for any configuration without a pipeline
    and without NVMe offload.
    """
    parts = ["engine"]
    if config is not None and config.megagpt.parallel.pipeline > 1:
        parts.append("pipeline")
    if config is not None and "nvme" in (
        config.zero_optimization.optimizer_device,
        config.zero_optimization.parameter_device,
    ):
        parts.append("nvme")
    if launcher == "deepspeed":
        parts.append("launcher")
    return parts


def require_known_internals(parts: Collection[str]) -> str | None:
    """Raise UserError naming each absent package, or each unknown file of these parts.

    With MEGAGPT_ALLOW_UNKNOWN=1, return the message instead. Return None if all files are known.
    """
    allowed = _unknown_is_allowed()
    unknown = [
        file
        for part in parts
        for file, digest in digests(part)
        if digest not in DIGESTS[part][file]
    ]
    if not unknown:
        return None
    packages = sorted({file.split("/")[0] for file in unknown})
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; {_remedy(package)}")
    installed = ", ".join(f"{package} {_version(package)}" for package in packages)
    found = (
        f"{installed}: megagpt relies on internals of these files, which differ from all tested "
        f"versions: " + ", ".join(unknown)
    )
    if allowed:
        return f"{found}; the run continues at your own risk ({ALLOW_VARIABLE}=1)"
    remedy = " && ".join(map(_remedy, packages))
    raise UserError(f"{found}; {remedy}; or continue at your own risk: {ALLOW_VARIABLE}=1")


def _unknown_is_allowed() -> bool:
    value = os.environ.get(ALLOW_VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise UserError(f"{ALLOW_VARIABLE}={value}: unknown value; set it to 0 or 1, or unset it")
    return value == "1"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a vendored copy
        return "of unknown version"


def _remedy(package: str) -> str:
    """Return the command that installs a tested version, or reinstalls a changed one."""
    installed = _version(package).partition("+")[0]
    if installed in TESTED[package]:
        return f"pip install --force-reinstall --no-deps {package}=={installed}"
    return f"pip install {package}=={TESTED[package][0]}"


def digests(part: str) -> Iterator[tuple[str, str]]:
    """Yield each file of a part with its digest here, "" if the file is missing.

    It imports none of them.
    """
    for file in DIGESTS[part]:
        package, _, path = file.partition("/")
        spec = find_spec(package)
        found = Path(spec.origin).parent / path if spec is not None and spec.origin else Path(path)
        yield file, hashlib.sha256(found.read_bytes()).hexdigest()[:12] if found.is_file() else ""


def main() -> None:
    """Print the digest of each file here, and whether it is a known one."""
    for part, known in DIGESTS.items():
        for file, digest in digests(part):
            print(f'{part:8} "{file}": "{digest}"{"" if digest in known[file] else "  # unknown"}')


if __name__ == "__main__":
    main()
