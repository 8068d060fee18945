"""The bounds command, best static, tuning and fitting goodput, on a small synthetic recording."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from policies.chain import Chain
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.registry import load_policy
from policies.threshold import Threshold
from sim import bounds, fit
from sim.replay import replay
from sim.static_search import CHAINS, Family, Found, best_static, same_budget
from sim.texts import by_domain, over_domains, paired_interval, text_sums
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


class Bowl(Family):
    """Settings whose time is known: least at depth 5, 24 tokens, top-k 8."""

    def __init__(self):
        self.asked = set()

    def ms_per_token(self, policies, cost):
        self.asked |= set(policies)
        return [
            abs(p.depth - 5) + abs(np.log2(p.total_tokens / 24)) + abs(p.top_k - 8) / 4 + 1 if isinstance(p, Eagle3) else 90.0
            for p in policies
        ]


def test_the_climb_ends_at_the_best_setting_of_the_grid():
    bowl = Bowl()
    assert best_static(bowl, COST).policy == Eagle3(24, 5, 8)
    assert {Chain(k) for k in CHAINS} <= bowl.asked and len(bowl.asked) < 200


def test_settings_that_the_recording_lacks_do_not_compete(recording):
    family = Family(recording, np.arange(8))
    found = best_static(family, COST)
    assert isinstance(found.policy, Chain) and found.policy.k <= 3  # the forest is three wide and three deep
    logs = [replay(recording, Chain(k)) for k in (1, 2, 3)]
    domain = recording.domain_index
    times = [over_domains(sums.ms, sums.emitted, domain) for sums in (text_sums(log, 8, COST) for log in logs)]
    assert found == Found(Chain(1 + int(np.argmin(times))), min(times))
    with pytest.raises(UserError, match="covers no static setting"):
        best_static(Family(recording, np.arange(8), replays=_nothing_covered), COST)
    assert same_budget(family, 6.4).total_tokens == 7


def _nothing_covered(recording, policies, drafter, sequences):
    log = replay(recording, Chain(9))
    assert log.coverage < 1
    return [log for _ in policies]


def test_figures_per_text(recording):
    log = replay(recording, load_policy("chain(k=2)"))
    sums = text_sums(log, 8, COST)
    assert sums.emitted.tolist() == [13.0] * 8 and np.isnan(text_sums(log, 8).ms).all()
    ratios = by_domain(sums.emitted, sums.cycles, recording.domain_index)
    mine = torch.from_numpy(recording.domain_index.copy())[log.sequence] == 1
    assert ratios[1] == pytest.approx(4 * 13 / int(mine.sum()))
    assert over_domains(sums.emitted, sums.cycles, recording.domain_index) == pytest.approx(sum(ratios.values()) / 2)
    low, high = paired_interval(0.9 * sums.ms, sums.ms, sums.emitted, recording.domain_index)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)  # whatever texts are drawn


def test_tuning_never_makes_it_slower(recording):
    start, chosen = Threshold(mass=0.05, probability=0.01, depth=3, top_k=3), np.array([0, 2, 4, 6])
    tuned, ms = tune(start, recording, "made-up", chosen, COST)

    def time_of(policy) -> float:
        sums = text_sums(replay(recording, policy, sequences=torch.as_tensor(chosen), cost=COST), 8, COST)
        return over_domains(sums.ms, sums.emitted, recording.domain_index)

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


def test_bad_input(recording, tmp_path, monkeypatch):
    for command, arguments, told in (
        (fit, ["--policy", GOODPUT, "--out", tmp_path / "p.json"], "give --profile"),
        (bounds, ["--policy", "goodput"], "must be fitted first"),
        (bounds, ["--train-share", "1"], "left to score on"),
        (bounds, ["--profile", tmp_path / "none.json"], "there is no profile"),
    ):
        with pytest.raises(UserError, match=told):
            run(command, [recording.folder, *arguments], monkeypatch)
    assert not list(tmp_path.iterdir())
