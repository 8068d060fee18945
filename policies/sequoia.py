"""Sequoia: the static tree that is best for the rank-acceptance vector of a recording.

Chen et al. 2024, "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding"
(https://arxiv.org/abs/2402.12374): its dynamic programme, and size and depth by hardware, as read in the released code. r_b is
the probability that the child of rank b is the accepted one, given that its parent is; measured, as by the authors'
`test_accept.py`, on the children of the root alone, here at every position of the training texts.

A tree of L levels below the root pays here for the L draft forwards that it takes. The authors' `tree_search.py` counts the root
as a level: that tree pays for L + 1, plain decoding for one, and their ``max_depth`` of 10 is 9 levels below the root.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.errors import UserError
from policies.registry import policy
from policies.static import Path, Static
from policies.tree import DraftTree

BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tree sizes, root included, among which a cost model chooses (the authors' configuration tries powers of two)."""


@policy("sequoia", paper="https://arxiv.org/abs/2402.12374")
class Sequoia(Policy):
    """A static tree fitted to a recording: the most expected tokens for its size and depth.

    ``total_tokens`` counts the root, ``depth`` counts levels below it, ``branches`` is the most children of a node.
    Where fitting knows a cost model, total_tokens and depth are upper limits, and the tree is the one with the least
    ms per expected token. Published: 128 tokens (A100), up to 9 levels, up to 16 branches; the defaults here fit into the
    default recording.

    Learned: ``acceptance_``, the vector r, and ``tree_``, paths of child ranks (none: plain decoding).
    """

    total_tokens: int = 60
    depth: int = 10
    branches: int = 10
    acceptance_: tuple[float, ...] | None = None
    tree_: tuple | None = None

    fits_on_nodes = True

    def __post_init__(self):
        for name in ("total_tokens", "depth", "branches"):
            require(getattr(self, name) >= 1, self.name, f"{name} must be 1 or more, not {getattr(self, name)}")
        rates = self.acceptance_ or ()
        message = f"acceptance_ must hold probabilities, not {self.acceptance_}"
        require(all(0 <= rate <= 1 for rate in rates), self.name, message)
        if self.tree_:
            Static(self.tree_)  # raises what is wrong with it

    @cached_property
    def static(self) -> Static | None:
        """The policy that drafts the fitted tree; None where plain decoding is best."""
        return Static(self.tree_) if self.tree_ else None

    def begin(self, cycle: Cycle, state: State) -> State:
        return self.static.begin(cycle, state) if self.static else state

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        return self.static.expand(tree, cycle, state) if self.static else None

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return self.static.select(tree, cycle, state) if self.static else tree.exists

    def fit_base(self) -> Static:
        """The children of the root."""
        return Static(tuple((rank,) for rank in range(self.branches)))

    def measure(self, tree: DraftTree, cycle: Cycle) -> dict[str, Tensor]:
        """ms [B] of a draft level and of verifying each tree size, where a cost model is known."""
        if cycle.cost is None:
            return {}
        one = torch.ones((), dtype=torch.int64)
        columns = {"draft_ms": cycle.cost.draft_ms(one, cycle.context_length, one)}
        for tokens in self._budgets():
            columns[f"verify_ms_{tokens}"] = cycle.cost.verify_ms(one * tokens, cycle.context_length, one)
        return columns

    def _budgets(self) -> list[int]:
        return [tokens for tokens in BUDGETS if tokens < self.total_tokens] + [self.total_tokens]

    def fit(self, samples: Any) -> Sequoia:
        """Measure the vector, and build the tree: of the given size, or of the cheapest one where costs are known."""
        rates = rank_acceptance(samples.nodes.rank, samples.nodes.accepted, self.branches)
        value, choice = best_trees(rates, self.total_tokens, self.depth)
        tokens, depth = int(np.argmax(value[self.depth])), self.depth  # the smallest of equally good ones
        if "draft_ms" in samples.columns:
            draft = float(samples.columns["draft_ms"].mean())
            ms = {n: float(samples.columns[f"verify_ms_{n}"].mean()) for n in self._budgets()}
            shapes = [(n, d) for n in ms for d in range(self.depth + 1) if np.isfinite(value[d, n])]
            tokens, depth = min(shapes, key=lambda shape: (shape[1] * draft + ms[shape[0]]) / value[shape[1], shape[0]])
        return replace(self, acceptance_=tuple(rates.tolist()), tree_=paths_of(choice, tokens, depth))

    def describe_fit(self, samples: Any) -> list[str]:
        """What tree it is, what it should emit, and whether the vector's sum holds on the held-out part."""
        size, depth = len(self.tree_) + 1, max((len(path) for path in self.tree_), default=0)
        lines = [f"tree of {size} tokens and {depth} levels: {expected_tokens(self.acceptance_, self.tree_):.3f} expected"]
        lines += [f"first token accepted: {sum(self.acceptance_):.1%} fitted, {samples.accepted.mean():.1%} held out"]
        return lines


