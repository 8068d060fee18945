"""The best static setting: fixed chains, EAGLE-3's grid, Sequoia's and published trees, chosen by predicted ms per token.

A static setting spends the same everywhere. The best of them, chosen on a training part of the texts, is what an adaptive
policy has to beat on the others; *same-budget static* is the static tree that verifies as many nodes on average.

The grid (depth 2..12, tokens 4..80, top-k 4, 8, 10) is searched from coarse to fine: around the best coarse points all
neighbours are tried until none is better.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from policies.chain import Chain
from policies.contract import Policy
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.sequoia import Sequoia, best_trees, paths_of, rank_acceptance
from policies.static import PUBLISHED, Static
from sim.samples import build_samples
from sim.trial import Trials, texts_at

DEPTHS = tuple(range(2, 13))
TOKENS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60, 70, 80)
TOP_KS = (4, 8, 10)
CHAINS = tuple(range(1, 13))
TREE_TOKENS = (4, 6, 8, 12, 16, 32, 60)
TREE_DEPTHS = (1, 2, 3, 4, 6, 8, 10)
COARSE = tuple((depth, tokens, top_k) for depth in (2, 4, 7, 10) for tokens in (6, 16, 40) for top_k in (4, 10))


@dataclass(frozen=True)
class Found:
    """A static setting and its predicted ms per token on the texts that it was chosen on."""

    policy: Policy
    ms_per_token: float


def best_static(trials: Trials, more: Sequence[Policy] = ()) -> Found:
    """The best of fixed chains, the EAGLE-3 grid and ``more`` (such as :func:`fixed_trees`)."""
    chains = _fastest(trials, [Chain(k) for k in CHAINS] + list(more))
    grid = _best_of_grid(trials)
    found = min(chains, grid, key=lambda found: found.ms_per_token)
    if found.ms_per_token == float("inf"):
        raise UserError("the recording covers no static setting: record it again with the default --cover")
    return found


def fixed_trees(trials: Trials) -> list[Policy]:
    """The published trees, and Sequoia's (see :mod:`policies.sequoia`) of several sizes and depths for the acceptance by rank
    that is measured on the trials' own texts. A recording covers a tree only where it was made with --cover or --fill for it."""
    chosen = texts_at(trials.recording, trials.setting.temperature) if trials.sequences is None else trials.sequences
    fanout = trials.recording.forest(trials.setting.drafter).child_token.shape[1]
    start = Sequoia(branches=min(fanout, Sequoia.branches))
    texts = None if chosen is None else chosen.numpy()
    samples = build_samples(trials.recording, start, trials.setting.drafter, texts, nodes=True)
    rates = rank_acceptance(samples.nodes.rank, samples.nodes.accepted, start.branches)
    value, choice = best_trees(rates, max(TREE_TOKENS), max(TREE_DEPTHS))
    trees: list[Policy] = [Static(name) for name in PUBLISHED]
    for depth, tokens in itertools.product(TREE_DEPTHS, TREE_TOKENS):
        if np.isfinite(value[depth, tokens]):
            paths = paths_of(choice, tokens, depth)
            trees.append(replace(start, total_tokens=tokens, depth=depth, acceptance_=tuple(rates.tolist()), tree_=paths))
    return trees


def same_budget(trials: Trials, kept: float, depths: Sequence[int] = (4, 6, 8)) -> Policy:
    """The EAGLE-3 setting whose mean number of kept nodes is ``kept``, rounded, and whose tau is the best.

    Trees verify all the nodes that they are given but at the context's end, so total_tokens is that number and the root.
    """
    tokens = max(round(kept) + 1, 1)
    grid = [Eagle3(tokens, depth, top_k) for depth in depths for top_k in TOP_KS]
    tallies = dict(zip(grid, trials.tallies(grid), strict=True))
    return max(grid, key=lambda one: (tallies[one].coverage == 1.0, tallies[one].mean("tau")))


def _fastest(trials: Trials, policies: Sequence[Policy]) -> Found:
    times = trials.ms_per_token(policies)
    place = min(range(len(times)), key=times.__getitem__)
    return Found(policies[place], times[place])


def _best_of_grid(trials: Trials, starts: int = 2) -> Found:
    """From the best coarse points to the neighbours of neighbours, until nothing is faster."""
    coarse = [Eagle3(tokens, depth, top_k) for depth, tokens, top_k in COARSE]
    times = trials.ms_per_token(coarse)
    climbed = []
    for place in sorted(range(len(times)), key=times.__getitem__)[:starts]:
        best = Found(coarse[place], times[place])
        while (step := _fastest(trials, _neighbours(best.policy))).ms_per_token < best.ms_per_token:
            best = step
        climbed.append(best)
    return min(climbed, key=lambda found: found.ms_per_token)


def _neighbours(setting: Eagle3) -> list[Eagle3]:
    """Settings one or two grid steps away along one axis, and one step along depth and tokens together."""

    def near(values: Sequence[int], value: int, reach: int) -> list[int]:
        place = values.index(value)
        return list(values[max(place - reach, 0) : place + reach + 1])

    depth, tokens, top_k = setting.depth, setting.total_tokens, setting.top_k
    around = {(d, n, top_k) for d in near(DEPTHS, depth, 1) for n in near(TOKENS, tokens, 1)}
    around |= {(d, tokens, top_k) for d in near(DEPTHS, depth, 2)} | {(depth, n, top_k) for n in near(TOKENS, tokens, 2)}
    around |= {(depth, tokens, k) for k in TOP_KS}
    return [Eagle3(n, d, k) for d, n, k in sorted(around)]
