"""Counter-based random numbers: a function of (seed, sequence, number), not of what was drawn before.

Philox4x32-10 of Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"
(https://doi.org/10.1145/2063384.2063405), in whole-number arithmetic only: the same bits on every device, for every
batch and in any order. Replay and live decoding see the same numbers because they name the same counters.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
"""What the two key words grow by each round: the golden ratio and the square root of three, less one."""
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words for each counter.

    :param counter: four words, int64 [...] of values below 2 ** 32, all of one shape.
    :param key: two words below 2 ** 32.
    :return: four words, int64 [...] below 2 ** 32.
    """
    first, second, third, fourth = counter
    for step in range(ROUNDS):
        high, low = _multiply(MULTIPLIERS[0], first)
        other_high, other_low = _multiply(MULTIPLIERS[1], third)
        first, second = other_high ^ second ^ (key[0] + step * WEYL[0] & WORD), other_low
        third, fourth = high ^ fourth ^ (key[1] + step * WEYL[1] & WORD), low
    return first, second, third, fourth


def uniform(seed: int, sequence: Tensor, number: Tensor, stream: int = 0) -> Tensor:
    """One uniform number per row, float64 [...] in [0, 1): a multiple of 2 ** -53.

    :param seed: any whole number; its lowest 64 bits are the key.
    :param sequence: int64 [...], which sequence the row decodes.
    :param number: int64 [...], which draw of that sequence (the cycle, or a position); below 2 ** 32.
    :param stream: below 2 ** 32; keeps draws for different purposes apart.
    """
    sequence, number = torch.broadcast_tensors(sequence, number)
    counter = number & WORD, torch.full_like(number, stream), sequence & WORD, sequence >> 32 & WORD
    high, low, _, _ = philox(counter, (seed & WORD, seed >> 32 & WORD))
    return ((high >> 5) * 2**26 + (low >> 6)).to(torch.float64) * 2.0**-53


def draw(probability: Tensor, number: Tensor) -> Tensor:
    """Index int64 [B] into ``probability`` float64 [B, K] (rows sum to 1) by the inverse of its cumulative sum.

    :param number: float64 [B] in [0, 1). The sum runs in index order, one addition at a time: the same bits everywhere.
    """
    chosen = torch.zeros_like(number, dtype=torch.int64)
    below = torch.zeros_like(number)
    for index in range(probability.shape[1] - 1):  # rounding never leads past the last
        below = below + probability[:, index]
        chosen = chosen + (number >= below)
    return chosen


def _multiply(word: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit products. The product may wrap to a negative number; its bits are the same."""
    product = values * word
    return product >> 32 & WORD, product & WORD
