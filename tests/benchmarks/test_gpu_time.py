"""What a job has finished when its time runs out is kept, and a round begins only where there is time for one."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import contest_live, cost, passes
from benchmarks.gpu.contest_live import in_turns
from benchmarks.gpu.contest_tables import tau_of
from benchmarks.gpu.results import Clock, OutOfTime
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import Shape, random_target
from benchmarks.gpu.tables import passes_section
from live.model import CachedModel
from policies.errors import UserError

SMALL = Shape(
    "small", hidden=32, intermediate=48, layers=2, heads=4, groups=2, head_dim=8, vocabulary=1000, drafted=300, context=512
)


class Watch:
    """A clock that is told how the time goes by."""

    def __init__(self, left: float):
        self.left = left

    def spend(self, seconds: float) -> None:
        self.left -= seconds
        if self.left < 0:
            raise OutOfTime


def test_rounds_are_judged_by_rounds_and_not_by_what_came_before():
    watch = Watch(50.0)  # of 100: captures and warm-ups took the rest
    runs = {name: lambda group: watch.spend(2.0) or {"ms": 1.0} for name in ("plain", "eagle3")}
    entries, rounds = in_turns(runs, [[0], [1]], 9, watch)
    assert rounds == 6 and len(entries) == 24 and watch.left == 2.0  # 8 s each; beside what came before it would have been 1


def test_groups_that_everyone_decoded_count_when_the_time_runs_out():
    watch = Watch(5.0)
    runs = {name: lambda group: watch.spend(2.0) or {"ms": 1.0} for name in ("plain", "eagle3")}
    entries, rounds = in_turns(runs, [[0], [1]], 9, watch)
    assert rounds == 0 and {(entry["contender"], entry["group"]) for entry in entries} == {("plain", 0), ("eagle3", 0)}


def test_tau_counts_each_group_once_however_often_it_was_decoded():
    job = {"measured": [{"contender": "x", "group": g, "tokens": t, "cycles": c} for g, t, c in ((0, 9, 3), (1, 4, 4), (0, 9, 3))]}
    assert tau_of(job, "x") == 13 / 7


def test_what_is_predicted_is_what_was_timed(monkeypatch):
    """Of the groups that the time allowed for, and not of those that nobody decoded."""
    recording = SimpleNamespace(sequence_ids=list(range(9)))
    predicted: list[list[list[int]]] = []
    monkeypatch.setattr(contest_live, "contenders", lambda *_: {"plain": lambda group: {"ms": 1.0}})
    monkeypatch.setattr(contest_live, "prediction", lambda *given: predicted.append(given[3]))
    entry = {"contender": "plain", "group": 1, "round": 0, "ms": 1.0}
    monkeypatch.setattr(contest_live, "in_turns", lambda *_: ([entry], 0))
    policy = SimpleNamespace(spec=lambda: "eagle3")
    found = contest_live.decode_live(None, {"eagle3": policy}, recording, None, [3, 4, 5], 1, (3, 2), 9.0)
    assert predicted == [[[4]]] and found["measured"] == [entry]

    def late(*given):
        raise OutOfTime

    monkeypatch.setattr(contest_live, "prediction", late)  # what was timed stays, without what it was to take
    found = contest_live.decode_live(None, {"eagle3": policy}, recording, None, [3, 4, 5], 1, (3, 2), 9.0)
    assert found["measured"] == [entry] and found["predicted"] == {}
    monkeypatch.setattr(contest_live, "in_turns", lambda *_: ([], 0))
    with pytest.raises(UserError, match="budget"):
        contest_live.decode_live(None, {}, recording, None, [3], 1, (3, 2), 9.0)


def measured_cost(pair, tmp_path, monkeypatch, watch: Watch, each: float) -> dict:
    monkeypatch.setattr(cost, "Clock", lambda seconds: watch)
    monkeypatch.setattr(cost, "record_once", lambda *_: watch.spend(each) or {"generate": 1.0, "write": 0.2})
    monkeypatch.setattr(cost, "generate_once", lambda *_: 0.5)
    return cost.measured(Setting("cpu", tmp_path), pair, 2, 8, watch.left)


def test_rounds_of_the_cost_that_are_done_are_kept(pair64, tmp_path, monkeypatch):
    pair64.description["target"].setdefault("id", "tiny")
    assert measured_cost(pair64, tmp_path, monkeypatch, Watch(60.0), 8.0)["rounds"] == 5
    assert measured_cost(pair64, tmp_path, monkeypatch, Watch(35.0), 8.0)["rounds"] == 3  # a fourth would not end in time
    found = measured_cost(pair64, tmp_path, monkeypatch, Watch(17.0), 8.0)
    assert found["rounds"] == 1 and found["ratio"] == pytest.approx(2.4)
    with pytest.raises(UserError, match="budget"):
        measured_cost(pair64, tmp_path, monkeypatch, Watch(9.0), 8.0)


def test_the_most_wanted_cost_is_measured_first(tmp_path):
    jobs = cost.jobs(Setting("cuda", tmp_path))
    assert [job.name.split(",")[0] for job in jobs] == ["true size", "shipped pair", "shipped pair"] and "bfloat16" in jobs[1].name


def test_cells_that_are_done_are_kept_and_others_are_named(tmp_path, monkeypatch):
    def cells(watch: Watch, *seconds: float) -> dict:
        spent = iter(seconds)
        monkeypatch.setattr(passes, "Clock", lambda seconds: watch)
        monkeypatch.setattr(passes, "timed_cell", lambda *_: watch.spend(next(spent)) or [{"ms": 1.0}])
        monkeypatch.setattr(passes, "random_target", lambda *_: random_target(SMALL, torch.bfloat16))
        monkeypatch.setattr(passes, "CELLS", ((1, 16), (1, 64), (1, 500), (2, 64), (2, 96)))
        return passes.measure(Setting("cpu", tmp_path), SMALL, watch.left)

    found = cells(Watch(40.0), 8.0, 9.0, 20.0)
    assert len(found["cells"]) == 3
    assert [(cut["context"], cut["why"].split()[0]) for cut in found["left_out"]] == [(500, "beyond"), (96, "no")]
    found = cells(Watch(40.0), 8.0, 33.0)  # one that takes longer than all before
    assert len(found["cells"]) == 1 and [cut["context"] for cut in found["left_out"]] == [64, 500, 2 * 32, 96]
    with pytest.raises(UserError, match="budget"):
        cells(Watch(5.0), 8.0)


def test_a_single_token_is_timed_without_a_mask_too(monkeypatch):
    """As plain decoding in any shape runs: no mask, and only the text is looked at."""
    masks: list[object] = []
    usual = CachedModel.run

    def run(self, tokens, positions, mask, extra):
        masks.append((type(self).__name__, tokens.shape[1], mask is None, self.cache.end))
        return usual(self, tokens, positions, mask, extra)

    monkeypatch.setattr(CachedModel, "run", run)
    rows = passes.timed_cell(random_target(SMALL, torch.float32), 2, 40, (1, 8), 1, Clock(60.0), False)
    told = {(row["tokens"], row["fixed_shape"], row["graphs"]) for row in rows}
    assert told == {(1, True, False), (8, True, False), (1, False, False)}
    assert {kind for kind in masks if kind[0] == "CachedModel"} == {("CachedModel", 1, True, 41)}
    assert not any(bare for name, _, bare, _ in masks if name == "GraphedModel")
    (table,) = passes_section({"small": {"dtype": "float32", "cells": random.sample(rows, 3), "left_out": []}})
    assert table.count("\n| 2 | 40 |") == 2 and "| no | no |" in table and "| yes | no |" in table
