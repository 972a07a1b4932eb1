"""The files that `compat.py` stands on, by their digest: what a run checks at its start, before any rank waits.

`launch_command.py` stands on the launcher's: it reads command lines that they write.

A version number says what was installed, not what runs: a vendored, patched or half-upgraded package keeps it. Once
compat.py has been compared with other versions, `python -m megagpt.internals` prints the new table.
"""

import hashlib
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from megagpt.utils import UserError

TESTED = {"deepspeed": "0.19.8", "torch": "2.13.0"}  # as in requirements.txt

# file below site-packages -> first digits of its SHA-256
DIGESTS: dict[str, str] = {
    "deepspeed/comm/torch.py": "e1ed1e77862a",
    "deepspeed/launcher/constants.py": "e5fd93f8865a",
    "deepspeed/launcher/launch.py": "ea1e6888ce11",
    "deepspeed/launcher/multinode_runner.py": "888fe4888604",
    "deepspeed/launcher/runner.py": "956d554ea5c9",
    "deepspeed/ops/__init__.py": "1009dc476505",
    "deepspeed/ops/adam/cpu_adam.py": "634fc0da21d4",
    "deepspeed/ops/adam/fused_adam.py": "e7f24193f52f",
    "deepspeed/ops/csrc/includes/cpu_adam.h": "d269bd3a7adc",
    "deepspeed/runtime/base_optimizer.py": "b42fb2d11c61",
    "deepspeed/runtime/engine.py": "e35eaa313874",
    "deepspeed/runtime/fp16/loss_scaler.py": "91a5886bcc79",
    "deepspeed/runtime/swap_tensor/optimizer_utils.py": "08a9817649bc",
    "deepspeed/runtime/swap_tensor/partitioned_optimizer_swapper.py": "95352bf4a1e9",
    "deepspeed/runtime/swap_tensor/partitioned_param_swapper.py": "51469488efe8",
    "deepspeed/runtime/swap_tensor/pipelined_optimizer_swapper.py": "762aa49995f1",
    "deepspeed/runtime/swap_tensor/utils.py": "901afbc8ac93",
    "deepspeed/runtime/utils.py": "f50261801c34",
    "deepspeed/runtime/zero/parameter_offload.py": "7fec7e04a5d0",
    "deepspeed/runtime/zero/partition_parameters.py": "c7866c302ef1",
    "deepspeed/runtime/zero/partitioned_param_coordinator.py": "a43fd966c88d",
    "deepspeed/runtime/zero/stage3.py": "4ff3fdb4cbab",
    "deepspeed/runtime/zero/stage_1_and_2.py": "752235af95d0",
    "deepspeed/runtime/zero/utils.py": "3211114393b1",
    "deepspeed/utils/tensor_fragment.py": "fdf7386ff95f",
    "torch/distributed/distributed_c10d.py": "cb2926a8eeaa",
    "torch/distributed/pipelining/schedules.py": "98d4784a7d2c",
    "torch/distributed/pipelining/stage.py": "9785de5f6082",
}


def check() -> None:
    """Raise UserError where a file is not the one that compat.py was written against, naming each."""
    changed = [file for file, digest in digests() if digest != DIGESTS[file]]
    if not changed:
        return
    packages = sorted({file.split("/")[0] for file in changed})
    installed = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    tested = " ".join(f"{package}=={TESTED[package]}" for package in packages)
    raise UserError(
        f"{installed}: megagpt relies on internals that are not as tested here: {', '.join(changed)}; "
        f"pip install --force-reinstall --no-deps {tested}"
    )


def digests() -> Iterator[tuple[str, str]]:
    """Each file with the digest it has here; one that is gone has an empty one. Imports nothing."""
    for file in DIGESTS:
        package, _, path = file.partition("/")
        spec = find_spec(package)
        found = Path(spec.origin).parent / path if spec is not None and spec.origin else Path(path)
        yield file, hashlib.sha256(found.read_bytes()).hexdigest()[:12] if found.is_file() else ""


if __name__ == "__main__":
    for name, digest in digests():
        print(f'    "{name}": "{digest}",')
