"""Medusa heads as a draft network: nothing to commit but the last hidden state.

A head is run when the first node of its depth wants it, so that a policy that stops early does not pay for the others.
"""

from __future__ import annotations

from torch import Tensor

from live.depth_rankings import DepthRankings
from live.distribution import Ranked
from live.medusa import MedusaHeads


class MedusaNetwork(DepthRankings):
    kind = "medusa"
    needs_features = True

    def __init__(self, heads: MedusaHeads, name: str = "medusa", features: slice = slice(None)):
        """:param features: which of the captured numbers are the target's last hidden state."""
        self.heads, self.name, self.features = heads, name, features
        self.deepest, self.target_ids = heads.shape.heads, heads.token_map
        self.bottom = f"there are {self.deepest} Medusa heads"

    def reset(self, rows: int) -> None:
        self.entropies = True

    def gather_rows(self, rows: Tensor) -> None:
        """Between cycles nothing is kept of a row: its source is the caller's."""

    def beside(self) -> MedusaNetwork:
        return MedusaNetwork(self.heads, self.name, self.features)

    def join(self, other: MedusaNetwork) -> None:
        """Nothing is kept of the rows of ``other`` either."""

    def forwards(self) -> list[tuple[object, str]]:
        return [(self, "logits_at")]

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        hidden = features[..., self.features]
        if everywhere:
            return hidden
        last = (counts - 1).to(hidden.device)[:, None, None].expand(-1, 1, hidden.shape[2])
        return hidden.gather(1, last)[:, 0]

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        self._source = source
        return self.begun(len(source), context_length.device, width)

    def logits_at(self, depth: int) -> Tensor:
        """The forward pass of a head, [B, V']."""
        return self.heads.logits(depth, self._source)
