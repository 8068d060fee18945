"""vLLM's online acceptance estimator, and a chain that is verified as far as it says.

``OnlineAcceptanceEstimator`` of vLLM (https://github.com/vllm-project/vllm/pull/52228, as merged): the chance that the token at
depth k is taken is a logistic function of the draft's log-odds for its most probable token, with one slope for all depths and
an intercept for each. Every ``refit`` cycles one damped Newton step on what was verified since. Nothing is stored but
sums. The first cycle already trusts the estimate, with the slope and the intercepts that it starts from; earlier commits of the
pull request verified everything until three refits were done (nearest: ``warm_up=3, slope=0, intercept=1.5``). vLLM's log-odds
are of the distribution behind the temperature, ours of the recorded one, which is raw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.acceptance import log_odds, logistic
from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.stopping import StoppingChain, last_token
from policies.sums import exact_sum
from policies.tree import DraftTree


@policy("online_acceptance", paper="https://github.com/vllm-project/vllm/pull/52228")
class OnlineAcceptance(StoppingChain):
    """A top-1 chain of the tokens whose estimated survival is at least a threshold, the estimate learned while serving.

    ``slope`` and ``intercept`` are where the estimate starts; ``damping`` is how many observations move a parameter by
    half a Newton step; ``ridge`` keeps it finite; all vLLM's. Until ``warm_up`` refits are done, all ``most`` tokens are
    drafted and verified. vLLM spends a budget on the estimates; the threshold on the survival stands in for it, and is ours.
    """

    threshold: float = 0.3
    slope: float = 0.5
    intercept: float = -0.2
    refit: int = 100
    warm_up: int = 0
    damping: float = 50.0
    ridge: float = 1e-3
    most: int = 8

    scope = "stream"

    def __post_init__(self):
        require(0 <= self.threshold <= 1, self.name, f"threshold must lie between 0 and 1, not {self.threshold}")
        for name, least in {"refit": 1, "most": 1, "warm_up": 0, "damping": 0, "slope": 0}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")
        require(self.ridge > 0, self.name, f"ridge must be above 0, not {self.ridge}")

    def init(self, rows: int, key: Tensor) -> State:
        """slope float64 [1], intercept float64 [1, most], cycles int64 [1], and the sums since the last refit."""
        nothing = torch.zeros((1, self.most), dtype=torch.float64, device=key.device)
        sums = {name: nothing for name in ("count", "weight", "weighted_odds", "error")}
        sums |= {name: nothing[:, 0] for name in ("weighted_square", "error_odds")}
        slope = torch.full_like(nothing[:, 0], self.slope)
        cycles = torch.zeros(1, dtype=torch.int64, device=key.device)
        return {"slope": slope, "intercept": torch.full_like(nothing, self.intercept), "cycles": cycles} | sums

    def begin(self, cycle: Cycle, state: State) -> State:
        """survival: float64 [B, most + 1], estimated chance that the target takes all tokens up to each depth."""
        survival = torch.zeros((len(cycle.sequence), self.most + 1), dtype=torch.float64, device=cycle.sequence.device)
        survival[:, 0] = 1
        return state | {"survival": survival}

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        self._survive(tree, last[:, 0], state)
        return self._probable(state)[:, tree.levels]

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        if tree.levels == self.most:  # expand has not looked at the last token
            self._survive(tree, last_token(tree)[:, 0].clamp(min=0), state)
        depth = tree.depth.clamp(min=0)
        return tree.exists & self._probable(state).gather(1, depth)

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """Add the tested tokens to the sums (accepted ones and the first rejected), and refit when it is time.

        Rows that decode side by side count alike, in whatever order they stand.
        """
        width = min(outcome.tree.width - 1, self.most)
        seen = (outcome.status[:, 1 : width + 1] >= 0) & cycle.active[:, None]
        taken = (outcome.status[:, 1 : width + 1] == 1).double()
        odds = log_odds(outcome.tree.logprob[:, 1 : width + 1].masked_fill(~seen, -1.0))
        said = logistic(state["slope"][:, None] * odds + state["intercept"][:, :width])
        weight = said * (1 - said) * seen
        error = (taken - said) * seen
        new = {"count": seen.double(), "weight": weight, "weighted_odds": weight * odds, "error": error}
        total = {"weighted_square": weight * odds * odds, "error_odds": error * odds}
        state = dict(state, cycles=state["cycles"] + 1)
        for name, value in new.items():
            state[name] = state[name] + torch.nn.functional.pad(exact_sum(value)[None], (0, self.most - width))
        for name, value in total.items():
            state[name] = state[name] + exact_sum(value.reshape(-1))
        return self._refit(state) if int(state["cycles"]) % self.refit == 0 else state

    def _refit(self, state: State) -> State:
        """One Newton step: the slope with the intercepts profiled out, then each intercept given the slope."""
        weight = state["weight"] + self.ridge
        coupling, error, count = state["weighted_odds"], state["error"], state["count"]
        information = state["weighted_square"] + self.ridge - (coupling * coupling / weight).sum(1)
        step = (state["error_odds"] - (coupling * error / weight).sum(1)) / information
        step = step * (count.sum(1) / (count.sum(1) + self.damping).clamp(min=1))
        step = torch.where(state["slope"] + step >= 0, step, 0.0)  # surer must not mean less likely
        shift = (error - coupling * step[:, None]) / weight * (count / (count + self.damping).clamp(min=1))
        sums = ("count", "weight", "weighted_odds", "error", "weighted_square", "error_odds")
        cleared = {name: torch.zeros_like(state[name]) for name in sums}
        return state | {"slope": state["slope"] + step, "intercept": state["intercept"] + shift} | cleared

    def _survive(self, tree: DraftTree, last: Tensor, state: State) -> None:
        """Write down the survival of the newest tokens ``last`` int64 [B], 0 in rows that have stopped."""
        level = tree.levels
        odds = log_odds(tree.logprob.gather(1, last[:, None])[:, 0].masked_fill(last == 0, -1.0))
        said = logistic(state["slope"] * odds + state["intercept"][:, level - 1])
        state["survival"][:, level] = (state["survival"][:, level - 1] * said).masked_fill(last == 0, 0)

    def _probable(self, state: State) -> Tensor:
        """bool [B, most + 1]; everything while the estimate warms up."""
        return (state["survival"] >= self.threshold) | (state["cycles"] < self.warm_up * self.refit)[:, None]
