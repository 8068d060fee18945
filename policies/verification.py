"""Verification and the acceptance walk: the same code behind a recorded verifier and behind a model."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from policies.contract import Cycle
from policies.errors import BrokenDraft, UserError
from policies.one_row import accepted_path, alone, integers, packed, status_of
from policies.order import NONE
from policies.tree import DraftTree


class Kept(NamedTuple):
    """The kept nodes, packed for verification in node order; place 0 is the root. Padding is -1.

    node    int64 [B, V]  index in the draft tree
    token   int64 [B, V]
    parent  int64 [B, V]  place of the parent in this list, -1 for the root
    depth   int64 [B, V]  0 for the root
    count   int64 [B]     kept nodes, without the root; ``verified = count + 1``
    """

    node: Tensor
    token: Tensor
    parent: Tensor
    depth: Tensor
    count: Tensor


class Walk(NamedTuple):
    """The accepted path.

    path      int64 [B, A]  places in the :class:`Kept` list of the accepted nodes, without the root, -1 behind the last
    accepted  int64 [B]     its length
    bonus     int64 [B]     the target's token behind the last accepted node, -1 when that node ends the sequence
    """

    path: Tensor
    accepted: Tensor
    bonus: Tensor


class Verifier(Protocol):
    """Chooses the target's tokens. Two implementations: recorded (in sim) and model-backed (in live)."""

    def accept(self, cycle: Cycle, kept: Kept) -> Walk:
        """Verify the kept nodes and walk the target's path."""

    def target_top(self, cycle: Cycle, kept: Kept, walk: Walk) -> tuple[Tensor, Tensor]:
        """The target's top-M tokens int64 [B, A+1, M] and raw log-probs float32 at the root and the accepted nodes."""


def _unpacked(tree: DraftTree, policy: str) -> UserError:
    """Whose fault it is that a node is kept whose parent is not: scores that are no numbers have no order to keep."""
    if bool(tree.score.isnan().any()):
        return BrokenDraft("the draft's probabilities are not numbers (NaN): use another --dtype, or check the draft's weights")
    return UserError(f"{policy} keeps a node whose parent it drops: `select` must return an ancestor-closed set")


def pack(tree: DraftTree, kept: Tensor, policy: str = "the policy") -> Kept:
    """Pack the kept nodes bool [B, N] of a tree, in node order, and check that every kept node's parent is kept."""
    if alone(kept):
        columns = packed(kept.numpy()[0].nonzero()[0].tolist(), *tree.listed("token", "parent", "depth"))
        if columns is None:
            raise _unpacked(tree, policy)
        return Kept(*integers(columns, kept).split(1), integers([len(columns[0]) - 1], kept))
    if bool(kept.all()):  # all is kept: a node's place is its index
        node = torch.arange(tree.width, device=kept.device).expand_as(kept)
        return Kept(node, tree.token, tree.parent, tree.depth, torch.full_like(tree.size, tree.width - 1))
    node = packed_columns(kept)
    padding = node < 0 if int(node.min()) < 0 else None

    def own(values: Tensor, empty: int) -> Tensor:
        return values if padding is None else values.masked_fill(padding, empty)

    parent, ascending = own(tree.at("parent", node), NONE), own(node, tree.width)
    inner = parent >= 0
    place = torch.searchsorted(ascending, parent)
    if bool((inner & (ascending.gather(1, place) != parent)).any()):
        raise _unpacked(tree, policy)
    return Kept(
        node=node,
        token=own(tree.at("token", node), NONE),
        parent=torch.where(inner, place, parent),
        depth=own(tree.at("depth", node), NONE),
        count=torch.full_like(tree.size, node.shape[1] - 1) if padding is None else (~padding).sum(1) - 1,
    )


def packed_columns(chosen: Tensor) -> Tensor:
    """The chosen columns of each row of bool [B, N], ascending: int64 [B, V], -1 behind a row's last one."""
    row, column = chosen.nonzero(as_tuple=True)
    if len(chosen) == 1:
        return column[None]
    count = torch.bincount(row, minlength=len(chosen))
    width = int(count.max()) if len(chosen) else 0
    if len(column) == len(chosen) * width:
        return column.view(len(chosen), width)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    packed = torch.full((len(chosen), width), NONE, device=row.device)
    return packed.index_put_((row, place), column)


def walk(kept: Kept, choice: Tensor) -> Walk:
    """Follow the target's own tokens through the kept tree.

    :param choice: int64 [B, V], the target's token behind each kept node (greedy, or the inverse CDF at the stored
        uniform number); -1 where the sequence has ended. If it is among the kept children the walk goes on, else it is
        the bonus (Leviathan et al. 2023 for a deterministic proposal: lossless by construction at any temperature).
    """
    if alone(choice):
        path, bonus = accepted_path(kept.token[0].tolist(), kept.parent[0].tolist(), choice[0].tolist())
        return Walk(integers([path], choice), integers([len(path)], choice), integers([bonus], choice))
    chosen = (kept.token == choice.gather(1, kept.parent.clamp(min=0))) & (kept.parent >= 0)
    candidate = packed_columns(chosen)  # the few nodes that are what the target says behind their own parent
    above = kept.parent.gather(1, candidate.clamp(min=0)).masked_fill(candidate < 0, NONE)
    current = torch.zeros_like(kept.count)
    accepted = torch.zeros_like(candidate, dtype=torch.bool)
    for own, parent, taken in zip(candidate.unbind(1), above.unbind(1), accepted.unbind(1), strict=True):
        torch.eq(parent, current, out=taken)  # in node order, so that a parent comes before its children
        current = torch.where(taken, own, current)
    step = packed_columns(accepted)
    path = candidate.gather(1, step.clamp(min=0)).masked_fill(step < 0, NONE)
    return Walk(path, accepted.sum(1), choice.gather(1, current[:, None])[:, 0])


def node_status(tree: DraftTree, kept: Kept, outcome: Walk) -> Tensor:
    """Status int8 [B, N] of every tree node: 1 accepted, 0 rejected (its parent was accepted), -1 untested or not kept.

    Behind an accepted end of sequence the target chooses nothing, so nothing is tested there.
    """
    if alone(kept.token):
        path, ended = [place for place in outcome.path[0].tolist() if place >= 0], int(outcome.bonus) < 0
        return torch.from_numpy(status_of(kept.node[0].tolist(), kept.parent[0].tolist(), path, ended, tree.width))
    rows, end = kept.token.shape
    on_path = torch.zeros((rows, end + 1), dtype=torch.bool, device=tree.device)
    on_path.scatter_(1, outcome.path.masked_fill(outcome.path < 0, end), True)  # the last column catches the padding
    on_path[:, 0] = True
    tested = on_path.gather(1, kept.parent.clamp(min=0)) & (kept.parent >= 0)
    if bool((outcome.bonus < 0).any()):
        # places grow along the path, and the root's is 0
        last = torch.nn.functional.pad(outcome.path, (1, 0)).clamp(min=0).amax(1)
        tested = tested & ~((kept.parent == last[:, None]) & (outcome.bonus < 0)[:, None])
    status = on_path[:, :end].to(torch.int8).masked_fill_(~tested, NONE)
    column = torch.full((rows, tree.width + 1), NONE, dtype=torch.int8, device=tree.device)
    place = kept.node.masked_fill(kept.node < 0, tree.width)
    return column.scatter_(1, place, status)[:, : tree.width]
