"""The generator behind dropout: published answers, an independent big-integer twin, and the
statistics of its masks.
"""

import random

import pytest
import torch

from kernels.philox import fold_seed, keep_mask, philox

# Random123's tests/kat_vectors (Salmon et al. 2011): philox4x32, 10 rounds; counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
MASK_32, MASK_64 = 2**32 - 1, 2**64 - 1


def big_integer_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 in Python's own integers, as the paper's figure 2 draws a round."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK_32, (k1 + 0xBB67AE85) & MASK_32
    return c0, c1, c2, c3


def big_integer_fold(seed: int, *values: int) -> int:
    """SplitMix64's finaliser over seed + value x golden gamma + 1, in Python's own integers."""
    for value in values:
        seed = (seed + value * 0x9E3779B97F4A7C15 + 1) & MASK_64
        seed = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & MASK_64
        seed = ((seed ^ seed >> 27) * 0x94D049BB133111EB) & MASK_64
        seed ^= seed >> 31
    return seed


def as_signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_big_integer_twin_gives_the_published_answers(counter, key, words):
    assert big_integer_philox(counter, key) == words


def test_philox_equals_its_big_integer_twin():
    drawn = random.Random(0)
    cases = [(0, 0, 0, 0), (MASK_64, MASK_32, MASK_32, MASK_32)]
    cases += [
        (drawn.getrandbits(64), *(drawn.getrandbits(32) for _ in range(3))) for _ in range(200)
    ]
    columns = zip(*([as_signed(seed), *counter] for seed, *counter in cases), strict=True)
    words = philox(*(torch.tensor(column) for column in columns))
    expected = [
        big_integer_philox((*counter, 0), (seed & MASK_32, seed >> 32)) for seed, *counter in cases
    ]
    assert words.tolist() == [list(four) for four in expected]


def test_philox_broadcasts_its_arguments():
    seed, counter, zero = torch.tensor([[1], [2]]), torch.tensor([[3, 4, 5]]), torch.tensor(0)
    words = philox(seed, counter, zero, zero)
    assert words.shape == (2, 3, 4)
    assert torch.equal(words[1, 2], philox(torch.tensor(2), torch.tensor(5), zero, zero))


def test_fold_seed_equals_its_big_integer_twin():
    drawn = random.Random(1)
    for _ in range(200):
        seed, first, second = drawn.getrandbits(64), drawn.getrandbits(40), drawn.getrandbits(20)
        folded = fold_seed(as_signed(seed), first, second)
        assert folded.item() == as_signed(big_integer_fold(seed, first, second))


def test_fold_seed_tells_step_sample_and_layer_apart():
    step, sample, layer = (
        torch.arange(20)[:, None, None],
        torch.arange(20)[:, None],
        torch.arange(20),
    )
    seeds = fold_seed(1234, step, sample, layer)
    assert seeds.shape == (20, 20, 20)
    assert len(seeds.unique()) == 20**3


def test_column_j_of_a_mask_is_word_j_mod_4_of_counter_j_div_4():
    seed, plane, row = torch.tensor(77), torch.tensor(5), torch.tensor(9)
    kept = keep_mask(0.25, seed, plane, row, columns=11)
    words = [
        big_integer_philox((column // 4, 9, 5, 0), (77, 0))[column % 4] for column in range(11)
    ]
    assert kept.tolist() == [word >= 2**30 for word in words]


def test_a_longer_mask_begins_with_the_shorter_one():
    seed, zero = torch.tensor(3), torch.tensor(0)
    assert torch.equal(
        keep_mask(0.5, seed, zero, zero, 37), keep_mask(0.5, seed, zero, zero, 64)[:37]
    )


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_masks_drop_the_given_share_in_every_row_and_column(probability):
    rows, columns = 500, 400
    dropped = ~keep_mask(
        probability, torch.tensor(11), torch.tensor(0), torch.arange(rows), columns
    )
    for dim, count in ((0, rows), (1, columns)):
        share = dropped.double().mean(dim=dim)
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert (
            share - probability
        ).abs().max() < 5 * deviation  # under 0.1 % of all seeds exceed it
    deviation = (probability * (1 - probability) / dropped.numel()) ** 0.5
    assert abs(dropped.double().mean() - probability) < 4 * deviation


def test_masks_of_other_seeds_planes_and_rows_are_independent():
    index = torch.arange(3)
    masks = keep_mask(0.5, index[:, None, None], index[:, None], index, columns=4096).flatten(0, 2)
    signs = masks.double() * 2 - 1
    correlation = signs @ signs.T / masks.shape[1]
    assert (correlation - torch.eye(27)).abs().max() < 5 / masks.shape[1] ** 0.5


def test_nothing_is_dropped_at_probability_zero():
    assert keep_mask(0.0, torch.tensor(1), torch.tensor(0), torch.arange(8), 64).all()
