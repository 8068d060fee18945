"""Where in a text the words that end it stood before."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.order import NONE


def match_lengths(context: Tensor, last: Tensor, longest: int) -> Tensor:
    """How many tokens up to each column are those that end the text: int64 [B, L], at most ``longest``, 0 at the end itself.

    :param context: int64 [B, L] tokens, -1 behind the end. :param last: int64 [B] column of the end.
    """
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
