"""Hugging Face's confidence threshold: stop at an unsure token, and refit the threshold from what was accepted.

``assistant_confidence_threshold`` of transformers (``ConfidenceCriteria`` and
``AssistedCandidateGenerator.update_candidate_strategy``), after DISCO: Mamou et al. 2024, "Dynamic Speculation Lookahead
Accelerates Speculative Decoding of Large Language Models" (https://arxiv.org/abs/2405.04304). Threshold and pairs are those of
the request at hand, as in transformers 5.23: every ``generate`` copies the assistant's configuration and learns on the copy.
Earlier versions wrote into the assistant's own, so that the threshold outlived the request, as the documentation still says.

transformers compares probabilities behind its logits processors (top-k, top-p, penalties, and the temperature, twice), and
samples the tokens where the text is sampled; here the draft's first choices are drafted, and their recorded probabilities are
raw. Where text is greedy and nothing is penalised, both are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.order import NONE
from policies.registry import policy
from policies.stopping import StoppingChain
from policies.tree import DraftTree


@policy("hf_confidence", paper="https://arxiv.org/abs/2405.04304")
class HfConfidence(StoppingChain):
    """A top-1 chain that ends with the first token whose draft probability is below a threshold that is refitted.

    ``threshold`` is where each request starts; the token below it is verified, too. After each cycle, once there are more
    than ``few`` pairs (draft probability, accepted) with both outcomes among them, it moves to the point of their ROC curve
    where false positive rate + ``miss_weight`` * false negative rate is least. Defaults: transformers', ``most`` being its
    ``num_assistant_tokens`` under a constant schedule. Probabilities are kept as logarithms, which tell apart what rounds
    to 1.
    """

    threshold: float = 0.4
    miss_weight: float = 3.0
    few: int = 5
    most: int = 20

    scope = "sequence"

    def __post_init__(self):
        require(0 < self.threshold <= 1, self.name, f"threshold must be above 0 and at most 1, not {self.threshold}")
        for name, least in {"miss_weight": 0, "few": 0, "most": 1}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")

    def init(self, rows: int, key: Tensor) -> State:
        """threshold: float64 [B], a log-probability. logprob, accepted: float64 and int8 [B, n], a row's pairs, -1 behind them."""
        nothing = torch.zeros((rows, 0), dtype=torch.float64, device=key.device)
        start = torch.full((rows,), math.log(self.threshold), dtype=torch.float64, device=key.device)
        return {"threshold": start, "logprob": nothing, "accepted": nothing.to(torch.int8)}

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        return tree.logprob.gather(1, last)[:, 0].double() >= state["threshold"]

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """Add the tested tokens: each row holds its accepted ones, then the rejected ones, whatever stands beside it."""
        accepted = torch.cat([state["accepted"], outcome.status[:, 1:]], 1)
        logprob = torch.cat([state["logprob"], outcome.tree.logprob[:, 1:].double()], 1)
        accepted, order = accepted.sort(dim=1, descending=True, stable=True)
        logprob = logprob.gather(1, order).masked_fill(accepted < 0, NONE)
        hits, pairs = (accepted == 1).sum(1), (accepted >= 0).sum(1)
        threshold = state["threshold"].clone()
        for row in ((pairs > self.few) & (hits > 0) & (hits < pairs)).nonzero()[:, 0].tolist():
            own = slice(int(pairs[row]))
            threshold[row] = refit(logprob[row, own], accepted[row, own] == 1, self.miss_weight)
        most = int(pairs.max())
        return {"threshold": threshold, "logprob": logprob[:, :most], "accepted": accepted[:, :most]}


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
