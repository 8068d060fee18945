"""The bounds command, best static, tuning and fitting goodput, on a small synthetic recording."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.chain import Chain
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.registry import load_policy
from policies.sequoia import Sequoia
from policies.threshold import Threshold
from sim import bounds, fit
from sim.bootstrap import Resamples
from sim.metrics import replay_rows
from sim.replay import replay
from sim.samples import build_samples
from sim.setting import Setting
from sim.static_search import CHAINS, Found, best_static, fixed_trees, same_budget
from sim.trial import Trials, run_trial
from sim.tuning import tune
from tests.policies.synthetic import Language
from tests.sim.synthetic_recording import write
from traces.costs import Profile
from traces.manifest import ShardPlan
from traces.recording import Recording

PLAN = [ShardPlan(0, (0, 1, 2, 3), "one"), ShardPlan(1, (4, 5, 6, 7), "two")]
GOODPUT = "goodput(depth=3, top_k=3, total_tokens=12)"
PROFILE = Profile(
    {
        "format": "specreplay-profile",
        "version": 1,
        "interpolation": "linear",
        "verify": {"tokens": [1, 21], "context": [0], "batch": [1], "ms": [[[4]], [[6]]]},
        "commit": {"tokens": [1, 3], "batch": [1], "ms": [[0.1], [0.3]]},
        "draft": {"made-up": {"width": [1, 11], "context": [0], "batch": [1], "ms": [[[0.3]], [[0.8]]]}},
        "catch_up": {"made-up": {"tokens": [0, 2], "context": [0], "batch": [1], "ms": [[[0.2]], [[0.4]]]}},
        "overhead": {"eagle3": {"levels": [0, 10], "batch": [1], "ms": [[0.1], [0.6]]}},
    }
)
COST = PROFILE.cost("made-up")


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    return write(tmp_path_factory.mktemp("bounds") / "trace", Language(2), PLAN)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("profile") / "p.json"
    PROFILE.save(path)
    return str(path)


def run(command, arguments: list, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", [command.__name__, *map(str, arguments)])
    command.main()


class Bowl(Trials):
    """Settings whose time is known: least at depth 5, 24 tokens, top-k 8."""

    def __init__(self):
        self.asked = set()

    def ms_per_token(self, policies):
        self.asked |= set(policies)
        return [
            abs(p.depth - 5) + abs(np.log2(p.total_tokens / 24)) + abs(p.top_k - 8) / 4 + 1 if isinstance(p, Eagle3) else 90.0
            for p in policies
        ]


def test_the_climb_ends_at_the_best_setting_of_the_grid():
    bowl = Bowl()
    assert best_static(bowl).policy == Eagle3(24, 5, 8)
    assert {Chain(k) for k in CHAINS} <= bowl.asked and len(bowl.asked) < 200


def test_settings_that_the_recording_lacks_do_not_compete(recording):
    trials = Trials(recording, Setting("made-up"), COST)
    found = best_static(trials)
    assert isinstance(found.policy, Chain) and found.policy.k <= 3  # the forest is three wide and three deep
    times = [replay_rows(recording, Chain(k), cost=COST)[-1].ms_per_token for k in (1, 2, 3)]
    assert found == Found(Chain(1 + int(np.argmin(times))), min(times))
    with pytest.raises(UserError, match="covers no static setting"):
        best_static(NothingCovered(recording, Setting("made-up"), COST))
    assert same_budget(trials, 6.4).total_tokens == 7


class NothingCovered(Trials):
    def tallies(self, policies):
        sums = run_trial(self.recording, Chain(9), self.setting, self.cost)
        assert sums.coverage < 1
        return [sums for _ in policies]


def test_fixed_trees_are_those_that_sequoia_would_fit(recording):
    trials = Trials(recording, Setting("made-up"), COST)
    trees = fixed_trees(trials)
    assert [tree.tree for tree in trees[:2]] == ["eagle1", "medusa"] and len(trees) > 8
    assert all(len(tree.tree_) + 1 == tree.total_tokens and max(map(len, tree.tree_)) <= tree.depth for tree in trees[2:])
    samples = build_samples(recording, Sequoia(branches=5), "made-up", nodes=True)
    small = Sequoia(total_tokens=4, depth=2, branches=5)
    assert small.fit(samples) == next(tree for tree in trees[2:] if (tree.total_tokens, tree.depth) == (4, 2))
    times = dict(zip(trees, trials.ms_per_token(trees), strict=True))
    found = best_static(trials, trees)
    assert found.ms_per_token <= min(times.values()) < float("inf")  # some are covered


def test_what_is_saved_is_paired(recording):
    sums = run_trial(recording, Chain(2), Setting("made-up"), COST)
    cheaper = replace(sums, sums=sums.sums | {"ms": 0.9 * sums.sums["ms"]})
    saved = Resamples(sums).saving(cheaper, sums, "ms_per_token")
    assert (saved.value, saved.low, saved.high) == pytest.approx((0.1, 0.1, 0.1))  # whatever texts are drawn
    assert Resamples(sums).saving(sums, sums, "cycles_per_token").value == 0.0
    lonely = replace(sums, domain=np.array([0] * 7 + [1]))
    assert Resamples(lonely).saving(lonely, lonely, "ms_per_token").low is None


def test_tuning_never_makes_it_slower(recording):
    start, chosen = Threshold(mass=0.05, probability=0.01, depth=3, top_k=3), np.array([0, 2, 4, 6])
    tuned, ms = tune(start, recording, "made-up", chosen, COST)

    def time_of(policy) -> float:
        return replay_rows(recording, policy, None, COST, torch.as_tensor(chosen))[-1].ms_per_token

    assert ms == time_of(tuned) < time_of(start)
    assert all(time_of(near) >= ms * 0.999 for near in tuned.variants(ms))
    assert tune(Chain(2), recording, "made-up", chosen, COST)[0] == Chain(2)  # nothing to choose


def test_fit_and_bounds_commands(recording, profile, tmp_path, monkeypatch, capsys):
    out, table = tmp_path / "goodput.json", tmp_path / "table.json"
    run(fit, [recording.folder, "--policy", GOODPUT, "--profile", profile, "--out", out], monkeypatch)
    printed, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "log-loss" in printed and "ms per token on the training part" in printed
    assert set(content["calibration"]) == {"fitted", "draft probability"}
    assert sum(one["nodes"] for one in content["calibration"]["fitted"]["bins"]) == content["calibration"]["fitted"]["nodes"]
    policy = load_policy(str(out))
    assert content["fit"]["ms_per_token"] > 0 and policy.spec().count("fitted") == 1
    log = replay(recording, policy, cost=COST)
    assert log.coverage == 1.0 and int(log.emitted.sum()) == 8 * 13  # never leaves EAGLE-3's beam
    run(bounds, [recording.folder, "--profile", profile, "--policy", out, "--json", table], monkeypatch)
    assert "least time possible" in capsys.readouterr().out
    lines = {line["name"]: line for line in json.loads(table.read_text())["standings"]}
    bound, plain = lines["[least time possible]"]["ms_per_token"], lines["autoregressive"]["ms_per_token"]
    ours = lines[policy.spec()]
    assert bound <= ours["ms_per_token"]
    assert ours["of_plain"] == pytest.approx((plain - ours["ms_per_token"]) / (plain - bound))
    run(bounds, [recording.folder, "--policy", "chain(k=2)"], monkeypatch)  # cycles alone, without a profile
    assert "fewest cycles possible" in capsys.readouterr().out


def test_bad_input(recording, profile, tmp_path, monkeypatch):
    for command, arguments, told in (
        (fit, ["--policy", GOODPUT, "--out", tmp_path / "p.json"], "give --profile"),
        (fit, ["--policy", "threshold", "--out", tmp_path / "p.json", "--profile", profile], "lacks draft nodes"),
        (bounds, ["--policy", "goodput"], "must be fitted first"),
        (bounds, ["--train-share", "1"], "left to score on"),
        (bounds, ["--profile", tmp_path / "none.json"], "there is no profile"),
    ):
        with pytest.raises(UserError, match=told):
            run(command, [recording.folder, *arguments], monkeypatch)
    assert not list(tmp_path.iterdir())
