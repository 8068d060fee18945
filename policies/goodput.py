"""Goodput: draft and verify what pays, in milliseconds.

Our own policy. A text of so many tokens takes least when every cycle maximises  value * (emitted tokens) - (milliseconds),
where ``value`` is what a token costs at the rate that the decoding reaches (Dinkelbach 1967, "On nonlinear fractional
programming", https://doi.org/10.1287/mnsc.13.7.492). So with P a node's calibrated chance of lying on the target's path
(`policies.acceptance_table`, multiplied down from the root):

- *which nodes to verify*: the n likeliest, for the n that maximises  value * (sum of P) - (ms of n + 1 tokens);
- *whether to draft another level, and how wide*: the W best nodes of EAGLE-2's beam and the number m of levels to come for which
  ``patience`` * (what m levels behind each of them bring) - (ms of a level W wide and of m - 1 more) is largest, as long as that
  is positive (`policies.lookahead`);
- *whether to draft at all*: the same, at the root, whose P is 1.

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

from policies.acceptance_table import Acceptance, fit_acceptance, histories, remember
from policies.contract import Cycle, Expansion, Outcome, Policy, State, require
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.families import Families
from policies.lookahead import LEAST, LookAhead, Plan, fit_look_ahead, plan_of
from policies.order import NONE
from policies.prices import Prices, prices_at
from policies.registry import policy
from policies.sums import exact_cumsum
from policies.tree import DraftTree


@policy("goodput", paper="https://doi.org/10.1287/mnsc.13.7.492")
class Goodput(Policy):
    """Draft another level and verify a node where the expected tokens are worth their milliseconds.

    ``depth`` is the most levels, ``top_k`` the widest frontier and the children of each node, ``total_tokens`` the most
    verified tokens, root included. Learned: what a token is worth in units of the rate (``markup_``), ``patience_``, what lies
    ``ahead_`` of a node, the acceptance estimate, and, for where there is no cost model, what the machine takes at the recording's
    mean context: a plain cycle, each number of further verified tokens, each level by its width.
    """

    depth: int = 12
    top_k: int = 10
    total_tokens: int = 80
    markup_: float | None = None
    patience_: float | None = None
    ahead_: tuple | None = None
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

    def _plan(self, cycle: Cycle) -> Plan:
        """What time costs under the cycle's cost model; without one, as it was when fitted."""
        device = cycle.sequence.device
        if cycle.cost is not None:
            return plan_of(cycle.cost, self._look_ahead, self.depth, self.top_k, self.total_tokens, device)
        if device not in self._fitted_plan:
            self._fitted_plan[device] = Plan.made(self._fitted_prices, self._look_ahead, device)
        return self._fitted_plan[device]

    @cached_property
    def _fitted_plan(self) -> dict[torch.device, Plan]:
        return {}

    @property
    def _fitted_prices(self) -> Prices:
        plain = torch.tensor([self.plain_ms_], dtype=torch.float64)
        verify = torch.tensor([(0.0, *self.verify_ms_)], dtype=torch.float64)
        level = tuple(torch.tensor([(0.0, *level)], dtype=torch.float64) for level in self.level_ms_)
        return Prices(torch.zeros(1, dtype=torch.int64), plain, verify, level)

    def init(self, rows: int, key: Tensor) -> State:
        """``history`` float64 [B] as in `policies.acceptance_table`."""
        return {"history": torch.zeros(rows, dtype=torch.float64, device=key.device)}

    def begin(self, cycle: Cycle, state: State) -> State:
        """``chance`` float64 [B, slots]: P of each node so far; ``passed`` float32 [B]: the best score that was passed over;
        ``place`` int64 [B]: which prices hold; ``value`` float64 [B]: ms that a token is worth."""
        plan = self._plan(cycle)
        place = torch.bucketize(cycle.context_length, plan.context, right=True) - 1
        value = self.markup_ * plan.rate[place]
        passed = torch.full_like(cycle.root_entropy, -torch.inf)
        return state | {"place": place, "value": value, "chance": torch.ones_like(value)[:, None], "passed": passed}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.depth:
            return None
        if tree.levels == 0:
            width = self._width(state["chance"], tree, cycle, state)
            return Expansion(tree.root_nodes().masked_fill(width == 0, NONE), self.top_k)
        families = tree.newest_families()
        own = self._chances(tree, families, state)
        score, slot = families.score.sort(dim=1, descending=True, stable=True)  # the total order
        score, slot = score[:, : self.top_k], slot[:, : self.top_k]
        passed = state["passed"][:, None]
        width = self._width(own.gather(1, slot).masked_fill(score <= passed, 0.0), tree, cycle, state)
        most = int(width.max())
        if most == 0:
            return None
        best = torch.maximum(passed, torch.cat([score, passed], 1).gather(1, width))
        state["passed"] = torch.where(width > 0, best, passed)[:, 0]  # a row that stopped stays as it would alone
        nodes = families.nodes_in(slot[:, :most])
        return Expansion(nodes.masked_fill(torch.arange(most, device=nodes.device) >= width, NONE), self.top_k)

    def _width(self, chance: Tensor, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        """How many of the frontier's nodes, P float64 [B, M] each, are worth a level: int64 [B, 1], 0 = stop here."""
        plan, value = self._plan(cycle), state["value"][:, None]
        share = plan.price[state["place"]][:, None] / (value * chance).clamp(min=LEAST)
        tokens = self.patience_ * (chance[:, :, None] * self._look_ahead(share))
        gain = value[:, :, None] * exact_cumsum(tokens, 1) - plan.level[tree.levels][state["place"]][:, : chance.shape[1]]
        gain, place = gain.view(len(gain), -1), gain.shape[2]
        first = gain.argmax(1, keepdim=True)
        return (first // place + 1).masked_fill(gain.gather(1, first) <= 0, 0)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        if state["chance"].shape[1] < tree.slots:  # drafting ended with a level that expand never looked at
            self._chances(tree, tree.newest_families(), state)
        ms = self._plan(cycle).verify[state["place"]]
        chance = state["chance"][:, 1 : tree.width].to(torch.float32)
        likely, place = chance.sort(dim=1, descending=True, stable=True)
        likely, place = likely[:, : self.total_tokens - 1], place[:, : self.total_tokens - 1]
        count = most_worth(state["value"], likely.clamp(min=0).to(torch.float64), ms)[:, None]
        kept = torch.arange(place.shape[1], device=place.device) < count
        return torch.zeros_like(tree.exists).scatter_(1, place + 1, kept)

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        tree, active = outcome.tree, cycle.active
        tested = (outcome.status >= 0) & (tree.rank == 0) & active[:, None]
        chance = state["chance"][:, : tree.width]
        expected = chance / chance.gather(1, tree.parent.clamp(min=0))
        surprise = ((outcome.status == 1).to(torch.float64) - expected).masked_fill(~tested, 0.0)
        history = remember(state["history"], exact_cumsum(surprise)[:, -1], tested.sum(1))
        return state | {"history": torch.where(active, history, state["history"])}

    def _chances(self, tree: DraftTree, families: Families, state: State) -> Tensor:
        """P float64 [B, slots of the level] of the newest level's nodes; also put among the others in ``state["chance"]``."""
        known = state["chance"]
        own = self._acceptance.of_level(tree.levels, families.logprob, families.entropy, state["history"])
        chance = (known.gather(1, families.parent.clamp(min=0))[:, :, None] * own).view(tree.rows, -1)
        if families.node is None:
            state["chance"] = torch.cat([known, chance], dim=1)
        else:  # the last column catches the empty slots
            column = torch.nn.functional.pad(known, (0, tree.slots + 1 - known.shape[1]), value=NONE)
            node = families.node.masked_fill(families.node < 0, tree.slots)
            state["chance"] = column.scatter_(1, node, chance)[:, :-1]
        return chance

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
        return replace(
            self,
            markup_=1.0,
            patience_=1.0,
            ahead_=fit_look_ahead(chance, samples.nodes, self.top_k),
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


def most_worth(value: Tensor, chance: Tensor, ms: Tensor) -> Tensor:
    """The n int64 [B] that maximises value * (sum of the first n chances) - ms[n], the least of equal ones.

    :param value: float64 [B]. :param chance: float64 [B, M], each at most 1. :param ms: float64 [B, M + 1 or more], from 0 up.
    """
    count = chance.shape[1]
    gain = torch.zeros((len(chance), count + 1), dtype=torch.float64, device=chance.device)
    torch.mul(value[:, None], exact_cumsum(chance), out=gain[:, 1:])
    return gain.sub_(ms[..., : count + 1]).argmax(1)


def _expected(acceptance: Acceptance, samples: Any) -> np.ndarray:
    """float64 [n]: the chance of each tested node as decided on, had each position before been a cycle of one level."""
    nodes = samples.nodes
    columns = [torch.from_numpy(getattr(nodes, name)) for name in ("rank", "depth", "logprob", "entropy")]

    def chance(history: np.ndarray) -> np.ndarray:
        return acceptance(*columns, torch.from_numpy(history)).numpy()

    unknowing = chance(np.zeros(len(nodes.rank)))
    return chance(histories(unknowing, nodes, samples.sequence)[nodes.sample])
