"""One schedule prices all that stand in a table, policies that decide for the whole batch, all others and plain decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import league
from policies.contract import Policy
from policies.errors import UserError
from policies.registry import all_policies, from_json, load_policy
from sim import compare, contest, sweep
from sim.opening import says
from sim.pricing import plain_ms, price
from sim.recorded import tensor
from sim.replay import replay
from sim.schedule import steps_of
from sim.setting import Setting
from sim.sweepstore import SweepStore
from sim.trial import run_trial, run_trials, tally_of
from tests.policies.synthetic import Language
from tests.sim.many_texts import PLAN, content, write_many, write_profile
from tests.sim.synthetic_recording import write
from traces.costs import Profile
from traces.recording import Recording, open_recording

COST = Profile(content()).cost("made-up")
ALONE, WHOLE, PLAIN = "chain(k=2)", "tetris(k=1, extra=1)", "autoregressive"
LENGTHS = [14, 5, 9, 3, 12, 2, 7, 14, 4, 10]
"""Counted tokens of each text: in groups of three or four some wait for others."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    sound = write(tmp_path_factory.mktemp("schedule") / "trace", Language(3, steps=5), PLAN)
    lengths = torch.tensor(LENGTHS, dtype=torch.from_numpy(sound.length.copy()).dtype).numpy()
    return replace(sound, arrays=dict(sound.arrays) | {"length": lengths})


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    return write_many(tmp_path_factory.mktemp("many") / "trace")


@pytest.mark.parametrize(("batch", "ragged"), [(3, "max"), (4, "sum")])
def test_in_one_table_everybody_takes_the_steps_of_fixed_groups(recording: Recording, batch: int, ragged: str):
    policies = [load_policy(spec) for spec in (ALONE, WHOLE, PLAIN)]
    setting = Setting("made-up", batch, ragged).scheduled(policies)
    assert setting.schedule == "fixed"
    for policy, sums in zip(policies, run_trials(recording, policies, setting, COST), strict=True):
        log = replay(recording, policy, batch=batch, cost=COST)
        ms = price(log, COST.of(policy.name), steps_of(log.sequence, batch, joining=False), ragged)
        by_hand = [float(ms[log.sequence == text].sum()) for text in range(10)]
        assert sums.sums["ms"].tolist() == pytest.approx(by_hand, rel=1e-12)
        assert tally_of(log, recording, policy, setting, COST).to_json() == sums.to_json()


@pytest.mark.parametrize("schedule", ["joining", "fixed"])
def test_plain_decoding_is_one_number_for_all(recording: Recording, schedule: str):
    setting = Setting("made-up", 4, schedule=schedule)
    specs = [ALONE, PLAIN, "eagle3(total_tokens=4, depth=2, top_k=3)"] + [WHOLE] * (schedule == "fixed")
    tallies = run_trials(recording, [load_policy(spec) for spec in specs], setting, COST)
    arguments = [torch.from_numpy(recording.offset.copy()), torch.tensor(LENGTHS), COST, 4]
    context = tensor(recording.context_length)
    by_hand = {how: plain_ms(context, *arguments, joining=how == "joining") for how in ("joining", "fixed")}
    assert by_hand["joining"].sum() != by_hand["fixed"].sum(), "the texts must tell the schedules apart"
    for sums in tallies:
        assert sums.sums["plain_ms"].tolist() == pytest.approx(by_hand[schedule].tolist(), rel=1e-12)


def test_policies_that_decide_alone_can_be_priced_under_both(recording: Recording):
    policy = load_policy(ALONE)
    joining, fixed = (run_trial(recording, policy, Setting("made-up", 3, schedule=how), COST) for how in ("joining", "fixed"))
    assert joining.mean("tau") == fixed.mean("tau") and joining.mean("tokens_per_second") > fixed.mean("tokens_per_second")
    one, other = (run_trial(recording, policy, Setting("made-up", schedule=how), COST) for how in ("joining", "fixed"))
    assert one.to_json() == other.to_json()  # nobody shares a step


def test_a_batch_decides_in_fixed_groups_only(recording: Recording):
    policy, setting = load_policy(WHOLE), Setting("made-up", 3)
    for priced in (
        lambda: run_trial(recording, policy, setting, COST),
        lambda: tally_of(replay(recording, policy, batch=3), recording, policy, setting, COST),
        lambda: setting.scheduled([load_policy(ALONE), policy], "joining"),
    ):
        with pytest.raises(UserError, match="tetris decides for the whole batch .* say --schedule fixed"):
            priced()
    assert run_trial(recording, policy, Setting("made-up"), COST).coverage == 1.0  # a batch of one has no schedule


def test_the_schedule_that_is_chosen():
    alone, whole = load_policy(ALONE), load_policy(WHOLE)
    for batch, policies, chosen in ((4, [alone, whole], "fixed"), (4, [alone], "joining"), (1, [alone, whole], "joining")):
        assert Setting("made-up", batch, schedule="fixed").scheduled(policies).schedule == chosen
    assert Setting("made-up", 4).scheduled([alone], "fixed").to_json()["schedule"] == "fixed"
    assert Setting("made-up", 4).scheduled(all_policies().values()).schedule == "fixed"
    with pytest.raises(UserError, match="--schedule must be joining or fixed, not 'loose'"):
        Setting("made-up", schedule="loose")


