"""Goodput: draft and verify what pays, in milliseconds.

Our own policy. A text of so many tokens takes least when every cycle maximises  value * (emitted tokens) - (milliseconds),
where ``value`` is what a token costs at the rate that the decoding reaches (Dinkelbach 1967, "On nonlinear fractional
programming", https://doi.org/10.1287/mnsc.13.7.492). So with P a node's calibrated chance of lying on the target's path
(`policies.acceptance_table`, multiplied down from the root):

- *which nodes to verify*: the n likeliest, for the n that maximises  value * (sum of P) - (ms of n + 1 tokens);
- *whether to draft another level, and how wide*: the W best nodes of EAGLE-2's beam and the number m of levels to come for which
  ``patience`` * (what m levels behind each of them bring) - (ms of a level W wide and of m - 1 more) is largest, as long as that
  is positive (`policies.lookahead`);
- *whether to draft at all*: the same, at the root, whose P is 1, by how unsure the target was of it.

What is learned of acceptance knows no machine, and the rate is computed from it and the prices: so one fit serves any machine.
Prices are those of the cycle's cost model, at the request's own context and for a request that decodes alone; without a cost model
they are those that it was fitted under. ``markup`` and ``patience`` make up for what the look-ahead simplifies; they are plain
numbers, chosen by predicted time on the training texts.

A node is never expanded after a likelier one was passed over at an earlier level: each frontier is then a part of the beam's
own, and a recording that covers EAGLE-3 at this top-k and depth covers this policy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.acceptance_table import Acceptance, fit_acceptance, histories
from policies.contract import Cycle, Expansion, Outcome, Policy, State, require
from policies.cost import Cost
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.grown import Grown
from policies.grown_alone import GrownAlone
from policies.lookahead import LookAhead, Opening, Plan, fit_look_ahead, fit_opening, plan_of
from policies.one_row import alone
from policies.prices import Prices, prices_at
from policies.registry import policy
from policies.tree import DraftTree


@policy("goodput", paper="https://doi.org/10.1287/mnsc.13.7.492")
class Goodput(Policy):
    """Draft another level and verify a node where the expected tokens are worth their milliseconds.

    ``depth`` is the most levels, ``top_k`` the widest frontier and the children of each node, ``total_tokens`` the most
    verified tokens, root included. Learned: what a token is worth in units of the rate (``markup_``), ``patience_``, what lies
    ``ahead_`` of a node and, by the root's entropy, of a root (``opening_``), the acceptance estimate, and, for where there is no
    cost model, what the machine takes at the recording's mean context: a plain cycle, each number of further verified tokens, each
    level by its width.
    """

    depth: int = 12
    top_k: int = 10
    total_tokens: int = 80
    markup_: float | None = None
    patience_: float | None = None
    ahead_: tuple | None = None
    root_edges_: tuple | None = None
    opening_: tuple | None = None
    logprob_edges_: tuple | None = None
    entropy_edges_: tuple | None = None
    odds_: tuple | None = None
    slopes_: tuple | None = None
    plain_ms_: float | None = None
    verify_ms_: tuple | None = None
    level_ms_: tuple | None = None

    scope = "sequence"
    needs = frozenset({"entropy"})
    fits_on_nodes = True
    fits_on_cost = True

    def __post_init__(self):
        for name in ("depth", "top_k", "total_tokens"):
            value = getattr(self, name)
            require(value >= 1, self.name, f"{name} must be 1 or more, not {value}")
        if self.level_ms_ is not None:
            wide = len(self.level_ms_) >= self.depth and all(len(level) >= self.top_k for level in self.level_ms_)
            fits = wide and len(self.verify_ms_ or ()) >= self.total_tokens - 1
            require(fits, self.name, "depth, top_k and total_tokens may not grow after fitting: fit it again with sim.fit")

    @cached_property
    def _acceptance(self) -> Acceptance:
        return Acceptance(self.logprob_edges_, self.entropy_edges_, self.odds_, self.slopes_)

    @cached_property
    def _look_ahead(self) -> LookAhead:
        return LookAhead(self.ahead_)

    @cached_property
    def _opening(self) -> Opening:
        return Opening(self.root_edges_, self.opening_)

    def _plan(self, cost: Cost | None) -> Plan:
        """What time costs under a cost model; without one, as it was when fitted."""
        if cost is None:
            return self._fitted_plan
        sizes = self.depth, self.top_k, self.total_tokens
        return plan_of(cost, self._look_ahead, self._opening, self.markup_, self.patience_, *sizes)

    @cached_property
    def _fitted_plan(self) -> Plan:
        plain = torch.tensor([self.plain_ms_], dtype=torch.float64)
        verify = torch.tensor([(0.0, *self.verify_ms_)], dtype=torch.float64)
        level = tuple(torch.tensor([(0.0, *level)], dtype=torch.float64) for level in self.level_ms_)
        prices = Prices(torch.zeros(1, dtype=torch.int64), plain, verify, level)
        return Plan(prices, self._look_ahead, self._opening, self.markup_, self.patience_)

    def init(self, rows: int, key: Tensor) -> State:
        """``history`` float64 [B] as in `policies.acceptance_table`."""
        return {"history": torch.zeros(rows, dtype=torch.float64, device=key.device)}

    def begin(self, cycle: Cycle, state: State) -> State:
        """For the cycle: ``plan``, what it is decided by, and the trees as they have ``grown``."""
        plan, history = self._plan(cycle.cost), state["history"]
        kind = GrownAlone if alone(history) else Grown
        return {"history": history, "plan": plan, "grown": kind(self._acceptance, plan, history, cycle, self.top_k)}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        return None if tree.levels == self.depth else state["grown"].wish(tree)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return tree.exists if tree.levels == 0 else state["grown"].kept(tree, self.total_tokens)

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """The history, from the first choices that were tested; what was for the cycle alone is dropped."""
        history = state["history"]
        return {"history": history if outcome.tree.levels == 0 else state["grown"].remembered(outcome, cycle.active)}

    def measure(self, tree: DraftTree, cycle: Cycle) -> dict[str, Tensor]:
        return {"root_entropy": cycle.root_entropy}

    def fit_base(self) -> Policy:
        return BaseTree(depth=min(self.depth, 10), top_k=self.top_k)

    def fit(self, samples: Any) -> Goodput:
        """Estimate acceptance from the tested nodes, and take the machine's times at the mean context from the cost model."""
        if samples.cost is None:
            raise UserError("policy 'goodput' weighs time against tokens: fit it under a cost model, with --profile")
        table = fit_acceptance(samples.nodes, samples.sequence)
        chance = _expected(table, samples)
        context = torch.tensor([round(float(samples.context.mean()))])
        prices = prices_at(samples.cost, context, self.depth, self.top_k, self.total_tokens)
        ahead = fit_look_ahead(chance, samples.nodes, self.top_k)
        edges, opening = fit_opening(chance, samples.nodes, self.top_k, ahead, samples.columns["root_entropy"])
        return replace(
            self,
            markup_=1.0,
            patience_=1.0,
            ahead_=ahead,
            root_edges_=edges,
            opening_=opening,
            logprob_edges_=table.logprob_edges,
            entropy_edges_=table.entropy_edges,
            odds_=table.table,
            slopes_=table.slopes,
            plain_ms_=float(prices.plain),
            verify_ms_=tuple(prices.verify[0, 1:].tolist()),
            level_ms_=tuple(tuple(level[0, 1:].tolist()) for level in prices.level),
        )

    def variants(self, ms_per_token: float) -> list[Goodput]:
        """Around the present markup and patience."""
        steps = [(0.85, 1.0), (1.15, 1.0), (1.0, 0.8), (1.0, 1.25), (0.85, 1.25), (1.15, 0.8)]
        return [replace(self, markup_=self.markup_ * a, patience_=self.patience_ * b) for a, b in steps]

    def expected_acceptance(self, samples: Any) -> Any:
        return _expected(self._acceptance, samples)


class BaseTree(Eagle3):
    """EAGLE-3's beam, with the entropies that acceptance is estimated from."""

    needs = frozenset({"entropy"})


def _expected(acceptance: Acceptance, samples: Any) -> np.ndarray:
    """float64 [n]: the chance of each tested node as decided on, had each position before been a cycle of one level."""
    nodes = samples.nodes

    def chance(history: np.ndarray) -> np.ndarray:
        return acceptance(nodes.rank, nodes.depth, nodes.logprob, nodes.entropy, history)

    unknowing = chance(np.zeros(len(nodes.rank)))
    return chance(histories(unknowing, nodes, samples.sequence)[nodes.sample])
