"""What a key of a published config.json says in our keys, and back.

A relation reads ``theirs``, the document, and returns the keys of ours that it decides; where it
leaves one out, ours has its default. It raises UnlikeOursError if theirs computes something that we
do not. ``write`` returns the keys of config.json for a model of ours; reading them gives the same
model back, unless theirs cannot be that model.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megagpt.config import ModelConfig
from megagpt.schema.errors import shown
from megagpt.schema.rope import DynamicScaling, LongRopeScaling

Document = Mapping[str, Any]


class UnlikeOursError(Exception):
    """Lines that each name a key of config.json, its value, and what ours has."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class KeyRelation(Protocol):
    """See the module. ``names`` are the keys of config.json that it reads."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def read(self, theirs: Document) -> dict[str, Any]: ...

    def write(self, model: ModelConfig) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Key:
    """A key that holds one of ours, or several that are equal.

    ``default`` is its value if it is absent; without one it must be present. A key with the default
    None, and one that is ``nullable``, may be null: ours then has its default. ``values`` are
    names of theirs with ours, if they differ; the first of equals is written.
    """

    theirs: str
    ours: str
    default: Any = ...
    also: tuple[str, ...] = ()
    nullable: bool = False
    values: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Document) -> dict[str, Any]:
        value = theirs.get(self.theirs, self.default)
        if value is ... or (value is None and self.default is not None and not self.nullable):
            raise UnlikeOursError([f"{self.theirs}: missing; download it again"])
        if value is None:
            return {}
        if self.values:
            if value not in list(self.values):  # an unhashable value is not in a list
                needed = " or ".join(map(json.dumps, self.values))
                raise UnlikeOursError([f"{self.theirs} {shown(value)}: megagpt needs {needed}"])
            value = self.values[value]
        return dict.fromkeys((self.ours, *self.also), value)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        value = getattr(model, self.ours)
        names = {ours: theirs for theirs, ours in reversed(list(self.values.items()))}
        return {self.theirs: names.get(value, next(iter(self.values), value))}


@dataclass(frozen=True)
class Fixed:
    """A key with the values under which theirs computes what our model does.

    The first value is written. ``default`` is transformers' value if the key is absent.
    """

    theirs: str
    values: tuple[Any, ...]
    default: Any

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Document) -> dict[str, Any]:
        value = theirs.get(self.theirs, self.default)
        if value not in self.values:
            needed = json.dumps(self.values[0])
            raise UnlikeOursError([f"{self.theirs} {shown(value)}: megagpt needs {needed}"])
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.values[0]}


_LAYER_TYPES = {"sliding_attention": "sliding", "full_attention": "full"}
_USUAL_WINDOW = 4096  # transformers' default in the families that have layer types


@dataclass(frozen=True)
class LayerWindows:
    """A sliding window in some layers: in those of ``layer_types``, or by the family's rule.

    ``usual`` returns the layer types of a config.json without them. With ``switch``, the window is
    off unless that key is true.
    """

    usual: Callable[[Document], list[str]]
    switch: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        switch = (self.switch, "max_window_layers") if self.switch else ()
        return ("sliding_window", "layer_types", *switch)

    def read(self, theirs: Document) -> dict[str, Any]:
        window = theirs.get("sliding_window", _USUAL_WINDOW)
        if self.switch and not theirs.get(self.switch):
            window = None
        types = theirs.get("layer_types")
        if types is None:
            types = self.usual(theirs) if window is not None else []
        layers = theirs.get("num_hidden_layers")
        if not isinstance(types, list) or not all(t in list(_LAYER_TYPES) for t in types):
            known = " or ".join(_LAYER_TYPES)
            raise UnlikeOursError([f"layer_types {shown(types)}: megagpt has layers of {known}"])
        if types and isinstance(layers, int) and len(types) != layers:
            raise UnlikeOursError(
                [f"layer_types: {len(types)} entries, num_hidden_layers is {layers}"]
            )
        pattern = _shortest_period([_LAYER_TYPES[kind] for kind in types])
        if "sliding" not in pattern:
            return {}
        if window is None:
            raise UnlikeOursError(["layer_types: sliding_attention without a sliding_window"])
        return {"sliding_window": window, "sliding_window_pattern": pattern}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        theirs_of = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
        pattern = model.sliding_window_pattern if model.sliding_window else ("full",)
        types = [theirs_of[pattern[i % len(pattern)]] for i in range(model.num_layers)]
        written = {"sliding_window": model.sliding_window, "layer_types": types}
        if self.switch:
            written |= {self.switch: model.sliding_window is not None}
        return written


def _shortest_period(pattern: list[str]) -> list[str]:
    """Return the shortest list that repeats to the pattern, whose last copy may be cut."""
    for length in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % length] for i in range(len(pattern))):
            return pattern[:length]
    return pattern


class ScoreScale:
    """Gemma 2's factor of the attention scores: one over the root of another number."""

    names = ("query_pre_attn_scalar",)

    def read(self, theirs: Document) -> dict[str, Any]:
        scalar = theirs.get("query_pre_attn_scalar", 256)
        if isinstance(scalar, bool) or not isinstance(scalar, int | float) or scalar <= 0:
            raise UnlikeOursError(
                [f"query_pre_attn_scalar {shown(scalar)}: expected a number above 0"]
            )
        return {} if scalar == theirs.get("head_dim", 256) else {"score_scale": scalar**-0.5}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scale = model.score_scale
        return {self.names[0]: model.head_size if scale is None else round(scale**-2)}


