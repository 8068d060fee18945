"""A DFlash drafter as a draft network: the text's keys and values kept, one pass of a block when trees begin.

The block is always run whole: what a place drafts depends on how many masks stand beside it. All depths are there once the trees
are open, so that a policy that goes down pays for rankings alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from live.border import fetched, sent
from live.cells import Cells
from live.depth_rankings import DepthRankings
from live.dflash import DFlashHead
from live.distribution import Ranked, ranked_in_one_piece


class Blocks(DepthRankings):
    """What networks of blocks share; on a GPU the whole block is ranked at once, so that the host waits for it once a cycle."""

    kind = "dflash"
    needs_features = True

    def take(self, logits: Tensor, told: Tensor | None = None) -> None:
        """Logits [B, D, V'] of new blocks, and on the host their ranking in one piece (live/distribution.py), if there is one."""
        self._logits, self._told = logits, told

    def logits_at(self, depth: int) -> Tensor:
        return self._logits[:, depth]

    def _rank(self, depth: int, width: int) -> Ranked:
        if self._told is None and self._logits.is_cpu:
            return super()._rank(depth, width)
        if self._told is None or self._told.shape[-1] < 2 * min(width, self._logits.shape[-1]) + 2:
            self._told = fetched(ranked_in_one_piece(self._logits, width, self.entropies, self.target_ids))
        told = self._told[:, depth]
        if told.numpy()[..., -1].any():  # so many are tied that the order of the best is open
            return super()._rank(depth, width)
        found = Ranked.of_one_piece(told[..., :-1])
        return found._replace(index=found.index[..., :width], logprob=found.logprob[..., :width])


class DFlashNetwork(Blocks):

    def __init__(self, head: DFlashHead, name: str = "dflash", features: slice = slice(None)):
        """:param features: which of the captured numbers are the drafter's."""
        self.head, self.name, self.features = head, name, features
        self.deepest = head.config.deepest
        self.bottom = f"a block drafts {self.deepest} tokens"
        self.target_ids = None if head.d2t is None else head.d2t + torch.arange(len(head.d2t), device=head.d2t.device)
        self.reset(1)

    def reset(self, rows: int) -> None:
        self.entropies = True
        head = self.head
        self._cells = Cells(rows, head.num_kv_heads, head.head_dim, head.fc.weight, head.config.num_hidden_layers)

    def gather_rows(self, rows: Tensor) -> None:
        self._cells.keep(rows)

    def beside(self) -> DFlashNetwork:
        return DFlashNetwork(self.head, self.name, self.features)

    def join(self, other: DFlashNetwork) -> None:
        self._cells.join(other._cells)

    def forwards(self) -> list[tuple[object, str]]:
        return [(self, "_remember"), (self, "_filled")]

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        """As every network does; a tree starts from its root's token: int64 [R, 1], or [R, T, 1]."""
        tokens, counts = sent(tokens.clamp(min=0), self._cells.device), fetched(counts)
        self._remember(features[..., self.features], *self._cells.following(counts, tokens.shape[1]))
        return tokens[:, :, None] if everywhere else tokens.gather(1, sent(counts[:, None] - 1, tokens.device))

    def _remember(self, features: Tensor, positions: Tensor, place: int | Tensor) -> None:
        """The forward pass of committed places: keys and values of every layer."""
        fused = self.head.fuse(features)
        for layer in range(self.head.config.num_hidden_layers):
            self._cells.write(*self.head.remembered(layer, fused, positions), place, layer)

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        cells = self._cells
        alike = len(source) == len(cells) and set(fetched(context_length).tolist()) == {cells.longest}
        self.take(self._filled(sent(source[:, 0], cells.device), sent(context_length, cells.device), alike))
        return self.begun(len(source), context_length.device, width)

    def _filled(self, root: Tensor, context_length: Tensor, alike: bool) -> Tensor:
        """The forward pass of a block: logits [B, D, V'] of all depths.

        :param root: tokens int64 [B].   :param context_length: places of the text before each, int64 [B].
        :param alike: every row has one tree, behind all of its cells, and the rows are as long as each other.
        """
        head, size = self.head, self.head.config.block_size
        positions = context_length[:, None] + torch.arange(size, device=root.device)
        hidden = head.block(root)
        seen: dict[tuple[int | None, bool], Tensor | None] = {}
        for layer, kind in enumerate(zip(head.config.windows, head.config.causal, strict=True)):
            if kind not in seen:
                plain = alike and kind == (None, False)
                seen[kind] = None if plain else self._visible(context_length, positions, *kind)
            query, key, value = head.project(layer, hidden, positions)
            key, value = self._with_text(layer, key, value)
            attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=seen[kind], enable_gqa=True)
            hidden = head.finish(layer, hidden, attended.transpose(1, 2).flatten(2))
        return head.logits(hidden)

    def _with_text(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, kv heads, cells + S, d] of a layer: the text's, and behind them a block's [B, S, kv heads, d]."""
        cells, trees, size = self._cells, len(key), key.shape[1]
        if trees == len(cells):  # where the next committed places will be written over them
            cells.write(key, value, cells.longest, layer)
            return tuple(part[layer][:, :, : cells.longest + size] for part in (cells.keys, cells.values))
        text = (part[layer][:, :, : cells.longest].expand(trees, -1, -1, -1) for part in (cells.keys, cells.values))
        return tuple(torch.cat([part, new.transpose(1, 2)], dim=2) for part, new in zip(text, (key, value), strict=True))

    def _visible(self, context_length: Tensor, positions: Tensor, window: int | None, causal: bool) -> Tensor:
        """Which cells the places of the blocks see, bool [B, 1, S, cells + S]."""
        cell = torch.arange(self._cells.longest, device=positions.device)
        text = seen_text(cell, context_length, positions, window)
        return torch.cat([text, seen_block(positions, window, causal).expand(len(positions), -1, -1)], dim=2)[:, None]


def seen_text(cell: Tensor, context_length: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Which of the places ``cell`` int64 [C] of the text before them the places of blocks see, bool [B, S, C].

    :param context_length: of the text, int64 [B].   :param positions: of the blocks, int64 [B, S].
    """
    seen = (cell < context_length[:, None])[:, None].expand(-1, positions.shape[1], -1)
    return seen if window is None else seen & (positions[:, :, None] - cell < window)


def seen_block(positions: Tensor, window: int | None, causal: bool) -> Tensor:
    """Which places of a block the places of it see, bool [S, S]."""
    place = torch.arange(positions.shape[1], device=positions.device)
    ahead = place - place[:, None]  # of the seen place before the seeing one
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if window is None else seen & (ahead.abs() < window)
