"""The draft tree: what a policy sees while drafting, for a batch of B cycles at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from policies.children import Children, ChildTable, StoredChildren, topk_entropy
from policies.families import Expanded, Families, Listed, answered, layout, packed_level, root_columns, topk_entropies, write_in
from policies.one_row import alone, integers, nodes_in
from policies.order import NONE, best, best_of_few


class DraftTree:
    """A batch of B draft trees as padded tensors [B, N]; node 0 is the root, the committed token of the cycle.

    Nodes are appended level by level: in frontier order (score descending, index ascending), then by rank among
    siblings. Rows are packed: row b uses columns 0 .. size[b] - 1, so a node's index does not depend on the rest of the
    batch.

    token    int64   target token id, -1 in padding
    parent   int64   node index of the parent, -1 for the root and in padding
    depth    int64   0 for the root, -1 in padding
    rank     int64   place among the siblings, 0 = most probable; -1 for the root and in padding
    logprob  float32 draft log q (nats) given the parent; 0 for the root, -inf in padding
    score    float32 path log-probability (nats): sum of logprob from the root; 0 for the root, -inf in padding
    expanded bool    the draft has been run on this node
    entropy  float32 entropy (nats) of an expanded node's next-token distribution, full vocabulary; -1 if not expanded
    topk_entropy float32 the same over the renormalised top-K that the policy asked for
    handle   int64   private to the drafter
    size     int64 [B] nodes of each row
    levels   int     draft forwards so far (the root's distribution is the first)

    Columns are made when they are read; do not write into them. To read a few nodes only, :meth:`at` is cheaper.

    Inside, a level is a block of *slots* [B, W * K], one for each child that was asked for. A slot may be empty; a node's index
    counts the filled ones before its own. The children of one expanded node are a *family*: they share parent and depth.
    """

    PER_FAMILY = ("parent", "depth", "row")
    EMPTY = {"token": NONE, "parent": NONE, "depth": NONE, "rank": NONE, "handle": NONE, "logprob": -torch.inf, "score": -torch.inf}

    def __init__(self, root_token: Tensor, needs: frozenset[str] = frozenset()):
        """:param root_token: int64 [B]. :param needs: the optional columns to keep: "entropy", "topk_entropy"."""
        rows, device = root_token.shape[0], root_token.device
        self.rows, self.device, self.needs, self.levels = rows, device, needs, 0
        none, zero = root_columns(rows, device)
        self._root_token = root_token[:, None].to(torch.int64)
        self._newest = {"token": self._root_token, "logprob": zero, "score": zero, "handle": none, "parent": none, "row": none}
        self._parts = {name: [part] for name, part in self._newest.items()}
        self._table: ChildTable | None = None  # answers for tokens and handles, while all levels lie in it
        self._shapes = [(1, 1)]
        self._expansions: list[Expanded] = []
        self._start, self._slots, self._fanout = 0, 1, 1
        self._even = True  # every level holds the nodes of one depth: its number says it
        self._size: Tensor | None = None  # int64 [B]; None while no slot is empty
        self._slot: Tensor | None = None  # int64 [B, N]: slot of each node, -1 padding; None while no slot is empty
        self._newest_node: Tensor | None = None  # int64 [B, M]: node in each slot of the newest level, -1 = empty
        self._forget()

    @property
    def width(self) -> int:
        """Columns N: the size of the largest row."""
        return self._slots if self._slot is None else self._slot.shape[1]

    @property
    def size(self) -> Tensor:
        return self._root_token.new_full((self.rows,), self._slots) if self._size is None else self._size

    @property
    def ragged(self) -> bool:
        """Whether rows may have padding."""
        return self._slot is not None

    @property
    def token(self) -> Tensor:
        return self._column("token")

    @property
    def parent(self) -> Tensor:
        return self._column("parent")

    @property
    def depth(self) -> Tensor:
        return self._column("depth")

    @property
    def rank(self) -> Tensor:
        return self._column("rank")

    @property
    def handle(self) -> Tensor:
        return self._column("handle")

    @property
    def logprob(self) -> Tensor:
        return self._column("logprob")

    @property
    def score(self) -> Tensor:
        return self._column("score")

    @property
    def expanded(self) -> Tensor:
        return self._of_expanded("expanded", lambda part: torch.ones_like(part.place, dtype=torch.bool), False)

    @property
    def entropy(self) -> Tensor:
        self._must_be_asked("entropy")
        return self._of_expanded("entropy", lambda part: part.children.entropy, -1.0)

    @property
    def topk_entropy(self) -> Tensor:
        self._must_be_asked("topk_entropy")
        return self._of_expanded("topk_entropy", lambda part: topk_entropy(part.children.logprob), -1.0)

    def topk_entropy_at(self, nodes: Tensor) -> Tensor:
        """:attr:`topk_entropy` of a few ``nodes`` int64 [B, W], without working it out for all."""
        self._must_be_asked("topk_entropy")
        return topk_entropies(self._expansions, nodes)

    def _must_be_asked(self, name: str) -> None:
        if name not in self.needs:
            raise AttributeError(f"the policy reads tree.{name} but does not name it in its `needs`")

    @property
    def exists(self) -> Tensor:
        """bool [B, N]: not padding."""
        if self._slot is None:
            return torch.ones((self.rows, self.width), dtype=torch.bool, device=self.device)
        return self._slot >= 0

    def drafted(self) -> Tensor:
        """bool [B, N]: every node but the root."""
        exists = self.exists
        exists[:, 0] = False
        return exists

    def root_nodes(self) -> Tensor:
        """The frontier that holds only the root: int64 [B, 1]."""
        return torch.zeros((self.rows, 1), dtype=torch.int64, device=self.device)

    def newest(self) -> tuple[Tensor, Tensor]:
        """Nodes of the last level: (index int64 [B, M], score float32 [B, M]), -1 and -inf where a row has fewer."""
        if self._newest_node is not None:
            return packed_level(self._newest_node, self._newest["score"])
        return torch.arange(self._start, self._slots, device=self.device).expand(self.rows, -1), self._newest["score"]

    def newest_scores(self) -> Tensor:
        """Path log-probabilities float32 [B, W, K] of the last level, by parent and rank; -inf where there is no such node."""
        return self._newest["score"].view(self.rows, -1, self._fanout)

    def newest_families(self) -> Families:
        """The last level, family by family, as it lies in memory: cheaper than :meth:`newest` and the columns."""
        self._must_be_asked("entropy")
        part = self._expansions[-1]
        logprob = self._newest["logprob"].view(*part.place.shape, -1)
        return Families(self._newest_node, self._start, part.place, logprob, part.children.entropy, self._newest["score"])

    def newest_listed(self) -> Listed:
        """The same of a tree that is alone, as numbers on the host."""
        return self.newest_families().listed()

    def listed(self, *names: str) -> list[list]:
        """The columns of a tree that is alone, as numbers on the host."""
        return [self._column(name)[0].tolist() for name in names]

    def frontier(self, count: int) -> Tensor:
        """The ``count`` best nodes of the last level in total order: int64 [B, count'], -1 where a row has fewer."""
        score = self._newest["score"]
        few = best_of_few(score, count)
        return self.frontier_in(best(score, count)) if few is None else self.frontier_of(few)

    def frontier_in(self, slot: Tensor) -> Tensor:
        """The nodes int64 [B, W] in slots int64 [B, W] of the last level, -1 = none; the caller vouches for the total order."""
        if alone(slot):
            return self.frontier_of(slot[0].tolist())
        known = slot.clamp(min=0)
        node = known + self._start if self._newest_node is None else self._newest_node.gather(1, known)
        nodes = node.masked_fill(slot < 0, NONE)
        self._offered = nodes.clone(), known
        return nodes

    def frontier_of(self, slot: list[int]) -> Tensor:
        """The same for a tree that is alone, whose slots are numbers on the host."""
        found = nodes_in(slot, self._newest_node, self._start)
        nodes = integers([found], self._root_token)
        self._offered = nodes.clone(), integers([[max(place, 0) for place in slot]], self._root_token)
        return nodes

    def is_frontier(self, nodes: Tensor) -> bool:
        """Whether these nodes int64 [B, W] are what :meth:`frontier` last gave: in canonical order, of the newest level."""
        if self._offered is None or self._offered[0].shape != nodes.shape or not torch.equal(self._offered[0], nodes):
            return False
        self._located = nodes, self._offered[1], True
        return True

    def at(self, name: str, nodes: Tensor) -> Tensor:
        """The values [B, W] of a column (token, parent, depth, logprob, score, handle) at ``nodes`` int64 [B, W].

        Where there is no node (-1) the value means nothing.
        """
        place, newest = self._locate(nodes)
        if name == "depth" and self._even:
            return self._layout()[2].take(place + self._start if newest else place)
        if name in ("token", "handle") and self._table is not None:
            family = self._family(nodes)
            rank = place - family * self._fanout if newest else self._layout()[1][place]
            row = (self._newest["row"] if newest else self._joined("row")).gather(1, family)
            handle = (row * self._table.fanout + rank).clamp(min=NONE)  # the root has none
            return handle if name == "handle" else torch.where(nodes == 0, self._root_token, self._table.tokens(handle))
        if name in self.PER_FAMILY:
            place = self._family(nodes)
        return (self._newest[name] if newest else self._joined(name)).gather(1, place)

    def path_to(self, end: Tensor, count: int) -> Tensor:
        """``end`` int64 [B] and the ``count`` nodes above it, upwards: int64 [B, count + 1]; the root also stands for what would be
        above itself."""
        path, parent, family = [end[:, None]], self._joined("parent"), self._layout()[0]
        for _ in range(count):
            slot = path[-1] if self._slot is None else self._slot.gather(1, path[-1])
            path.append(parent.gather(1, family.take(slot)).clamp(min=0))
        return torch.cat(path, dim=1)

    def append(self, nodes: Tensor, children: Children | StoredChildren) -> None:
        """Add the children of the expanded ``nodes`` int64 [B, W] (frontier order, -1 = none) as one level."""
        rows, frontier, fanout = children.logprob.shape
        score = self.at("score", nodes)
        if self._even and not self._locate(nodes)[1]:
            self._note_depths()
        new = {"parent": nodes, "logprob": children.logprob.reshape(rows, -1)}
        new["score"] = (score[:, :, None] + children.logprob).reshape(rows, -1)
        if not self._even:
            new["depth"] = self.at("depth", nodes) + 1
        stored = isinstance(children, StoredChildren) and (self.levels == 0 or self._table is children.table)
        if stored:
            self._table = children.table
            new["row"] = children.row
        else:
            self._leave_table()
            new |= {"token": children.token.reshape(rows, -1), "handle": children.handle.reshape(rows, -1)}
        self.levels += 1
        self._start, self._slots, self._fanout = self._slots, self._slots + frontier * fanout, fanout
        self._shapes.append((frontier, fanout))
        self._newest = new
        held, exists, place = children.row[:, :, None] if stored else children.token, None, nodes
        if not held.numel() or int(held.min()) < 0:  # else all have all their children, as is the rule
            exists, families = held >= 0, children.row >= 0 if stored else answered(nodes, children)
            place = nodes.masked_fill(~families, NONE)
        self._expansions.append(Expanded(place, children))
        self._number(exists)
        for name, part in new.items():
            self._parts[name].append(part)
        self._forget()

    def _leave_table(self) -> None:
        """From now on tokens and handles are kept here: a level came that does not lie in the table."""
        if self._table is not None:
            tokens, handles = self._joined("token"), self._joined("handle")
            self._parts["token"], self._parts["handle"], self._table = [tokens], [handles], None

    def _note_depths(self) -> None:
        """From now on depths are kept, by family: a level came whose nodes are not of one depth."""
        level = [level for level, (families, _) in enumerate(self._shapes) for _ in range(families)]
        self._parts["depth"], self._even = [torch.tensor([level], device=self.device).expand(self.rows, -1)], False

    def _number(self, exists: Tensor | None) -> None:
        """Give the newest level's slots node indices: rows stay packed, whatever slots are empty.

        :param exists: bool [B, W, K], or [B, W, 1] where whole families are empty or not; None: no slot is empty.
        """
        if self._slot is None:
            if exists is None or bool(exists.all()):
                return
            self._size = torch.full((self.rows,), self._start, device=self.device)
            self._slot = torch.arange(self._start, device=self.device).expand(self.rows, -1)
        every = torch.ones_like(self._newest["score"], dtype=torch.bool)
        exists = every if exists is None else exists.expand(-1, -1, self._fanout).reshape(self.rows, -1)
        self._newest["score"] = self._newest["score"].masked_fill(~exists, -torch.inf)
        node = (self._size[:, None] + exists.cumsum(1) - 1).masked_fill(~exists, NONE)
        self._size = self._size + exists.sum(1)
        width = max(int(self._size.max()), self.width)
        slot = torch.arange(self._start, self._slots, device=self.device).expand_as(node)
        column = torch.nn.functional.pad(self._slot, (0, width + 1 - self._slot.shape[1]), value=NONE)
        self._slot = column.scatter(1, node.masked_fill(~exists, width), slot)[:, :width]  # the last catches the empty
        self._newest_node = node

    def _forget(self) -> None:
        """Drop what was derived from the levels before the newest one came."""
        self._read: dict[str, Tensor] = {}
        self._offered: tuple[Tensor, Tensor] | None = None
        self._located: tuple[Tensor | None, Tensor | None, bool] = None, None, False
        self._families: tuple[Tensor | None, Tensor | None] = None, None

    def _locate(self, nodes: Tensor) -> tuple[Tensor, bool]:
        """(place int64 [B, W], True) in the newest level when all nodes are of it, else (slot, False)."""
        if self._located[0] is not nodes:
            known = nodes.clamp(min=0)
            slot = known if self._slot is None else self._slot.gather(1, known)
            newest = self.levels == 0 or bool(((slot >= self._start) | (nodes < 0)).all())
            self._located = nodes, (slot - self._start).clamp(min=0) if newest else slot, newest
        return self._located[1:]

    def _family(self, nodes: Tensor) -> Tensor:
        """The family int64 [B, W] of each node, counted as :meth:`_locate` counts places."""
        if self._families[0] is not nodes:
            place, newest = self._locate(nodes)
            self._families = nodes, place // self._fanout if newest else self._layout()[0][place]
        return self._families[1]

    def _joined(self, name: str) -> Tensor:
        """A column over all slots, or over all families: [B, slots] or [B, families]."""
        if name in ("token", "handle") and self._table is not None:
            family, rank, _ = self._layout()
            row = self._joined("row").index_select(1, family)
            handle = (row * self._table.fanout + rank).masked_fill_(row < 0, NONE)
            return handle if name == "handle" else torch.cat([self._root_token, self._table.tokens(handle[:, 1:])], dim=1)
        parts = self._parts[name]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts, dim=1)]
        return parts[0]

    def _layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """The family, the rank and the level int64 [slots] of every slot, the same in all rows."""
        return layout(tuple(self._shapes), self.device)

    def _column(self, name: str) -> Tensor:
        """A public column [B, N], by node."""
        if name not in self._read:
            family, rank, level = self._layout()
            if name == "rank" or (name == "depth" and self._even):
                column = (rank if name == "rank" else level).expand(self.rows, -1)
            elif name in self.PER_FAMILY:
                column = self._joined(name).index_select(1, family)
            else:
                column = self._joined(name)
            if self._slot is not None:
                column = column.gather(1, self._slot.clamp(min=0)).masked_fill(self._slot < 0, self.EMPTY[name])
            self._read[name] = column
        return self._read[name]

    def _of_expanded(self, name: str, value: Callable[[Expanded], Tensor], fill: float | bool) -> Tensor:
        """A column [B, N] with one value per expanded node, ``value`` [B, W] of each expansion, and ``fill`` elsewhere."""
        if name not in self._read:
            column = torch.full((self.rows, self.width + 1), fill, device=self.device)  # bool or float32, as it is filled
            self._read[name] = write_in(column, self._expansions, value)[:, : self.width]
        return self._read[name]
