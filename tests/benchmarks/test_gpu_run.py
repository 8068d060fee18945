"""The GPU runs: results survive interruptions and are not mixed, budgets are kept, tables say what the files say."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import report, run
from benchmarks.gpu.contest_tables import bars, live_table, per_token, ratio
from benchmarks.gpu.results import Clock, Job, Results, read_results
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.tables import scaled
from policies.errors import UserError

ROOT = Path(__file__).parents[2]
ABOUT = {"rehearsal": False, "device": "cpu", "machine": {"processor": "none"}, "libraries": {"torch": "0"}, "tf32": False}


def stage_of(monkeypatch, jobs: list[Job]) -> None:
    """Let the stage "check" consist of these jobs."""
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.check", SimpleNamespace(jobs=lambda setting: jobs))


def run_once(tmp_path, budget: float = 100.0) -> dict:
    setting = Setting("cpu", tmp_path)
    run.run_stage("check", setting, Results(tmp_path, "check", ABOUT), Clock(budget))
    return read_results(tmp_path / "check.json")["jobs"]


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path, monkeypatch):
    calls: list[str] = []

    def fails(_: float) -> dict:
        calls.append("b")
        raise RuntimeError("out of memory")

    stage_of(monkeypatch, [Job("a", lambda _: calls.append("a") or {"value": 1}, 0, 9), Job("b", fails, 0, 9)])
    first = run_once(tmp_path)
    assert first["a"]["value"] == 1 and first["b"]["error"] == "RuntimeError: out of memory"
    run_once(tmp_path)
    assert calls == ["a", "b", "b"]


def test_a_job_that_does_not_fit_is_left_for_the_next_run(tmp_path, monkeypatch):
    given: list[float] = []
    stage_of(monkeypatch, [Job("large", lambda _: {}, 500, 900), Job("small", lambda left: given.append(left) or {}, 1, 7)])
    assert list(run_once(tmp_path)) == ["small"] and given == [7]
    assert list(run_once(tmp_path, 1000)) == ["small", "large"] and len(given) == 1


def test_a_job_that_overruns_is_stopped_and_the_next_one_runs(tmp_path, monkeypatch):
    def endless(_: float) -> dict:
        while True:
            with suppress(Exception):  # as decoding does, which survives what its draft does
                time.sleep(5)

    stage_of(monkeypatch, [Job("endless", endless, 0, 0.2), Job("next", lambda _: {}, 0, 9)])
    found = run_once(tmp_path)
    assert "took longer" in found["endless"]["error"] and "error" not in found["next"]


def planned(tmp_path, stage: str) -> list[Job]:
    """The stage's jobs at true size."""
    return importlib.import_module(f"benchmarks.gpu.{stage}").jobs(Setting("cuda", tmp_path, corpus=tmp_path))


def test_stages_keep_to_the_times_that_the_commands_of_the_readme_give_them(tmp_path):
    for stage in run.STAGES:
        assert sum(job.most for job in planned(tmp_path, stage)) <= 600, stage
        assert len({job.name for job in planned(tmp_path, stage)}) == len(planned(tmp_path, stage))
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    commands = [line for line in text.splitlines() if "benchmarks.gpu.run" in line and "--stage" in line and "--budget" in line]
    first = next(line for line in commands if "--stage check" in line)
    stages, budget = re.findall(r"--stage (\w+)", first), int(re.search(r"--budget (\d+)", first)[1])
    assert {"check", "sample", "cost", "profiles"} == set(stages)
    assert sum(job.least for stage in stages for job in planned(tmp_path, stage)) <= budget
    later = next(line for line in commands if "--stage fidelity" in line)
    budget = int(re.search(r"--budget (\d+)", later)[1])
    assert re.findall(r"--stage (\w+)", later) == ["fidelity", "recording"]  # one after the other: they would slow each other down
    assert sum(job.least for job in planned(tmp_path, "fidelity")) <= budget - planned(tmp_path, "recording")[0].least
    live = next(line for line in commands if "--stage contest" in line)
    wanted = [job for job in planned(tmp_path, "contest") if "batch 4" not in job.name and job.name not in ("random", "no graphs")]
    assert sum(job.least for job in wanted) <= int(re.search(r"--budget (\d+)", live)[1]) <= 300


def test_the_table_of_the_readme_says_what_stages_take(tmp_path):
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    told = {stage: (int(least), int(most)) for stage, least, most in re.findall(r"^\| `(\w+)` .*\| (\d+), (\d+) \|$", text, re.M)}
    for stage in run.STAGES:
        jobs = planned(tmp_path, stage)
        assert told[stage] == (sum(job.least for job in jobs), sum(job.most for job in jobs)), stage


def test_sixteen_rows_get_the_time_of_their_captures(tmp_path):
    """Up to sixteen numbers of rows, some seven buckets each, and everyone's texts once, before anything is timed."""
    jobs = [job for job in planned(tmp_path, "contest16") if job.name.startswith("live")]
    assert len(jobs) == 2 and all(job.least >= 60 and job.most >= 100 for job in jobs)


