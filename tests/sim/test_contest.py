"""The command that says who wins: its figures, files and refusals."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from policies.errors import UserError
from policies.registry import load_policy
from sim.contest import main
from sim.metrics import replay_rows
from sim.opening import open_profile
from tests.sim.many_texts import write_many, write_profile
from traces.recording import open_recording

POLICIES = ("eagle3(total_tokens=12, depth=3, top_k=3)", "chain(k=2)", "autoregressive")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_many(tmp_path_factory.mktemp("contest") / "trace")


def run(trace, out, *options, policies=POLICIES):
    words = [word for policy in policies for word in ("--policy", policy)]
    main([str(trace), *words, "--json", str(out), "--resamples", "200", *options])
    return json.loads(out.read_text())


def test_rows_are_those_of_the_replay(trace, tmp_path, capsys):
    profile = write_profile(tmp_path / "p.json")
    found = run(trace, tmp_path / "out.json", "--profile", str(profile), "--parquet", str(tmp_path / "out.parquet"))
    from traces.costs import load_profile

    cost = load_profile(profile).cost("made-up")
    recording = open_recording(trace)
    expected = [row for spec in POLICIES for row in replay_rows(recording, load_policy(spec), None, cost)]
    assert len(found["rows"]) == 9
    for row, wanted in zip(found["rows"], expected, strict=True):
        assert {name: row[name] for name in ("policy", "domain", "tau", "ms_per_token", "speedup", "coverage")} == {
            name: getattr(wanted, name) for name in ("policy", "domain", "tau", "ms_per_token", "speedup", "coverage")
        }
        assert row["tau_low"] <= row["tau"] <= row["tau_high"]
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["tau"] for row in table] == [row["tau"] for row in found["rows"]]
    best = min((row for row in found["rows"] if row["domain"] == "mean"), key=lambda row: row["ms_per_token"])
    assert found["contest"]["winner"] == best["policy"]
    told = capsys.readouterr().out
    assert f"best by ms/token: {best['policy']}" in told and "too narrow" in told
    assert found["about"]["manifest_sha256"] and found["command"].startswith("python -m sim.replay")


def test_without_a_profile_tau_decides(trace, tmp_path):
    found = run(trace, tmp_path / "out.json")
    assert found["contest"]["figure"] == "tau"
    last = [one for one in found["contest"]["differences"] if one["policy"] == "autoregressive" and one["domain"] == "mean"]
    assert last[0]["difference"] < 0 and last[0]["ahead"] == 1.0


def test_batches_and_offsets_move_prices_only(trace, tmp_path):
    profile = str(write_profile(tmp_path / "p.json", verify={
        "tokens": [1, 11], "context": [0, 100], "batch": [1, 10],
        "ms": [[[4, 5], [6, 7]], [[8, 9], [10, 11]]]}))  # fmt: skip
    alone = run(trace, tmp_path / "a.json", "--profile", profile)["rows"]
    for options in (["--batch", "4"], ["--batch", "4", "--ragged", "sum"], ["--context-offset", "50"]):
        other = run(trace, tmp_path / "b.json", "--profile", profile, *options)["rows"]
        assert [row["tau"] for row in other] == [row["tau"] for row in alone]
        drafting = [(a, b) for a, b in zip(alone, other, strict=True) if a["policy"] == "chain(k=2)"]
        assert all(b["ms_per_token"] > a["ms_per_token"] for a, b in drafting)
        if "--batch" in options:
            assert all(b["tokens_per_second"] > a["tokens_per_second"] for a, b in drafting)


def test_what_the_recording_lacks_is_not_ranked(trace, tmp_path, capsys):
    found = run(trace, tmp_path / "out.json", policies=("chain(k=2)", "chain(k=9)"))
    assert found["contest"]["winner"] == "chain(k=2)" and found["contest"]["not_ranked"] == ["chain(k=9)"]
    assert "not ranked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "11"], "a batch of 11 does not fit: the recording has 10 texts"),
        (["--batch", "0"], "--batch must be 1 or more"),
        (["--context-offset", "-1"], "--context-offset must be 0 or more"),
        (["--execution", "pipelined", "--batch", "2"], "one request at a time"),
        (["--temperature", "0.7"], "no text of .* was sampled at temperature 0.7: it holds 0"),
        (["--policy", "chain(k=2)"], "two of the policies are chain"),
        (["--resamples", "5"], "--resamples must be 100 or more"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
        (["--drafter", "other"], "holds no drafter 'other'"),
    ],
)
def test_refusals(trace, refused, options, message):
    import re

    told = refused(lambda: main([str(trace), "--policy", "chain(k=2)", *options]))
    assert re.search(message, told), told


def test_profile_of_another_model_is_named(trace, tmp_path, refused):
    import shutil

    copy = shutil.copytree(trace, tmp_path / "trace")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"] = {"id": "org/small", "weights_sha256": "aa" * 32}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    profile = write_profile(tmp_path / "p.json", target={"id": "org/big", "weights_sha256": "bb" * 32})
    words = [str(copy), "--policy", "chain(k=1)", "--profile", str(profile)]
    told = refused(lambda: main(words))
    assert "org/big" in told and "org/small" in told and told.strip().endswith("or say --other-models for a what-if")
    main([*words, "--other-models"])
    with pytest.raises(UserError, match="org/big") as error:  # of a command that has no such option
        open_profile(profile, open_recording(copy), "made-up")
    assert "--other-models" not in str(error.value)


def test_two_fits_of_a_policy_go_by_their_files(trace, tmp_path, refused):
    for name, following in (("a", 0.05), ("b", 0.95)):
        parameters = {"most": 2, "draft_share": 0.3, "weights_": [1.0, 1.0, 0.0, 0.0], "next_": following}
        (tmp_path / f"{name}.json").write_text(json.dumps({"policy": "expected_value", "parameters": parameters}))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    found = run(trace, tmp_path / "out.json", policies=(*files, "chain(k=1)"))
    taus = {row["policy"]: row["tau"] for row in found["rows"] if row["domain"] == "mean"}
    assert list(taus) == [*files, "chain(k=1)"] and taus[files[0]] < taus[files[1]] and found["contest"]["winner"] == files[1]
    told = refused(lambda: main([str(trace), "--policy", files[0], "--policy", f"{files[0]}(most=2)"]))
    assert "two of the policies are expected_value(most=2, draft_share=0.3, fitted): give each once" in told


def test_one_policy_is_told_how_its_intervals_were_made(trace, tmp_path, capsys):
    run(trace, tmp_path / "out.json", policies=("chain(k=2)",))
    assert "\nMeans over domains. Bootstrap over 10 texts, 200 draws." in capsys.readouterr().out


def test_nan_in_a_recording_is_refused(trace, tmp_path, refused, monkeypatch):
    import dataclasses

    import sim.opening

    sound = open_recording(trace)
    broken = dict(sound.arrays) | {"entropy": np.where(np.arange(len(sound.entropy)) == 5, np.nan, sound.entropy)}
    monkeypatch.setattr(sim.opening, "open_recording", lambda folder: dataclasses.replace(sound, arrays=broken))
    assert "holds NaN in its entropy" in refused(lambda: main([str(trace), "--policy", "chain(k=1)"]))
