"""How far to trust a probability of acceptance: reliability diagram, expected calibration error, AUC, log-loss.

Reliability diagram and expected calibration error with equal-width bins: Guo et al. 2017, "On Calibration of Modern Neural
Networks" (https://arxiv.org/abs/1706.04599), section 2, for the event "accepted".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10
SMALLEST = 1e-7
"""Probabilities are kept this far from 0 and 1 in the log-loss."""


@dataclass(frozen=True)
class Calibration:
    """Expected chances against what came true, over n nodes.

    nodes      n
    accepted   share of them that was accepted
    ece        expected calibration error: the mean gap |accepted - expected| over the bins, weighted by their nodes
    auc        chance that an accepted node was given a higher probability than a rejected one; None without both kinds
    brier      mean of (expected - accepted)^2, Brier's score
    log_loss   mean of -log(probability given to what happened), nats
    bins       the reliability diagram: per non-empty bin {low, high, nodes, expected, accepted}
    """

    nodes: int
    accepted: float
    ece: float
    auc: float | None
    brier: float
    log_loss: float
    bins: tuple[dict[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibration(chance: np.ndarray, accepted: np.ndarray, bins: int = BINS) -> Calibration:
    """:param chance: float [n], in 0..1. :param accepted: bool [n]. n must be 1 or more."""
    chance, accepted = np.asarray(chance, dtype=np.float64), np.asarray(accepted, dtype=bool)
    place = np.minimum((chance * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    expected = np.bincount(place, chance, minlength=bins)
    found = np.bincount(place, accepted, minlength=bins)
    diagram = tuple(
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "nodes": int(count[index]),
            "expected": float(expected[index] / count[index]),
            "accepted": float(found[index] / count[index]),
        }
        for index in np.flatnonzero(count)
    )
    safe = np.clip(chance, SMALLEST, 1 - SMALLEST)
    return Calibration(
        nodes=len(chance),
        accepted=float(accepted.mean()),
        ece=float(np.abs(found - expected).sum() / len(chance)),
        auc=area_under_curve(chance, accepted),
        brier=float(((chance - accepted) ** 2).mean()),
        log_loss=float(-np.where(accepted, np.log(safe), np.log1p(-safe)).mean()),
        bins=diagram,
    )


def area_under_curve(chance: np.ndarray, accepted: np.ndarray) -> float | None:
    """How often what was accepted has the higher score, float [n] of any scale, ties counted half: AUC, by Mann-Whitney's U. None
    when all or none was accepted."""
    positives = int(accepted.sum())
    negatives = len(accepted) - positives
    if not positives or not negatives:
        return None
    _, place, count = np.unique(chance, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    return float((mean_rank[place][accepted].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_lines(named: dict[str, Calibration]) -> list[str]:
    """A small table: one line per estimate."""
    lines = [f"{'acceptance estimate':<24} {'nodes':>8} {'ECE':>7} {'AUC':>7} {'log-loss':>9}"]
    for name, one in named.items():
        auc = "-" if one.auc is None else f"{one.auc:.4f}"
        lines.append(f"{name:<24} {one.nodes:>8} {one.ece:>7.4f} {auc:>7} {one.log_loss:>9.4f}")
    return lines
