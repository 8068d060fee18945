"""How likely the target is to take a drafted token: a logistic estimate from what the draft says, and how it is fitted.

The features are the log-odds of the token (vLLM's acceptance estimator uses them alone,
https://github.com/vllm-project/vllm/pull/52228), the entropy of the distribution it was taken from, and its depth. The
estimate is conditional: given that all tokens before it were taken.

It is for chains, whose nodes are all first choices: four weights say enough there, a short recording fits them, and they can be
learned while decoding (policies/online_acceptance.py). Trees also ask about second and later choices, for which the odds bend;
policies/acceptance_table.py is made for them, and needs a recording to fill its cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.chain import Chain
from policies.contract import Cycle
from policies.errors import UserError
from policies.stopping import proposed_by
from policies.tree import DraftTree

Weights = tuple[float, ...]
"""Intercept, weight of the log-odds, of the entropy (nats), of the depth."""

MOST_LOG_ODDS = 40.0
"""A token that takes all of the draft's mass would have infinite log-odds."""


def log_odds(logprob: Tensor) -> Tensor:
    """log(q / (1 - q)) float64 [...], between -40 and 40, of log-probabilities (nats)."""
    value = logprob.contiguous().double()
    return (value - torch.log(-torch.expm1(value))).clamp(-MOST_LOG_ODDS, MOST_LOG_ODDS)


def logistic(value: Tensor) -> Tensor:
    """1 / (1 + exp(-value)) float64 [...], rounded to float32 so that the last bits of exp do not decide."""
    return (1 / (1 + torch.exp(-value.contiguous()))).float().double()


def estimate(weights: Weights, logprob: Tensor, entropy: Tensor, depth: Tensor | int) -> Tensor:
    """Probability float64 [...] that a token is taken, given that those before it were. Elementwise, in a fixed order."""
    intercept, odds, entropy_weight, depth_weight = weights
    value = intercept + odds * log_odds(logprob)
    value = value + entropy_weight * entropy.double()
    return logistic(value + depth_weight * depth)


def estimate_last(weights: Weights, tree: DraftTree, last: Tensor) -> Tensor:
    """The estimate float64 [B] for the newest nodes ``last`` int64 [B, 1] of growing chains."""
    logprob = tree.logprob.gather(1, last)[:, 0]
    return estimate(weights, logprob.masked_fill(last[:, 0] == 0, -1.0), proposed_by(tree, last), tree.levels)


class WatchedChain(Chain):
    """A fixed chain that keeps the entropies: what :func:`chain_columns` looks at."""

    needs = frozenset({"entropy"})


def chain_columns(tree: DraftTree, cycle: Cycle, most: int) -> dict[str, Tensor]:
    """What a fit needs of chains of up to ``most`` tokens, per position: columns [B, most] in depth order.

    logprob and entropy float32 (NaN where nothing was drafted), and what remains of the text, ``room`` int64 [B]:
    nothing is tested behind its end.
    """
    width = tree.width - 1
    entropy = tree.entropy[:, :width].masked_fill(~tree.exists[:, 1:], torch.nan)
    logprob = tree.logprob[:, 1:].masked_fill(~tree.exists[:, 1:], torch.nan)
    pad = (0, most - width)
    columns = {"logprob": logprob, "entropy": entropy}
    columns = {name: torch.nn.functional.pad(value, pad, value=torch.nan) for name, value in columns.items()}
    return columns | {"room": cycle.room}


def graded(samples: Any) -> tuple[np.ndarray, np.ndarray]:
    """(features float64 [n, 4], taken bool [n]) of the tokens that the truth tests: the accepted ones and the next."""
    logprob, entropy = samples.columns["logprob"], samples.columns["entropy"]
    depth = np.arange(1, logprob.shape[1] + 1)
    accepted = samples.accepted[:, None]
    seen = (depth <= accepted + 1) & (depth <= samples.columns["room"][:, None]) & ~np.isnan(logprob)
    odds = log_odds(torch.from_numpy(logprob[seen])).numpy()
    depth = np.broadcast_to(depth, seen.shape)[seen]
    taken = (np.arange(1, seen.shape[1] + 1) <= accepted)[seen]
    return np.stack([np.ones_like(odds), odds, entropy[seen].astype(np.float64), depth], axis=1), taken


def fit_weights(samples: Any, rejection_weight: float = 1.0, ridge: float = 1e-3, steps: int = 50) -> Weights:
    """Weights of least log-loss (Newton's method), rejections counted ``rejection_weight`` times."""
    x, taken = graded(samples)
    if taken.all() or not taken.any():
        raise UserError("the training part has no accepted or no rejected token: record more text, or raise --train-share")
    count = np.where(taken, 1.0, rejection_weight)
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        probability = 1 / (1 + np.exp(-(x @ weights)))
        slope = x.T @ (count * (taken - probability)) - ridge * weights
        curve = (x * (count * probability * (1 - probability))[:, None]).T @ x + ridge * np.eye(len(weights))
        change = np.linalg.solve(curve, slope)
        weights = weights + change
        if np.abs(change).max() < 1e-10:
            break
    return tuple(float(value) for value in weights)


def calibration_lines(weights: Weights, samples: Any) -> list[str]:
    """How well the estimates fit tokens held out: log-loss, expected calibration error, AUC and ten equal groups."""
    x, taken = graded(samples)
    if taken.all() or not taken.any():
        return ["the held-out part has no accepted or no rejected token: nothing to say about the calibration"]
    probability = 1 / (1 + np.exp(-(x @ np.array(weights))))
    loss = -np.log(np.where(taken, probability, 1 - probability)).mean()
    groups = np.array_split(np.argsort(probability, kind="stable"), 10)
    pairs = [(probability[group].mean(), taken[group].mean(), len(group)) for group in groups if len(group)]
    error = sum(size * abs(said - was) for said, was, size in pairs) / len(taken)
    quality = f"log-loss {loss:.3f}, ECE {error:.3f}, AUC {auc(probability, taken):.3f}"
    groups_said = "  ".join(f"{said:.2f} {was:.2f}" for said, was, _ in pairs)
    return [f"{len(taken)} tokens, {taken.mean():.1%} accepted: {quality}", f"said, was: {groups_said}"]


def auc(score: np.ndarray, taken: np.ndarray) -> float:
    """Probability that an accepted token scores above a rejected one, ties counted half."""
    values, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]  # mean rank of equal scores, from 1
    hits = taken.sum()
    return float((rank[taken].sum() - hits * (hits + 1) / 2) / (hits * (len(taken) - hits)))
