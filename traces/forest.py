"""The draft forest of many positions of one text: every node any covering policy expands, each expanded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from live.network import DraftNetwork
from policies.contract import Expansion
from policies.drafting import most_children
from policies.order import NONE
from policies.tree import Children, DraftTree

GROWABLE = ("parent", "rank", "depth", "token", "logprob", "entropy", "child_token", "child_logprob", "child_row")


class ForestDrafter:
    """A drafter that remembers: a node expanded before is answered from memory, a new one by the network.

    B trees, one per position; row r of a tree's memory is the network's slot r, row 0 the root. Several policies draft side by
    side, and the union of their expansions is left here: a level's new nodes, whoever wants them, are one draft forward, as wide
    levels cost far less per node than narrow ones. A child's handle is its parent's row * K + rank.
    """

    def __init__(self, network: DraftNetwork, source: Tensor, root: Tensor, context_length: Tensor, fanout: int):
        """:param source: what ``network.advance`` returned for these positions [B, X]. :param fanout: children kept, K."""
        self.network, self.deepest = network, network.deepest
        trees, device = len(root), root.device
        found = network.open(source, context_length, fanout)
        self.fanout = fanout = found.index.shape[1]
        self.parent = torch.full((trees, 1), NONE, device=device)
        self.rank = torch.full((trees, 1), NONE, device=device)
        self.depth = torch.zeros((trees, 1), dtype=torch.int64, device=device)
        self.token = root[:, None].clone()
        self.logprob = torch.zeros((trees, 1), device=device)
        self.entropy = found.entropy[:, None]
        self.child_token = found.index[:, None]
        self.child_logprob = found.logprob[:, None]
        self.child_row = torch.full((trees, 1, fanout), NONE, device=device)

    def preload(self, rows: dict[str, Tensor]) -> None:
        """Take over recorded expansions, so that only what is missing is drafted anew; the recorded numbers stay.

        :param rows: [B, S'] tensors ``parent``, ``rank``, ``depth``, ``token``, ``logprob``, ``entropy`` and [B, S', K]
            ``child_token``, ``child_logprob``; row 0 is the root, rows of one depth lie together, -1 tokens are padding.
            The network runs the nodes again for its own memory of them (keys and values); its answers are not used.
        """
        depths = rows["depth"].max(0).values  # of each row; padding within a depth is -1
        for depth in range(1, int(depths.max()) + 1):
            level = (depths == depth).nonzero()[:, 0]
            self.network.grow(rows["parent"][:, level].clamp(min=0), rows["token"][:, level], self.fanout)
        root = self.token[:, :1]  # rows of a recording do not hold it
        for name in GROWABLE:
            if name != "child_row":
                setattr(self, name, rows[name])
        self.token = torch.cat([root, self.token[:, 1:]], dim=1)
        trees, count = rows["token"].shape
        place = rows["parent"] * self.fanout + rows["rank"]
        place = place.masked_fill((rows["token"] < 0) | (rows["depth"] == 0), count * self.fanout)
        own = torch.arange(count, device=place.device).expand_as(place)
        table = torch.full((trees, count * self.fanout + 1), NONE, device=place.device)
        self.child_row = table.scatter(1, place, own)[:, :-1].reshape(trees, count, self.fanout)

    @property
    def exists(self) -> Tensor:
        """bool [B, S]: rows that hold an expansion; the rest is padding."""
        return self.token >= 0

    def expand(self, trees: Sequence[DraftTree], wishes: Sequence[Expansion]) -> list[Children]:
        """The children of what several policies wish for, each in a tree of its own; what is new, by one draft forward."""
        nodes = torch.cat([wish.nodes for wish in wishes], dim=1)
        handle = torch.cat([tree.at("handle", wish.nodes) for tree, wish in zip(trees, wishes, strict=True)], dim=1)
        row = self._known_rows(nodes, handle)
        unknown = (nodes >= 0) & (row < 0)
        if bool(unknown.any()):
            self._grow(_distinct(handle, unknown))
            row = self._known_rows(nodes, handle)
        return self._answers(row.clamp(min=0), nodes, wishes)

    def _known_rows(self, nodes: Tensor, handle: Tensor) -> Tensor:
        row = self.child_row.flatten(1).gather(1, handle.clamp(min=0))
        return torch.where(nodes == 0, 0, row)

    def _grow(self, handle: Tensor) -> None:
        """Run the network on new nodes [B, W] (handle -1 = padding) and remember its answer."""
        padding, place = handle < 0, handle.clamp(min=0)
        parent, rank = place // self.fanout, place % self.fanout
        token = self.child_token.flatten(1).gather(1, place).masked_fill(padding, NONE)
        found = self.network.grow(parent, token, self.fanout)
        size = self.token.shape[1]
        tree, column = (~padding).nonzero(as_tuple=True)
        self.child_row.flatten(1)[tree, handle[tree, column]] = size + column
        new = {
            "parent": parent.masked_fill(padding, NONE),
            "rank": rank.masked_fill(padding, NONE),
            "depth": (self.depth.gather(1, parent) + 1).masked_fill(padding, NONE),
            "token": token,
            "logprob": self.child_logprob.flatten(1).gather(1, place).masked_fill(padding, 0.0),
            "entropy": found.entropy,
            "child_token": found.index,
            "child_logprob": found.logprob,
            "child_row": torch.full_like(found.index, NONE),
        }
        for name in GROWABLE:
            setattr(self, name, torch.cat([getattr(self, name), new[name]], dim=1))

    def _answers(self, row: Tensor, nodes: Tensor, wishes: Sequence[Expansion]) -> list[Children]:
        """From rows int64 [B, M] of the memory, side by side, to one answer for each wish."""
        tree = torch.arange(len(row), device=row.device)[:, None]
        nothing = nodes < 0
        columns = Children(
            token=self.child_token[tree, row].masked_fill(nothing[:, :, None], NONE),
            logprob=self.child_logprob[tree, row].masked_fill(nothing[:, :, None], -torch.inf),
            entropy=self.entropy[tree, row].masked_fill(nothing, -1.0),
            handle=row[:, :, None] * self.fanout + torch.arange(self.fanout, device=row.device),
        )
        sizes = [wish.nodes.shape[1] for wish in wishes]
        split = zip(*(column.split(sizes, dim=1) for column in columns[:4]), strict=True)
        widths = [min(most_children(wish), self.fanout) for wish in wishes]
        return [
            Children(token[:, :, :width], logprob[:, :, :width], entropy, handle[:, :, :width])
            for width, (token, logprob, entropy, handle) in zip(widths, split, strict=True)
        ]


def _distinct(handle: Tensor, wanted: Tensor) -> Tensor:
    """The different handles int64 [B, M] where ``wanted`` bool [B, M], each once, ascending: [B, W], -1 behind the last.

    So a level's rows stand in the order of their parents and ranks, whoever asked for them first and whatever other trees hold.
    """
    beyond = torch.iinfo(torch.int64).max
    found = handle.masked_fill(~wanted, beyond).sort(dim=1).values
    found[:, 1:] = found[:, 1:].masked_fill(found[:, 1:] == found[:, :-1], beyond)
    found = found.sort(dim=1).values
    count = int((found < beyond).sum(1).max())
    return found[:, :count].masked_fill(found[:, :count] == beyond, NONE)
