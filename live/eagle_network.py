"""The EAGLE-3 head as a draft network: tree attention over a committed part of true features.

Li et al. 2025, "EAGLE-3" (https://arxiv.org/abs/2503.01840). Cell i consumes the target's feature of place i and the token
of place i + 1, at rotary position i; a drafted node consumes the head's own output of its parent instead of a feature.
Those self-made features never survive a cycle: :meth:`advance` recomputes accepted places from the target's features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from live.distribution import Ranked, ranked
from live.eagle3 import Eagle3Head
from live.network import Ancestry, Slots


class EagleNetwork:
    kind = "eagle3"
    needs_features = True
    entropies = True

    def __init__(self, head: Eagle3Head, name: str = "eagle3"):
        self.head, self.name = head, name
        self.reset(1)

    def reset(self, rows: int) -> None:
        self.entropies = True
        head = self.head
        like = next(head.parameters())
        self._key = like.new_empty((rows, 0, head.num_kv_heads, head.head_dim))
        self._value = torch.empty_like(self._key)
        self._length = torch.zeros(rows, dtype=torch.int64, device=like.device)

    def gather_rows(self, rows: Tensor) -> None:
        self._key, self._value, self._length = self._key[rows], self._value[rows], self._length[rows]

    def forwards(self) -> list[tuple[object, str]]:
        own = [(self, name) for name in ("_attend", "_attend_committed")]
        return own + [(self.head, name) for name in ("fuse", "project", "finish", "logits")]

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        head, rows, count = self.head, *tokens.shape
        hidden = head.fuse(features)
        places = torch.arange(count, device=tokens.device)
        positions = self._length[:, None] + places
        query, key, value = head.project(hidden, tokens.clamp(min=0), positions)
        self._reserve(int(self._length.max()) + count)
        row = torch.arange(rows, device=tokens.device)[:, None]
        self._key[row, positions], self._value[row, positions] = key, value
        attended = self._attend_committed(query, positions, int(self._length.max()) + count)
        hidden = head.finish(hidden, attended)
        self._length = self._length + counts
        if everywhere:
            return hidden
        return hidden.gather(1, (counts - 1)[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]

    def _attend_committed(self, query: Tensor, positions: Tensor, span: int) -> Tensor:
        """Causal attention of committed cells [R, T, heads, d] at ``positions`` int64 [R, T] over the first ``span`` cells."""
        visible = torch.arange(span, device=query.device) <= positions[:, :, None]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            self._heads(self._key[:, :span]),
            self._heads(self._value[:, :span]),
            attn_mask=visible[:, None],
        )
        return attended.transpose(1, 2).flatten(2)

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        self._prefix = context_length  # cells 0 .. context_length - 1
        self._ancestry = Ancestry(len(source), source.device)
        self._hidden = Slots(source[:, None])  # each slot's output; the root's is the last committed cell's
        nothing = self._key.new_zeros((len(source), 1, self.head.num_kv_heads, self.head.head_dim))
        self._tree_key, self._tree_value = Slots(nothing), Slots(nothing)
        return self._children(ranked(self.head.logits(source[:, None])[:, 0], width, self.entropies))

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        above = self._ancestry.add(parent)
        depth = self._ancestry.depth[:, -parent.shape[1] :]
        tree = torch.arange(len(parent), device=parent.device)[:, None].expand_as(parent)
        hidden = self._hidden.values
        hidden = hidden.gather(1, parent[:, :, None].expand(-1, -1, hidden.shape[-1]))
        real = None
        if len(parent) > len(self._key):  # many trees of one text grow by different numbers of nodes: leave the padding out
            real = token >= 0
            above, depth, tree, token, hidden = (part[real][None] for part in (above, depth, tree, token, hidden))
        prefix = self._prefix[tree]
        query, key, value = self.head.project(hidden, token.clamp(min=0), prefix + depth - 1)
        self._tree_key.append(_spread(key, real))
        self._tree_value.append(_spread(value, real))
        output = self.head.finish(hidden, self._attend(query, above, tree, prefix))
        self._hidden.append(_spread(output, real))
        found = self._children(ranked(self.head.logits(output), width, self.entropies))
        return Ranked(*(_spread(part, real) for part in found))

    def _attend(self, query: Tensor, above: Tensor, tree: Tensor, prefix: Tensor) -> Tensor:
        """Attention of tree nodes [B, W, heads, d] to their committed ``prefix`` int64 [B, W] and to their ancestors' slots
        [B, W, D] in the trees int64 [B, W]."""
        trees, count, heads, size = query.shape
        rows, groups = self._key.shape[0], self.head.num_kv_heads
        shared = heads // groups
        span = int(self._prefix.max())
        query = query.reshape(trees, count, groups, shared, size) * size**-0.5
        committed_key = self._key[:, :span].permute(0, 2, 3, 1)  # [R, groups, d, span]
        folded = query.reshape(rows, trees // rows * count, groups, shared, size).permute(0, 2, 1, 3, 4)
        far = folded.reshape(rows, groups, -1, size) @ committed_key
        far = far.reshape(rows, groups, trees // rows, count, shared, span).permute(0, 2, 3, 1, 4, 5)
        far = far.reshape(trees, count, groups, shared, span)
        hidden_cells = torch.arange(span, device=query.device) >= prefix[:, :, None]
        far = far.masked_fill(hidden_cells[:, :, None, None], -torch.inf)
        place = tree[:, :, None], above.clamp(min=0)
        near = (query[:, :, None] * self._tree_key.values[place][:, :, :, :, None]).sum(-1).permute(0, 1, 3, 4, 2)
        near = near.masked_fill((above < 0)[:, :, None, None], -torch.inf)
        scores = torch.cat([far, near], dim=-1)
        weight = torch.softmax(scores if scores.dtype == torch.float64 else scores.float(), dim=-1).to(query.dtype)
        far_weight = weight[..., :span].reshape(rows, trees // rows * count, groups, shared, span).permute(0, 2, 1, 3, 4)
        committed_value = self._value[:, :span].permute(0, 2, 1, 3)
        far_sum = far_weight.reshape(rows, groups, -1, span) @ committed_value
        far_sum = far_sum.reshape(rows, groups, -1, shared, size).permute(0, 2, 1, 3, 4).reshape(trees, count, groups, shared, size)
        near_value = self._tree_value.values[place]
        near_sum = (weight[..., span:].permute(0, 1, 4, 2, 3)[..., None] * near_value[:, :, :, :, None]).sum(2)
        return (far_sum + near_sum).reshape(trees, count, heads * size)

    def _children(self, found: Ranked) -> Ranked:
        """From the draft vocabulary to the target's token ids (d2t holds offsets)."""
        if self.head.d2t is None:
            return found
        return found._replace(index=found.index + self.head.d2t[found.index])

    def _heads(self, cells: Tensor) -> Tensor:
        """[R, S, kv heads, d] as [R, heads, S, d] for attention."""
        return cells.transpose(1, 2).repeat_interleave(self.head.num_heads // self.head.num_kv_heads, dim=1)

    def _reserve(self, cells: int) -> None:
        missing = cells - self._key.shape[1]
        if missing > 0:
            missing = max(missing, self._key.shape[1])  # doubling: growth costs little per token
            self._key, self._value = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in (self._key, self._value))


def _spread(values: Tensor, real: Tensor | None) -> Tensor:
    """Values [1, N, ...] of the N nodes that are real, back among the padding: [B, W, ...] (zeros there); else as they are."""
    if real is None:
        return values
    whole = values.new_zeros((*real.shape, *values.shape[2:]))
    whole[real] = values[0]
    return whole
