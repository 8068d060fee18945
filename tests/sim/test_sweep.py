"""Sweeps: grids, the Pareto front, resuming, and the same bits from every kind of worker."""

from __future__ import annotations

import json
from contextlib import suppress

import pyarrow.parquet as pq
import pytest

import sim.trial
from policies.errors import UserError
from policies.registry import load_policy
from sim.gridpoints import parse_grid, points_of
from sim.metrics import replay_rows
from sim.sweep import main, pareto
from tests.sim.many_texts import write_many, write_profile
from traces.costs import load_profile
from traces.recording import open_recording

GRID = ["--grid", "depth=1:3", "total_tokens=4,8"]
SHARED = ["--grid", "depth=1:3", "total_tokens=4,6,8"]  # three and more points of one drafting share a replay
POLICY = ["--policy", "eagle3(top_k=3)", "--resamples", "100"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_many(tmp_path_factory.mktemp("sweep") / "trace")


def test_grids():
    assert parse_grid(["depth=2:5", "top_k=4,8", "tree=eagle1"]) == {"depth": [2, 3, 4, 5], "top_k": [4, 8], "tree": ["eagle1"]}
    assert parse_grid(["depth=2:8:3", "mu=0.1,1e-2"]) == {"depth": [2, 5, 8], "mu": [0.1, 0.01]}
    points = [policy.spec() for policy in points_of("eagle3(top_k=4)", parse_grid(["depth=1:2"]))]
    assert points == ["eagle3(depth=2, top_k=4)", "eagle3(depth=1, top_k=4)"]  # the largest first


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("depth=5:2", "the grid is empty"),
        ("depth=", "the grid is empty"),
        ("depth", "cannot read the grid's 'depth'"),
        ("depth=0:1000000000", "holds 1,000,000,001 values: 10,000 are the most"),
    ],
)
def test_grids_that_say_nothing(trace, tmp_path, refused, word, message):
    assert message in refused(lambda: main([str(trace), *POLICY, "--grid", word, "--out", str(tmp_path / "s")]))
    assert not (tmp_path / "s").exists()


def test_settings_of_what_is_learned_are_told_apart(trace, tmp_path, capsys):
    """A fitted policy's spec does not spell out what it learned; a grid over it says what it set."""
    fitted = "expected_value(most=2, draft_share=0.3, weights_=[1.0, 1.0, 0.0, 0.0], next_=0.5)"
    words = [str(trace), "--policy", fitted, "--grid", "next_=0.05,0.95", "--resamples", "100", "--out", str(tmp_path / "s")]
    main(words)
    rows = {row["policy"]: row for row in pq.read_table(tmp_path / "s" / "results.parquet").to_pylist() if row["domain"] == "mean"}
    names = [f"expected_value(most=2, draft_share=0.3, fitted, next_={value})" for value in (0.05, 0.95)]
    assert sorted(rows) == names and rows[names[0]]["tau"] < rows[names[1]]["tau"]
    best = json.loads((tmp_path / "s" / "sweep.json").read_text())["summary"]["best"]
    assert best == names[1] and f"{names[1]}  " in capsys.readouterr().out


def test_points_that_the_policy_refuses():
    with pytest.raises(UserError, match="has no parameter 'width'"):
        points_of("eagle3", {"width": [1]})
    with pytest.raises(UserError, match="depth must be 1 or more"):
        points_of("eagle3", {"depth": [0, 1]})


def test_the_front_by_hand():
    points = [(8, 2.5), (4, 2.0), (8, 2.7), (16, 2.6), (20, 3.0), (4, 2.0)]
    assert pareto(points) == [1, 2, 4]
    assert pareto([]) == []


