"""How likely a drafted node is accepted, given that its parent is: what the draft's own numbers were worth on a recording.

A draft's probabilities are not the probabilities that the target agrees: a draft may be sure and wrong, and a greedy target
is far surer than its draft. So a table gives the log-odds by three things: the node's rank among its siblings, the draft's
log-probability of it, and the entropy of the distribution it was taken from. Cells with little evidence lean on a logistic
regression of the same numbers. Two slopes correct the table, one pair for first choices and one for the others: by depth (a
draft that feeds on its own features wears out), and by how the draft has been doing lately in this text.

Look-ups and elementwise float64: the same bits at every batch shape, and cheap. In NumPy, on the host: a small operation takes a
fraction there of what it takes in torch, and deciding consists of small operations.

It is for trees, where rank matters and thousands of nodes are asked about at once (goodput). Chains make do with the four
weights of the logistic estimate in policies/acceptance.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from policies.errors import UserError

RANK_EDGES = (1, 2, 3, 5)
"""Ranks 0, 1, 2, 3 to 4, and beyond are told apart."""
BINS = 16
PRIOR = 50.0
"""How many nodes of evidence the regression is worth in a cell."""


MEMORY = 7 / 8
"""What each tested first choice leaves of the history before it."""


@dataclass(frozen=True)
class Acceptance:
    """P(accepted | parent accepted).

    logprob_edges  ascending edges (nats) between bins of the draft's log-probability; x <= edge lies below
    entropy_edges  the same for the entropy of the distribution that proposed the node (nats, full vocabulary)
    table          log-odds by rank group, log-probability bin and entropy bin
    slopes         what is added per level of depth and per unit of history, for rank 0; then for all other ranks
    """

    logprob_edges: tuple[float, ...]
    entropy_edges: tuple[float, ...]
    table: tuple[tuple[tuple[float, ...], ...], ...]
    slopes: tuple[tuple[float, float], tuple[float, float]]

    def __post_init__(self):
        shape = (len(RANK_EDGES) + 1, len(self.logprob_edges) + 1, len(self.entropy_edges) + 1)
        try:
            values, slopes = np.array(self.table, dtype=np.float64), np.array(self.slopes, dtype=np.float64)
        except (TypeError, ValueError):
            values, slopes = np.empty(0), np.empty(0)
        if values.shape != shape or slopes.shape != (2, 2) or not np.isfinite(values).all():
            raise UserError(f"an acceptance table must hold log-odds in the shape {shape} and 2 x 2 slopes: write it with sim.fit")
        edges = [np.array(edges, dtype=np.float32) for edges in (self.logprob_edges, self.entropy_edges)]
        kinds = [min(group, 1) for group in range(len(RANK_EDGES) + 1)]
        object.__setattr__(self, "_held", (values.reshape(len(RANK_EDGES) + 1, -1), slopes[kinds], *edges))
        object.__setattr__(self, "_levels", {})
        object.__setattr__(self, "_lists", {})

    def __call__(
        self, rank: np.ndarray, depth: np.ndarray, logprob: np.ndarray, entropy: np.ndarray, history: np.ndarray
    ) -> np.ndarray:
        """Probability float64 [n] of nodes with these ranks and depths (int64), log-probabilities and entropies (float32, nats),
        in a text with this ``history`` (float64, see :func:`remember`)."""
        values, slopes, logprob_edges, entropy_edges = self._held
        group = np.searchsorted(RANK_EDGES, rank, side="right")
        cell = logprob_edges.searchsorted(logprob) * (len(entropy_edges) + 1) + entropy_edges.searchsorted(entropy)
        slope = slopes[group]
        return 1 / (np.exp(-(values[group, cell] + slope[:, 0] * depth)) * np.exp(history * -slope[:, 1]) + 1)

    def by_history(self, history: np.ndarray, fanout: int) -> np.ndarray:
        """What ``history`` float64 [B] does to the odds against each of ``fanout`` siblings: factors float64 [B, 1, fanout]."""
        return np.exp(history[:, None, None] * -self._held[1][_groups(fanout), 1])

    def of_level(self, depth: int, logprob: np.ndarray, entropy: np.ndarray, by_history: np.ndarray) -> np.ndarray:
        """The same float64 [B, W, K], to the bit, for the families of one level: ``logprob`` float32 [B, W, K], ``entropy``
        float32 [B, W], ``by_history`` float64 [B, 1, K or more]."""
        fanout = logprob.shape[2]
        if (depth, fanout) not in self._levels:
            self._levels[depth, fanout] = self._level(depth, fanout)
        against, first, columns, logprob_edges, entropy_edges = self._levels[depth, fanout]
        cell = logprob_edges.searchsorted(logprob)
        cell *= columns
        cell += first.take(entropy_edges.searchsorted(entropy), 0)
        chance = against.take(cell)
        chance *= by_history[:, :, :fanout]
        chance += 1
        return np.reciprocal(chance, out=chance)

    def by_one_history(self, history: float, fanout: int) -> list[float]:
        """:meth:`by_history` of one row: one factor for the first choice, and one for all others."""
        first, other = np.exp([history * -slope for _, slope in self.slopes]).tolist()
        return [first] + [other] * (fanout - 1)

    def of_one_level(self, depth: int, fanout: int) -> tuple[list[float], list[list[int]], int, list[float], list[float]]:
        """What :meth:`of_level` looks up, as lists: odds against a node by cell; by entropy bin, where the cells of each rank
        begin; cells from one log-probability bin to the next; edges of the log-probability bins and of the entropy bins."""
        if (depth, fanout) not in self._lists:
            against, first, columns, *edges = self._level(depth, fanout)
            self._lists[depth, fanout] = against.tolist(), first.tolist(), columns, *(edge.tolist() for edge in edges)
        return self._lists[depth, fanout]

    def _level(self, depth: int, fanout: int) -> tuple:
        """For a level: odds against a node by cell, where the cells of each rank begin by entropy bin, and the bins."""
        values, slopes, logprob_edges, entropy_edges = self._held
        columns = len(entropy_edges) + 1
        first = np.arange(columns)[:, None] + _groups(fanout) * values.shape[1]
        return np.exp(-(values + slopes[:, :1] * depth)).ravel(), first, columns, logprob_edges, entropy_edges


@lru_cache(maxsize=64)
def _groups(fanout: int) -> np.ndarray:
    """The rank group int64 [fanout] of each of so many siblings."""
    return np.searchsorted(RANK_EDGES, np.arange(fanout), side="right")


def remember(history: np.ndarray | float, surprise: np.ndarray | float, tested: np.ndarray | int) -> np.ndarray:
    """The history float64 [B], or a number, after a cycle: a moving average of accepted (0 or 1) less expected, over first choices.

    :param surprise: float64 [B], their sum over the ``tested`` (int64 [B]) first choices of the cycle.
    """
    return _FADED.take(tested, mode="clip") * history + (1 - MEMORY) * surprise


_FADED = np.array([MEMORY**power for power in range(100)])
"""What so many tested first choices leave: looked up, so the same bits at every batch shape."""


def fit_acceptance(nodes: Any, sequence: np.ndarray, bins: int = BINS, prior: float = PRIOR) -> Acceptance:
    """The estimate for tested nodes (`sim.samples.Nodes`) of positions in (sequence, position) order.

    :param sequence: int64 [P], the sequence of each position that ``nodes.sample`` points at.
    """
    logprob, entropy = nodes.logprob.astype(np.float64), nodes.entropy.astype(np.float64)
    accepted = nodes.accepted.astype(np.float64)
    if not 0 < accepted.sum() < len(accepted):
        raise UserError("no drafted node was accepted, or all were: record more texts, or raise --train-share")
    group = np.searchsorted(RANK_EDGES, nodes.rank, side="right")
    regression = _shape_regression(nodes.rank, logprob, entropy, accepted)
    # most tested nodes are hopeless: most edges go to the others; a drafter that knows no doubt has one value for all
    middle = np.quantile(logprob, 0.5)
    likely = logprob > middle if logprob.max() > middle else logprob == middle
    edges = np.concatenate([np.quantile(logprob, np.linspace(0, 0.5, bins // 4 + 1)[1:]), _edges(logprob[likely], bins)])
    logprob_edges = np.unique(edges.astype(np.float32)).astype(np.float64)
    entropy_edges = np.unique(_edges(entropy[nodes.rank == 0], bins).astype(np.float32)).astype(np.float64)
    shape = (len(RANK_EDGES) + 1, len(logprob_edges) + 1, len(entropy_edges) + 1)
    bins_of = np.searchsorted(logprob_edges, logprob), np.searchsorted(entropy_edges, entropy)
    cell, size = np.ravel_multi_index((group, *bins_of), shape), int(np.prod(shape))
    count = np.bincount(cell, minlength=size).astype(np.float64)
    hits = np.bincount(cell, accepted, minlength=size)
    expected = regression(*_centres(logprob_edges, entropy_edges))
    inside = count > 0
    expected[inside] = np.bincount(cell, regression(nodes.rank, logprob, entropy), minlength=size)[inside] / count[inside]
    chance = ((hits + prior * expected) / (count + prior)).clip(1e-6, 1 - 1e-6)
    odds = np.log(chance / (1 - chance))
    table, slopes = _corrected(odds, cell, group, nodes, sequence)
    edges_found = tuple(logprob_edges.tolist()), tuple(entropy_edges.tolist())
    return Acceptance(*edges_found, _nested(table.reshape(shape).round(4)), _nested(slopes.round(4)))


def histories(chance: np.ndarray, nodes: Any, sequence: np.ndarray) -> np.ndarray:
    """History float64 [P] at every position, had each position before it in the text been a cycle of one level.

    :param chance: float64 [n], the expected acceptance of every tested node.
    """
    first = (nodes.rank == 0) & (nodes.depth == 1)
    surprise = np.zeros(len(sequence))
    surprise[nodes.sample[first]] = nodes.accepted[first] - chance[first]
    history, value = np.zeros(len(sequence)), 0.0
    for place in range(1, len(sequence)):
        same = sequence[place] == sequence[place - 1]
        value = value * MEMORY + (1 - MEMORY) * surprise[place - 1] if same else 0.0
        history[place] = value
    return history


def _corrected(
    odds: np.ndarray, cell: np.ndarray, group: np.ndarray, nodes: Any, sequence: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The table's log-odds rescaled per kind of node (first choices, others), and the slopes [2, 2] of each kind."""
    own = odds[cell]
    history = histories(1 / (1 + np.exp(-own)), nodes, sequence)[nodes.sample]
    slopes, table = np.zeros((2, 2)), odds.copy().reshape(len(RANK_EDGES) + 1, -1)
    for kind in (0, 1):
        mine = (group > 0) == kind
        if not mine.any():  # a drafter of chains has first choices only
            continue
        x = np.stack([own[mine], np.ones(mine.sum()), nodes.depth[mine], history[mine]], 1)
        weight = _logistic(x, nodes.accepted[mine].astype(np.float64))
        slopes[kind] = weight[2:]
        groups = slice(0, 1) if kind == 0 else slice(1, None)
        table[groups] = table[groups] * weight[0] + weight[1]
    return table, slopes


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    return np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])


