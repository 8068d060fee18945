"""Networks that draft a place whatever was drafted before it: one ranking for all nodes of a depth, and trees only so deep."""

from __future__ import annotations

import torch
from torch import Tensor

from live.distribution import Ranked, ranked


class DepthRankings:
    """What such networks share (live/network.py): Medusa heads, DFlash's blocks.

    deepest     depth of the deepest nodes
    bottom      why there are no deeper ones, in words
    target_ids  int64 [V'], the target's token for each entry of the logits; None: the entry's own number
    """

    deepest: int
    bottom: str
    target_ids: Tensor | None = None
    entropies = True

    def logits_at(self, depth: int) -> Tensor:
        """Scores [B, V'] of the children of every node of a depth, 0 the root's."""
        raise NotImplementedError

    def begun(self, trees: int, device: torch.device, width: int) -> Ranked:
        """Start new trees: the ``width`` best children of each root [B, K]."""
        self._depth = torch.zeros((trees, 1), dtype=torch.int64, device=device)  # of each slot
        self._known: dict[tuple[int, int], Ranked] = {}
        return self._ranked(0, width)

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        """As every network does; raises ValueError for nodes below which nothing is drafted."""
        depth = self._depth.gather(1, parent) + 1
        self._depth = torch.cat([self._depth, depth], dim=1)
        wanted = depth[token >= 0].unique().tolist()
        if wanted and wanted[-1] >= self.deepest:
            raise ValueError(f"{self.bottom}: no tree is deeper")
        found = [self._ranked(one, width) for one in wanted or [0]]
        if len(found) == 1:
            return Ranked(*(part[:, None].expand(-1, parent.shape[1], *part.shape[1:]) for part in found[0]))
        place = torch.searchsorted(torch.tensor(wanted, device=depth.device), depth).clamp(max=len(found) - 1)
        row = torch.arange(len(place), device=depth.device)[:, None]
        return Ranked(*(torch.stack(part).to(depth.device)[place, row] for part in zip(*found, strict=True)))

    def _ranked(self, depth: int, width: int) -> Ranked:
        """The children of every node of a depth: index and logprob [B, K], entropy [B]."""
        if (depth, width) not in self._known:
            self._known[depth, width] = self._rank(depth, width)
        return self._known[depth, width]

    def _rank(self, depth: int, width: int) -> Ranked:
        found = ranked(self.logits_at(depth), width, self.entropies)
        return found if self.target_ids is None else found._replace(index=self.target_ids.take(found.index))