def test_texts_are_compared_where_they_have_to_be_the_same(tmp_path, monkeypatch):
    from benchmarks.gpu import fidelity

    asked: dict[str, list[str]] = {}
    setting = Setting("cpu", tmp_path, rehearse=True)
    setting.work.mkdir()

    def main(words: list[str]) -> int:
        report = Path(words[words.index("--json") + 1])
        report.write_text('{"recording": "here"}')
        asked[report.stem] = words
        return 0

    monkeypatch.setattr("live.fidelity.main", main)
    monkeypatch.setattr(fidelity, "record_here", lambda *_: {})
    for job in fidelity.jobs(setting):
        job.run(9.0)
    assert {name: "--skip-generate" in words for name, words in asked.items()} == {
        "fidelity-float64": False, "fidelity-float32": True, "fidelity-bfloat16": True,
    }  # fmt: skip


def test_the_compute_mode_is_told(monkeypatch):
    from benchmarks.gpu import check, tables

    monkeypatch.setattr(check, "asked_of_driver", lambda what: {"compute_mode": "Exclusive_Process"}[what])
    assert "Exclusive_Process" in "".join(tables.check_section({"settings": check.settings()}))


def test_results_of_another_machine_are_not_mixed(tmp_path):
    Results(tmp_path, "check", ABOUT).keep("a", {})
    with pytest.raises(UserError, match="another machine"):
        Results(tmp_path, "check", ABOUT | {"machine": {"processor": "other"}})
    (tmp_path / "passes.json").write_text("{}")
    with pytest.raises(UserError, match="no results"):
        Results(tmp_path, "passes", ABOUT)


def test_a_file_too_large_to_carry_is_refused_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.results.LARGEST", 2000)
    results = Results(tmp_path, "check", ABOUT)
    results.keep("a", {"value": 1})
    with pytest.raises(UserError, match="keep less"):
        results.keep("b", {"value": "x" * 3000})
    assert list(read_results(tmp_path / "check.json")["jobs"]) == ["a"]


def entry(contender: str, group: int, number: int, tokens: int, cycles: int, ms: float) -> dict:
    return {"contender": contender, "group": group, "round": number, "tokens": tokens, "cycles": cycles, "steps": cycles, "ms": ms}


LIVE = {
    "batch": 1,
    "temperature": 0.0,
    "rounds": 2,
    "specs": {},
    "measured": [
        entry(name, group, number, 100, cycles, ms + group + jitter)
        for number, jitter in ((0, 0.0), (1, 2.0))
        for group in (0, 1)
        for name, cycles, ms in (("plain", 100, 1000.0), ("eagle3", 25, 400.0), ("goodput", 30, 300.0), ("best static", 40, 330.0))
    ],
    "predicted": {"eagle3": {"tau": 4.0, "ms_per_token": 4.1, "coverage": 1.0, "kept": 59.0, "levels": 8.0},
                  "goodput": {"tau": 3.3, "ms_per_token": 3.4, "coverage": 1.0, "kept": 9.0, "levels": 3.0}},
}  # fmt: skip


def test_figures_of_the_contest():
    assert per_token(LIVE, "plain") == pytest.approx((1001 + 1002) / 200)
    speed, low, high = ratio(LIVE, "plain", "eagle3")
    assert low <= speed <= high and speed == pytest.approx(2003 / 803)
    told = "\n".join(bars(LIVE))
    assert "met: EAGLE-3 2.49x plain decoding, 0.6 x tau is 2.40" in told and "NOT MET: EAGLE-3" not in told
    assert "met: goodput 1.100" in told and "times as fast as best static" in told
    assert "met: prediction of eagle3 off by +2.1%" in told and "NOT MET: prediction of goodput" in told
    rows = live_table(LIVE).splitlines()
    assert rows[4].startswith("| goodput | 3.333 |") and "1.00x" in rows[-1]


def test_a_large_model_is_scaled_from_slices_and_says_so():
    cell = {"batch": 1, "context": 512, "tokens": 8, "graphs": True, "fixed_shape": True}
    jobs = {
        f"big ({n} of 80 layers)": {"shape": f"big ({n} of 80 layers)", "layers": n, "cells": [cell | {"ms": 1.0 + n / 4}]}
        for n in (4, 8)
    }
    told = "\n".join(scaled(jobs))
    assert "SCALED" in told and "| 0.25 | 21 |" in told


def test_report_of_files(tmp_path, capsys):
    Results(tmp_path, "contest", ABOUT).keep("live, batch 1, temperature 0", LIVE)
    Results(tmp_path, "contest", ABOUT).keep("breakdown", {"error": "RuntimeError: no memory"})
    report.main([str(tmp_path)])
    told = capsys.readouterr().out
    assert "times plain" in told and "failed: breakdown: RuntimeError: no memory" in told and "rehearsal" not in told
    Results(tmp_path, "check", ABOUT | {"rehearsal": True}).keep("a", {})
    with pytest.raises(UserError, match="different"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="no result files"):
        report.main([str(tmp_path / "empty")])


