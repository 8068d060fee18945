"""HeteroSpec: spend more drafting and less verification where the draft is sure of itself.

"HeteroSpec: Leveraging Contextual Heterogeneity for Efficient Speculative Decoding"
(https://arxiv.org/abs/2505.13254), section 4, on the tree of EAGLE-3. After the base tree is drafted, one number says
how sure the draft was: the cumulative meta-path top-K entropy (eq. 1), summed along P*, the path to the most confident
node of the deepest base level. A regression tree on that number (section 4.2) cuts it into strata; the lowest three are
drafted deeper and pruned harder (section 4.3), all others are EAGLE-3 to the bit.

Where the paper is silent or contradicts itself, this file chooses:

- P*'s "confidence" is the path probability (``confidence="cumulative"``, what EAGLE ranks by) or the last token's own
  probability ("local");
- the paper numbers bins 0 to 2 and their gammas 1 to 3: ``first_index`` is 0 or 1;
- gamma * N is rounded to the nearest whole number, halves to the even one (Python's ``round``);
- the nodes added to N pay for the extra levels: without extension (``extend=False``) none are added;
- a tree that never reached the base depth (the context ended) has no P*: it counts as least sure, that is as EAGLE-3;
- the tree is fitted on "fully accepted draft paths": cycles in which the target accepted a path of the verified nodes down to the
  last base level (``samples="accepted"``; P*, which is at least as likely, then has its rank among the top N). ``"all"`` takes
  every cycle, P* being anywhere in the drafted tree: it treats several times as many cycles.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.eagle3 import most_probable
from policies.errors import UserError
from policies.order import NONE, best, rank_of
from policies.registry import policy
from policies.strata import fit_edges, strata_lines
from policies.tree import DraftTree


@policy("heterospec", paper="https://arxiv.org/abs/2505.13254")
class HeteroSpec(Policy):
    """EAGLE-3 that drafts deeper and verifies less where the draft's entropy along its best path is low.

    ``total_tokens`` (N, root included), ``depth`` and ``top_k`` are EAGLE-3's. In stratum j = 0, 1, 2 (lowest entropy
    first), with i = j + ``first_index``: alpha - i extra levels (``extend``: dynamic extended drafting) and
    round(gamma[j] * N) + (alpha - i) verified tokens, root included (``prune``: top-N pruning). ``alpha`` None is
    ceil(depth / 2). ``criterion`` is how the strata are fitted: "cart" is scikit-learn's, "paper" adds the two sides'
    variances unweighted (eq. 2); ``samples`` which cycles they are fitted on; no stratum gets fewer than ``minimum_samples`` of
    these. ``thresholds_`` are the strata's
    ascending upper edges in nats (x <= edge lies below). With fewer than eight strata the lowest min(3, strata - 1) are
    treated; a single stratum is EAGLE-3.
    """

    total_tokens: int = 60
    depth: int = 8
    top_k: int = 10
    alpha: int | None = None
    gamma: tuple[float, ...] = (0.3, 0.6, 1.0)
    first_index: int = 0
    confidence: str = "cumulative"
    extend: bool = True
    prune: bool = True
    criterion: str = "cart"
    samples: str = "accepted"
    minimum_samples: int = 20
    thresholds_: tuple[float, ...] | None = None

    needs = frozenset({"topk_entropy"})

    def __post_init__(self):
        for name, least in {"total_tokens": 1, "depth": 1, "top_k": 1, "first_index": 0, "minimum_samples": 1}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")
        require(self.first_index <= 1, self.name, f"first_index must be 0 or 1, not {self.first_index}")
        require(self.alpha is None or self.alpha >= 0, self.name, f"alpha must be 0 or more, not {self.alpha}")
        positive = all(0 <= share < math.inf for share in self.gamma)
        require(positive, self.name, f"gamma must hold numbers from 0 up, not {self.gamma}")
        words = {"confidence": ("cumulative", "local"), "criterion": ("cart", "paper"), "samples": ("accepted", "all")}
        for name, known in words.items():
            value = getattr(self, name)
            require(value in known, self.name, f"{name} must be {' or '.join(known)}, not '{value}'")
        edges = self.thresholds_ or ()
        ascending = all(low < high for low, high in zip(edges, edges[1:], strict=False))
        fine = ascending and all(math.isfinite(edge) for edge in edges)
        require(fine, self.name, f"thresholds_ must be ascending finite numbers, not {self.thresholds_}")

    @property
    def strata(self) -> int:
        return len(self.thresholds_ or ()) + 1

    def extra_levels(self) -> list[int]:
        """Levels beyond the base depth, per stratum."""
        alpha = math.ceil(self.depth / 2) if self.alpha is None else self.alpha
        treated = self.gamma[: self.strata - 1] if self.extend else ()
        extra = [max(alpha - self.first_index - place, 0) for place in range(len(treated))]
        return extra + [0] * (self.strata - len(treated))

    def verified_tokens(self) -> list[int]:
        """Verified tokens, root included, per stratum: what EAGLE-3 calls total_tokens."""
        if not self.prune:
            return [self.total_tokens] * self.strata
        share = [*self.gamma[: self.strata - 1], *[1.0] * self.strata][: self.strata]
        kept = [round(part * self.total_tokens) + extra for part, extra in zip(share, self.extra_levels(), strict=True)]
        return [max(tokens, 1) for tokens in kept]

    def begin(self, cycle: Cycle, state: State) -> State:
        """The stratum int64 [B]; the last one, EAGLE-3's, until the base tree has been looked at."""
        least_sure = torch.full_like(cycle.sequence, self.strata - 1)
        return state | {"stratum": least_sure}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels < self.depth:
            return Expansion(tree.frontier(self.top_k), self.top_k)
        if tree.levels == self.depth:
            state["stratum"] = self.stratum(tree)
        extra = self.extra_levels()
        if tree.levels == self.depth + max(extra):
            return None
        deeper = self.depth + self._of_stratum(extra, state) > tree.levels
        return Expansion(tree.frontier(self.top_k).masked_fill(~deeper[:, None], NONE), self.top_k)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return most_probable(tree, self._of_stratum(self.verified_tokens(), state) - 1)

    def stratum(self, tree: DraftTree) -> Tensor:
        """Stratum int64 [B] of finished base trees: how many edges the entropy exceeds."""
        end, entropy = meta_path(tree, self.depth, self.confidence)
        edges = torch.tensor(self.thresholds_ or (), dtype=torch.float64, device=tree.device)
        above = (entropy.to(torch.float64)[:, None] > edges).sum(1)
        return above.masked_fill(end < 0, self.strata - 1)

    @staticmethod
    def _of_stratum(values: list[int], state: State) -> Tensor:
        return torch.tensor(values, device=state["stratum"].device)[state["stratum"]]

    def fit_base(self) -> HeteroSpec:
        """The base tree alone: a single stratum."""
        return replace(self, thresholds_=())

    def measure(self, tree: DraftTree, cycle: Cycle) -> dict[str, Tensor]:
        """x and y of section 4.2: P*'s entropy (nats, float32) and rank among the drafted nodes (int64, 1 = best); NaN and 0
        without a P*."""
        end, entropy = meta_path(tree, self.depth, self.confidence)
        score = confidence_of(tree, self.confidence).masked_fill(~tree.drafted(), -torch.inf)
        rank = rank_of(score, end.clamp(min=0)) + 1
        return {"entropy": entropy.masked_fill(end < 0, torch.nan), "rank": rank.masked_fill(end < 0, 0)}

    def fit(self, samples: Any) -> HeteroSpec:
        """Cut the entropy by a regression tree of depth 3 that predicts the rank (section 4.2).

        :raises UserError: when there are not samples enough for two strata.
        """
        used = self.used(samples)
        if used.sum() < 2 * self.minimum_samples:
            raise UserError(
                f"policy 'heterospec' is fitted on cycles {self._kind()}, of which there are {used.sum()} here, not "
                f"{2 * self.minimum_samples}: record more text, greedy if this was sampled, or lower minimum_samples"
            )
        x, y = samples.columns["entropy"][used], samples.columns["rank"][used]
        return replace(self, thresholds_=fit_edges(x, y, self.criterion, self.minimum_samples))

    def used(self, samples: Any) -> np.ndarray:
        """Which of the samples (`sim.samples.Samples`) are fitted on, bool [P]."""
        return samples.columns["rank"] > 0 if self.samples == "all" else samples.accepted >= self.depth

    def _kind(self) -> str:
        """Which those are, in words."""
        return "that reached the base depth" if self.samples == "all" else "whose base tree was accepted down to its last level"

    def describe_fit(self, samples: Any) -> list[str]:
        used = f"what it learns from, cycles {self._kind()}: {self.used(samples).sum()} of these"
        return [used, *strata_lines(self.thresholds_, self.extra_levels(), self.verified_tokens(), samples)]


def confidence_of(tree: DraftTree, confidence: str) -> Tensor:
    """What makes a node "confident", float32 [B, N]: its path's log-probability, or its own."""
    return tree.score if confidence == "cumulative" else tree.logprob


def meta_path(tree: DraftTree, depth: int, confidence: str) -> tuple[Tensor, Tensor]:
    """P*, the path to the most confident node at exactly ``depth`` in finished base trees; ties by the total order.

    Its end int64 [B], -1 where the tree has no node so deep; and the cumulative top-K entropy float32 [B] (nats) of the
    distributions that its tokens were taken from, the root's among them.
    """
    end = best(confidence_of(tree, confidence).masked_fill(tree.depth != depth, -torch.inf), 1)[:, 0]
    own = tree.topk_entropy_at(tree.path_to(end.clamp(min=0), depth)[:, 1:])
    entropy = torch.zeros_like(end, dtype=torch.float64)
    for one in own.unbind(1):  # from the end to the root, one by one: the same bits at every batch shape
        entropy = entropy + one
    return end, entropy.to(torch.float32)
