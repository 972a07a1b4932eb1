"""Counter-based random numbers: dropout masks that any kernel, rank or mesh can recompute.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain
torch. It returns the same words as ``triton.language.philox``, so that a Triton kernel and its twin
drop the same elements.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, rounds: int = 10) -> Tensor:
    """Return four 32-bit words for each counter ``(c0, c1, c2, 0)`` under a 64-bit key.

    Arguments are int64 and broadcast together. Returns int64 of their common shape + (4,), values
    in [0, 2^32).
    """
    seed, c0, c1, c2 = torch.broadcast_tensors(seed, c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # int64 products overflow, but their 64 bits are right: the mask after the shift recovers
        # the unsigned high word.
        from_c0, from_c2 = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((from_c2 >> 32) & _WORD) ^ c1 ^ k0
        c1 = from_c2 & _WORD
        c2 = ((from_c0 >> 32) & _WORD) ^ c3 ^ k1
        c3 = from_c0 & _WORD
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def keep_mask(probability: float, seed: Tensor, plane: Tensor, row: Tensor, columns: int) -> Tensor:
    """Return True where an element survives dropout with this probability of being dropped.

    ``seed``, ``plane`` and ``row`` (int64) broadcast to the shape of everything but the last
    dimension, which has ``columns`` elements. Column j takes word j % 4 of counter (j // 4, row,
    plane), so that one Philox call serves four neighbours.
    """
    groups = torch.arange((columns + 3) // 4, device=seed.device)
    words = philox(seed.unsqueeze(-1), groups, row.unsqueeze(-1), plane.unsqueeze(-1))
    return words.flatten(-2)[..., :columns] >= int(probability * 2**32)


def fold_seed(seed: Tensor | int, *values: Tensor | int) -> Tensor:
    """Return a new 64-bit seed from a seed and integers (step, sample, layer ...).

    SplitMix64's finaliser; constants from Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014. Values broadcast.
    """
    state = torch.as_tensor(seed, dtype=torch.int64)
    for value in values:
        state = state + torch.as_tensor(value, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15) + 1
        state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shift_right(state, 31)
    return state


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift unsigned: torch's shift keeps the sign of an integer."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