def test_bad_arguments_and_quick_help(tmp_path, refused):
    assert "--budget" in refused(lambda: run.main(["--out", str(tmp_path), "--budget", "0"]))
    assert "cuda" in refused(lambda: run.main(["--out", str(tmp_path / "new"), "--device", "cuda:7"]))
    assert not (tmp_path / "new").exists()
    for module in ("run", "report"):
        found = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", f"benchmarks.gpu.{module}", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0 and "usage:" in found.stdout
        assert not {"torch", "transformers", "numpy"} & {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}


NO_TABLES = """
import importlib, pkgutil, sys
for name in ("polars", "altair", "streamlit", "vl_convert", "dask", "joblib"):
    sys.modules[name] = None
rooms = [f"{room}.{found.name}" for room in ("policies", "traces", "live", "benchmarks.gpu")
         for found in pkgutil.iter_modules(importlib.import_module(room).__path__)]
also = "metrics fit tuning static_search trial split replay contest table"
also = [f"sim.{name}" for name in also.split()]
for module in [*rooms, *also]:
    if not module.endswith("__main__"):
        importlib.import_module(module)
"""


def test_nothing_that_runs_on_a_gpu_box_imports_table_or_chart_libraries():
    found = subprocess.run([sys.executable, "-c", NO_TABLES], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert found.returncode == 0, found.stderr[-2000:]


def test_the_four_commands_run_without_table_or_chart_libraries(tiny_pair, tmp_path, monkeypatch, capsys):
    from live import bench, fidelity
    from traces import profile, record

    for name in ("polars", "altair", "streamlit", "vl_convert"):
        monkeypatch.setitem(sys.modules, name, None)
    trace, priced = tmp_path / "trace", tmp_path / "profile.json"
    models = ["--target", tiny_pair.target, "--draft", tiny_pair.eagle3]
    cover = "eagle3(top_k=3, depth=2)"
    size = ["--limit", "1", "--max-new-tokens", "6", "--cover", cover, "--dtype", "bfloat16"]
    record.main([*models, "--prompts", *tiny_pair.prompts, "--out", str(trace), *size])
    grid = ["--tokens", "1", "4", "--widths", "1", "3", "--contexts", "16", "--repeats", "1"]
    profile.main([*models, "--out", str(priced), "--dtype", "bfloat16", *grid])
    policy = ["--policy", "eagle3(total_tokens=4, depth=2, top_k=3)"]
    bench.main([str(trace), "--profile", str(priced), *policy])
    assert fidelity.main([str(trace), *policy, "--cycles", "5", "--witness", "0"]) == 0
    about = json.loads((trace / "manifest.json").read_text())
    assert about["dtype"] == "bfloat16" and {"processor", "threads"} <= about["machine"].keys() and "torch" in about["libraries"]


@pytest.fixture
def quick_halves(monkeypatch):
    """Products of bfloat16 worked out in float32: a processor without units for them takes up to ten times as long."""
    linear = torch.nn.functional.linear

    def quick(input, weight, bias=None):
        if any(part.dtype != torch.bfloat16 for part in (input, weight, bias) if part is not None):
            return linear(input, weight, bias)
        return linear(input.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)

    monkeypatch.setattr(torch.nn.functional, "linear", quick)


@pytest.mark.long
def test_the_rehearsal(tmp_path, capsys, quick_halves):
    """Without the stages that do the same at greater length, which take as long again."""
    stages = ("check", "sample", "profiles", "cost", "contest", "passes")
    words = [word for stage in stages for word in ("--stage", stage)]
    assert run.main(["--rehearse", *words, "--out", str(tmp_path), "--budget", "3600"]) == 0
    found = {path.stem: read_results(path) for path in tmp_path.glob("*.json")}
    assert set(found) == set(stages)
    assert not [name for results in found.values() for name, job in results["jobs"].items() if "error" in job]
    fitted = found["contest"]["jobs"]["fitted"]
    assert not fitted["failed"] and set(fitted["policies"]) == {"best static", "heterospec", "goodput"}
    assert found["check"]["jobs"]["embedding in float64"]["largest_difference_nats"] < 1e-5
    report.main([str(tmp_path)])
    assert "A rehearsal at toy size" in capsys.readouterr().out
    with pytest.raises(UserError, match="rehearsal"):
        report.main([str(tmp_path), "--profiles", str(tmp_path)])


@pytest.mark.long
def test_a_rehearsal_as_on_a_gpu(tmp_path):
    """With CUDA graphs, on the pretended GPU: the check and the timed passes."""
    from tests.live.pretended_gpu import pretended_gpu

    stages = ["--stage", "check", "--stage", "passes"]
    with pretended_gpu() as gpu:
        assert run.main(["--rehearse", "--device", "cuda", "--out", str(tmp_path), "--budget", "3000", *stages]) == 0
    check, passes = (read_results(tmp_path / f"{stage}.json") for stage in ("check", "passes"))
    assert check["about"]["machine"]["gpu"] == "a pretended GPU" and gpu.graphs
    decoded = check["jobs"]["graphs on the small pair"]
    assert decoded["captured"] and decoded["identical"] == decoded["texts"] > 0
    assert check["jobs"]["embedding at true size"]["graphs"]
    assert all(cell["ms"] > 0 for job in passes["jobs"].values() for cell in job["cells"])
