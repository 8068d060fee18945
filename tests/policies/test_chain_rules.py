"""Every chain policy against its paper's rule, written row by row in plain Python."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from live.joining import joined_states
from policies.acceptance import auc, calibration_lines, fit_weights, graded
from policies.contract import Outcome
from policies.drafting import draft
from policies.errors import UserError
from policies.expected_value import ExpectedValue
from policies.hf_confidence import refit
from policies.registry import load_policy
from policies.tree import DraftTree
from tests.policies.row_by_row import Reference, check
from tests.policies.synthetic import Language, Priced, SyntheticDrafter, cycle_at, fresh


class Stops(Reference):
    """Ends a chain where ``rule`` says so of the last token."""

    def __init__(self, most, rule):
        self.most, self.rule = most, rule

    def goes_on(self, chain):
        return not len(chain) or self.rule(chain)


def bound(gamma, chain):
    return 1 - math.sqrt(gamma * chain.entropy[-1])


def test_kangaroo_and_svip():
    rule = Stops(5, lambda chain: math.exp(chain.logprob[-1]) >= 0.7)
    assert check(load_policy("kangaroo(threshold=0.7, most=5)"), lambda: rule) >= 4
    rule = Stops(6, lambda chain: math.sqrt(0.15 * chain.entropy[-1]) <= 3.2)
    assert check(load_policy("svip(threshold=3.2, most=6)"), lambda: rule) >= 4


class AdaEdl(Stops):
    def __init__(self, goal):
        super().__init__(4, lambda chain: bound(0.01, chain) >= self.threshold)
        self.threshold, self.rate, self.goal = 0.3, 0.0, goal

    def learn(self, chain, kept, accepted, rejected):
        self.rate = 0.5 * self.rate + 0.5 * accepted / len(chain)
        wanted = self.threshold
        if self.rate < self.goal:
            wanted += 0.4
        elif len(chain) < self.most:
            wanted -= 0.4
        self.threshold = 0.9 * self.threshold + (1 - 0.9) * wanted


@pytest.mark.parametrize("goal", [0.9, 0.3])
def test_adaedl(goal):
    policy = load_policy(f"adaedl(gamma=0.01, start=0.3, step=0.4, goal={goal}, most=4)")
    assert check(policy, lambda: AdaEdl(goal)) >= 3


class Survival(Reference):
    most = 5

    def goes_on(self, chain):
        return math.exp(sum(chain.logprob)) >= 0.4

    def keeps(self, chain):
        return len(chain) if self.goes_on(chain) else len(chain) - 1


def test_survival():
    assert check(load_policy("survival(threshold=0.4, most=5)"), Survival) >= 3


class Heuristic(Reference):
    most = 7

    def __init__(self, threshold):
        self.length, self.threshold = 3, threshold

    def goes_on(self, chain):
        return not chain or (len(chain) < self.length and math.exp(chain.logprob[-1]) >= self.threshold)

    def learn(self, chain, kept, accepted, rejected):
        self.length = max(1, self.length - 1) if rejected else self.length + 2


@pytest.mark.parametrize("given, threshold", [("", 0.4), (", threshold=0.6", 0.6), (", threshold=0", 0.0)])
def test_hf_heuristic(given, threshold):
    """The token that falls below the threshold is verified, and a success is one of the chain that it cut short."""
    assert check(load_policy(f"hf_heuristic(start=3, most=7{given})"), lambda: Heuristic(threshold)) >= 4


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.lists(st.sampled_from(["all", "some", "none drafted", "idle"]), min_size=1, max_size=9))
def test_hf_heuristic_counts_rows_in_order(start, rows):
    """Rows side by side do what they would do one after the other."""
    policy = load_policy(f"hf_heuristic(start={start})")
    length = start
    for row in rows:
        length = {"all": length + 2, "some": max(1, length - 1)}.get(row, length)
    size = torch.tensor([1 if row == "none drafted" else 2 for row in rows])
    status = torch.tensor([[-1, {"all": 1, "some": 0}.get(row, -1)] for row in rows], dtype=torch.int8)
    outcome = Outcome(None, None, status, SimpleNamespace(size=size), None)
    cycle = SimpleNamespace(active=torch.tensor([row != "idle" for row in rows]))
    assert policy.observe(outcome, cycle, policy.init(len(rows), size))["length"].tolist() == [length]


class Confidence(Stops):
    """With scikit-learn's ROC curve, as transformers does it."""

    def __init__(self):
        super().__init__(4, lambda chain: math.exp(chain.logprob[-1]) >= self.threshold)
        self.threshold, self.pairs = 0.4, []

    def learn(self, chain, kept, accepted, rejected):
        self.pairs += [(math.exp(p), 1) for p in chain.logprob[:accepted]]
        self.pairs += [(math.exp(chain.logprob[accepted]), 0)] if rejected else []
        if len(self.pairs) > 5 and {label for _, label in self.pairs} == {0, 1}:
            false_positive, true_positive, thresholds = roc_curve(*zip(*[(y, p) for p, y in self.pairs], strict=True))
            self.threshold = thresholds[np.argmin(false_positive + 3 * (1 - true_positive))]


