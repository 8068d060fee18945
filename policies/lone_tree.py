"""The draft tree of a request that decodes alone on a CPU: columns of plain numbers, where a batch has tensors of rows and slots.

Between two forward passes of a network all code comes from memory, and each operation of torch or NumPy is code of its own. Here a
level is written down and read by plain Python, family by family, so that little is touched.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.children import Children, Only, StoredChildren
from policies.one_row import alone, integers
from policies.order import NONE, best_of_list
from policies.tree import DraftTree, Listed

_ROOT = {"parent": NONE, "depth": 0, "rank": NONE, "handle": NONE, "logprob": 0.0, "score": 0.0}
_FLOAT32 = frozenset({"logprob", "score"})


def new_tree(root_token: Tensor, needs: frozenset[str]) -> DraftTree:
    """The trees of a batch of cycles, before anything is drafted; see :class:`DraftTree`."""
    return (LoneTree if alone(root_token) else DraftTree)(root_token, needs)


class LoneTree(DraftTree):
    """One tree at each level of which there are all the children that were asked for, or none. What is asked of it beyond its
    columns, or does not fit them, makes it the tree that a batch has, by appending its levels there: the answers are the same."""

    def __init__(self, root_token: Tensor, needs: frozenset[str] = frozenset()):
        """:param root_token: int64 [1]. :param needs: see :class:`DraftTree`."""
        self.rows, self.device, self.needs, self.levels = 1, root_token.device, needs, 0
        self._root_token, self._answers = root_token[:, None], []
        self._first, self._siblings, self._offer, self._made = 0, 1, [], {}
        self._columns = {name: [value] for name, value in {"token": root_token.item(), **_ROOT}.items()}

    def __getattr__(self, name: str) -> Any:
        """What only the tree of a batch has."""
        if "_columns" not in self.__dict__:  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self._joined_the_batch(), name)

    def _joined_the_batch(self) -> DraftTree:
        """The same object, from now on the tree of a batch."""
        root, needs, answers = self._root_token[:, 0], self.needs, self._answers
        self.__dict__.clear()
        self.__class__ = DraftTree
        self.__init__(root, needs)
        for nodes, answer in answers:
            self.append(nodes, answer.children() if isinstance(answer, Only) else answer)
        return self

    @property
    def width(self) -> int:
        return len(self._columns["token"])

    @property
    def ragged(self) -> bool:
        return False

    @property
    def exists(self) -> Tensor:
        return torch.ones((1, self.width), dtype=torch.bool)

    def append(self, nodes: Tensor, children: Children | StoredChildren) -> None:
        token = children.token.flatten().tolist() if isinstance(children, Children) and children.missing is None else []
        if not token or min(token) < 0 <= max(token):
            self._joined_the_batch().append(nodes, children)
            return
        self._first, self._siblings, self._offer = self.width, children.token.shape[2], []
        if token[0] >= 0:  # else there are no children at all
            self._write_down(nodes[0].tolist(), token, children)
        self.levels += 1
        self._answers.append((nodes, children))
        self._made = {}

    def append_only(self, answer: Only) -> None:
        """What :meth:`append` does with the newest node and its only child, or none, from plain numbers."""
        own, above = self._columns, self.width - 1
        self._answers.append((integers([[above]], self._root_token), answer))
        self._first, self._siblings, self._offer = self.width, 1, []
        if answer.token >= 0:
            new = answer.token, above, own["depth"][above] + 1, 0, answer.handle, answer.logprob
            for name, value in zip(("token", "parent", "depth", "rank", "handle", "logprob"), new, strict=True):
                own[name].append(value)
            own["score"] += array("f", [own["score"][above] + answer.logprob])  # as float32
        self.levels += 1
        self._made = {}

    def is_newest(self, nodes: Tensor) -> bool:
        """Whether these nodes int64 [1, W] are a frontier as it was offered, and that is the newest node, alone on its level."""
        return self._offer == [self._first] == [self.width - 1] and self.is_frontier(nodes)

    def _write_down(self, asked: list[int], token: list[int], children: Children) -> None:
        """The children of the nodes ``asked``, all of which there are."""
        own, step, siblings, sums = self._columns, children.logprob.flatten().tolist(), self._siblings, array("f")
        parent, depth, score = own["parent"], own["depth"], own["score"]
        own["token"] += token
        own["handle"] += children.handle.flatten().tolist()
        own["logprob"] += step
        own["rank"] += [*range(siblings)] * len(asked)
        for family, above in enumerate(asked):
            parent += [above] * siblings
            depth += [depth[above] + 1] * siblings
            so_far = score[above]
            sums.fromlist([so_far + more for more in step[family * siblings : (family + 1) * siblings]])
        score += sums  # as float32

    def listed(self, *names: str) -> list[list]:
        return [self._columns[name] for name in names]

    def newest_listed(self) -> Listed:
        self._must_be_asked("entropy")
        logprob, score = (self._columns[name][self._first :] for name in ("logprob", "score"))
        answer = self._answers[-1][1]
        entropy = [answer.entropy] if isinstance(answer, Only) else answer.entropy[0].tolist()
        return Listed(range(self._first, self.width), self._siblings, logprob, entropy, score)

    def frontier(self, count: int) -> Tensor:
        slots = best_of_list(self._columns["score"][self._first :], count)
        return self._joined_the_batch().frontier(count) if slots is None else self.frontier_of(slots)

    def frontier_of(self, slot: list[int]) -> Tensor:
        self._offer = [self._first + place if place >= 0 else NONE for place in slot]
        return integers([self._offer], self._root_token)

    def is_frontier(self, nodes: Tensor) -> bool:
        return nodes[0].tolist() == self._offer

    def at(self, name: str, nodes: Tensor) -> Tensor:
        column = self._columns[name]
        return self._tensor(name, [column[node] for node in nodes[0].tolist()])

    def _column(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._tensor(name, self._columns[name])
        return self._made[name]

    def _tensor(self, name: str, values: list) -> Tensor:
        """[1, M]."""
        if name in _FLOAT32:
            return torch.from_numpy(np.array([values], dtype=np.float32))  # torch.tensor takes thrice as long
        return integers([values], self._root_token)