def _centres(logprob_edges: np.ndarray, entropy_edges: np.ndarray) -> tuple[np.ndarray, ...]:
    """A typical (rank, log-probability, entropy) of every cell, in the table's order."""

    def middles(edges: np.ndarray) -> np.ndarray:
        return np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]]) if len(edges) else np.zeros(1)

    ranks = np.array([0, *RANK_EDGES])
    grid = np.meshgrid(ranks, middles(logprob_edges), middles(entropy_edges), indexing="ij")
    return tuple(part.reshape(-1) for part in grid)


def _shape_regression(rank: np.ndarray, logprob: np.ndarray, entropy: np.ndarray, accepted: np.ndarray) -> Any:
    """A logistic regression of a few shapes of the three numbers, as a function of them."""

    def shapes(rank: np.ndarray, logprob: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        group = np.searchsorted(RANK_EDGES, rank, side="right")[:, None] == np.arange(len(RANK_EDGES) + 1)
        own = np.stack([logprob, np.exp(logprob), -np.log1p(-np.exp(np.minimum(logprob, -1e-3))), entropy], 1)
        return np.concatenate([group, own, group * entropy[:, None]], 1)

    weight = _logistic(shapes(rank, logprob, entropy), accepted)
    return lambda *where: 1 / (1 + np.exp(-np.clip(shapes(*where) @ weight, -30, 30)))


def _logistic(x: np.ndarray, accepted: np.ndarray, ridge: float = 1e-2) -> np.ndarray:
    """Weights of a logistic regression, by Newton's method on scaled columns with a small ridge."""
    scale = x.std(0) + (x.std(0) == 0)
    x, weight = x / scale, np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(x @ weight, -30, 30)))
        slope = x.T @ (accepted - p) - ridge * weight
        curvature = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(weight))
        step = np.linalg.solve(curvature, slope)
        weight = weight + step
        if np.abs(step).max() < 1e-8:
            break
    return weight / scale


def _nested(table: np.ndarray) -> tuple:
    return tuple(_nested(part) for part in table) if table.ndim > 1 else tuple(float(value) for value in table)
