"""From logits to what policies and recordings see: float32 log-probabilities, entropies and ranked children."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from live.border import fetched, sent
from policies.order import FEW, any_equal, best, most_likely

SLACK = 6
"""Candidates looked at beyond the K asked for, so that ties at the cut are settled by id without sorting the vocabulary."""

IN_CACHE = 2**18
"""Logits looked at side by side by each core of a CPU: every pass over them finds them in its cache."""

DRAFT_STEP = 2.0**-16
"""What a draft says is rounded to multiples of this, in nats (see ``on_grid``)."""

_SHIFT = 1.5 * 2**23 * DRAFT_STEP
"""Between _SHIFT - 64 and _SHIFT + 64 float32 numbers lie DRAFT_STEP apart: to add it and to take it away again rounds."""
_SHIFT_ON_HOST = np.float32(_SHIFT)


class Ranked(NamedTuple):
    """The K most probable next tokens: index int64 [..., K], logprob float32 [..., K], entropy float32 [...] in nats, both
    :func:`on_grid`."""

    index: Tensor
    logprob: Tensor
    entropy: Tensor

    def in_one_piece(self) -> Tensor:
        """float64 [..., 2 K + 1]: indices up to 2**53 and float32 numbers are exact in it."""
        return torch.cat([self.index.double(), self.logprob.double(), self.entropy.double()[..., None]], -1)

    @classmethod
    def of_one_piece(cls, told: Tensor) -> Ranked:
        """The inverse, of float64 [..., 2 K + 1] on the host."""
        values, count = told.numpy(), told.shape[-1] // 2
        parts = values[..., :count].astype(np.int64), values[..., count:-1].astype(np.float32), values[..., -1].astype(np.float32)
        return cls(*map(torch.from_numpy, parts))

    def fetched(self) -> Ranked:
        """The same on the host, fetched in one piece."""
        return self if self.index.is_cpu else self.of_one_piece(fetched(self.in_one_piece()))


def log_probabilities(logits: Tensor) -> Tensor:
    """log-softmax over the last axis: in float64 for float64 logits, else in float32."""
    return torch.log_softmax(_exact(logits), dim=-1)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def entropy_of(logprob: Tensor) -> Tensor:
    """Entropy float32 [...] in nats of log-probabilities [..., V]."""
    if logprob.is_cpu:  # looking at the sum would wait for a GPU
        total = logprob.exp().mul_(logprob).sum(-1)
        if not math.isnan(sum(total.flatten().tolist())):
            return -total.float()
    return -logprob.exp().mul_(logprob.nan_to_num(neginf=0.0)).sum(-1).float()  # a token that cannot be: 0 * -inf counts as 0


def told_of(logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy, log-probability of the given tokens int64 [B]) under logits [B, V]: float32 [B] each, in nats, on the host."""
    logprob = log_probabilities(logits)
    told = entropy_of(logprob), logprob.gather(1, sent(token, logits.device)[:, None])[:, 0].float()
    return told if logits.is_cpu else tuple(fetched(torch.stack(told)).unbind(0))


def on_grid(nats: Tensor) -> Tensor:
    """Float32 numbers of a draft, rounded in place to multiples of DRAFT_STEP (1.5e-5 nats; half of that below -64).

    Recorder and live decoding round alike, to a step near the noise of float32 forward passes: the sums along a path are
    exact in any order, and a recording needs five bits less for each number.
    """
    if nats.is_cpu and nats.numel() <= FEW:
        on_host = nats.numpy()  # the same additions, which take NumPy a quarter of the time to start
        on_host += _SHIFT_ON_HOST
        on_host -= _SHIFT_ON_HOST
        return nats
    return nats.add_(_SHIFT).sub_(_SHIFT)