def test_what_was_chosen_is_said_below_the_table():
    facts = {"drafters": [{"name": "made-up"}], "target": {}, "profile": {"kind": "measured", "target": None, "machine": "none"}}
    for how, told in (("joining", "joins when one has ended"), ("fixed", "groups shrink as texts end")):
        (line,) = says(facts, Setting("made-up", 4, schedule=how))
        assert f"schedule {how}" in line and told in line
        assert not says(facts, Setting("made-up", schedule=how))


def test_replay_chooses_and_can_be_told(trace, tmp_path, capsys, refused):
    out, profile = tmp_path / "r.json", write_profile(tmp_path / "p.json")
    words = [str(trace), "--policy", ALONE, "--profile", str(profile), "--batch", "3", "--json", str(out)]

    def ms(*options: str) -> float:
        contest.main([*words, *options, "--resamples", "100"])
        found = json.loads(out.read_text())
        row = next(row for row in found["rows"] if row["policy"] == ALONE and row["domain"] == "mean")
        told = capsys.readouterr().out
        assert found["setting"]["schedule"] == row["schedule"] and told.count(f"schedule {row['schedule']}") == 1
        expected = Setting("made-up", 3, schedule=row["schedule"])
        assert row["ms_per_token"] == run_trial(open_recording(trace), load_policy(ALONE), expected, COST).mean("ms_per_token")
        return row["ms_per_token"]

    joining, fixed = ms(), ms("--schedule", "fixed")
    assert joining != fixed == ms("--policy", WHOLE)
    assert "--schedule fixed" in refused(lambda: contest.main([*words, "--policy", WHOLE, "--schedule", "joining"]))


def test_sweep_and_compare_choose(trace, tmp_path):
    options = ["--profile", str(write_profile(tmp_path / "p.json")), "--batch", "3", "--resamples", "100"]
    sweep.main([str(trace), "--policy", WHOLE, "--grid", "k=1,2", *options, "--allow-misses", "--out", str(tmp_path / "s")])
    assert set(pq.read_table(tmp_path / "s" / "results.parquet")["schedule"].to_pylist()) == {"fixed"}
    wanted, recording = Setting("made-up", 3, schedule="fixed"), open_recording(trace)
    out = ["--json", str(tmp_path / "c.json")]
    compare.main([str(trace), str(trace), "--policy", ALONE, "--policy", WHOLE, *options, *out])
    found = json.loads((tmp_path / "c.json").read_text())
    assert [setting["schedule"] for setting in found["settings"]] == ["fixed", "fixed"]
    for row in (row for row in found["rows"] if row["domain"] == "mean"):
        sums = run_trial(recording, load_policy(row["policy"]), wanted, COST)
        assert row["ms_per_token_first"] == pytest.approx(sums.mean("ms_per_token"), rel=1e-12)


def test_a_league_is_priced_in_fixed_groups(trace, tmp_path):
    """Whoever takes part, and the best static setting too, where it is chosen and where it is scored."""
    out = tmp_path / "league"
    options = ["--profile", str(write_profile(tmp_path / "p.json")), "--batch", "2", "--resamples", "100", "--rounds", "0"]
    league.main([str(trace), *options, "--only", "chain", "--policy", ALONE, "--out", str(out)])
    found = json.loads((out / "league.json").read_text())
    (group,), setting = found["groups"], Setting("made-up", 2, temperature=0.0, schedule="fixed")
    assert group["setting"] == setting.to_json() and any("schedule fixed" in line for line in found["says"])
    scored = json.loads((out / "temperature-0" / "points.jsonl").read_text().splitlines()[0])["texts"]
    learned, recording = [text for text in range(10) if text not in scored], open_recording(trace)

    def ms(policy: Policy, texts: list[int]) -> float:
        return run_trial(recording, policy, setting, COST, torch.tensor(texts)).mean("ms_per_token")

    policies = [from_json(line["rows"][-1]["parameters"]) for line in group["lines"]]
    assert {line["form"] for line in group["lines"]} == {"control", "best static", "default", "given"}
    for line, policy in zip(group["lines"], policies, strict=True):
        assert line["rows"][-1]["ms_per_token"] == pytest.approx(ms(policy, scored), rel=1e-12)
    assert group["best_static"]["ms_per_token_in_training"] == pytest.approx(ms(policies[1], learned), rel=1e-12)


def test_sweeps_from_before_there_was_a_choice(tmp_path, refused):
    for batch in (1, 4):
        now = {"setting": Setting("made-up", batch).to_json()}
        before = {"setting": {name: value for name, value in now["setting"].items() if name != "schedule"}}
        SweepStore.open(tmp_path / str(batch), before)
        if batch == 1:
            assert SweepStore.open(tmp_path / "1", now).finished == {}
        else:  # some of it may have been priced under one schedule, some under the other
            assert "another setting.schedule" in refused(lambda n=now: SweepStore.open(tmp_path / "4", n))
