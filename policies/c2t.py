"""C2T: a small classifier decides which nodes are drafted on and verified.

Huo et al. 2025, "C2T: A Classifier-Based Tree Construction Method in Speculative Decoding"
(https://arxiv.org/abs/2502.13652), section 4 (algorithm 1) and appendix B. A feed-forward network of two layers reads a
node's joint probability, the entropy of the distribution it comes from and its depth, and says how likely the node is
to be accepted. It is trained on whole EAGLE-2 trees, most of the rejected nodes left out (appendix B.2).

The paper does not say how many are left; one per accepted node is what its betas and tree sizes fit with (where trees of
60 to 100 among 1000 nodes are cut at 0.5, the last node kept has a chance of some 1 in 300, that is even odds in a
balanced sample). Its entropy is that of the 1000 most probable tokens; here it is that of all of them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.marks import with_marks
from policies.order import NONE, best
from policies.registry import policy
from policies.sums import ordered_sum
from policies.tree import DraftTree

STEPS = 600
"""Least training steps: about what the paper's 31,000 accepted nodes and as many rejected ones give in 10 epochs."""


@policy("c2t", paper="https://arxiv.org/abs/2502.13652")
class C2T(Policy):
    """Expand and verify, layer by layer, the nodes that a fitted classifier trusts.

    A node is taken if its confidence is at least ``beta``; of a layer's at most the ``top_k`` most trusted. Each taken
    node is expanded into ``top_k`` children, over at most ``depth`` layers. Published: 0.5, 15 and 10. The default
    top_k of 10 and ``width``, the most probable nodes of a layer that the classifier looks at, are a capped form that
    lies nearly inside the default recording; the paper's is ``c2t(top_k=15, width=225)``.

    The classifier has ``hidden`` units and is trained for ``epochs`` (both as published) on ``negatives`` rejected nodes
    per accepted one. Learned: ``units_``, per hidden unit the weights of joint probability, entropy (nats) and depth
    and its bias; ``output_``, the units' weights and a bias.
    """

    beta: float = 0.5
    top_k: int = 10
    depth: int = 10
    width: int = 10
    hidden: int = 48
    epochs: int = 10
    negatives: int = 1
    units_: tuple[tuple[float, ...], ...] | None = None
    output_: tuple[float, ...] | None = None

    published = "c2t(top_k=15, width=225)"
    needs = frozenset({"entropy"})
    fits_on_nodes = True
    fits_on_whole_trees = 10

    def __post_init__(self):
        for name in ("top_k", "depth", "width", "hidden", "epochs", "negatives"):
            require(getattr(self, name) >= 1, self.name, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(0 < self.beta < 1, self.name, f"beta must lie between 0 and 1, not {self.beta}")
        if self.units_ is not None or self.output_ is not None:
            units, output = self.units_ or (), self.output_ or ()
            fits_together = len(output) == len(units) + 1 and all(len(unit) == 4 for unit in units)
            require(fits_together, self.name, "units_ must hold 4 numbers per unit, and output_ one per unit and a bias")
            finite = all(math.isfinite(weight) for row in (*units, output) for weight in row)
            require(finite, self.name, "units_ and output_ must hold finite numbers")

    def begin(self, cycle: Cycle, state: State) -> State:
        """Which nodes were taken: int64 [B, N], 1 taken, -1 not."""
        rows, device = cycle.active.shape[0], cycle.active.device
        return state | {"taken": torch.ones((rows, 1), dtype=torch.int64, device=device)}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == 0:
            return Expansion(tree.root_nodes(), self.top_k)
        nodes = self.layer(tree)
        state["taken"] = with_marks(tree, state["taken"], nodes, torch.ones_like(nodes))
        return None if tree.levels == self.depth else Expansion(nodes, self.top_k)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return state["taken"] > 0

    def layer(self, tree: DraftTree) -> Tensor:
        """The nodes to take of the newest layer, most trusted first, then most probable: int64 [B, L], -1 = none."""
        index = tree.frontier(self.width)
        place = index.clamp(min=0)
        entropy = tree.entropy.gather(1, tree.parent.gather(1, place).clamp(min=0))
        logit = self.logit(tree.score.gather(1, place), entropy, tree.depth.gather(1, place))
        distrusted = (index < 0) | (logit < math.log(self.beta / (1 - self.beta)))
        trusted = best(logit.masked_fill(distrusted, -torch.inf), self.top_k)
        return index.gather(1, trusted.clamp(min=0)).masked_fill(trusted < 0, NONE)

    def logit(self, score: Tensor, entropy: Tensor, depth: Tensor) -> Tensor:
        """The classifier's log-odds float32 [...] of acceptance; elementwise in float64, added in a fixed order."""
        units = torch.tensor(self.units_, dtype=torch.float64, device=score.device).T
        output = torch.tensor(self.output_, dtype=torch.float64, device=score.device)
        joint = torch.exp(score.to(torch.float64).contiguous())
        seen = units[0] * joint[..., None] + units[1] * entropy.to(torch.float64)[..., None]
        seen = seen + units[2] * depth.to(torch.float64)[..., None] + units[3]
        return (ordered_sum(seen.clamp(min=0) * output[:-1], len(output) - 1) + output[-1]).to(torch.float32)

    def fit_base(self) -> Eagle3:
        """The whole EAGLE-2 tree: no node is left out."""
        return Eagle3(total_tokens=1 + self.top_k + self.top_k**2 * (self.depth - 1), depth=self.depth, top_k=self.top_k)

    def fit(self, samples: Any) -> C2T:
        """Train the classifier on nodes labelled accepted or not (Adam, rate 1e-3, batches of 1024)."""
        try:
            from sklearn.neural_network import MLPClassifier
        except ImportError:
            raise UserError("fitting c2t needs scikit-learn: pip install scikit-learn") from None
        features, accepted = training_set(samples.nodes, self.negatives)
        batch = min(1024, len(accepted))
        epochs = max(self.epochs, math.ceil(STEPS / math.ceil(len(accepted) / batch)))
        network = MLPClassifier((self.hidden,), batch_size=batch, max_iter=epochs, n_iter_no_change=epochs, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so many epochs, converged or not
            network.fit(features, accepted)
        (inner, outer), (bias, last) = network.coefs_, network.intercepts_
        units = tuple(tuple(map(float, (*weights, shift))) for weights, shift in zip(inner.T, bias, strict=True))
        return replace(self, units_=units, output_=tuple(map(float, (*outer[:, 0], last[0]))))

    def describe_fit(self, samples: Any) -> list[str]:
        """Recall and positive rate (appendix B.2): the share taken of the accepted nodes, and of all."""
        nodes = samples.nodes
        columns = (torch.from_numpy(np.ascontiguousarray(column)) for column in (nodes.score, nodes.entropy, nodes.depth))
        taken = self.logit(*columns).numpy() >= math.log(self.beta / (1 - self.beta))
        recall = f"{taken[nodes.accepted].mean():.1%}" if nodes.accepted.any() else "-"
        return [f"at beta {self.beta}: {recall} of the accepted nodes and {taken.mean():.1%} of the listed ones are taken"]


def training_set(nodes: Any, negatives: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 [n, 3] and labels bool [n]: the accepted nodes, and so many rejected ones for each, drawn."""
    accepted, rejected = np.flatnonzero(nodes.accepted), np.flatnonzero(~nodes.accepted)
    if not len(accepted) or not len(rejected):
        raise UserError("c2t needs accepted and rejected nodes to learn from: record more text, or raise --train-share")
    drawn = np.random.default_rng(0).permutation(rejected)[: negatives * len(accepted)]
    chosen = np.sort(np.concatenate([accepted, drawn]))
    return features_of(nodes)[chosen], nodes.accepted[chosen]


def features_of(nodes: Any) -> np.ndarray:
    """Joint probability, entropy (nats) and depth of the nodes, float64 [n, 3]."""
    columns = (np.exp(nodes.score.astype(np.float64)), nodes.entropy, nodes.depth)
    return np.stack([column.astype(np.float64) for column in columns], axis=1)
