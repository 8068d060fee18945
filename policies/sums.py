"""Sums that have the same bits at every batch shape, padding and device: decisions may hang on them."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.order import best

UNIT = 2.0**40


def exact_sum(value: Tensor) -> Tensor:
    """Sum float64 [...] over the first axis of ``value`` float64 [M, ...], whatever the order of its entries.

    They are added as whole multiples of 2**-40, and sums of whole numbers are exact. For totals below 2**22 in size.
    """
    return (value * UNIT).round().to(torch.int64).sum(0).to(torch.float64) / UNIT


def exact_cumsum(value: Tensor, dim: int = -1) -> Tensor:
    """Sums float64 along ``dim`` of ``value`` float64, up to and with each entry: the same bits at every shape.

    They are added as whole multiples of 2**-40, which float64 does exactly for totals below 2**13.
    """
    return (value * UNIT).round_().cumsum(dim).div_(UNIT)


def ordered_sum(value: Tensor, width: int) -> Tensor:
    """Sum [...] over the last axis of ``value`` [..., M], M at most ``width``, by halving.

    Entry i is added to entry i + h, where 2h is the power of two at or above ``width``, then h is halved: which entries
    meet depends on ``width`` alone, never on M. (``torch.sum`` chooses its order by shape and device.)
    """
    size = 1 << max(width - 1, 0).bit_length()
    value = torch.nn.functional.pad(value, (0, size - value.shape[-1]))
    while value.shape[-1] > 1:
        half = value.shape[-1] // 2
        value = value[..., :half] + value[..., half:]
    return value[..., 0]


def probability_mass(score: Tensor, count: int) -> Tensor:
    """Sum float32 [B] of the ``count`` highest path probabilities among ``score`` float32 [B, M] (nats, -inf = none).

    Elementwise in float64, added best first in a fixed order, rounded at the end.
    """
    place = best(score, count)
    chosen = score.gather(1, place.clamp(min=0)).masked_fill(place < 0, -torch.inf)
    return ordered_sum(torch.exp(chosen.to(torch.float64).contiguous()), count).to(torch.float32)
