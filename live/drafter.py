"""The model-backed drafter: a draft network behind the drafting loop, for live decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from live.border import sent
from live.network import DraftNetwork
from policies.contract import Cycle
from policies.one_row import alone, least
from policies.order import NONE
from policies.tree import Children, DraftTree

Committed = tuple[Tensor, Tensor | None, Tensor]
"""Newly committed tokens int64 [R, T] (right padded), the features [R, T, F] before them, and how many count int64 [R]."""


class LiveDrafter:
    """Feeds committed tokens to a draft network when a policy drafts, and answers the drafting loop's questions.

    The catch-up is lazy: a policy that declines to draft does not pay for it. A child's handle is its parent's slot.
    """

    top = 0
    """How many of the target's best tokens at each committed place it wants to hear of (live/looking_up.py): none."""

    def __init__(self, network: DraftNetwork):
        self.network = network

    @property
    def deepest(self) -> int | None:
        """Depth of the deepest nodes that the network drafts, if it has one."""
        return self.network.deepest

    def prefill(self, prompt: Tensor, counts: Tensor, features: Tensor | None, root: Tensor) -> None:
        """Show the draft the prompts int64 [R, L] (counts int64 [R]), their features [R, L, F] and the first roots [R]. Features
        lie where the target left them, all else on the host."""
        self.network.reset(len(prompt))
        behind = torch.nn.functional.pad(prompt, (0, 1)).scatter(1, counts[:, None], root[:, None])
        self._root = root
        if self.network.needs_features:  # a cell pairs a place's feature with the next token
            self._source = self.network.advance(behind[:, 1:], features, counts)
        else:
            self._source = self.network.advance(behind, None, counts + 1)
        self._pending: list[Committed] = []

    def commit(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Remember the newly committed tokens int64 [R, T] (accepted and bonus, counts int64 [R]) and the features before them."""
        self._root = tokens[:, -1] if len(tokens) == 1 else tokens.gather(1, (counts - 1)[:, None])[:, 0]
        features = features if self.network.needs_features else None
        self._pending.append((tokens, features, counts))

    def gather_rows(self, rows: Tensor) -> None:
        self.network.gather_rows(rows)
        self._root, self._source = self._root[rows], self._source[rows]
        self._pending = [tuple(None if part is None else part[rows] for part in piece) for piece in self._pending]

    def join(self, other: LiveDrafter) -> None:
        """The rows of ``other``, which has just seen its prompts, behind our own. We catch up first: rows that have nothing to
        catch up on cannot go along."""
        self._catch_up()
        self.network.join(other.network)
        self._root = torch.cat([self._root, other._root])
        self._source = torch.cat([self._source, other._source])

    def _catch_up(self) -> None:
        if self._pending:
            self._source = self.network.advance(*_joined(self._pending))
            self._pending = []

    def beside(self) -> DraftNetwork:
        """Who drafts for another decoder beside this one: the same network with committed parts of its own."""
        return self.network.beside()

    def forget(self) -> None:
        """Let the caches go: no row is left."""
        self.network.reset(0)

    def forwards(self) -> list[tuple[object, str]]:
        """Owner and name of the methods that do the drafting, for timers (live/breakdown.py)."""
        return self.network.forwards()

    def root(self, cycle: Cycle) -> Tensor:
        self._context_length = cycle.context_length
        return self._root

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        nothing = nodes < 0 if least(nodes) < 0 else None  # mostly: no place in any row is empty
        if tree.levels == 0:
            self.network.entropies = "entropy" in tree.needs  # a sum over the vocabulary that most policies never look at
            self._catch_up()
            found = self.network.open(self._source, self._context_length, branching).fetched()
            found = [part.unsqueeze(1) for part in found]
            self._slots = 0
        else:
            token, parent = tree.at("token", nodes), tree.at("handle", nodes)
            if nothing is not None:
                token, parent = token.masked_fill(nothing, NONE), parent.masked_fill(nothing, 0)
            found = self.network.grow(parent, token, branching).fetched()
        token, logprob, entropy = found
        if nothing is not None:
            token, logprob = token.masked_fill(nothing[:, :, None], NONE), logprob.masked_fill(nothing[:, :, None], -torch.inf)
            entropy = entropy.masked_fill(nothing, -1.0)
        handle = _from(self._slots, nodes.shape[1], nodes.device).expand_as(token)
        self._slots += nodes.shape[1]
        return Children(token, logprob, entropy, handle)


@lru_cache(maxsize=1024)
def _from(first: int, count: int, device: torch.device) -> Tensor:
    """``count`` slots from ``first`` on, int64 [1, W, 1]; nobody writes into them."""
    return torch.arange(first, first + count, device=device)[None, :, None]


def _joined(pieces: list[Committed]) -> Committed:
    """What several cycles committed, as one piece: rows [R, T, ...] side by side, right padded."""
    if len(pieces) == 1:
        return pieces[0]
    tokens, features, counts = zip(*pieces, strict=True)
    total = sum(counts)
    if alone(tokens[0]):  # what it committed beside others may be padded
        own = [int(count) for count in counts]
        tokens, features = (
            None if parts[0] is None else torch.cat([part[:, :count] for part, count in zip(parts, own, strict=True)], 1)
            for parts in (tokens, features)
        )
        return tokens, features, total
    width, place = int(total.max()), []
    for new, behind in zip(tokens, (torch.stack(counts).cumsum(0) - torch.stack(counts)), strict=True):
        step = torch.arange(new.shape[1], device=new.device)
        place.append((behind[:, None] + step).clamp(max=width))  # padding falls into a column that is cut off
    return _laid_out(tokens, place, width), None if features[0] is None else _laid_out(features, place, width), total


def _laid_out(pieces: Sequence[Tensor], place: list[Tensor], width: int) -> Tensor:
    """The pieces [R, T, ...] at their places int64 [R, T] of [R, width, ...]; later ones cover the padding of earlier ones."""
    whole = pieces[0].new_zeros(len(pieces[0]), width + 1, *pieces[0].shape[2:])
    for own, where in zip(pieces, place, strict=True):
        where = sent(where, own.device).view(*where.shape, *[1] * (own.dim() - 2)).expand_as(own)
        whole.scatter_(1, where, own)
    return whole[:, :width]
