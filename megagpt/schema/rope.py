"""The `megagpt.model.rope_scaling` section: rotary positions for contexts longer than trained.

Numbers have the names of transformers' `rope_scaling`, except `original_length`, which is its
`original_max_position_embeddings`. megagpt/rotary.py computes the frequencies.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagpt.schema.fields import Section, identity, refuse

Factors = tuple[Annotated[float, Field(gt=0)], ...]


def _factor() -> Any:
    return identity(..., "how many times longer the context becomes", ge=1)


def _original_length() -> Any:
    return identity(..., "tokens of the context before it was made longer", ge=1)


class LinearScaling(Section):
    """All frequencies divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""

    type: Literal["linear"] = identity(..., "how frequencies change")
    factor: float = _factor()


class DynamicScaling(Section):
    """A larger base as soon as a text is longer than the original length (NTK-aware)."""

    type: Literal["dynamic"] = identity(..., "how frequencies change")
    factor: float = _factor()
    original_length: int = _original_length()


class YarnScaling(Section):
    """Low frequencies divided, high ones kept (Peng et al. 2023, arXiv 2309.00071)."""

    type: Literal["yarn"] = identity(..., "how frequencies change")
    factor: float = _factor()
    original_length: int = _original_length()
    beta_fast: float = identity(
        32.0, "turns within the original length from which a frequency is kept", gt=0
    )
    beta_slow: float = identity(
        1.0, "turns within the original length up to which a frequency is divided", gt=0
    )
    truncate: bool = identity(True, "round the range between the two to whole channels")
    attention_factor: float = identity(
        lambda keys: 0.1 * math.log(keys["factor"]) + 1.0,
        "factor of cosines and sines; default: 0.1 ln(factor) + 1",
        gt=0,
    )


class Llama3Scaling(Section):
    """Long waves divided by the factor, short ones kept, those between interpolated (Llama 3.1)."""

    type: Literal["llama3"] = identity(..., "how frequencies change")
    factor: float = _factor()
    original_length: int = _original_length()
    low_freq_factor: float = identity(
        1.0, "waves longer than original_length / this are divided", gt=0
    )
    high_freq_factor: float = identity(
        4.0, "waves shorter than original_length / this are kept", gt=0
    )

    @model_validator(mode="after")
    def _check_range(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            message = (
                f"must be greater than low_freq_factor {self.low_freq_factor:g}, got "
                f"{self.high_freq_factor:g}"
            )
            refuse([("high_freq_factor", message)])
        return self


class LongRopeScaling(Section):
    """Each frequency divided by its own factor (Ding et al. 2024, arXiv 2402.13753; Phi-3)."""

    type: Literal["longrope"] = identity(..., "how frequencies change")
    factor: float = _factor()
    original_length: int = _original_length()
    short_factor: Factors = identity(
        ..., "divisor of each frequency in texts up to the original length", strict=False
    )
    long_factor: Factors = identity(..., "divisor of each frequency in longer texts", strict=False)
    attention_factor: float = identity(
        lambda keys: _longrope_attention(keys["factor"], keys["original_length"]),
        "factor of cosines and sines; default: sqrt(1 + ln(factor) / ln(original_length))",
        gt=0,
    )


def _longrope_attention(factor: float, original_length: int) -> float:
    if factor == 1 or original_length == 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_length))


RopeScaling = Annotated[
    LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling | LongRopeScaling,
    Field(discriminator="type"),
]