def test_hf_confidence():
    assert check(load_policy("hf_confidence(most=4)"), Confidence) >= 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60), st.sampled_from([1.0, 3.0]))
def test_the_refit_is_scikit_learns(pairs, miss_weight):
    score, accepted = [p / 4 for p, _ in pairs], [y for _, y in pairs]
    if len(set(accepted)) < 2:
        return
    false_positive, true_positive, thresholds = roc_curve(accepted, score)
    wanted = thresholds[np.argmin(false_positive + miss_weight * (1 - true_positive))]
    assert float(refit(torch.tensor(score, dtype=torch.float64), torch.tensor(accepted), miss_weight)) == wanted


def test_hf_confidence_learns_from_the_request_at_hand():
    """A request that joins another starts at the given threshold, and each learns what it would learn alone."""
    policy = load_policy("hf_confidence(threshold=0.3, few=3)")
    logprob = torch.tensor([[0.0, -0.1, -0.5, -2.0], [0.0, -0.7, -0.2, -torch.inf]])
    status = torch.tensor([[-1, 1, 1, 0], [-1, 1, 0, -1]], dtype=torch.int8)

    def learned(state, rows):
        return policy.observe(Outcome(None, None, status[rows], SimpleNamespace(logprob=logprob[rows]), None), None, state)

    first = learned(policy.init(1, torch.zeros(1)), [0])
    joined = joined_states(policy, [(first, 1), (policy.init(1, torch.ones(1)), 1)])
    together = learned(joined, [0, 1])
    alone = learned(first, [0])
    assert together["threshold"].tolist() == [alone["threshold"].item(), math.log(0.3)]
    assert together["threshold"][0] == -0.5 and torch.equal(together["logprob"][:1], alone["logprob"])
    assert together["logprob"][1].tolist() == pytest.approx([-0.7, -0.2, -1, -1, -1, -1])
    assert together["accepted"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, -1, -1, -1, -1]]


class GammaTune(Reference):
    most = 6

    def __init__(self):
        self.length, self.average = 2, 2.0

    def goes_on(self, chain):
        return len(chain) < self.length

    def learn(self, chain, kept, accepted, rejected):
        if rejected:
            self.average = min(max((1 - 0.3) * self.average + 0.3 * accepted, 1), 6)
            self.length = math.ceil(self.average)
        else:
            self.length = min(max(accepted + 2, 1), 6)


def test_gammatune():
    assert check(load_policy("gammatune(start=2, most=6)"), GammaTune) >= 4


# ---- with an acceptance estimate -------------------------------------------------------------------------------------

WEIGHTS = (1.5, 0.5, -0.02, -0.2)


def chance(chain, place):
    """Estimated chance that token ``place`` (from 0) is taken."""
    q = math.exp(chain.logprob[place])
    odds = min(math.log(q / (1 - q)), 40.0) if q < 1 else 40.0
    value = WEIGHTS[0] + WEIGHTS[1] * odds + WEIGHTS[2] * chain.entropy[place] + WEIGHTS[3] * (place + 1)
    return 1 / (1 + math.exp(-value))


def survive(chain, length):
    return math.prod(chance(chain, place) for place in range(length))


def test_specdec_pp():
    rule = Stops(6, lambda chain: len(chain) < 2 or 1 - survive(chain, len(chain)) <= 0.6)
    assert check(load_policy(f"specdec_pp(threshold=0.6, most=6, weights_={WEIGHTS})"), lambda: rule) >= 3