# Their names of the numbers of a scaling, with ours.
_NUMBERS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
_SECTIONS = ("rope_scaling", "rope_parameters")
_LENGTH = "original_max_position_embeddings"
_LONG = ("factor", _LENGTH)
_NUMBERS_OF: dict[str, tuple[str, ...]] = {
    "default": (_LENGTH,),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *_LONG,
        *("beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "llama3": (*_LONG, "low_freq_factor", "high_freq_factor"),
    "longrope": (*_LONG, "attention_factor", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class Rotary:
    """The base, the rotated share and the scaling of rotary positions.

    transformers 4 writes them as keys of config.json and its section `rope_scaling`, transformers 5
    all into `rope_parameters`. Both are read; the first form is written, which both versions read.
    ``fraction`` is the key of the rotated share, with its default; None: all is rotated.
    ``synonyms`` are other names of scaling types in the family.
    """

    base: str = "rope_theta"
    fraction: tuple[str, float] | None = None
    synonyms: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        fraction = (self.fraction[0],) if self.fraction else ()
        return (self.base, *fraction, *_SECTIONS, _LENGTH, "max_position_embeddings")

    def read(self, theirs: Document) -> dict[str, Any]:
        name, section = self._section(theirs)
        kind = section.pop("rope_type", None) or section.get("type") or "default"
        section.pop("type", None)
        kind = self.synonyms.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in list(_NUMBERS_OF):
            known = ", ".join(_NUMBERS_OF)
            raise UnlikeOursError([f"{name}.rope_type {shown(kind)}: megagpt has {known}"])
        base = section.pop("rope_theta", theirs.get(self.base, 10_000.0))
        fraction = self._fraction(name, section, theirs)
        unknown = [key for key in section if key not in _NUMBERS_OF[kind]]
        if unknown:
            raise UnlikeOursError(
                f"{name}.{key} {shown(section[key])}: megagpt does not support it with rope_type "
                f"{kind}"
                for key in unknown
            )
        found = {"rope_base": base, "rope_fraction": fraction}
        if kind == "default":
            return found
        return found | {"rope_scaling": self._scaling(kind, section, theirs)}

    def _section(self, theirs: Document) -> tuple[str, dict[str, Any]]:
        """Return the section that holds the scaling, and its name; None counts as absent."""
        given = {name: theirs[name] for name in _SECTIONS if theirs.get(name)}
        for name, section in given.items():
            if not isinstance(section, dict):
                raise UnlikeOursError([f"{name} {shown(section)}: megagpt does not support it"])
        if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
            raise UnlikeOursError(["rope_scaling: differs from rope_parameters; remove one"])
        for name, section in given.items():
            return name, {key: value for key, value in section.items() if value is not None}
        return _SECTIONS[0], {}

    def _fraction(self, name: str, section: dict[str, Any], theirs: Document) -> Any:
        given = section.pop("partial_rotary_factor", None)
        if self.fraction is None:
            if given not in (None, 1):
                raise UnlikeOursError(
                    [f"{name}.partial_rotary_factor {shown(given)}: megagpt needs 1.0"]
                )
            return 1.0
        return given if given is not None else theirs.get(*self.fraction)

    def _scaling(self, kind: str, section: dict[str, Any], theirs: Document) -> dict[str, Any]:
        """Return our rope_scaling; what is left out has the same default in theirs and ours."""
        length: Any = theirs.get("max_position_embeddings")
        if kind not in ("linear", "dynamic"):
            # Phi-3 has the key outside the section, where it counts before that inside.
            section.setdefault(_LENGTH, length)
            section[_LENGTH] = theirs.get(_LENGTH) or section[_LENGTH]
        if kind == "dynamic":
            section[_LENGTH] = length
        found: dict[str, Any] = {"type": kind} | {
            ours: section[name] for name, ours in _NUMBERS.items() if name in section
        }
        original = found.get("original_length")
        if kind == "longrope" and "factor" not in found and _are_numbers(length, original):
            found["factor"] = max(1.0, length / original)
        mscales: list[Any] = [section.get("mscale"), section.get("mscale_all_dim")]
        numbers = _are_numbers(*mscales, found.get("factor"))
        if numbers and "attention_factor" not in found:
            one, all_dims = (0.1 * scale * math.log(found["factor"]) + 1.0 for scale in mscales)
            found["attention_factor"] = one / all_dims
        return found

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scaling = model.rope_scaling
        length = model.sequence_length
        written: dict[str, Any] = {self.base: model.rope_base}
        if self.fraction:
            written[self.fraction[0]] = model.rope_fraction
        if isinstance(scaling, DynamicScaling):
            length = scaling.original_length
        if isinstance(scaling, LongRopeScaling):
            length = round(scaling.factor * scaling.original_length)
            written[_LENGTH] = scaling.original_length
        if scaling is not None:
            values = scaling.model_dump(mode="json")
            numbers = {name: values[ours] for name, ours in _NUMBERS.items() if ours in values}
            if isinstance(scaling, DynamicScaling):
                del numbers[_LENGTH]
            written["rope_scaling"] = {"rope_type": values["type"], **numbers}
        return written | {"max_position_embeddings": length}


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and value > 0 for value in values)
