"""A frozen text in the order of what stands before each of its places: the longest matches of many rows, by bisection.

A suffix array (Manber and Myers 1990, https://epubs.siam.org/doi/10.1137/0222058), of the text read backwards, since a drafter
looks for the words that *end* a text; REST keeps its datastore in one as well (arXiv 2311.08252).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policies.order import NONE


class Index(NamedTuple):
    """N tokens of several texts, one after the other, none reaching into its neighbours.

    token   int32 [N]
    before  int32 [N]  how many tokens of its own text stand before each place
    after   int32 [N]  and behind it
    order   int32 [N]  the places, sorted by the tokens that end there: the last one counts first, then the one before it, and
                       so on to the beginning of the text, which sorts before any token; of equal ones the first place
    lead    int32 [N]  the token at each of these
    """

    token: Tensor
    before: Tensor
    after: Tensor
    order: Tensor
    lead: Tensor

    def to(self, device: torch.device) -> Index:
        """The same on another device."""
        return Index(*(part.to(device) for part in self))

    def backwards(self, place: Tensor, count: int) -> Tensor:
        """The ``count`` tokens that end at each place int64 [...], the last first: int64 [..., count], -1 before the beginning."""
        back = torch.arange(count, device=place.device)
        known = back <= self.before[place][..., None]
        return self.token[(place[..., None] - back).clamp(min=0)].to(torch.int64).masked_fill(~known, NONE)

    def behind(self, place: Tensor, depth: int) -> Tensor:
        """The tokens behind places int64 [B, S] (-1 = none), at most ``depth``: int64 [B, D, S], -1 where the text has ended."""
        left = self.after[place.clamp(min=0)].masked_fill(place < 0, 0)
        step = torch.arange(1, min(depth, int(left.amax())) + 1, device=place.device)[None, :, None]
        token = self.token[(place[:, None] + step).clamp(max=len(self.token) - 1)]
        return token.to(torch.int64).masked_fill(step > left[:, None], NONE)

    def matches(self, ending: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` places at which the most tokens of ``ending`` stand, in the order of the index.

        Of the places with the shortest match among them there may be more than fit: of these the index is sampled at even
        distances, so that what is taken came about in many ways.

        :param ending: int64 [B, K] the last tokens of each row's text, the last first, -1 before its beginning.
        Returns (place int64 [B, count], -1 = none; length int64 [B, count], 0 = none).
        """
        whole = torch.full_like(ending[:, 0], ending.shape[1])
        here = self._first_not_below(ending, whole, whole < 0)
        seat = torch.arange(count, device=ending.device)
        near = here[:, None] + torch.arange(-count, count, device=ending.device)
        inside = (near >= 0) & (near < len(self.order))
        length = self._agreeing(near.clamp(0, len(self.order) - 1), ending).masked_fill(~inside, 0)
        # lengths fall on either side of where the row's own text would stand: the longest are among the near
        shortest = length.topk(count, dim=1).values[:, -1].clamp(min=1)
        longer = length > shortest[:, None]
        left, right = longer[:, :count].sum(1), longer[:, count:].sum(1)
        more, start = left + right, here - left
        beyond = torch.arange(2 * len(ending), device=ending.device) >= len(ending)
        low, high = self._first_not_below(ending.repeat(2, 1), shortest.repeat(2), beyond).chunk(2)
        equal = high - low - more
        room = torch.minimum(count - more, equal)
        number = seat - more[:, None]
        spaced = low[:, None] + (2 * number + 1) * equal[:, None] // (2 * room.clamp(min=1)[:, None])
        spaced = spaced + torch.where(spaced >= start[:, None], more[:, None], 0)  # step over the longer ones
        rank = torch.where(number < 0, start[:, None] + seat, spaced)
        taken = number < room[:, None]
        known = length.gather(1, (rank - here[:, None] + count).clamp(0, 2 * count - 1))
        length = torch.where(number < 0, known, shortest[:, None]).masked_fill(~taken, 0)
        place = self.order[rank.clamp(0, len(self.order) - 1)].to(torch.int64).masked_fill(~taken, NONE)
        return place, length

    def _agreeing(self, rank: Tensor, ending: Tensor) -> Tensor:
        """How many tokens of ``ending`` [B, K] stand at places by rank int64 [B, S]: int64 [B, S]."""
        seen = self.backwards(self.order[rank].to(torch.int64), ending.shape[1])
        return ((seen == ending[:, None]) & (seen >= 0)).cumprod(2).sum(2)

    def _first_not_below(self, ending: Tensor, width: Tensor, beyond: Tensor) -> Tensor:
        """Rank int64 [B] of the first place that sorts at or behind the first ``width`` int64 [B] tokens of ``ending``; where
        ``beyond`` bool [B] is set, behind them. Only those tokens are compared, one at least."""
        counted = torch.arange(ending.shape[1], device=ending.device) < width[:, None]
        token = ending[:, 0].to(torch.int32)
        low, high = torch.searchsorted(self.lead, token), torch.searchsorted(self.lead, token, right=True)
        for _ in range(int((high - low).max()).bit_length()):
            middle = (low + high) // 2
            seen = self.backwards(self.order[middle.clamp(max=len(self.order) - 1)].to(torch.int64), ending.shape[1])
            differs = (seen != ending) & counted
            first = (~differs).cumprod(1).sum(1, keepdim=True).clamp(max=ending.shape[1] - 1)
            below = torch.where(differs.any(1), (seen < ending).gather(1, first)[:, 0], beyond)
            searching = low < high
            low = torch.where(searching & below, middle + 1, low)
            high = torch.where(searching & ~below, middle, high)
        return low


def indexed(token: Tensor, length: Tensor, order: Tensor | None = None) -> Index:
    """The index of texts.

    :param token: int32 [N] their tokens, N >= 1. :param length: int64 [T] of each text. :param order: int32 [N] when it is known.
    """
    end = length.cumsum(0)
    place = torch.arange(len(token))
    before = place - (end - length).repeat_interleave(length)
    after = end.repeat_interleave(length) - 1 - place
    order = sorted_places(token, before) if order is None else order
    return Index(token, before.to(torch.int32), after.to(torch.int32), order, token[order.to(torch.int64)])


def sorted_places(token: Tensor, before: Tensor) -> Tensor:
    """``Index.order`` by doubling: ranks by the last w tokens, of a place and of the one w before it, give those by 2w.

    :param token: int32 [N]. :param before: int64 [N]. Time and memory: O(N log N) per doubling, O(N).
    """
    place = torch.arange(len(token))
    values, rank = torch.unique(token, return_inverse=True)
    width, longest = 1, int(before.max()) + 1
    while width < longest and len(values) < len(token):
        earlier = torch.where(before >= width, rank[(place - width).clamp(min=0)] + 1, 0)
        values, rank = torch.unique(rank * (len(token) + 1) + earlier, return_inverse=True)
        width *= 2
    return rank.argsort(stable=True).to(torch.int32)