def rank_acceptance(rank: np.ndarray, accepted: np.ndarray, branches: int) -> np.ndarray:
    """r float64 [branches]: share of the tested parents of which the child of each rank was the accepted one.

    :param rank: int [n] of every tested child; each tested parent has one of rank 0. :param accepted: bool [n].
    """
    parents = np.count_nonzero(rank == 0)
    if not parents:
        raise UserError("no sample to fit on: record more text, or raise --train-share")
    return np.bincount(rank[accepted], minlength=branches)[:branches] / parents


def best_trees(rates: np.ndarray, tokens: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The dynamic programme: expected emitted tokens of the best tree of each size and depth.

    ``value`` float64 [depth + 1, tokens + 1] is that of the best tree of exactly n tokens (root included) and at most d
    levels below the root; -inf where there is none. A tree is built child by child: with b children it is the tree with
    b - 1, and one more subtree of y tokens and a level less, which is worth r_b times its own value. ``choice`` int64
    [depth + 1, tokens + 1, branches + 1] is the best y for a tree with exactly b children (0 = none), and
    ``choice[..., 0]`` the best b.
    """
    branches = len(rates)
    value = np.full((depth + 1, tokens + 1), -np.inf)
    value[:, 1] = 1.0  # the root alone emits the target's own token
    choice = np.zeros((depth + 1, tokens + 1, branches + 1), dtype=np.int64)
    for level in range(1, depth + 1):
        grown = np.full((branches + 1, tokens + 1), -np.inf)
        grown[0, 1] = 1.0
        for child in range(1, branches + 1):
            subtree = value[level - 1].copy()
            subtree[np.isfinite(subtree)] *= rates[child - 1]  # a rate of 0 leaves "there is none" as it is
            for size in range(child + 1, tokens + 1):
                options = grown[child - 1, size - 1 : 0 : -1] + subtree[1:size]  # y = 1 .. size - 1
                best = int(np.argmax(options))
                if options[best] > -np.inf:
                    grown[child, size], choice[level, size, child] = options[best], best + 1
        value[level], choice[level, :, 0] = grown.max(0), grown.argmax(0)
    return value, choice


def paths_of(choice: np.ndarray, tokens: int, depth: int) -> tuple[Path, ...]:
    """The best tree of exactly so many tokens (there must be one) as paths of child ranks, level by level."""
    paths: list[Path] = []
    pending: list[tuple[Path, int, int]] = [((), tokens, depth)]
    while pending:
        path, size, level = pending.pop()
        for child in range(int(choice[level, size, 0]), 0, -1):
            part = int(choice[level, size, child])
            pending.append((path + (child - 1,), part, level - 1))
            size -= part
        paths += [path] if path else []
    return tuple(sorted(paths, key=lambda path: (len(path), path)))


def expected_tokens(rates: tuple[float, ...], paths: tuple[Path, ...]) -> float:
    """Tokens that a tree emits per cycle if ranks are accepted independently: 1 and the sum over its nodes."""
    return 1.0 + sum(float(np.prod([rates[rank] for rank in path])) for path in paths)
