"""The three layouts in which DeepSpeed lays out weights, each as tensors by name and rank.

DIR/zero/NAME/fp32.pt, exp_avg.pt ...    the universal format: whole tensors in fp32
DIR/layer_LL-model_RR-model_states.pt    a pipeline's: one file a layer and tensor rank
DIR/mp_rank_RR_model_states.pt           without a pipeline: one file a tensor rank, under "module"
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megagpt.migration.checkpoint.pickles import load, tensors_in
from megagpt.parallel.compat import MOMENTS
from megagpt.utils import UserError

UNIVERSAL = "zero"
WEIGHT_FILE = "fp32.pt"
STEP_FILE = "step.pt"
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
ZERO_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")


Moments = dict[str, dict[str, Tensor]]  # by moment and name


@dataclass(frozen=True)
class Source:
    """Tensors by name, one for each tensor rank; a universal checkpoint has whole ones.

    They are mapped from their files, so that a name costs no memory until it is read. A universal
    checkpoint may have Adam's moments too.
    """

    directory: Path
    kind: str
    tensors: dict[str, list[Tensor]]
    moments: Moments = field(default_factory=dict)
    steps: int = 0  # updates that the moments have seen; 0: there are none


def open_source(directory: Path) -> Source:
    """Return the checkpoint in a directory, or in the one that its `latest` names.

    Raise UserError if there is none.
    """
    here = _newest(directory)
    if (here / UNIVERSAL).is_dir():
        return _universal(here)
    names = sorted(path.name for path in here.iterdir()) if here.is_dir() else []
    layers = [(name, match) for name in names if (match := LAYER.fullmatch(name))]
    if layers:
        return Source(here, "files of layers", _by_rank(here, layers))
    ranks = [(name, match) for name in names if (match := RANK.fullmatch(name))]
    if any(map(ZERO_3.fullmatch, names)):
        raise UserError(
            f"{here}: holds ZeRO 3's partitions, no whole tensors; make a universal checkpoint: "
            f"python -m deepspeed.checkpoint.ds_to_universal --input_folder {here} "
            f"--output_folder DIR"
        )
    if not ranks:
        raise UserError(
            f"{here}: no checkpoint (found no zero/, layer_*-model_states.pt or "
            f"mp_rank_*_model_states.pt); name the directory that holds one, such as "
            f"checkpoints/global_step1000"
        )
    return Source(here, "files of ranks", _by_rank(here, ranks))


def _newest(directory: Path) -> Path:
    """Return the directory that `latest` or `latest_universal` names, else the directory."""
    for name in ("latest_universal", "latest"):
        pointer = directory / name
        if pointer.is_file():
            named = directory / pointer.read_text(errors="replace").strip()
            if named.is_dir():
                return named
    return directory


def _universal(here: Path) -> Source:
    """Return a universal checkpoint; its moments only if every parameter has both, and a step."""
    directories = sorted(path.parent for path in (here / UNIVERSAL).glob(f"*/{WEIGHT_FILE}"))
    tensors = {path.name: [_param(path / WEIGHT_FILE)] for path in directories}
    files = [f"{moment}.pt" for moment in MOMENTS] + [STEP_FILE]
    having = [path for path in directories if all((path / file).is_file() for file in files)]
    if having and len(having) < len(directories):
        lacking = next(path for path in directories if path not in having)
        raise UserError(
            f"{lacking}: has not all of {', '.join(files)}, as others do; copy it again"
        )
    moments = {m: {path.name: _param(path / f"{m}.pt") for path in having} for m in MOMENTS}
    counts = {int(load(path / STEP_FILE)) for path in having}
    if len(counts) > 1:
        raise UserError(f"{here / UNIVERSAL}: {STEP_FILE} differs between tensors ({counts})")
    kind = "DeepSpeed's universal checkpoint"
    return Source(here, kind, tensors, moments if having else {}, counts.pop() if counts else 0)


def _param(path: Path) -> Tensor:
    content = load(path)
    tensor = content.get("param") if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor):
        raise UserError(f'{path}: no tensor in it (need one under "param")')
    return tensor


def _by_rank(directory: Path, files: list[tuple[str, re.Match[str]]]) -> dict[str, list[Tensor]]:
    """Return the tensors of files of layers or ranks; all ranks must have the same names."""
    found: dict[str, dict[int, Tensor]] = {}
    numbers = set()
    for name, match in files:
        rank = int(match[match.lastindex or 1])
        numbers.add(rank)
        content = load(directory / name)
        is_layer = match.re is LAYER
        if not is_layer:
            content = content.get("module", content) if isinstance(content, dict) else content
        for inner, tensor in tensors_in(content, match[1] if is_layer else "").items():
            found.setdefault(inner, {})[rank] = tensor
    ranks = range(max(numbers) + 1)
    for name, by_rank in found.items():
        if missing := [rank for rank in ranks if rank not in by_rank]:
            raise UserError(
                f"{directory}: {name}: tensor rank {missing[0]} of {len(ranks)} has none; copy all "
                f"files of the checkpoint"
            )
    return {name: [by_rank[rank] for rank in ranks] for name, by_rank in found.items()}