def test_every_point_is_what_a_replay_gives(trace, tmp_path, capsys, monkeypatch):
    profile = write_profile(tmp_path / "p.json")
    drafted, real = [], sim.trial.outlooks
    monkeypatch.setattr(sim.trial, "outlooks", lambda r, p, *a, **k: drafted.append(len(p)) or real(r, p, *a, **k))
    main([str(trace), *POLICY, *SHARED, "--profile", str(profile), "--out", str(tmp_path / "s")])
    rows = pq.read_table(tmp_path / "s" / "results.parquet").to_pylist()
    assert len(rows) == 9 * 3 and drafted == [9]
    cost, recording = load_profile(profile).cost("made-up"), open_recording(trace)
    means = {row["policy"]: row for row in rows if row["domain"] == "mean"}
    for spec, row in means.items():
        wanted = replay_rows(recording, load_policy(spec), None, cost)[-1]
        assert (row["tau"], row["ms_per_token"], row["verified"]) == (wanted.tau, wanted.ms_per_token, wanted.verified)
        assert (row["depth"], row["top_k"]) == (wanted.parameters["parameters"]["depth"], 3)
    summary = json.loads((tmp_path / "s" / "sweep.json").read_text())["summary"]
    assert summary["best"] == min(means, key=lambda spec: means[spec]["ms_per_token"])
    assert {spec for spec, row in means.items() if row["on_front"]} == set(summary["front"])
    told = capsys.readouterr().out
    assert "Pareto front" in told and summary["best"] in told


def test_a_sweep_goes_on_where_it_was_stopped(trace, tmp_path, monkeypatch):
    import sim.farm

    out = tmp_path / "s"
    main([str(trace), *POLICY, "--grid", "depth=1:2", "total_tokens=4,8", "--out", str(out)])
    text = (out / "points.jsonl").read_text()
    (out / "points.jsonl").write_text(text[:-40])  # killed while the last line was written
    replayed = []
    real = sim.farm.run_trials
    monkeypatch.setattr(sim.farm, "run_trials", lambda r, p, *rest: replayed.extend(p) or real(r, p, *rest))
    main([str(trace), *POLICY, *GRID, "--out", str(out)])
    assert sorted(policy.spec() for policy in replayed) == [
        "eagle3(total_tokens=4, depth=1, top_k=3)",  # the torn one, and the two that are new
        "eagle3(total_tokens=4, depth=3, top_k=3)",
        "eagle3(total_tokens=8, depth=3, top_k=3)",
    ]
    main([str(trace), *POLICY, *GRID, "--out", str(tmp_path / "fresh")])
    assert (out / "results.parquet").read_bytes() == (tmp_path / "fresh" / "results.parquet").read_bytes()


def test_a_store_of_another_sweep_is_refused(trace, tmp_path, refused):
    out = str(tmp_path / "s")
    main([str(trace), *POLICY, "--grid", "depth=1,2", "--out", out])
    told = refused(lambda: main([str(trace), *POLICY, "--grid", "depth=1,2", "--out", out, "--batch", "2"]))
    assert "holds a sweep with another setting.batch" in told


def test_processes_give_the_same_bits(trace, tmp_path):
    profile = str(write_profile(tmp_path / "p.json"))
    for name, jobs in (("one", "1"), ("two", "2")):
        main([str(trace), *POLICY, *SHARED, "--profile", profile, "--out", str(tmp_path / name), "--jobs", jobs])
    one, two = ((tmp_path / name / "results.parquet").read_bytes() for name in ("one", "two"))
    assert one == two


def test_outside_the_envelope(trace, tmp_path, refused, capsys):
    words = [str(trace), *POLICY, "--grid", "depth=2,5", "--out", str(tmp_path / "s")]
    assert "eagle3(depth=5, top_k=3) leaves the recording's envelope" in refused(lambda: main(words))
    main([*words, "--allow-misses"])
    assert "1 setting is not covered" in capsys.readouterr().out
    content = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert content["summary"]["front"] == ["eagle3(depth=2, top_k=3)"]
    assert "leaves the recording's envelope" in refused(lambda: main(words))  # though it is finished now


def test_dask_needs_its_address(trace, tmp_path, refused):
    words = [str(trace), *POLICY, *GRID, "--out", str(tmp_path / "s")]
    assert "belong together" in refused(lambda: main([*words, "--backend", "dask"]))
    assert "belong together" in refused(lambda: main([*words, "--scheduler", "tcp://x:1"]))


@pytest.mark.long
def test_a_dask_cluster_gives_the_same_bits(trace, tmp_path):
    import distributed

    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1")
    try:
        address = ["--backend", "dask", "--scheduler", cluster.scheduler_address]
        main([str(trace), *POLICY, *GRID, "--out", str(tmp_path / "dask"), *address])
    finally:
        with suppress(TimeoutError):  # workers that are slow to end are killed
            cluster.close()
    main([str(trace), *POLICY, *GRID, "--out", str(tmp_path / "serial")])
    dask, serial = ((tmp_path / name / "results.parquet").read_bytes() for name in ("dask", "serial"))
    assert dask == serial
