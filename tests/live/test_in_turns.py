"""A profile taken in turns with decoding: how often it has its turn, and what is predicted by it. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import live_speed
from live import bench
from live.in_turns import LOOPS, SHAPES, ProfileInTurns, _shapes
from policies.registry import load_policy
from sim.finding import text_digest
from tests.sim.many_texts import content as priced
from traces.costs import Profile, load_profile
from traces.recording import open_recording

SMALL = "eagle3(total_tokens=8, depth=3, top_k=4)"
GOODPUT = str(Path(live_speed.FITTED) / "goodput.json")
GRID = {"tokens": [1, 4, 9], "context": [20, 40], "batch": [1]}


DEAR = {
    name: {"width": [1, 4], "tokens": [0, 4], "context": [20], "batch": [1], "ms": [[[500.0]], [[500.0]]]}
    for name in ("eagle3", "draft")
}


def coarse(**others) -> Profile:
    """Made-up prices of the tiny pair's drafters, on a grid that fits into its context."""
    verify = GRID | {"ms": [[[1.0], [1.1]], [[1.2], [1.3]], [[1.5], [1.6]]]}
    draft = {"width": [1, 4], "context": [20, 40], "batch": [1], "ms": [[[0.1], [0.1]], [[0.2], [0.2]]]}
    caught = {"tokens": [0, 4], "context": [20, 40], "batch": [1], "ms": [[[0.1], [0.1]], [[0.2], [0.2]]]}
    names = ("eagle3", "draft")
    tables = {"verify": verify, "draft": dict.fromkeys(names, draft), "catch_up": dict.fromkeys(names, caught)}
    return Profile(priced(**tables | others))


