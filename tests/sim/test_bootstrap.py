"""Intervals against scipy's bootstrap and against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from policies.errors import UserError
from sim.bootstrap import Estimate, Resamples
from sim.tally import Tally


def made(emitted, cycles, domain=None) -> Tally:
    emitted, cycles = np.array(emitted, float), np.array(cycles, float)
    domain = np.zeros(len(emitted), int) if domain is None else np.array(domain)
    return Tally(np.arange(len(emitted)), domain, {"emitted": emitted, "cycles": cycles}, np.zeros((len(emitted), 0)), ["a", "b"])


def test_interval_agrees_with_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    cycles = rng.integers(5, 40, 60).astype(float)
    emitted = np.round(cycles * rng.uniform(1.5, 4, 60))
    found = Resamples(made(emitted, cycles), 8000).estimate(made(emitted, cycles), "tau")
    theirs = bootstrap(
        (emitted, cycles), lambda e, c, axis: e.sum(axis) / c.sum(axis), paired=True, vectorized=True, n_resamples=8000,
        method="percentile", random_state=0,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.06 * width) and found.high == pytest.approx(theirs.high, abs=0.06 * width)
    assert found.value == emitted.sum() / cycles.sum()


def test_what_all_policies_share_cancels_out():
    rng = np.random.default_rng(2)
    hard = rng.uniform(1, 6, 40)
    cycles = np.full(40, 20.0)
    one, other = made(20 * hard + 2, cycles), made(20 * hard, cycles)
    apart = Resamples(one).difference(one, other, "tau")
    assert apart.share == 1.0 and apart.estimate.low == pytest.approx(0.1) and apart.estimate.high == pytest.approx(0.1)
    alone = Resamples(one).estimate(one, "tau")
    assert alone.high - alone.low > 0.5  # though each by itself is far from sure
    assert Resamples(one).difference(one, one, "tau").share == 0.5


def test_domains_count_equally_and_are_drawn_apart():
    sums = made([10, 10, 30, 30, 30], [10, 10, 10, 10, 10], [0, 0, 1, 1, 1])
    found = Resamples(sums).estimate(sums, "tau")
    assert found == Estimate(2.0, 2.0, 2.0)  # within a domain all are alike, so drawing them anew changes nothing
    assert Resamples(sums).estimate(sums, "tau", domain=1).value == 3.0


def test_one_text_gives_no_interval():
    sums = made([10, 20, 30], [10, 10, 10], [0, 0, 1])
    draws = Resamples(sums)
    assert draws.estimate(sums, "tau") == Estimate(2.25, None, None)
    assert draws.estimate(sums, "tau", domain=0).low is not None
    assert draws.difference(sums, sums, "tau").share is None


def test_the_seed_decides():
    sums = made(np.arange(1, 31), np.full(30, 4))
    assert Resamples(sums, seed=5).estimate(sums, "tau") == Resamples(sums, seed=5).estimate(sums, "tau")
    assert Resamples(sums, seed=5).estimate(sums, "tau") != Resamples(sums, seed=6).estimate(sums, "tau")


def test_too_few_draws_and_other_texts_are_refused():
    sums = made([1, 2], [1, 1])
    with pytest.raises(UserError, match="100 or more"):
        Resamples(sums, 99)
    with pytest.raises(ValueError, match="other texts"):
        Resamples(sums).estimate(made([1, 2, 3], [1, 1, 1]), "tau")
