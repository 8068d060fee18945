"""Hugging Face's confidence threshold: stop at an unsure token, and refit the threshold from what was accepted.

``assistant_confidence_threshold`` of transformers (``ConfidenceCriteria`` and
``AssistedCandidateGenerator.update_candidate_strategy``), after DISCO: Mamou et al. 2024, "Dynamic Speculation Lookahead
Accelerates Speculative Decoding of Large Language Models" (https://arxiv.org/abs/2405.04304). The threshold outlives the
request; the pairs it is fitted to are those of the request at hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.stopping import StoppingChain
from policies.tree import DraftTree


@policy("hf_confidence", paper="https://arxiv.org/abs/2405.04304")
class HfConfidence(StoppingChain):
    """A top-1 chain that ends with the first token whose draft probability is below a threshold that is refitted.

    ``threshold`` is where it starts. After each cycle, once there are more than ``few`` pairs (draft probability,
    accepted) with both outcomes among them, it moves to the point of their ROC curve where
    false positive rate + ``miss_weight`` * false negative rate is least. Defaults: transformers'. Probabilities are kept
    as logarithms, which tell apart what rounds to 1.
    """

    threshold: float = 0.4
    miss_weight: float = 3.0
    few: int = 5
    most: int = 20

    scope = "stream"

    def __post_init__(self):
        require(0 < self.threshold <= 1, self.name, f"threshold must be above 0 and at most 1, not {self.threshold}")
        for name, least in {"miss_weight": 0, "few": 0, "most": 1}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")

    def init(self, rows: int, key: Tensor) -> State:
        """threshold: float64 [1], a log-probability; logprob, accepted: float64 and bool [1, n], the pairs so far."""
        nothing = torch.zeros((1, 0), dtype=torch.float64, device=key.device)
        start = torch.full((1,), math.log(self.threshold), dtype=torch.float64, device=key.device)
        return {"threshold": start, "logprob": nothing, "accepted": nothing > 0}

    def begin(self, cycle: Cycle, state: State) -> State:
        if int(cycle.number.max()) > 0:
            return state
        return state | {name: state[name][:, :0] for name in ("logprob", "accepted")}  # a new request

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        return tree.logprob.gather(1, last)[:, 0].double() >= state["threshold"]

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        tested = outcome.status >= 0
        logprob = torch.cat([state["logprob"][0], outcome.tree.logprob[tested].double()])
        accepted = torch.cat([state["accepted"][0], outcome.status[tested] == 1])
        threshold = state["threshold"]
        if len(accepted) > self.few and bool(accepted.any()) and not bool(accepted.all()):
            threshold = refit(logprob, accepted, self.miss_weight)[None]
        return {"threshold": threshold, "logprob": logprob[None], "accepted": accepted[None]}


def refit(score: Tensor, accepted: Tensor, miss_weight: float) -> Tensor:
    """The score float64 [] that is the best threshold for "accepted": the corner of the ROC curve of least cost.

    :param score: float64 [n]. :param accepted: bool [n], both values present. Of equal costs the highest threshold.
    """
    score, order = score.sort(descending=True, stable=True)
    accepted = accepted[order]
    distinct = torch.ones_like(accepted)
    distinct[:-1] = score[1:] != score[:-1]
    hits, misfires = accepted.cumsum(0)[distinct], (~accepted).cumsum(0)[distinct]
    corner = torch.ones_like(hits, dtype=torch.bool)
    if len(hits) > 2:  # as scikit-learn's roc_curve, which drops points on a straight line
        corner[1:-1] = (hits.diff(n=2) != 0) | (misfires.diff(n=2) != 0)
    points = score[distinct][corner], misfires[corner].double(), hits[corner].double()
    score, misfires, hits = (  # the curve starts where nothing counts as accepted
        torch.nn.functional.pad(point, (1, 0), value=start) for point, start in zip(points, (torch.inf, 0, 0), strict=True)
    )
    return score[(misfires / misfires[-1] + miss_weight * (1 - hits / hits[-1])).argmin()]
