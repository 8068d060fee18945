"""What a training-free drafter may look at: the committed tokens of its own row, and what the target said there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policies.one_row import alone
from policies.order import NONE


class Past(NamedTuple):
    """The committed texts of B rows, by reference: nothing is copied until it is looked at.

    text          int64   [T]     the tokens of all rows, each row's in one piece
    first         int64   [B]     where in ``text`` a row's prompt begins
    root          int64   [B]     where its root stands, the last committed token; what lies behind is never read
    top_tokens    int64   [P, M]  the target's most probable tokens at places of the texts, -1 padding
    top_logprobs  float32 [P, M]  their raw log-probabilities (nats), -inf in padding
    shift         int64   [B]     the distribution that gave the token at place i stands in row i - shift of these tables
    told          int64   [B]     the first place whose distribution is known: the second generated token
    """

    text: Tensor
    first: Tensor
    root: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor
    shift: Tensor
    told: Tensor

    def context(self) -> tuple[Tensor, Tensor]:
        """(tokens int64 [B, L], -1 behind the root; column int64 [B] of the root)."""
        last = self.root - self.first
        if alone(last):  # its text lies in one piece
            return self.text[None, int(self.first) : int(self.root) + 1], last
        column = torch.arange(int(last.max()) + 1, device=last.device)
        place = torch.minimum(self.first[:, None] + column, self.root[:, None])
        return self.text[place].masked_fill(column > last[:, None], NONE), last

    def target_top(self, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The target's ``count`` best tokens int64 [B, W, count] behind the tokens at columns ``place`` int64 [B, W] and their
        log-probabilities float32; -1 and -inf where ``place`` is -1."""
        known = place >= 0
        row = (self.first[:, None] + place + 1 - self.shift[:, None]).masked_fill(~known, 0)
        token = self.top_tokens[row, :count].to(torch.int64).masked_fill(~known[:, :, None], NONE)
        return token, self.top_logprobs[row, :count].masked_fill(~known[:, :, None], -torch.inf)
