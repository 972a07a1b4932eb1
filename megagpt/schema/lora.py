"""The `megagpt.training.lora` section: low-rank adapters on a base that stays as it is.

Which projections a model has, and which rows of our fused weights each of them is, follows from the
model alone; what trains, plans and exports adapters reads it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

from megagpt.schema.fields import PathText, Section, execution, identity, refuse
from megagpt.schema.model import ModelConfig, ModelSection
from megagpt.utils import did_you_mean

EVERY = "all"  # every projection by itself
# Of two names for the same rows: one adapter of the fused projection, or one for each part of it.
PARTS_OF = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}
PEFT_NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "up_proj": "up",
    "gate_proj": "gate",
    "down_proj": "down",
    "qkv_proj": "qkv",
    "c_attn": "qkv",
    "query_key_value": "qkv",
    "gate_up_proj": "gate_up",
    "c_fc": "up",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "all-linear": EVERY,
}


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): only they are trained."""

    rank: int = identity(..., "rank of the update of each projection", ge=1)
    alpha: float = identity(
        lambda keys: 2.0 * keys["rank"],
        "the update is multiplied by alpha / rank; default: twice the rank",
        gt=0,
    )
    dropout: float = identity(
        0.0, "probability of dropping an input of an adapter in training", ge=0, lt=1
    )
    targets: tuple[str, ...] = identity(
        (EVERY,),
        "projections of each block that get one: query, key, value or qkv (one for the three), "
        "output, up, gate or gate_up (one for both), down; all: each by itself",
        strict=False,
        min_length=1,
    )
    base: PathText | None = execution(
        None, "run directory with the weights that the adapters change", min_length=1
    )

    def projections(self, model: ModelSection) -> tuple[str, ...]:
        """Return the projections of a block that get an adapter, in the model's order."""
        wanted = _each(model) if EVERY in self.targets else self.targets
        return tuple(name for name in known_projections(model) if name in wanted)

    def check(self, model: ModelSection) -> None:
        """Raise a validation error on targets that are no projections of the model."""
        refuse(self._problems(model))

    def _problems(self, model: ModelSection) -> Iterator[tuple[str, str]]:
        known = (*known_projections(model), EVERY)
        for name in self.targets:
            if name not in known:
                meant = PEFT_NAMES.get(name)
                hint = f', did you mean "{meant}"?' if meant in known else did_you_mean(name, known)
                yield (
                    "training.lora.targets",
                    f'"{name}" names no projection of this model{hint}; it has '
                    f"{', '.join(known_projections(model))}",
                )
        if EVERY in self.targets and len(self.targets) > 1:
            yield "training.lora.targets", f'"{EVERY}" stands alone; remove the other names'
        for fused, parts in PARTS_OF.items():
            both = [name for name in self.targets if name in parts]
            if fused in self.targets and both:
                yield (
                    "training.lora.targets",
                    f'"{fused}" and "{both[0]}" have the same rows; keep one of them',
                )


class Projection(NamedTuple):
    """Some rows of one of our linear layers.

    ``layer`` is the layer's path in a block, ``part`` the index of the projection in each group of
    its rows, None for all rows. A group has ``widths`` rows of each part.
    """

    name: str
    layer: str
    inputs: int
    outputs: int
    part: int | None
    widths: tuple[int, ...]

    @property
    def is_row(self) -> bool:
        """Whether tensor parallelism splits its inputs, not its outputs."""
        return self.layer in ("attention.output", "mlp.down")


def projection(name: str, model: ModelConfig) -> Projection:
    """Return what a name stands for in a block of this model."""
    width = model.hidden_size
    keys = model.key_value_size
    if name == "output":
        return Projection(name, "attention.output", model.query_size, width, None, ())
    if name == "down":
        return Projection(name, "mlp.down", model.mlp_size, width, None, ())
    if name in ("qkv", *PARTS_OF["qkv"]):
        queries = model.query_size // model.num_kv_heads
        sizes = {
            "qkv": model.query_size + 2 * keys,
            "query": model.query_size,
            "key": keys,
            "value": keys,
        }
        widths = (queries, model.head_size, model.head_size)
        part = None if name == "qkv" else PARTS_OF["qkv"].index(name)
        return Projection(name, "attention.qkv", width, sizes[name], part, widths)
    whole = name == "gate_up" or not model.gated
    outputs = model.mlp_size * (2 if name == "gate_up" else 1)
    part = None if whole else PARTS_OF["gate_up"].index(name)
    return Projection(name, "mlp.up", width, outputs, part, (1, 1) if model.gated else ())


def known_projections(model: ModelSection) -> tuple[str, ...]:
    """Return every name that a target may have in this model."""
    up = ("gate_up", "gate", "up") if model.gated else ("up",)
    return ("qkv", "query", "key", "value", "output", *up, "down")


def shards(model: ModelConfig) -> int:
    """Return the largest number of tensor ranks, which every smaller one divides."""
    return gcd(model.num_kv_heads, model.mlp_size)


def _each(model: ModelSection) -> Sequence[str]:
    return [name for name in known_projections(model) if name not in PARTS_OF]
