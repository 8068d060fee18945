"""Policies that learn online, against their papers' formulas, row by row in plain Python."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from policies.arms import Arms
from policies.drafting import draft
from policies.errors import UserError
from policies.hedgespec import normal_hedge
from policies.loop import run_cycle
from policies.philox import uniform
from policies.registry import load_policy
from tests.policies.row_by_row import Reference, check
from tests.policies.synthetic import Language, Priced, SyntheticDrafter, SyntheticVerifier, cycle_at, fresh

LENGTHS = (1, 2, 4)
"""The arms of the chain bandits below; K = 3, L = 4."""


class Chooser(Reference):
    """Plays one of the chains of ``LENGTHS`` per cycle."""

    most = 4
    key = 0

    def goes_on(self, chain):
        return len(chain) < LENGTHS[self.arm]


class Ucb(Chooser):
    def __init__(self):
        self.rewards = [[], [], []]

    def start(self, number):
        def bound(arm):
            n, t = len(self.rewards[arm]), number + 1
            if n == 0:
                return 1e9
            radius = (1 + n) / n**2 * (1 + 2 * math.log(3 * t**2 * math.sqrt(1 + n) / 0.1))
            return sum(self.rewards[arm]) / n + 0.2 * 4 / 2 * math.sqrt(radius)

        bounds = [bound(arm) for arm in range(3)]
        self.arm = bounds.index(max(bounds))

    def learn(self, chain, kept, accepted, rejected):
        self.rewards[self.arm].append(accepted + 1)


def test_ucbspec():
    assert check(load_policy(f"ucbspec(arms={LENGTHS}, exploration=0.2)"), Ucb) >= 3


def inverse(shares, number):
    return min(int(np.searchsorted(np.cumsum(shares), number, side="right")), len(shares) - 1)


class Exp3(Chooser):
    def __init__(self):
        self.loss = [0.0] * 3

    def start(self, number):
        rate = math.sqrt(math.log(3) / ((number + 1) * 3))
        weights = [math.exp(-rate * loss) for loss in self.loss]
        self.shares = [weight / sum(weights) for weight in weights]
        self.arm = inverse(self.shares, float(uniform(7, torch.tensor(self.key), torch.tensor(number), 1)))

    def learn(self, chain, kept, accepted, rejected):
        self.loss[self.arm] += (4 + 1 - (accepted + 1)) / (4 * self.shares[self.arm])


def hedge_weights(regret):
    positive = [max(value, 0.0) for value in regret]
    top = max(positive)
    if top == 0:
        return [1 / len(regret)] * len(regret)

    def excess(c):
        return sum(math.exp(value**2 / (2 * c)) for value in positive) / len(regret) - math.e

    c = brentq(excess, top**2 / (2 * (1 + math.log(len(regret)))) * 0.999, top**2 / 2 * 1.001, xtol=1e-15)
    weights = [value / c * math.exp(value**2 / (2 * c)) for value in positive]
    return [weight / sum(weights) for weight in weights]


class Hedge(Chooser):
    def __init__(self):
        self.regret = [0.0] * 3

    def start(self, number):
        self.arm = inverse(hedge_weights(self.regret), float(uniform(7, torch.tensor(self.key), torch.tensor(number), 1)))

    def learn(self, chain, kept, accepted, rejected):
        known = [arm for arm in range(3) if arm <= self.arm]  # shorter chains lie inside the one that was verified
        loss = {arm: 1 - (min(accepted, LENGTHS[arm]) + 1) / 5 for arm in known}
        weights = hedge_weights(self.regret)
        total = sum(weights[arm] for arm in known)
        share = {arm: weights[arm] / total if total > 0 else 1 / len(known) for arm in known}
        mean = sum(share[arm] * loss[arm] for arm in known)
        for arm in known:
            self.regret[arm] += mean - loss[arm]


@pytest.mark.parametrize("name, reference", [("exp3spec", Exp3), ("hedgespec", Hedge)])
def test_randomised_choosers(name, reference):
    keys = iter([0, 1, 2] * 2)  # check() goes through the texts in order, once per language

    def make():
        made = reference()
        made.key = next(keys)
        return made

    assert check(load_policy(f"{name}(arms={LENGTHS}, seed=7)"), make) >= 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3000, 3000).map(lambda value: value / 100), min_size=2, max_size=8))
def test_normal_hedge(regret):
    got = normal_hedge(torch.tensor([regret], dtype=torch.float64))[0].tolist()
    assert sum(got) == pytest.approx(1) and got == pytest.approx(hedge_weights(regret), abs=1e-9)


def test_hedge_knows_what_lies_inside():
    """What each setting would have had accepted is what it gets when it is played."""
    settings_ = ((3, 2, 3), (8, 3, 3), (15, 3, 3), (9, 4, 3))
    language, rows = Language(4, steps=8), 24
    texts = [language.truth(key, 12) for key in range(rows)]
    drafter, verifier = SyntheticDrafter(language, texts), SyntheticVerifier(texts)
    cycle, policy = cycle_at(list(range(rows)), [0] * rows), load_policy(f"hedgespec(arms={settings_})")
    outcomes = {}

    class Spy(type(policy)):
        def begin(self, cycle, state):
            return state | {"arm": torch.full((rows,), self.played)}

        def observe(self, outcome, cycle, state):
            outcomes[self.played] = outcome
            return state

    seen = 0
    for played in range(4):
        spy = Spy(policy.arms)
        object.__setattr__(spy, "played", played)
        run_cycle(spy, drafter, verifier, cycle, {})
    for played, outcome in outcomes.items():
        accepted, known = policy.counterfactual(outcome, cycle, torch.full((rows,), played))
        assert bool(known[:, played].all()) and bool((accepted[:, played] == outcome.accepted).all())
        for other in range(4):
            rows_known = known[:, other]
            assert torch.equal(accepted[rows_known, other], outcomes[other].accepted[rows_known])
            seen += int(rows_known.sum()) if other != played else 0
        assert not bool(known[:, 3].any()) or played == 3, "a deeper tree was not drafted"
    assert seen >= 4 * rows


@pytest.mark.parametrize("arm, spec", [((7, 3, 2), "eagle3(total_tokens=7, depth=3, top_k=2)"), (3, "chain(k=3)")])
def test_an_arm_is_the_policy_it_names(arm, spec):
    """Beside other arms in the batch, to the node."""
    language = Language(8, steps=5)
    drafter = SyntheticDrafter(language, [language.truth(key, 3) for key in range(8)])
    cycle, plain = cycle_at(list(range(8)), [0] * 8), load_policy(spec)
    wanted = draft(plain, drafter, cycle, fresh(plain, cycle))
    mixed = load_policy(f"ucbspec(arms=((12, 4, 4), {arm}))")
    got = draft(mixed, drafter, cycle, {"arm": torch.tensor([0, 1] * 4)})
    for row in range(1, 8, 2):
        size = int(wanted.tree.size[row])
        assert int(got.tree.size[row]) == size
        assert got.tree.token[row, :size].tolist() == wanted.tree.token[row, :size].tolist()
        assert got.kept[row, :size].tolist() == wanted.kept[row, :size].tolist()


def test_gain_by_speed():
    cycle = cycle_at([0, 1], [0, 10])
    priced = dataclasses.replace(cycle, cost=Priced())
    arms = Arms((1, (6, 3, 2)))
    context = [5, 15]
    wanted = [[3 + 10 + 0.5 * 2 + 0.25 + 1.125, 3 + 2 * (2 + 0.01 * c) + 10 + 0.5 * 6 + 0.25 + 1.375] for c in context]
    assert arms.time_ms(priced).tolist() == [pytest.approx(row) for row in wanted]
    assert arms.worth("speed", priced, "x").tolist() == [pytest.approx([1, row[0] / row[1]]) for row in wanted]
    assert arms.worth("tokens", cycle, "x").tolist() == [[1, 1], [1, 1]]
    with pytest.raises(UserError, match="needs a cost model: pass --profile"):
        arms.worth("speed", cycle, "ucbspec")


class Tap(Reference):
    most = 4

    def __init__(self):
        self.rewards = [[], []]

    def start(self, number):
        def bound(rewards):
            return sum(rewards) / len(rewards) + math.sqrt(2 * math.log(number) / len(rewards)) if rewards else 1e9

        bounds = [bound(rewards) for rewards in self.rewards]
        self.arm = bounds.index(max(bounds))

    def goes_on(self, chain):
        if not len(chain):
            return True
        return math.exp(chain.logprob[-1]) >= 0.8 if self.arm == 0 else math.sqrt(0.15 * chain.entropy[-1]) <= 3.2

    def learn(self, chain, kept, accepted, rejected):
        self.rewards[self.arm].append(0.5 * accepted / 4 + 0.5 * accepted / len(chain))


def test_tapout():
    policy = load_policy("tapout(arms=('kangaroo(threshold=0.8)', 'svip(threshold=3.2)'), most=4)")
    assert check(policy, Tap) >= 3


class Estimator(Reference):
    """Newton's step on all parameters at once (slope and one intercept per depth), by numpy."""

    most = 4

    def __init__(self, warm_up=0):
        self.slope, self.intercept, self.seen, self.cycles, self.warm_up = 0.5, np.full(4, -0.2), [], 0, warm_up

    def survival(self, chain):
        product = 1.0
        for place, logprob in enumerate(chain.logprob):
            product *= 1 / (1 + math.exp(-(self.slope * self.odds(logprob) + self.intercept[place])))
        return product

    @staticmethod
    def odds(logprob):
        q = math.exp(logprob)
        return math.log(q / (1 - q)) if logprob < 0 else 40.0

    def goes_on(self, chain):
        return self.cycles < self.warm_up or self.survival(chain) >= 0.3

    def keeps(self, chain):
        return len(chain) if self.goes_on(chain) else len(chain) - 1

    def learn(self, chain, kept, accepted, rejected):
        self.seen += [(place, self.odds(chain.logprob[place]), place < accepted) for place in range(accepted + rejected)]
        self.cycles += 1
        if self.cycles % 4:
            return
        design = np.zeros((len(self.seen), 5))
        for row, (place, odds, _) in enumerate(self.seen):
            design[row, 0], design[row, 1 + place] = odds, 1
        said = 1 / (1 + np.exp(-(design @ [self.slope, *self.intercept])))
        error = np.array([taken for _, _, taken in self.seen]) - said
        information = (design * (said * (1 - said))[:, None]).T @ design + 1e-3 * np.eye(5)
        count = design[:, 1:].sum(0)
        step = np.linalg.solve(information, design.T @ error)[0] * count.sum() / (count.sum() + 50)
        step = step if self.slope + step >= 0 else 0.0
        shift = ((design.T @ error)[1:] - information[0, 1:] * step) / np.diag(information)[1:]
        self.slope, self.intercept, self.seen = self.slope + step, self.intercept + shift * count / (count + 50), []


