"""Profiles in fixed shapes: a cache of its own size behind each context, which the profile tells; the contest has one size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import capacities, contest, tables
from benchmarks.gpu.capacities import measure_parts, one_by_one, slots
from benchmarks.gpu.results import OutOfTime
from benchmarks.gpu.setting import Setting
from live.graphed import GraphedModel, StaticLayer
from live.graphed_pair import graphed
from policies.errors import UserError
from traces.campaign import Campaign, Shapes
from traces.costs import Profile

GRID = Shapes((1, 2), (1, 2), (16, 48), (1, 2), (0, 1), (1,))
TEXT = torch.arange(2 * GRID.text_length).reshape(2, -1) % 90 + 5


@pytest.fixture
def small_rooms(monkeypatch):
    """Caches with little more than the text, as the tiny pair's context is short."""
    monkeypatch.setattr(capacities, "ROOM", 80)
    monkeypatch.setattr(capacities, "measured_policies", lambda: {"eagle3": ("eagle3(total_tokens=4, depth=2, top_k=2)",)})


def test_each_context_is_measured_in_a_cache_of_its_own(pair64, small_rooms, monkeypatch):
    seen: dict[int, set[int]] = {}
    usual = StaticLayer.update

    def update(self, keys, values, *given, **named):
        shown = usual(self, keys, values, *given, **named)
        if self.cache.places is not None:
            seen.setdefault(shown[0].shape[2], set()).add(self.cache.longest)
        return shown

    monkeypatch.setattr(StaticLayer, "update", update)
    profile = measure_parts(one_by_one(pair64, GRID, False), TEXT, GRID, 1, 60.0)
    small, large = (slots(replace(GRID, contexts=(context,)).text_length) for context in GRID.contexts)
    assert profile.content["method"]["capacity"] == {"16": small, "48": large} and small < large
    assert set(seen) == {small, large} and max(seen[small]) < 48  # attention behind a short text looks at a small cache
    assert profile.content["verify"]["context"] == [16, 48] and torch.tensor(profile.content["verify"]["ms"]).min() > 0
    assert profile.content["method"]["rounds"] == 1 and list(profile.content["overhead"]) == ["eagle3"]
    Profile(profile.content).cost("eagle3")


def test_loops_are_measured_once_and_growing_caches_have_no_size(pair64, small_rooms, monkeypatch):
    loops: list[int] = []
    usual = Campaign._loops
    monkeypatch.setattr(Campaign, "_loops", lambda self, *given: loops.append(len(self.policies)) or usual(self, *given))
    measure_parts(one_by_one(pair64, GRID, False), TEXT, GRID, 1, 60.0)
    assert sorted(loops) == [0, 0, 1, 1]  # two batches, behind the middle context alone
    assert measure_parts([(pair64, GRID)], TEXT, GRID, 1, 60.0).content["method"]["capacity"] == {}


def test_time_that_runs_out_in_a_round_leaves_the_rounds_before(pair64, small_rooms, monkeypatch):
    usual, rounds = Campaign.measure, []

    def measure(self, *given, last: int = 5, **named):
        rounds.append(self)
        if len(rounds) > last:  # warm-ups of both contexts, a whole round, and half of one
            raise OutOfTime
        usual(self, *given, **named)

    monkeypatch.setattr(Campaign, "measure", measure)
    profile = measure_parts(one_by_one(pair64, GRID, False), TEXT, GRID, 9, 60.0)
    assert profile.content["method"]["rounds"] == 1 and profile.cost("eagle3")
    monkeypatch.setattr(Campaign, "measure", lambda self, *given, **named: measure(self, *given, last=0, **named))
    with pytest.raises(UserError, match="budget"):
        measure_parts(one_by_one(pair64, GRID, False), TEXT, GRID, 9, 60.0)


def test_the_table_says_how_large_the_caches_were(pair64, small_rooms):
    profile = measure_parts([(graphed(pair64, 128), GRID)], TEXT, GRID, 1, 60.0)
    profile.content["method"]["cuda_graphs"] = False
    (told,) = tables.profiles_section({"toy": {"profile": profile.content, "left_out_batches": []}})
    assert "slots of its cache" in told and "| 16 | 128 | 1 |" in told and "| 48 | 128 | 2 |" in told


def test_the_contest_is_priced_and_decoded_in_caches_of_one_size(pair64, tmp_path, monkeypatch):
    """Of the size that its longest text needs, or what is priced behind its longest context."""
    made: list[int] = []

    class Stop(Exception):
        pass

    def stop(self, rows=1, *given):
        made.append(self.capacity)
        raise Stop

    setting = Setting("cpu", tmp_path, rehearse=True)
    setting._embedded = pair64
    texts = {"length": [9], "domain_index": [0], "prompt_tokens": lambda _: [5] * 400}
    recording = type("Texts", (), {name: staticmethod(part) if callable(part) else part for name, part in texts.items()})()
    recording.sampling = lambda _: {"temperature": 0.0}
    for name, value in {"opened": recording, "cost_of": None, "split": ([], [0]), "entrants": {}}.items():
        monkeypatch.setattr(contest, name, lambda *_, value=value: value)
    monkeypatch.setattr("traces.profile.running_text", lambda pair, rows, length: torch.zeros(rows, length))
    monkeypatch.setattr(contest, "measure_parts", lambda parts, *_: stop(parts[0][0]))
    monkeypatch.setattr(contest, "decode_live", lambda pair, *_: stop(pair))
    monkeypatch.setattr("live.contenders.break_down", lambda recording, pair, *_: stop(pair))
    calls = [
        lambda: contest.profiled(setting, (1, 2), 9.0),
        lambda: contest.live(setting, 1, 0.0, 9.0),
        lambda: contest.without_graphs(setting, 9.0),
        lambda: contest.breakdown(setting),
    ]
    for call in calls:
        with pytest.raises(Stop):
            call()
    assert made == [768] * 4  # 400 + 9 + 256, in steps of 128
    assert GraphedModel(pair64.model, 1, 768).cache.capacity == 768
