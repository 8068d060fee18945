"""The league: everyone takes part by itself, figures are the replays', and a second run computes nothing again."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import league, standing
from benchmarks.entrants import registered, shorter
from benchmarks.league_tables import is_ranked, mean
from policies.errors import UserError
from policies.registry import all_policies, load_policy
from sim.setting import Setting
from sim.trial import run_trial
from tests.policies.synthetic import Language
from tests.sim.synthetic_recording import write
from tests.sim.test_bounds import COST, PLAN, PROFILE

NAMES = ("chain", "eagle3", "hedgespec", "sequoia", "svip", "expected_value")


def only(names) -> list[str]:
    return [word for name in names for word in ("--only", name)]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write(tmp_path_factory.mktemp("league") / "trace", Language(2), PLAN)


@pytest.fixture(scope="module")
def played(recording, tmp_path_factory):
    """(folder, arguments, content) of a league of a few policies."""
    folder = tmp_path_factory.mktemp("out")
    PROFILE.save(folder / "profile.json")
    arguments = [str(recording.folder), "--profile", str(folder / "profile.json"), "--out", str(folder / "league")]
    arguments += ["--policy", "chain(k=2)", "--policy", "eagle3(total_tokens=5, depth=2, top_k=3)"]
    league.main([*arguments, *only(NAMES), "--clocked", "2", "--rounds", "1"])
    return folder / "league", arguments, json.loads((folder / "league" / "league.json").read_text())


def test_every_registered_policy_takes_part():
    names = {entrant.policy.name for entrant in registered()}
    needing = {name for name, cls in all_policies().items() if cls.required_fit()}
    assert names | needing == set(all_policies()) and not names & needing
    forms = {entrant.policy.name: entrant.form for entrant in registered()}
    assert forms["opt_tree"] == "capped" and forms["eagle3"] == "default"
    for cls in all_policies().values():
        assert not cls.published or load_policy(cls.published).spec() == cls.published


def test_unlimited_chains_are_cut_to_what_is_covered():
    assert shorter(load_policy("svip")).most == 24 and shorter(load_policy("kangaroo")) is None
    assert shorter(load_policy("eagle3")) is None


def test_figures_are_the_replays(recording, played):
    _, _, content = played
    (group,) = content["groups"]
    lines = {line["policy"]: line for line in group["lines"]}
    fits = {line["policy"].partition("(")[0] for line in group["lines"] if line["form"] == "fitted"}
    assert fits == {"sequoia", "expected_value"}
    ours = lines["chain(k=2)"]
    scored = torch.tensor(sorted(set(range(8)) - set(_trained(played))))
    sums = run_trial(recording, load_policy("chain(k=2)"), Setting("made-up", temperature=0.0), COST, scored)
    assert mean(ours)["ms_per_token"] == pytest.approx(sums.mean("ms_per_token")) and mean(ours)["tau"] == sums.mean("tau")
    plain, static, least = lines["autoregressive"], group["lines"][1], group["least_ms_per_token"]
    assert static["form"] == "best static" and static["faster"] is None
    gap = mean(static)["ms_per_token"] - least
    assert ours["of_static"] == pytest.approx((mean(static)["ms_per_token"] - mean(ours)["ms_per_token"]) / gap)
    assert ours["faster"]["value"] == pytest.approx(1 - mean(ours)["ms_per_token"] / mean(static)["ms_per_token"])
    assert plain["of_plain"] == 0 and ours["decision_ms"] > 0
    assert all(mean(line)["ms_per_token"] >= least for line in group["lines"])
    uncovered = lines["eagle3"]
    assert mean(uncovered)["coverage"] < 1 and not is_ranked(uncovered)
    bounds = [line for line in group["lines"] if line["form"] == "bound"]
    assert len(bounds) == 1 and not is_ranked(bounds[0]) and "every arm known" in bounds[0]["policy"]


def _trained(played) -> list[int]:
    fit = json.loads(next((played[0] / "temperature-0" / "fitted").glob("*.json")).read_text())
    return fit["training"]["texts"]


def test_the_page(played):
    folder, _, content = played
    page = (folder / "league.md").read_text()
    assert "## Temperature 0, drafter made-up" in page and "Not ranked" in page
    assert "--fill TRACE --policy 'eagle3'" in page
    ranked = [line for line in content["groups"][0]["lines"] if is_ranked(line)]
    fastest = min(ranked, key=lambda line: mean(line)["ms_per_token"])
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows[rows.index("policy") + 2] == fastest["policy"]


def test_a_second_run_replays_nothing(played, monkeypatch):
    folder, arguments, content = played

    def never(*_, **__):
        raise AssertionError("replayed or fitted again")

    monkeypatch.setattr("benchmarks.entrants.fit", never)
    monkeypatch.setattr(standing, "run_trial", never)
    league.main([*arguments, *only(set(NAMES) - {"hedgespec"}), "--rounds", "0"])  # the bound is made anew each time
    again = json.loads((folder / "league.json").read_text())
    assert [line["rows"] for line in again["groups"][0]["lines"]] == [
        line["rows"] for line in content["groups"][0]["lines"] if "hedgespec" not in line["policy"]
    ]


def test_bad_input(recording, tmp_path):
    with pytest.raises(UserError, match="give --profile"):
        league.main([str(recording.folder), "--out", str(tmp_path)])
    PROFILE.save(tmp_path / "profile.json")
    arguments = [str(recording.folder), "--profile", str(tmp_path / "profile.json"), "--out", str(tmp_path / "league")]
    for wrong, told in ((["--policy", "egle3"], "egle3"), (["--only", "egle3"], "--only egle3 names no registered policy")):
        with pytest.raises(UserError, match=told):  # before anything is fitted
            league.main([*arguments, *wrong])
    assert not (tmp_path / "league").exists()
    with pytest.raises(UserError, match="--rounds must be 0 or more"):
        league.main([*arguments, "--rounds", "-1"])
    with pytest.raises(UserError, match="prompts to score are also learned from"):
        league.main([*arguments, "--train", str(recording.folder)])
