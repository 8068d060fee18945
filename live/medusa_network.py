"""Medusa heads as a draft network: nothing to commit but the last hidden state, and one ranking for all nodes of a depth.

A head is run when the first node of its depth wants it, so that a policy that stops early does not pay for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from live.distribution import Ranked, ranked
from live.medusa import MedusaHeads


class MedusaNetwork:
    kind = "medusa"
    needs_features = True
    entropies = True

    def __init__(self, heads: MedusaHeads, name: str = "medusa", features: slice = slice(None)):
        """:param features: which of the captured numbers are the target's last hidden state."""
        self.heads, self.name, self.features = heads, name, features
        self.deepest = heads.shape.heads

    def reset(self, rows: int) -> None:
        self.entropies = True

    def gather_rows(self, rows: Tensor) -> None:
        """Between cycles nothing is kept of a row: its source is the caller's."""

    def beside(self) -> MedusaNetwork:
        return MedusaNetwork(self.heads, self.name, self.features)

    def join(self, other: MedusaNetwork) -> None:
        """Nothing is kept of the rows of ``other`` either."""

    def forwards(self) -> list[tuple[object, str]]:
        return [(self, "_logits")]

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        hidden = features[..., self.features]
        if everywhere:
            return hidden
        last = (counts - 1).to(hidden.device)[:, None, None].expand(-1, 1, hidden.shape[2])
        return hidden.gather(1, last)[:, 0]

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        self._source = source
        self._depth = torch.zeros((len(source), 1), dtype=torch.int64, device=context_length.device)  # of each slot
        self._known: dict[tuple[int, int], Ranked] = {}
        return self._ranked(0, width)

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        """As every network does; raises ValueError for nodes that no head drafts below."""
        depth = self._depth.gather(1, parent) + 1
        self._depth = torch.cat([self._depth, depth], dim=1)
        wanted = depth[token >= 0].unique().tolist()
        if wanted and wanted[-1] >= self.deepest:
            raise ValueError(f"there are {self.deepest} Medusa heads: no tree is deeper")
        found = [self._ranked(one, width) for one in wanted or [0]]
        if len(found) == 1:
            return Ranked(*(part[:, None].expand(-1, parent.shape[1], *part.shape[1:]) for part in found[0]))
        place = torch.searchsorted(torch.tensor(wanted, device=depth.device), depth).clamp(max=len(found) - 1)
        row = torch.arange(len(place), device=depth.device)[:, None]
        return Ranked(*(torch.stack(part).to(depth.device)[place, row] for part in zip(*found, strict=True)))

    def _ranked(self, depth: int, width: int) -> Ranked:
        """The children of every node of a depth: index and logprob [B, K], entropy [B]."""
        if (depth, width) not in self._known:
            found = ranked(self._logits(depth), width, self.entropies)
            if (tokens := self.heads.token_map) is not None:
                found = found._replace(index=tokens.take(found.index))
            self._known[depth, width] = found
        return self._known[depth, width]

    def _logits(self, depth: int) -> Tensor:
        """The forward pass of a head, [B, V']."""
        return self.heads.logits(depth, self._source)
