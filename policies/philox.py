"""Uniform numbers that depend on a key alone: the same on every device, in every batch, for every policy.

Philox4x32-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2):
the seed is its key, and the counter names which number is wanted, so that no state has to be kept or replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_WORD = 0xFFFFFFFF
_MANTISSA = 53


def uniform(seed: int | Tensor, sequence: Tensor, position: Tensor, purpose: int = 0) -> Tensor:
    """Numbers float64 [...] in [0, 1) with 53 random bits, keyed by (seed, sequence, position).

    :param seed: a number from 0 to 2^63 - 1, or int64 [...]. The three are broadcast against each other.
    :param sequence: int64 [...], number of the text.
    :param position: int64 [...] from 0 to 2^32 - 1, counted from the first generated token.
    :param purpose: keeps draws for different purposes apart; 0 chooses the target's tokens.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=position.device)
    counter = (position, torch.full_like(position, purpose), *_words(sequence))
    first, second, _, _ = philox4x32(counter, _words(seed))
    bits = (first >> 5) * (1 << 26) + (second >> 6)
    return bits.to(torch.float64) * 2.0**-_MANTISSA


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


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for four counter words and two key words, all int64 [...] from 0 to 2^32 - 1."""
    a, b, c, d = torch.broadcast_tensors(*counter)
    one, two = key
    for number in range(ROUNDS):
        if number:
            one, two = (one + _KEY_STEPS[0]) & _WORD, (two + _KEY_STEPS[1]) & _WORD
        high_a, low_a = _product(a, _MULTIPLIERS[0])
        high_c, low_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ one, low_c, high_a ^ d ^ two, low_a
    return a, b, c, d


def _words(value: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of int64 numbers that are not negative."""
    return value & _WORD, (value >> 32) & _WORD


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product, in halves: int64 has no room for 64 unsigned bits."""
    low = (word & 0xFFFF) * factor
    middle = (word >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