class Expected(Reference):
    most = 6

    def goes_on(self, chain):
        return survive(chain, len(chain)) * 0.7 > 0.2 + 0.1

    def keeps(self, chain):
        value = [sum(survive(chain, k) - 0.1 for k in range(1, length + 1)) for length in range(len(chain) + 1)]
        return value.index(max(value))


def test_expected_value():
    spec = f"expected_value(draft_share=0.2, verify_share=0.1, most=6, weights_={WEIGHTS}, next_=0.7)"
    assert check(load_policy(spec), Expected) >= 3


def test_expected_value_under_a_cost_model():
    policy = ExpectedValue(weights_=WEIGHTS, next_=0.7)
    cycle = cycle_at([0, 1, 2], [0, 0, 4])
    cycle = cycle.__class__(**{**cycle.__dict__, "cost": Priced(), "group": torch.tensor([5, 2, 5])})
    plain, draft, verify = policy._times(cycle, 0)
    assert plain.tolist() == [10 + 1 + 0.25 + 1, 10 + 0.5 + 0.25 + 1, 12.25]  # rows 0 and 2 decode together
    assert draft.tolist() == [3.125] * 3 and verify.tolist() == [1.0, 0.5, 1.0]
    _, draft, _ = policy._times(cycle, 2)
    assert draft.tolist() == pytest.approx([2.195, 2.195, 2.235])  # contexts of 5, 5 and 9 tokens, and two drafted


def test_expected_value_needs_times():
    policy = ExpectedValue(weights_=WEIGHTS, next_=0.7)
    cycle = cycle_at([0], [0])
    with pytest.raises(UserError, match="needs a cost model: pass --profile"):
        policy.expand(DraftTree(torch.tensor([1])), cycle, fresh(policy, cycle))


def made_up_samples(count: int = 3000) -> SimpleNamespace:
    """Chains of four tokens whose acceptance follows known weights."""
    random = np.random.default_rng(0)
    logprob = -random.exponential(0.7, (count, 4)).astype(np.float32)
    entropy = random.uniform(0, 3, (count, 4)).astype(np.float32)
    odds = np.log(np.exp(logprob) / -np.expm1(logprob))
    taken = random.random((count, 4)) < 1 / (1 + np.exp(-(0.5 + 0.8 * odds - 0.4 * entropy - 0.1 * np.arange(1, 5))))
    columns = {"logprob": logprob, "entropy": entropy, "room": np.full(count, 100)}
    return SimpleNamespace(columns=columns, accepted=taken.cumprod(1).sum(1))


def test_the_fit_finds_known_weights_and_agrees_with_scikit_learn():
    samples = made_up_samples()
    x, taken = graded(samples)
    weights = fit_weights(samples)
    other = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, taken).coef_[0]
    assert weights == pytest.approx(other, abs=2e-3) and weights == pytest.approx((0.5, 0.8, -0.4, -0.1), abs=0.2)
    lines = calibration_lines(weights, samples)
    assert f"AUC {roc_auc_score(taken, x @ np.array(weights)):.3f}" in lines[0] and len(lines) == 2
    assert float(lines[0].split("ECE ")[1].split(",")[0]) < 0.03
    heavier = fit_weights(samples, rejection_weight=6.0)
    assert heavier[0] < weights[0]  # rejections that count more make it warier


def test_what_was_not_tested_is_left_out():
    samples = made_up_samples(50)
    samples.columns["room"][:] = 2
    samples.columns["logprob"][0] = np.nan
    x, taken = graded(samples)
    wanted = sum(min(a + 1, 2, 4) for a in samples.accepted[1:])
    assert len(x) == len(taken) == wanted and x[:, 3].max() == 2
    assert auc(np.array([1.0, 2, 2, 3]), np.array([False, True, False, True])) == roc_auc_score([0, 1, 0, 1], [1, 2, 2, 3])


def test_measure_lists_the_chain():
    policy = load_policy("specdec_pp(most=5)")
    language = Language(3)
    drafter = SyntheticDrafter(language, [language.truth(0, 4)])
    cycle, base = cycle_at([0], [0], reach=3), policy.fit_base()

    columns = policy.measure(draft(base, drafter, cycle, {}).tree, cycle)
    assert columns["logprob"].shape == columns["entropy"].shape == (1, 5)
    assert columns["logprob"].isnan().tolist() == columns["entropy"].isnan().tolist() == [[False] * 3 + [True] * 2]
