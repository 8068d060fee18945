"""Counter-based numbers: the published vectors, NumPy's doubles, and independence of batch and order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policies.random import draw, philox, uniform

PUBLISHED = [  # Random123's kat_vectors: philox4x32, 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's round, ten times, with Python's whole numbers."""
    c, k = counter[:], key[:]
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right >> 32 ^ c[1] ^ k[0], right % 2**32, left >> 32 ^ c[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("counter, key, wanted", PUBLISHED)
def test_published_vectors(counter, key, wanted):
    got = philox(tuple(torch.tensor(word) for word in words(counter)), tuple(words(key)))
    assert [int(word) for word in got] == words(wanted) == plain_philox(words(counter), words(key))


def test_uniform_numbers_one_by_one():
    sequence, number = torch.tensor([0, 5, 2**40 + 3, -1]), torch.tensor([0, 1, 2**31, 7])
    for seed, stream in ((0, 0), (-3, 2), (2**35 + 1, 2**32 - 1)):
        got = uniform(seed, sequence, number, stream).tolist()
        for row, value in enumerate(got):
            s, n = int(sequence[row]) % 2**64, int(number[row])
            high, low, *_ = plain_philox([n, stream, s % 2**32, s >> 32], [seed % 2**32, seed % 2**64 >> 32])
            assert value == ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def test_they_are_uniform_and_uncorrelated():
    cells = uniform(7, torch.arange(200)[:, None], torch.arange(200)).numpy()
    assert cells.shape == (200, 200) and 0 <= cells.min() and cells.max() < 1 and len(np.unique(cells)) == cells.size
    expected = cells.size / 20
    chi = ((np.histogram(cells, 20, (0, 1))[0] - expected) ** 2 / expected).sum()
    assert chi < 43.8  # 99.9% of 19 degrees of freedom
    for one, other in ((cells[1:], cells[:-1]), (cells[:, 1:], cells[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


def test_the_batch_does_not_matter():
    sequence, number = torch.arange(64), torch.arange(64) % 5
    whole = uniform(1, sequence, number)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(1, sequence[order], number[order]), whole[order])
    assert all(float(uniform(1, sequence[i], number[i])) == float(whole[i]) for i in range(64))
    assert not torch.equal(uniform(2, sequence, number), whole) and not torch.equal(uniform(1, sequence, number, 1), whole)


def test_draw():
    share = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    for number, wanted in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.7499, 1), (0.75, 2), (0.9999, 2)):
        assert int(draw(share, torch.tensor([number], dtype=torch.float64))) == wanted
    short = torch.tensor([[0.1] * 3], dtype=torch.float64)  # a sum that rounding left short of one
    assert int(draw(short, torch.tensor([0.99], dtype=torch.float64))) == 2