def ranked(logits: Tensor, count: int, entropy: bool = True) -> Ranked:
    """The ``count`` best entries by float32 log-probability, ties by lowest index, and the full entropy (-1 unless asked for)."""
    if logits.is_cpu and logits.numel() > (most := IN_CACHE * torch.get_num_threads()):
        rows = logits.reshape(-1, logits.shape[-1])
        work = _ranked if count == 1 else _ranked_many
        parts = [work(part, count, entropy) for part in rows.split(max(1, most // logits.shape[-1]))]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        return Ranked(*(column.reshape(*logits.shape[:-1], *column.shape[1:]) for column in columns))
    return _ranked(logits, count, entropy)


def _ranked(logits: Tensor, count: int, entropy: bool) -> Ranked:
    """The same, of all rows at once."""
    logprob = log_probabilities(logits)
    spread = on_grid(entropy_of(logprob)) if entropy else _unknown(logprob.shape[:-1], logprob.device)
    logprob = logprob.float()  # what policies see in every mode; ranking the rounded values keeps the modes alike
    count = min(count, logprob.shape[-1])
    if count == 1:
        index = most_likely(logprob)[..., None]
        return Ranked(index, on_grid(logprob.gather(-1, index)), spread)
    value, index = logprob.topk(min(count + 1, logprob.shape[-1]), dim=-1)
    if any_equal(value):
        index = _settled(logprob, count)
        return Ranked(index, on_grid(logprob.gather(-1, index)), spread)
    return Ranked(index[..., :count], on_grid(value[..., :count]), spread)  # all distinct, so this is the only order


def ranked_in_one_piece(logits: Tensor, count: int, entropy: bool, ids: Tensor | None = None) -> Tensor:
    """The same without a look at the numbers, which would wait for a GPU: float64 [..., 2 K + 2], the ranking in one piece (indices
    as ``ids`` int64 [V] calls them), and 1 where so many are tied that the order of the best is still open."""
    logprob = log_probabilities(logits)
    spread = on_grid(entropy_of(logprob)) if entropy else torch.full_like(logprob[..., 0], -1.0)
    logprob = logprob.float()
    count, looked_at = (min(some, logprob.shape[-1]) for some in (count, count + SLACK))
    index = logprob.topk(looked_at, dim=-1).indices.sort(dim=-1).values
    value, order = logprob.gather(-1, index).sort(dim=-1, descending=True, stable=True)  # ties by lowest index
    open_order = value[..., 0].isnan()
    if looked_at < logprob.shape[-1]:
        open_order = open_order | (value[..., count - 1] == value[..., -1])
    index, value = index.gather(-1, order[..., :count]), on_grid(value[..., :count])
    found = Ranked(index if ids is None else ids.take(index), value, spread)
    return torch.cat([found.in_one_piece(), open_order.double()[..., None]], -1)


@lru_cache(maxsize=64)
def _unknown(shape: torch.Size, device: torch.device) -> Tensor:
    """-1.0 float32 [...], the entropy that nobody asked for; nobody writes into it."""
    return torch.full(shape, -1.0, dtype=torch.float32, device=device)


def _ranked_many(logits: Tensor, count: int, entropy: bool) -> Ranked:
    """The same of many rows [N, V] on a CPU: each exponential is worked out once, and log-probabilities of the best alone."""
    exact = _exact(logits)
    count = min(count, exact.shape[1])
    value, index = exact.topk(min(count + 1, exact.shape[1]), dim=1)
    best_one = value[:, :1]
    below = exact - best_one
    weight = below.exp()
    total = weight.sum(1, keepdim=True)
    logprob = (value - best_one - total.log()).float()
    if bool((logprob[:, 1:] == logprob[:, :-1]).any()):
        every = (below - total.log()).float()
        index = _settled(every, count)
        logprob = every.gather(1, index)
    spread = logprob.new_full(logprob.shape[:1], -1.0)
    if entropy:
        weighted = weight.mul_(below).sum(1, keepdim=True)
        if bool(weighted.isnan().any()):
            weighted = weight.nan_to_num_(0.0).sum(1, keepdim=True)  # a token that cannot be: 0 * -inf counts as 0
        spread = on_grid((total.log() - weighted / total)[:, 0].float())
    return Ranked(index[:, :count], on_grid(logprob[:, :count]), spread)


def _settled(logprob: Tensor, count: int) -> Tensor:
    """The best entries int64 [..., K] where some are tied: ties by lowest index."""
    looked_at = min(count + SLACK, logprob.shape[-1])
    value, index = logprob.topk(looked_at, dim=-1)
    if looked_at < logprob.shape[-1] and bool((value[..., count - 1] == value[..., -1]).any()):
        return best(logprob, count)  # so many ties that the slack may have missed the lowest index
    index = index.sort(dim=-1).values
    return index.gather(-1, best(logprob.gather(-1, index), count))