@pytest.mark.parametrize("given, warm_up", [("", 0), (", warm_up=1", 4)])
def test_online_acceptance(given, warm_up):
    """By default the estimate is used from the first cycle on."""
    assert check(load_policy(f"online_acceptance(refit=4, most=4{given})"), lambda: Estimator(warm_up)) >= 3


@pytest.mark.parametrize(
    "spec, told",
    [
        ("ucbspec(arms=(1,))", "two or more settings"),
        ("ucbspec(arms=(1, 0))", "all 1 or more"),
        ("exp3spec(arms=((4, 2), 3))", "triples"),
        ("ucbspec(gain=money)", "tokens or speed"),
        ("ucbspec(delta=0)", "delta must lie between"),
        ("hedgespec(arms=((4, 2, 2), (9, 3, 3)))", "share one top_k"),
        ("tapout(arms=('eagle3', 'kangaroo'))", "stopping rules without memory"),
        ("tapout(arms=('adaedl', 'kangaroo'))", "stopping rules without memory"),
        ("tapout(arms=('kangaro', 'svip'))", "did you mean kangaroo?"),
        ("online_acceptance(ridge=0)", "ridge must be above 0"),
        ("kangaroo(threshold=0)", "threshold must be above 0"),
        ("gammatune(start=11)", "start must lie between"),
        ("specdec_pp(weights_=(1.0,))", "weights_ must be 4 numbers"),
        ("hf_heuristic(start=0)", "start must be 1 or more"),
        ("hf_heuristic(threshold=-0.1)", "threshold must lie between"),
    ],
)
def test_bad_parameters(spec, told):
    with pytest.raises(UserError) as error:
        load_policy(spec)
    assert told in str(error.value)
