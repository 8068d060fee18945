"""One total order for ties, everywhere: score descending, then index ascending.

The official EAGLE code gets this order from CUDA's radix select; ``torch.topk`` on a CPU breaks ties arbitrarily and
can then keep a node whose parent it dropped. Rows without a tie among their best scores have one order only, and take
it from ``topk``; in the others the order key makes every score distinct, so any selection agrees.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

NONE = -1
"""The one marker for "none": no token, no parent, no node."""

FEW = 128
"""Up to so many scores of a single row on a CPU are sorted by plain Python: that takes less than torch's operations to start."""


def order_key(score: Tensor) -> Tensor:
    """Distinct int64 keys [..., M] that sort as (score descending, index ascending) when sorted descending.

    :param score: float32 [..., M]; -inf sorts last, NaN is not allowed.
    """
    bits = (score + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # sign-magnitude floats to ordered integers
    index = torch.arange(score.shape[-1], device=score.device)
    return (ordered << 32) - index


def best(score: Tensor, count: int) -> Tensor:
    """Indices int64 [..., min(count, M)] of the best scores in total order, best first; -1 where the score is -inf."""
    entries = score.shape[-1]
    if (few := best_of_few(score, count)) is not None:
        return torch.as_tensor(np.array(few, dtype=np.int64), device=score.device).view(*score.shape[:-1], len(few))
    if entries == 1 and count > 0:
        return torch.zeros_like(score, dtype=torch.int64).masked_fill(score == -torch.inf, NONE)
    count = min(count, entries)
    value, index = score.topk(min(count + 1, entries), dim=-1, sorted=True)  # one more, to see a tie at the cut
    equal = value[..., 1:] == value[..., :-1]
    index = index[..., :count]
    if bool(equal.any()):  # scores that tie, or places that hold none
        tied = (equal & (value[..., 1:] > -torch.inf)).any(-1)
        if bool(tied.any()):
            index[tied] = order_key(score[tied]).topk(count, dim=-1, sorted=True).indices
    return index.masked_fill(value[..., :count] == -torch.inf, NONE)


def best_of_few(score: Tensor, count: int) -> list[int] | None:
    """The same as a list, for a single row that lies in the host's memory and is short; None for others, and where there is NaN."""
    if not score.numel() == score.shape[-1] <= FEW or not score.is_cpu:
        return None
    return best_of_list(score.flatten().tolist(), count)


def best_of_list(score: list[float], count: int) -> list[int] | None:
    """The same for a list."""
    if len(score) > FEW or math.isnan(sum(score)):  # a draft that is broken: decided as among other rows
        return None
    order = sorted(range(len(score)), key=score.__getitem__, reverse=True)[:count]  # equal ones keep their order
    return [NONE if score[index] == -math.inf else index for index in order]


def any_equal(ordered: Tensor) -> bool:
    """Whether two of the numbers [..., M] of a row, which are in order, are equal."""
    if ordered.is_cpu and ordered.numel() <= FEW:
        flat, width = ordered.flatten().tolist(), ordered.shape[-1]
        return any(len(set(flat[start : start + width])) < width for start in range(0, len(flat), width))
    return bool((ordered[..., 1:] == ordered[..., :-1]).any())


def rank_of(score: Tensor, index: Tensor) -> Tensor:
    """Rank int64 [B] (0 = best) of entry ``index`` [B] among ``score`` [B, M] in total order."""
    own = score.gather(1, index[:, None])
    columns = torch.arange(score.shape[1], device=score.device)
    ahead = (score > own) | ((score == own) & (columns < index[:, None]))
    return ahead.sum(1)


def most_likely(scores: Tensor) -> Tensor:
    """The index int64 [...] of the best of scores [..., M], the lowest on ties; that of the first NaN where there is one.

    On a CPU NumPy's search is some ten times as fast as torch's; it knows no half precisions.
    """
    if scores.is_cpu and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.asarray(scores.numpy(force=True).argmax(-1)))
    return scores.argmax(-1)
