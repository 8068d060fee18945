"""An EAGLE head as a draft network: tree attention over a committed part of true features.

Li et al. 2025, "EAGLE-3" (https://arxiv.org/abs/2503.01840), and its forerunners, whose head is another (live/eagle1.py). Cell i
consumes the target's feature of place i and the token of place i + 1, at rotary position i; a drafted node consumes the head's own
output of its parent instead of a feature. Those self-made features never survive a cycle: :meth:`advance` recomputes accepted
places from the target's features.

Keys and values of the rows' committed cells lie in one buffer, and behind them the cells of this cycle's trees (live/cells.py). The
trees of one text (R = 1, the recorder's way) share its committed cells and keep their own beside them (live/eagle_trees.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from live.border import fetched, sent
from live.cells import Cells
from live.distribution import Ranked, ranked
from live.eagle1 import Eagle1Head, EagleHead
from live.eagle_trees import SharedTrees, spread
from live.network import Ancestry


class EagleNetwork:
    needs_features = True
    deepest = None
    entropies = True

    def __init__(self, head: EagleHead, name: str = "eagle3", features: slice = slice(None)):
        """:param features: which of the captured numbers are the head's."""
        self.head, self.name, self.features = head, name, features
        self.kind = "eagle" if isinstance(head, Eagle1Head) else "eagle3"
        self.reset(1)

    def reset(self, rows: int) -> None:
        self.entropies = True
        head = self.head
        self._cells = Cells(rows, head.num_kv_heads, head.head_dim, head.fc.weight)
        offsets = head.d2t
        self._target_ids = None if offsets is None else offsets + torch.arange(len(offsets), device=offsets.device)
        self._trees: SharedTrees | None = None  # the trees of one text, where they are several

    def gather_rows(self, rows: Tensor) -> None:
        self._cells.keep(rows)

    def forwards(self) -> list[tuple[object, str]]:
        return [(self, name) for name in ("_caught_up", "_level", "_root_logits")]

    def beside(self) -> EagleNetwork:
        return EagleNetwork(self.head, self.name, self.features)

    def join(self, other: EagleNetwork) -> None:
        self._cells.join(other._cells)

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        device, counts = self._cells.device, fetched(counts)
        positions, place = self._cells.following(counts, tokens.shape[1])
        last = None if everywhere or tokens.shape[1] == 1 else sent((counts - 1)[:, None], device)
        hidden = self._caught_up(sent(tokens.clamp(min=0), device), features, positions, place, last)
        return hidden if everywhere else hidden[:, 0]

    def _caught_up(
        self, tokens: Tensor, features: Tensor, positions: Tensor, place: int | Tensor, last: Tensor | None
    ) -> Tensor:
        """The forward pass of committed cells: outputs [R, T, H] at all of them, or [R, 1, H] at the ``last`` int64 [R, 1] of
        each row: later cells read the keys and values of all, but the output of the last alone.

        :param positions: int64 [R, T]. :param place: where their keys and values go, see :meth:`Cells.write`.
        """
        residual, query, key, value = self.head.project(self.head.fuse(features[..., self.features]), tokens, positions)
        self._cells.write(key, value, place)
        if last is not None:
            residual, query, positions = _at(residual, last), _at(query, last), positions.gather(1, last)
        return self.head.finish(residual, self._attend_committed(query, positions))

    def _attend_committed(self, query: Tensor, positions: Tensor) -> Tensor:
        """Causal attention of committed cells [R, T, heads, d] at ``positions`` int64 [R, T] over their rows."""
        span = self._cells.longest
        last = positions.numel() == 1  # the last cell of a single row, which sees all
        visible = None if last else (torch.arange(span, device=query.device) <= positions[:, :, None])[:, None]
        return self._attention(query, span, visible)

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        lengths, context_length = context_length, sent(context_length, source.device)
        self._trees = None
        cells = self._cells
        if len(source) != len(cells):
            text = (part[0][0, :, : cells.longest] for part in (cells.keys, cells.values))
            self._trees = SharedTrees(self.head, *text, source, context_length)
        else:
            self._prefix, self._before = context_length, context_length - 1  # cells 0 .. context_length - 1
            self._ancestry = Ancestry(len(source), source.device)
            self._hidden = source[:, None]  # each slot's output; the root's is the last committed cell's
            self._all = set(lengths.tolist()) == {cells.longest}
        return self._children(ranked(self._root_logits(source), width, self.entropies))

    def _root_logits(self, source: Tensor) -> Tensor:
        return self.head.logits(source.unsqueeze(1)).squeeze(1)

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        parent, token = sent(parent, self._cells.device), sent(token, self._cells.device)
        if self._trees is not None:
            return self._grow_shared(parent, token, width)
        sees = self._ancestry.add(parent)[:, :, 1:]  # the root has no cell in the tree
        position = self._ancestry.below(self._before, parent.shape[1])
        output, logits = self._level(_at(self._hidden, parent), token.clamp(min=0), position, sees)
        self._hidden = torch.cat([self._hidden, output], dim=1)
        return self._children(ranked(logits, width, self.entropies))

    def _level(self, hidden: Tensor, token: Tensor, position: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
        """The forward pass of a level of the trees: outputs [B, W, H] and logits [B, W, Vd] of new slots.

        :param hidden: what they consume [B, W, H]. :param token: int64 [B, W]. :param position: int64 [B, W].
        :param sees: bool [B, W, S], tree cells that each attends to.
        """
        residual, query, key, value = self.head.project(hidden, token, position)
        self._cells.write(key, value, self._cells.longest + sees.shape[2] - token.shape[1])
        output = self.head.finish(residual, self._attend(query, sees))
        return output, self.head.logits(output)

    def _grow_shared(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        """The same for B trees over one text. They grow by different numbers of nodes: the real ones are run side by side."""
        output, real = self._trees.grow(parent, token)
        found = self._children(ranked(self.head.logits(output[None])[0], width, self.entropies))
        return Ranked(*(spread(part, real, token.shape) for part in found))

    def _attend(self, query: Tensor, sees: Tensor) -> Tensor:
        """Attention of tree nodes [B, W, heads, d] to their committed prefix and to tree cells where ``sees`` bool [B, W, S]."""
        if self._all and self._ancestry.straight:
            return self._attention(query, self._cells.longest + sees.shape[2], None)
        committed = torch.arange(self._cells.longest, device=query.device) < self._prefix[:, None, None]
        visible = torch.cat([committed.expand(-1, sees.shape[1], -1), sees], dim=2)
        return self._attention(query, visible.shape[2], visible[:, None])

    def _attention(self, query: Tensor, span: int, visible: Tensor | None) -> Tensor:
        """Attention [B, W, heads * d] over the first ``span`` cells; ``visible`` bool [B, 1, W, span], None: all of them."""
        key, value = (part[0][:, :, :span] for part in (self._cells.keys, self._cells.values))
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=visible, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)

    def _children(self, found: Ranked) -> Ranked:
        """From the draft vocabulary to the target's token ids."""
        return found if self._target_ids is None else Ranked(self._target_ids.take(found.index), found.logprob, found.entropy)


def _at(cells: Tensor, place: Tensor) -> Tensor:
    """Entries [B, W, ...] of cells [B, S, ...] at ``place`` int64 [B, W]."""
    if place.numel() == 1:
        return cells.select(1, int(place))[:, None] if place.is_cpu else cells.index_select(1, place[0])
    index = place.reshape(*place.shape, *[1] * (cells.dim() - 2))
    return cells.gather(1, index.expand(-1, -1, *cells.shape[2:]))
