"""Prediction against measurements that were made up around a known truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policies.registry import load_policy
from sim.finding import text_digest
from sim.metrics import replay_rows
from sim.setting import Setting
from sim.trial import run_trial
from sim.validate import kendall, main
from tests.sim.many_texts import write_many, write_profile
from traces.costs import load_profile
from traces.recording import open_recording

SPECS = ("chain(k=2)", "autoregressive", "eagle3(total_tokens=8, depth=3, top_k=3)")
GOODPUT = str(Path(__file__).parents[2] / "policies" / "fitted" / "goodput.json")

DEAR = {"made-up": {"width": [1, 11], "tokens": [0, 2], "context": [0], "batch": [1], "ms": [[[90.0]], [[90.0]]]}}
DEAR_COMMIT = {"tokens": [1, 3], "batch": [1], "ms": [[3.1], [3.3]]}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_many(tmp_path_factory.mktemp("validate") / "trace")


def bench(trace, folder, slower=1.1, rounds=(1.0, 1.02, 0.98), specs=SPECS, **changes):
    """A bench whose measured times are the predicted ones times ``slower``, and scatter from round to round."""
    profile = write_profile(folder / "p.json")
    recording, cost = open_recording(trace), load_profile(profile).cost("made-up")
    predicted, measured = [], {}
    for policy in map(load_policy, specs):
        spec = policy.spec()
        predicted += [row.to_json() for row in replay_rows(recording, policy, "made-up", cost)]
        sums = run_trial(recording, policy, Setting("made-up"), cost)
        measured[spec] = [
            {
                "text": text,
                "domain": recording.domains[recording.domain_index[text]],
                "tokens": int(sums.sums["emitted"][text]),
                "cycles": int(sums.sums["cycles"][text]),
                "ms": float(sums.sums["ms"][text]) * slower * factor,
            }
            for factor in rounds
            for text in (0, 1, 5)
        ]
    content = {"recording": str(trace), "profile": str(profile), "drafter": "made-up", "predicted": predicted, "measured": measured}
    (folder / "bench.json").write_text(json.dumps(content | changes))
    return folder / "bench.json"


def test_a_profile_that_is_ten_per_cent_too_fast(trace, tmp_path, capsys):
    main([str(bench(trace, tmp_path)), "--json", str(tmp_path / "v.json"), "--parquet", str(tmp_path / "v.parquet")])
    found = json.loads((tmp_path / "v.json").read_text())
    summary = found["summary"]
    assert summary["lengths_equal"] and summary["kendall_tau"] == 1.0 and summary["within_spread"] == 0
    assert summary["error"] == pytest.approx({"median_absolute": 1 - 1 / 1.1, "bias": 1 / 1.1 - 1})
    assert summary["cycle_error"] == pytest.approx(summary["error"])
    assert [row["built_the_profile"] for row in found["rows"]] == [False, False, True] and summary["unseen"] == 2
    assert len(found["points"]) == 9
    told = capsys.readouterr().out
    assert "MISSED (5% or within the spread), reached (ranking 0.9)" in told and "equal on every text" in told


def test_a_good_profile(trace, tmp_path, capsys):
    main([str(bench(trace, tmp_path, slower=1.01))])
    assert "bars: reached (5% or within the spread), reached (ranking 0.9)" in capsys.readouterr().out


def test_times_are_priced_by_the_profile_that_was_taken_in_turns(trace, tmp_path, refused):
    """The policies went on deciding by the one that the bench was given: goodput drafts less by the dearer one."""
    dearer = write_profile(tmp_path / "dearer.json", draft=DEAR, catch_up=DEAR, commit=DEAR_COMMIT)
    path = bench(trace, tmp_path, rounds=(1.0, 1.0, 1.9), specs=(*SPECS, GOODPUT), in_turns=str(dearer))

    def rows(*options: str) -> list[dict]:
        main([str(path), *options, "--json", str(tmp_path / "v.json")])
        return json.loads((tmp_path / "v.json").read_text())["rows"]

    found, recording = rows(), open_recording(trace)
    own, turns = (load_profile(file).cost("made-up") for file in (tmp_path / "p.json", dearer))
    texts = [0, 1, 5]
    domains = recording.domain_index[texts]
    for row, spec in zip(found, (*SPECS, GOODPUT), strict=True):
        sums = run_trial(recording, load_policy(spec), Setting("made-up"), own, prices=turns).sums
        ms, tokens = sums["ms"][texts], sums["emitted"][texts]
        ratios = [ms[domains == domain].sum() / tokens[domains == domain].sum() for domain in sorted(set(domains))]
        assert row["expected_ms_per_token"] == pytest.approx(sum(ratios) / len(ratios))
        assert not row["differing_texts"]
    cheap = rows("--profile", str(tmp_path / "p.json"))
    assert all(row["expected_ms_per_token"] < other["expected_ms_per_token"] for row, other in zip(cheap, found, strict=True))
    assert all(row["error"] == pytest.approx(1 / (1.1 * 1.3) - 1) for row in cheap)  # a mean of rounds, not their median
    assert rows("--decided-by", str(dearer))[-1]["differing_texts"]  # goodput would have decided otherwise
    (tmp_path / "p.json").rename(tmp_path / "moved.json")
    assert "say with --decided-by where it has moved" in refused(lambda: rows())
    assert rows("--decided-by", str(tmp_path / "moved.json")) == found


def test_a_profile_that_was_replaced_is_refused(trace, tmp_path, refused):
    digests = {"profile": load_profile(write_profile(tmp_path / "p.json")).digest, "in_turns": "ab" * 32}
    path = bench(trace, tmp_path, digests=digests, in_turns=str(write_profile(tmp_path / "turns.json")))
    assert "turns.json is not the profile that the bench was made with" in refused(lambda: main([str(path)]))
    main([str(path), "--profile", str(tmp_path / "turns.json")])
    write_profile(tmp_path / "p.json", commit=DEAR_COMMIT)
    assert "p.json is not the profile" in refused(lambda: main([str(path), "--profile", str(tmp_path / "turns.json")]))


def test_no_verdict_without_evidence(trace, tmp_path, capsys):
    main([str(bench(trace, tmp_path, rounds=(0.01, 1.0, 100.0)))])
    told = capsys.readouterr().out
    assert "not tested (ranking 0.9: no two policies are told apart" in told and "12 settings are needed" in told


def test_lengths_that_differ_are_told(trace, tmp_path, capsys):
    path = bench(trace, tmp_path)
    content = json.loads(path.read_text())
    for entry in content["measured"]["chain(k=2)"]:
        entry["cycles"] += entry["text"] == 5
    path.write_text(json.dumps(content))
    main([str(path), "--json", str(tmp_path / "v.json")])
    rows = json.loads((tmp_path / "v.json").read_text())["rows"]
    assert [row["differing_texts"] for row in rows] == [[5], [], []]
    assert "accepted lengths: NOT equal" in capsys.readouterr().out


def test_a_single_round_has_no_spread(trace, tmp_path, capsys):
    main([str(bench(trace, tmp_path, rounds=(1.0,)))])
    assert "Kendall's tau 1.00 over 3 pairs" in capsys.readouterr().out


def test_without_a_profile_only_lengths_are_compared(trace, tmp_path, capsys):
    main([str(bench(trace, tmp_path, profile=None))])
    told = capsys.readouterr().out
    assert "equal on every text" in told and "no times" in told


def test_ranking_by_hand():
    def row(measured, expected, low, high):
        return {"ms_per_token": measured, "expected_ms_per_token": expected, "low": low, "high": high}

    rows = [row(10, 1, 9, 11), row(20, 3, 19, 21), row(30, 2, 29, 31), row(20.5, 9, 20, 22)]
    # the second and the fourth overlap; of the five pairs left two are in the wrong order
    assert kendall(rows) == ((3 - 2) / 5, 5)
    assert kendall(rows[:1]) == (None, 0)


def test_refusals(trace, tmp_path, refused):
    assert "cannot be read" in refused(lambda: main([str(tmp_path / "none.json")]))
    moved = bench(trace, tmp_path, recording=str(tmp_path / "moved"))
    assert "moved, on which the bench was made: say with --trace where it has moved" in refused(lambda: main([str(moved)]))
    other = bench(trace, tmp_path, digests={"texts": "aa" * 32})
    assert "holds other texts than those that were benched" in refused(lambda: main([str(other)]))
    main([str(bench(trace, tmp_path, digests={"texts": text_digest(open_recording(trace))}))])
    (tmp_path / "other.json").write_text("[]")
    assert "is not a bench" in refused(lambda: main([str(tmp_path / "other.json")]))
    path = bench(trace, tmp_path)
    content = json.loads(path.read_text())
    content["measured"]["chain(k=2)"][0]["text"] = 99
    path.write_text(json.dumps(content))
    assert "decoded text 99, which the recording does not hold" in refused(lambda: main([str(path)]))