@pytest.mark.parametrize(("turns", "rounds"), [(1, 1), (3, 3), (4, 3), (9, 5), (40, 20), (1000, SHAPES)])
def test_rounds_are_spread_evenly(pair64, monkeypatch, turns, rounds):
    in_turns = ProfileInTurns(pair64, coarse())
    campaign, measured = in_turns._campaign, []
    monkeypatch.setattr(campaign, "warm_up", lambda: None)

    def measure(loops):
        measured.append((in_turns._turn, loops))
        campaign.rounds += 1

    monkeypatch.setattr(campaign, "measure", measure)
    in_turns.begin(turns)
    for _ in range(turns):
        in_turns.turn()
    places = [place for place, _ in measured]
    assert len(places) == rounds and places[0] == 0
    gaps = [later - sooner for sooner, later in zip(places, [*places[1:], turns], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert sum(loops for _, loops in measured) == min(LOOPS, rounds)


def test_its_profile_has_the_given_ones_grid_and_kinds(pair64):
    like = coarse(overhead=priced()["overhead"] | {"svip": priced()["overhead"]["eagle3"]})
    in_turns = ProfileInTurns(pair64, like, [SMALL, "svip(threshold=0.5)", "adaedl"])
    in_turns.begin(4)
    for _ in range(4):
        in_turns.turn()
    content = in_turns.profile().content
    assert {axis: content["verify"][axis] for axis in GRID} == GRID
    assert content["draft"]["draft"]["width"] == content["draft"]["eagle3"]["width"] == [1, 4]
    assert {"svip", "goodput", "eagle3"} <= content["overhead"].keys() and "adaedl" not in content["overhead"]
    assert content["method"]["rounds"] == content["method"]["rounds_of_loops"] == 3
    assert torch.tensor(content["verify"]["ms"]).min() > 0


def test_an_analytic_profile_lends_no_grid():
    like = coarse(verify={**coarse().content["verify"], "context": [0, 32768]}, kind="analytic")
    assert _shapes(like) == _shapes(None)
    assert _shapes(coarse(verify={**coarse().content["verify"], "context": [0, 40]})).contexts == (40,)


def test_bench_decides_by_the_given_profile_and_predicts_by_the_new_one(tiny_recording, tmp_path, capsys):
    given, new, out = (tmp_path / name for name in ("given.json", "new.json", "bench.json"))
    coarse(draft=DEAR, catch_up=DEAR).save(given)  # by this one nothing is drafted, by the new one or by none something is
    words = ["--policy", SMALL, "--policy", GOODPUT, "--drafter", "draft", "--profile", str(given), "--in-turns", str(new)]
    bench.main([str(tiny_recording), *words, "--json", str(out)])
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    recording, members = open_recording(tiny_recording), bench.at_temperature(open_recording(tiny_recording), None)
    decided, prices = (load_profile(path).cost("draft") for path in (given, new))
    rows = {row["policy"]: row for row in found["predicted"] if row["domain"] == "mean"}
    for spec in (SMALL, GOODPUT):
        policy = load_policy(spec)
        expected = bench.predict(recording, policy, "draft", decided, members, prices)[-1]
        alone = bench.predict(recording, policy, "draft", decided, members)[-1]
        row = rows[policy.spec()]
        assert row["ms_per_token"] == expected.ms_per_token != alone.ms_per_token
        assert row["tau"] == alone.tau  # the same decisions
        cycles, emitted = (sum(entry[count] for entry in found["measured"][policy.spec()]) for count in ("cycles", "tokens"))
        assert (cycles == emitted) == (alone.tau == 1.0)  # and live
    assert rows[load_policy(GOODPUT).spec()]["tau"] == 1.0 < rows[SMALL]["tau"]
    assert bench.predict(recording, load_policy(GOODPUT), "draft", None, members)[-1].tau > 1.0
    turns = sum(len(entries) for entries in found["measured"].values())
    assert load_profile(new).content["method"]["rounds"] == -(-turns // 2)
    assert found["in_turns"] == str(new) and found["profile"] == str(given)
    digests = {"profile": load_profile(given).digest, "in_turns": load_profile(new).digest, "texts": text_digest(recording)}
    assert found["digests"] == digests
    assert "in turns with decoding" in told


def test_bench_without_a_profile_but_in_turns(tiny_recording, tmp_path, refused):
    words = [str(tiny_recording), "--policy", SMALL, "--drafter", "draft", "--in-turns", str(tmp_path / "p.json")]
    told = refused(lambda: bench.main(words))
    assert "give smaller --contexts or --tokens to python -m traces.profile, and its file here with --profile" in told
    assert "--in-turns looks at one request at a time" in refused(lambda: bench.main([*words, "--batch", "1"]))
    assert not (tmp_path / "p.json").exists()
    assert "cannot write" in refused(lambda: bench.main([*words[:-1], str(tmp_path / "none" / "p.json")]))


@pytest.mark.parametrize("command", [bench, live_speed])
def test_no_file_has_two_parts(tiny_recording, tmp_path, refused, command):
    coarse().save(tmp_path / "p.json")
    before = (tmp_path / "p.json").read_bytes()
    for first, second in (("--profile", "--in-turns"), ("--in-turns", "--json"), ("--profile", "--json")):
        words = [str(tiny_recording), first, str(tmp_path / "p.json"), second, str(tmp_path / "." / "p.json")]
        assert "p.json is given for two purposes" in refused(lambda words=words: command.main(words))
    assert (tmp_path / "p.json").read_bytes() == before


def test_the_race_predicts_by_the_new_one(tiny_recording, tmp_path):
    given, new, out = (tmp_path / name for name in ("given.json", "new.json", "race.json"))
    coarse().save(given)
    contenders = ["--contender", "draft: chain(k=2)", "--contender", f"suffix+draft: {GOODPUT}"]
    options = ["--profile", str(given), "--in-turns", str(new), "--texts", "1", "--rounds", "1", "--json", str(out)]
    live_speed.main([str(tiny_recording), *contenders, *options])
    found = json.loads(out.read_text())["predicted"]
    recording = open_recording(tiny_recording)
    texts = bench.chosen_texts(recording, 1, bench.at_temperature(recording, 0.0))
    for drafter, policy in (("draft", load_policy("chain(k=2)")), ("suffix+draft", load_policy(GOODPUT))):
        decided, prices = (load_profile(path).cost(drafter) for path in (given, new))
        rows = bench.predict(recording, policy, drafter, decided, texts, prices)
        expected = {"tau": rows[-1].tau, "speedup": bench.plain_told(rows) / rows[-1].ms_per_token}
        assert found[live_speed.called(drafter, policy)] == expected
