"""Many EAGLE trees over one text, grown side by side: the recorder's way.

Every node is one place of a flat memory, whatever tree it is of, in the order of coming; the roots lie first. A node attends to
the text up to its root, whose keys and values are read once for all trees, and to the nodes on the path down to it: nothing is
worked out for cells that it does not see, and a level's trees may grow by different numbers of nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from live.cells import with_room
from live.distribution import IN_CACHE
from live.eagle1 import EagleHead


class SharedTrees:
    """B trees, and the committed cells of the one text they stand on."""

    def __init__(self, head: EagleHead, key: Tensor, value: Tensor, source: Tensor, prefix: Tensor):
        """:param key: the text's keys [kv heads, cells, d]. :param value: its values. :param source: outputs of the roots' cells
        [B, H]. :param prefix: cells up to each root, its own included, int64 [B]."""
        self.head, self._text, self._prefix = head, (key, value), prefix
        trees, device = len(source), source.device
        self._count = trees  # nodes in memory; the tensors may have room for more
        self._hidden = source  # what a node's children consume [N, H]
        self._key = key.new_zeros((len(key), trees, key.shape[2]))  # [kv heads, N, d]; the roots' own lie in the text
        self._value = torch.zeros_like(self._key)
        self._above = torch.arange(trees, device=device)  # place of each node's parent int64 [N]; a root is its own
        self._depth = torch.zeros_like(self._above)
        self._place = self._above[:, None]  # place of each slot int64 [B, S]

    def grow(self, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Run the head on new slots: children of the slots ``parent`` int64 [B, W], with tokens int64 [B, W] (-1 = padding).

        Returns (outputs [N, H] of the real ones, where those stand in the level: int64 [N], counted row by row).
        """
        real = (token >= 0).flatten().nonzero()[:, 0]
        above = self._place.gather(1, parent).take(real)
        depth = self._depth[above] + 1
        prefix = self._prefix[real // token.shape[1]]
        hidden = self._hidden[above][None]
        residual, query, key, value = self.head.project(hidden, token.take(real)[None], (prefix + depth - 1)[None])
        first, self._count = self._count, self._count + len(real)
        self._key = _kept(self._key, 1, first, key[0].transpose(0, 1))
        self._value = _kept(self._value, 1, first, value[0].transpose(0, 1))
        self._above, self._depth = _kept(self._above, 0, first, above), _kept(self._depth, 0, first, depth)
        own = torch.arange(first, self._count, device=real.device)
        output = self.head.finish(residual, self._attend(query[0], own, depth, prefix)[None])[0]
        self._hidden = _kept(self._hidden, 0, first, output)
        self._place = torch.cat([self._place, spread(own, real, token.shape)], dim=1)
        return output, real

    def _attend(self, query: Tensor, own: Tensor, depth: Tensor, prefix: Tensor) -> Tensor:
        """Attention [N, heads * d] of the nodes at places ``own`` int64 [N] by queries [N, heads, d]; on a CPU as many nodes at a
        time as its cache holds the scores of."""
        nodes, heads, size = query.shape
        query = (query * size**-0.5).view(nodes, len(self._key), -1, size).transpose(0, 1)  # [g, N, n, d], n heads share a key
        shallowest, deepest = depth.aminmax()
        path = [own]  # upwards; above its first node a shorter path goes on with the root
        for _ in range(int(deepest) - 1):
            path.append(self._above[path[-1]])
        path = torch.stack(path, dim=1)
        absent = None if shallowest == deepest else path < len(self._prefix)
        some = nodes
        if query.device.type == "cpu":
            some = max(1, IN_CACHE // (heads * (self._text[0].shape[1] + path.shape[1])))
        attended = [
            self._attend_some(query[:, part], path[part], None if absent is None else absent[part], prefix[part])
            for part in (slice(start, start + some) for start in range(0, nodes, some))
        ]
        return torch.cat(attended, dim=1).transpose(0, 1).reshape(nodes, -1)

    def _attend_some(self, query: Tensor, path: Tensor, absent: Tensor | None, prefix: Tensor) -> Tensor:
        """The same [g, N, n, d] of some queries [g, N, n, d]; ``path`` int64 [N, D], ``absent`` bool [N, D]: where it has ended."""
        groups, nodes, shared, size = query.shape
        seen, span = (int(end) for end in prefix.aminmax())  # all see the text's first ``seen`` cells, none one from ``span`` on
        (key, value), query = (part[:, :span] for part in self._text), query.reshape(groups, -1, size)
        own_key, own_value = (
            part.index_select(1, path.flatten()).view(groups * nodes, -1, size) for part in (self._key, self._value)
        )
        scores = query.new_empty((groups, nodes, shared, span + path.shape[1]))
        torch.bmm(query, key.mT, out=scores.flatten(1, 2)[..., :span])
        scores[..., span:] = torch.bmm(query.reshape(-1, shared, size), own_key.mT).view(groups, nodes, shared, -1)
        if seen < span:
            behind = torch.arange(seen, span, device=prefix.device) >= prefix[:, None]
            scores[..., seen:span].add_(_bias(behind, scores.dtype)[:, None])
        if absent is not None:
            scores[..., span:].add_(_bias(absent, scores.dtype)[:, None])
        weight = torch.softmax(scores if scores.dtype == torch.float64 else scores.float(), dim=-1).to(query.dtype)
        far = torch.bmm(weight.flatten(1, 2)[..., :span], value).view(-1, shared, size)
        return torch.baddbmm(far, weight.flatten(0, 1)[..., span:], own_value).view(groups, nodes, shared, size)


def spread(values: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
    """Values [N, ...] of the real nodes at places ``real`` int64 [N] of a level [B, W, ...], zeros between them."""
    if len(real) == shape.numel():
        return values.view(*shape, *values.shape[1:])
    whole = values.new_zeros((shape.numel(), *values.shape[1:]))
    whole[real] = values
    return whole.view(*shape, *values.shape[1:])


def _kept(memory: Tensor, axis: int, first: int, new: Tensor) -> Tensor:
    """The memory with new entries from ``first`` on along an axis."""
    memory = with_room(memory, axis, first + new.shape[axis])
    memory.narrow(axis, first, new.shape[axis]).copy_(new)
    return memory


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores where ``hidden`` bool [...]: adding is several times as fast as filling under a mask."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
