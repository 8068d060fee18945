"""The uniform numbers: Philox to the bit, one number per key, and uniform."""

from __future__ import annotations

import pytest
import torch

from policies.philox import draw, philox4x32, uniform

# Random123's known answers for philox4x32-10: counter, key, output (kat_vectors of the reference distribution)
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def words(values: list[int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers(counter, key, wanted):
    assert [int(word) for word in philox4x32(words(counter), words(key))] == wanted


def by_integers(seed: int, sequence: int, position: int) -> float:
    """The same number in Python's integers, one at a time."""
    mask = (1 << 32) - 1
    a, b, c, d = position, 0, sequence & mask, sequence >> 32
    one, two = seed & mask, seed >> 32
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ one, right & mask, (left >> 32) ^ d ^ two, left & mask
        one, two = (one + 0x9E3779B9) & mask, (two + 0xBB67AE85) & mask
    return ((a >> 5) * 2**26 + (b >> 6)) / 2**53


def test_a_batch_is_its_numbers_one_by_one():
    seed = torch.tensor([0, 7, 2**40 + 3, 2**63 - 1])[:, None, None]
    sequence = torch.tensor([0, 1, 2**33 + 5])[:, None]
    position = torch.tensor([0, 1, 2, 2**32 - 1])
    found = uniform(seed, sequence, position)
    assert found.shape == (4, 3, 4) and found.dtype == torch.float64
    for i, s in enumerate(seed.flatten().tolist()):
        for j, q in enumerate(sequence.flatten().tolist()):
            assert found[i, j].tolist() == [by_integers(s, q, p) for p in position.tolist()]
    assert uniform(7, torch.tensor(1), torch.tensor(2)).item() == by_integers(7, 1, 2)


def test_no_two_keys_share_a_number():
    found = uniform(torch.arange(20)[:, None, None], torch.arange(30)[:, None], torch.arange(40))
    assert found.unique().numel() == 20 * 30 * 40
    other = uniform(torch.arange(20)[:, None, None], torch.arange(30)[:, None], torch.arange(40), purpose=1)
    assert not torch.isin(other, found).any()


def test_they_are_uniform():
    found = uniform(3, torch.arange(300)[:, None], torch.arange(300)).flatten()
    assert 0 <= float(found.min()) and float(found.max()) < 1
    counts = torch.histc(found.double(), bins=100, min=0, max=1)
    expected = found.numel() / 100
    assert float(((counts - expected) ** 2 / expected).sum()) < 180  # chi-square, 99 degrees: 180 has p = 1e-6
    pairs = torch.stack([found[:-1], found[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.02


def test_draws_by_the_inverse_of_the_sum():
    share = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    for number, wanted in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.7499, 1), (0.75, 2), (0.9999, 2)):
        assert int(draw(share, torch.tensor([number], dtype=torch.float64))) == wanted
    short = torch.tensor([[0.1] * 3], dtype=torch.float64)  # a sum that rounding left short of one
    assert int(draw(short, torch.tensor([0.99], dtype=torch.float64))) == 2


if torch.cuda.is_available():

    def test_a_gpu_draws_the_same():
        sequence, position = torch.arange(100)[:, None], torch.arange(1000)
        assert torch.equal(uniform(5, sequence.cuda(), position.cuda()).cpu(), uniform(5, sequence, position))
