"""What a policy notes beside each node of a tree that grows: a column of its state, as wide as the tree by then."""

from __future__ import annotations

from torch import Tensor

from policies.order import NONE
from policies.tree import DraftTree


def with_marks(tree: DraftTree, known: Tensor, nodes: Tensor, value: Tensor) -> Tensor:
    """``known`` [B, n <= N] widened to the tree's N columns with -1, and ``value`` [B, M] written at ``nodes`` [B, M].

    :param nodes: int64 node indices, -1 = none (its value is dropped).
    """
    column = known.new_full((tree.rows, tree.width + 1), NONE)  # one column too many catches the values of no node
    column[:, : known.shape[1]] = known
    return column.scatter(1, nodes.masked_fill(nodes < 0, tree.width), value.to(column.dtype))[:, : tree.width]
