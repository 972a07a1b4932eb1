"""Rotary positions (Su et al. 2021, arXiv 2104.09864), also for contexts longer than trained.

Each frequency is the same fp32 number as in transformers, whose models we continue: at position
100,000 one rounding of a frequency would already turn a pair of channels by 0.006.
"""

import math

import torch
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.schema.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)


def rotary_angles(
    config: ModelConfig, offset: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return fp32 cosines and sines (length, rotated_size / 2) of positions from ``offset`` on."""
    positions = torch.arange(offset, offset + length, device=device, dtype=torch.float32)
    # (length, rotated_size / 2)
    angles = torch.outer(positions, frequencies(config, offset + length, device))
    factor = getattr(config.rope_scaling, "attention_factor", 1.0)
    return angles.cos() * factor, angles.sin() * factor


def frequencies(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """Return the fp32 frequencies (rotated_size / 2,) of a text that is ``length`` tokens long.

    The length matters to dynamic and longrope only. Keys that are in a cache keep the frequencies
    of the length at which they were computed, as in transformers.
    """
    size = config.rotated_size
    base = config.rope_base
    scaling = config.rope_scaling
    if isinstance(scaling, DynamicScaling) and length > scaling.original_length:
        stretched = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        base = base * stretched ** (size / (size - 2))
    powers = base ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    match scaling:
        case LinearScaling():
            return 1.0 / powers / scaling.factor
        case YarnScaling():
            return _yarn(powers, scaling, base)
        case Llama3Scaling():
            return _llama3(1.0 / powers, scaling)
        case LongRopeScaling():
            long = length > scaling.original_length
            divisors = scaling.long_factor if long else scaling.short_factor
            return 1.0 / (torch.tensor(divisors, device=device) * powers)
    return 1.0 / powers


def _yarn(powers: Tensor, scaling: YarnScaling, base: float) -> Tensor:
    """Divide low frequencies by the factor and keep high ones, with a ramp between them."""
    size = 2 * powers.shape[0]

    def pair_of(turns: float) -> float:
        """Return the pair that turns so often within the original length."""
        wave = scaling.original_length / (turns * 2 * math.pi)
        return size * math.log(wave) / (2 * math.log(base))

    low = pair_of(scaling.beta_fast)
    high = pair_of(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    pairs = torch.arange(size // 2, device=powers.device, dtype=torch.float32)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide the frequencies of long waves by the factor, keep short ones, mix between."""
    waves = 2 * math.pi / plain
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    divided = torch.where(waves > scaling.original_length / low, plain / scaling.factor, plain)
    kept = (scaling.original_length / waves - low) / (high - low)
    between = (1 - kept) * divided / scaling.factor + kept * divided
    is_between = (waves >= scaling.original_length / high) & (
        waves <= scaling.original_length / low
    )
    return torch.where(is_between, between, divided)
