"""Where in a text the words that end it stood before, and what came behind them there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from policies.lookup.index import Index
from policies.one_row import alone
from policies.order import NONE


class Matches(NamedTuple):
    """S places per row at which the end of its text was found.

    length  int64 [B, S]     how many tokens agree, 0 = no match
    behind  int64 [B, D, S]  the tokens behind each place, -1 where there are no more
    """

    length: Tensor
    behind: Tensor

    def first_continuation(self) -> list[int]:
        """The tokens behind the first place of the first row."""
        tokens = self.behind[0, :, 0].tolist()
        return tokens[: tokens.index(NONE)] if NONE in tokens else tokens


def own_matches(context: Tensor, last: Tensor, longest: int, count: int, depth: int, latest: bool = True) -> Matches:
    """The ``count`` longest matches in the text itself, the latest (or earliest) first among equals.

    :param context: int64 [B, L] tokens, -1 behind the end. :param last: int64 [B] column of the end.
    :param longest: tokens to compare at most. :param depth: tokens to follow a match at most.
    """
    if alone(context):
        return _matches_of_one(context[0, : int(last) + 1].numpy(), longest, count, depth, latest)
    place, length = best_matches(match_lengths(context, last, longest), count, latest)
    matched = place >= 0
    deepest = int((last[:, None] - place).masked_fill(~matched, 0).amax())
    step = torch.arange(1, min(depth, deepest) + 1, device=context.device)[None, :, None]
    column = place[:, None] + step
    going = matched[:, None] & (column <= last[:, None, None])
    behind = context.gather(1, column.clamp(max=context.shape[1] - 1).flatten(1)).view_as(column)
    return Matches(length, behind.masked_fill(~going, NONE))


def _matches_of_one(text: np.ndarray, longest: int, count: int, depth: int, latest: bool) -> Matches:
    """The same for a single row in the host's memory, its text int64 [L]: only where the last token stood is looked any further."""
    last = len(text) - 1
    place = np.flatnonzero(text[:last] == text[last])
    length, going = np.ones_like(place), np.arange(len(place))
    for back in range(1, min(longest, last + 1)):
        going = going[place[going] >= back]
        going = going[text[place[going] - back] == text[last - back]]
        if not len(going):
            break
        length[going] += 1
    order = np.lexsort((-place if latest else place, -length))[:count]
    found = np.zeros(count, dtype=np.int64)
    found[: len(order)] = length[order]
    deepest = min(depth, last - int(place[order].min())) if len(order) else 0
    behind = np.full((deepest, count), NONE, dtype=np.int64)
    column = place[order] + np.arange(1, deepest + 1)[:, None]
    behind[:, : len(order)] = np.where(column <= last, text[np.minimum(column, last)], NONE)
    return Matches(torch.from_numpy(found)[None], torch.from_numpy(behind)[None])


def longest_match(text: np.ndarray, longest: int, depth: int, latest: bool) -> tuple[int, list[int]]:
    """The first of :func:`own_matches` for one text int64 [L]: (length, 0 = no match; the tokens behind it).

    The text is searched as a string with a character for each token, of which there are far more than any vocabulary has tokens.
    """
    last = len(text) - 1
    written = text.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    length, begins = 0, 0  # of the match so far: tokens, and where it begins
    while length < min(longest, last):
        longer = written[-(length + 1) :]
        if latest:  # a longer match ends no later than the latest shorter one
            place = written.rfind(longer, 0, begins + length if length else last)
        else:  # nor earlier than the earliest
            place = written.find(longer, max(begins - 1, 0), last)
        if place < 0:
            break
        length, begins = length + 1, place
    behind = begins + length
    return length, text[behind : behind + depth].tolist() if length else []


def frozen_matches(index: Index, context: Tensor, last: Tensor, longest: int, count: int, depth: int) -> Matches:
    """The ``count`` longest matches in a frozen corpus (see :meth:`Index.matches`); parameters as above."""
    column = last[:, None] - torch.arange(longest, device=last.device)
    ending = context.gather(1, column.clamp(min=0)).masked_fill(column < 0, NONE)
    place, length = index.matches(ending, count)
    return Matches(length, index.behind(place, depth))


def longest_first(own: Matches, frozen: Matches, count: int) -> Matches:
    """The ``count`` longest of both; of equal ones those of the own text come first."""
    depth = max(own.behind.shape[1], frozen.behind.shape[1])
    behind = torch.cat([deepened(own.behind, depth), deepened(frozen.behind, depth)], 2)
    length, seat = torch.cat([own.length, frozen.length], 1).sort(dim=1, descending=True, stable=True)
    length, seat = length[:, :count], seat[:, :count]
    return Matches(length, behind.gather(2, seat[:, None].expand(-1, depth, -1)))


def deepened(levels: Tensor, depth: int) -> Tensor:
    """The same int64 [B, D, S] with ``depth`` levels, -1 in those that were not there."""
    return torch.nn.functional.pad(levels, (0, 0, 0, depth - levels.shape[1]), value=NONE)


def match_lengths(context: Tensor, last: Tensor, longest: int) -> Tensor:
    """How many tokens up to each column are those that end the text: int64 [B, L], at most ``longest``, 0 at the end itself."""
    column = torch.arange(context.shape[1], device=context.device)
    going = column < last[:, None]
    length = torch.zeros_like(context)
    for back in range(min(longest, context.shape[1])):
        ending = context.gather(1, (last - back).clamp(min=0)[:, None])
        before = torch.nn.functional.pad(context, (back, 0), value=NONE)[:, : context.shape[1]]
        going = going & (before == ending) & (column >= back) & (last >= back)[:, None]
        if not bool(going.any()):
            break
        length += going
    return length


def best_matches(length: Tensor, count: int, latest: bool = True) -> tuple[Tensor, Tensor]:
    """The ``count`` longest matches, the latest (or earliest) first among equals: (column int64 [B, count], -1 = none;
    length int64 [B, count], 0 = none)."""
    columns = length.shape[1]
    column = torch.arange(columns, device=length.device)
    key = length * columns + (column if latest else columns - 1 - column)
    found = key.masked_fill(length == 0, NONE).topk(min(count, columns), dim=1)
    place = found.indices.masked_fill(found.values < 0, NONE)
    place = torch.nn.functional.pad(place, (0, count - place.shape[1]), value=NONE)
    return place, length.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)


def last_occurrence(context: Tensor, token: Tensor, allowed: Tensor) -> Tensor:
    """The last allowed column that holds each ``token`` int64 [B, W]: int64 [B, W], -1 = none.

    :param allowed: bool [B, L]
    """
    column = torch.arange(context.shape[1], device=context.device)
    same = (context[:, None, :] == token[:, :, None]) & allowed[:, None, :]
    return torch.where(same, column, NONE).amax(2)
