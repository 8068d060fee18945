"""Goodput: draft and verify what pays, in milliseconds.

Our own policy. A text of so many tokens takes least when every cycle maximises  value * (emitted tokens) - (milliseconds),
where ``value`` is what a token costs at the rate that the decoding reaches (Dinkelbach 1967, "On nonlinear fractional
programming", https://doi.org/10.1287/mnsc.13.7.492). So with P a node's calibrated chance of lying on the target's path
(`policies.acceptance_table`, multiplied down from the root):

- *which nodes to verify*: the n likeliest, for the n that maximises  value * (sum of P) - (ms of n + 1 tokens);
- *whether to draft another level, and how wide*: the W best nodes of EAGLE-2's beam, for the W that maximises
  value * ``patience`` * (sum of P) - (ms of a level W wide), as long as that is positive. ``patience`` is what drafting behind
  a node adds, in accepted tokens per chance of getting there, once verifying it all and the levels behind it are counted in;
- *whether to draft at all*: the same, at the root, whose P is how likely the draft's first choice has been lately.

The rate is that of the training texts, or (``adaptive``) a moving average of this text's own cycles, priced as planned, which
begins there: where a text is slow going, a token is worth more. Which of the two, ``markup`` and ``patience`` are chosen by
predicted time on the training texts.

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

from policies.acceptance_table import Acceptance, fading, fit_acceptance, histories, remember
from policies.contract import Cycle, Expansion, Outcome, Policy, State, require
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.families import Families
from policies.order import NONE
from policies.prices import Prices, prices_at, prices_of
from policies.registry import policy
from policies.tree import DraftTree

UNIT = 2.0**40
"""Probabilities are added up as whole multiples of 1 / UNIT: sums of whole numbers below 2 ** 53 are exact in any order."""


@policy("goodput", paper="https://doi.org/10.1287/mnsc.13.7.492")
class Goodput(Policy):
    """Draft another level and verify a node where the expected tokens are worth their milliseconds.

    ``depth`` is the most levels, ``top_k`` the widest frontier and the children of each node, ``total_tokens`` the most
    verified tokens, root included; ``horizon`` is over how many tokens a text's own rate is averaged. Learned: ``rate_`` (ms
    per token), what a token is worth in units of it (``markup_``), ``patience_``, whether the rate is ``adaptive_``, the
    acceptance estimate, and what the machine takes at the recording's mean context: a plain cycle, each number of further
    verified tokens, each level by its width.
    """

    depth: int = 12
    top_k: int = 10
    total_tokens: int = 80
    horizon: int = 32
    rate_: float | None = None
    markup_: float | None = None
    patience_: float | None = None
    adaptive_: bool | None = None
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
        for name in ("depth", "top_k", "total_tokens", "horizon"):
            value = getattr(self, name)
            require(value >= 1, self.name, f"{name} must be 1 or more, not {value}")
        if self.level_ms_ is not None:
            wide = len(self.level_ms_) >= self.depth and all(len(level) >= self.top_k for level in self.level_ms_)
            fits = wide and len(self.verify_ms_ or ()) >= self.total_tokens - 1
            require(fits, self.name, "depth, top_k and total_tokens may not grow after fitting: fit it again with sim.fit")

    @cached_property
    def _acceptance(self) -> Acceptance:
        return Acceptance(self.logprob_edges_, self.entropy_edges_, self.odds_, self.slopes_)

    def _prices(self, cycle: Cycle) -> Prices:
        """What time costs under the cycle's cost model; without one, as it was when fitted."""
        device = cycle.sequence.device
        if cycle.cost is not None:
            return prices_of(cycle.cost, self.depth, self.top_k, self.total_tokens, device)
        if device not in self._fitted_prices:
            here = {"dtype": torch.float64, "device": device}
            verify = torch.tensor([(0.0, *self.verify_ms_)], **here)
            level = tuple(torch.tensor([(0.0, *level)], **here) for level in self.level_ms_)
            always = torch.zeros(1, dtype=torch.int64, device=device)
            self._fitted_prices[device] = Prices(always, torch.tensor([self.plain_ms_], **here), verify, level)
        return self._fitted_prices[device]

    @cached_property
    def _fitted_prices(self) -> dict[torch.device, Prices]:
        return {}

    def init(self, rows: int, key: Tensor) -> State:
        """``history`` as in `policies.acceptance_table`; ``spent`` times that of a plain cycle for ``gained`` tokens: the text's
        rate. float64 [B] each."""
        zero = torch.zeros(rows, dtype=torch.float64, device=key.device)
        return {"history": zero, "spent": zero + self.horizon * (self.rate_ / self.plain_ms_), "gained": zero + self.horizon}

    def begin(self, cycle: Cycle, state: State) -> State:
        """``chance`` float64 [B, slots]: P of each node so far; ``passed`` float32 [B]: the best score that was passed over;
        ``place`` int64 [B]: which prices hold; ``planned`` float64 [B]: ms of the cycle so far; ``worth`` float64 [B]: ms that a
        token is worth."""
        prices = self._prices(cycle)
        place = prices.place(cycle.context_length)
        planned = prices.plain[place]
        scratch = {"place": place, "planned": planned, "worth": self._worth(cycle, state, planned)}
        passed = torch.full_like(cycle.root_entropy, -torch.inf)
        return state | scratch | {"chance": torch.ones_like(planned)[:, None], "passed": passed}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.depth:
            return None
        ms = self._prices(cycle).level[tree.levels][state["place"]]
        value = state["worth"] * self.patience_
        if tree.levels == 0:
            pays = value > ms[:, 1]
            state["planned"] = state["planned"] + ms[:, 1].masked_fill(~pays, 0.0)
            return Expansion(tree.root_nodes().masked_fill(~pays[:, None], NONE), self.top_k)
        families = tree.newest_families()
        own = self._chances(tree, families, state)
        score, slot = families.score.sort(dim=1, descending=True, stable=True)  # the total order
        score, slot = score[:, : self.top_k], slot[:, : self.top_k]
        passed = state["passed"][:, None]
        width = most_worth(value, own.gather(1, slot).masked_fill(score <= passed, 0.0), ms)[:, None]
        most = int(width.max())
        if most == 0:
            return None
        state["passed"] = torch.maximum(passed, torch.cat([score, passed], 1).gather(1, width))[:, 0]
        state["planned"] = state["planned"] + ms.gather(1, width)[:, 0]
        nodes = families.nodes_in(slot[:, :most])
        return Expansion(nodes.masked_fill(torch.arange(most, device=nodes.device) >= width, NONE), self.top_k)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        if state["chance"].shape[1] < tree.slots:  # drafting ended with a level that expand never looked at
            self._chances(tree, tree.newest_families(), state)
        ms = self._prices(cycle).verify[state["place"]]
        chance = state["chance"][:, 1 : tree.width].to(torch.float32)
        likely, place = chance.sort(dim=1, descending=True, stable=True)
        likely, place = likely[:, : self.total_tokens - 1], place[:, : self.total_tokens - 1]
        count = most_worth(state["worth"], likely.clamp(min=0).to(torch.float64), ms)[:, None]
        state["planned"] = state["planned"] + ms.gather(1, count)[:, 0]
        kept = torch.arange(place.shape[1], device=place.device) < count
        return torch.zeros_like(tree.exists).scatter_(1, place + 1, kept)

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        tree, active = outcome.tree, cycle.active
        tested = (outcome.status >= 0) & (tree.rank == 0) & active[:, None]
        chance = state["chance"][:, : tree.width]
        expected = chance / chance.gather(1, tree.parent.clamp(min=0))
        surprise = ((outcome.status == 1).to(torch.float64) - expected).masked_fill(~tested, 0.0)
        history = remember(state["history"], exact_cumsum(surprise)[:, -1], tested.sum(1))
        learned = {"history": history}
        if self.adaptive_:
            emitted = outcome.accepted + 1
            fade = fading(1 - 1 / self.horizon, emitted)
            planned = state["planned"] / self._prices(cycle).plain[state["place"]]
            learned |= {"spent": state["spent"] * fade + planned, "gained": state["gained"] * fade + emitted}
        return state | {name: torch.where(active, value, state[name]) for name, value in learned.items()}

    def _worth(self, cycle: Cycle, state: State, plain: Tensor) -> Tensor:
        """What a token is worth, ms float64 [B], where a plain cycle takes ``plain`` ms."""
        if self.adaptive_:
            return self.markup_ * (state["spent"] / state["gained"]) * plain
        if cycle.cost is None:
            return torch.full_like(plain, self.markup_ * self.rate_)
        return self.markup_ * (self.rate_ / self.plain_ms_) * plain

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
        context = torch.tensor([round(float(samples.context.mean()))])
        prices = prices_at(samples.cost, context, self.depth, self.top_k, self.total_tokens)
        plain = float(prices.plain)
        return replace(
            self,
            rate_=plain,
            markup_=0.9,
            patience_=0.6,
            adaptive_=False,
            logprob_edges_=table.logprob_edges,
            entropy_edges_=table.entropy_edges,
            odds_=table.table,
            slopes_=table.slopes,
            plain_ms_=plain,
            verify_ms_=tuple(prices.verify[0, 1:].tolist()),
            level_ms_=tuple(tuple(level[0, 1:].tolist()) for level in prices.level),
        )

    def variants(self, ms_per_token: float) -> list[Goodput]:
        """Around the present worth of a token and patience; the rate is the one that was reached, adaptive or not."""
        here = replace(self, rate_=ms_per_token, markup_=self.markup_ * self.rate_ / ms_per_token)
        steps = [(0.8, 1.0), (1.25, 1.0), (1.0, 0.8), (1.0, 1.25), (0.8, 1.25), (1.25, 0.8)]
        near = [replace(here, markup_=here.markup_ * a, patience_=here.patience_ * b) for a, b in steps]
        return near + [replace(here, adaptive_=not self.adaptive_)]

    def expected_acceptance(self, samples: Any) -> Any:
        """As decided on, had each position before been a cycle of one level."""
        nodes = samples.nodes
        columns = [torch.from_numpy(getattr(nodes, name)) for name in ("rank", "depth", "logprob", "entropy")]

        def chance(history: np.ndarray) -> np.ndarray:
            return self._acceptance(*columns, torch.from_numpy(history)).numpy()

        unknowing = chance(np.zeros(len(nodes.rank)))
        return chance(histories(unknowing, nodes, samples.sequence)[nodes.sample])


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


def exact_cumsum(value: Tensor) -> Tensor:
    """Sums float64 [..., M] over value[..., : m + 1] for every m, the same bits at every shape; values at most 1 in size."""
    return (value * UNIT).round_().cumsum(-1).div_(UNIT)
