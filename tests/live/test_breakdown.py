"""Where the time of a cycle goes: every millisecond once, and nothing about decoding changes while it is measured."""

from __future__ import annotations

import json
import time

import pytest

from live import bench
from live.breakdown import PARTS, Breakdown, Breaker, _Clock
from live.decode import SpeculativeDecoder
from live.pair import encode_prompt
from policies.registry import load_policy

SPEC = "eagle3(total_tokens=8, depth=3, top_k=4)"


@pytest.fixture
def seconds(monkeypatch):
    """A clock that goes on only when told."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_call_inside_another_is_counted_once(seconds):
    import torch

    clock = _Clock(torch.device("cpu"))

    def passing(count: float, inner=lambda: None):
        def call():
            seconds[0] += count
            inner()
            seconds[0] += count

        return call

    clock.turn()
    clock.timed("policy", passing(1.0, clock.timed("draft", passing(10.0))))()
    seconds[0] += 5.0
    clock.turn()
    assert clock.spent == {"draft": 20.0, "verify": 0.0, "policy": 2.0, "cache": 0.0, "python": 5.0}


def test_time_goes_where_it_was_spent(pair64, seconds, monkeypatch):
    """Each part's own calls advance the clock by a known amount: the shares are what was planted."""
    decoder = SpeculativeDecoder(pair64.target(), pair64.networks["eagle3"], load_policy(SPEC), pair64.end_tokens)
    planted = {"verify": 0, "draft": 0, "policy": 0}

    def slow(owner, name, part, by):
        call = getattr(owner, name)

        def slower(*args, **kwargs):
            seconds[0] += by
            planted[part] += by
            return call(*args, **kwargs)

        monkeypatch.setitem(vars(owner), name, slower)

    prompt = encode_prompt(pair64.tokenizer, [{"role": "user", "content": "the cat sat on the mat"}])
    plain = decoder.generate([prompt], 12)
    slow(decoder.target, "run", "verify", 8.0)
    slow(decoder.drafter.network.head, "finish", "draft", 2.0)
    slow(decoder.policy, "expand", "policy", 0.5)

    def begin(_):
        planted.update(dict.fromkeys(planted, 0))
        breaker.begin()

    with Breaker(decoder).watching() as breaker:
        done = decoder.generate([prompt], 12, on_first=begin)
        found = breaker.end(done.cycles[0])
    assert done.tokens == plain.tokens
    assert {part: ms / 1e3 for part, ms in found.ms.items()} == planted | {"cache": 0.0, "python": 0.0}
    assert found.overhead == pytest.approx(planted["policy"] / sum(planted.values())) and found.cycles == done.cycles[0]
    assert "commit" not in vars(decoder.target)  # the timers are gone


def test_breakdowns_add_up():
    one = Breakdown(dict(zip(PARTS, (1.0, 6.0, 1.0, 1.0, 1.0), strict=True)), 1)
    both = one + one
    assert both.cycles == 2 and both.per_cycle() == one.ms and both.overhead == pytest.approx(0.3)


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
def test_bench_prints_the_breakdown(tiny_recording, tmp_path, capsys, drafter):
    out = tmp_path / "bench.json"
    options = ["--policy", SPEC, "--policy", "autoregressive", "--drafter", drafter, "--breakdown", "--json", str(out)]
    bench.main([str(tiny_recording), *options])
    told = capsys.readouterr().out
    assert "overhead" in told and told.count(SPEC) >= 2
    parts = json.loads(out.read_text())["breakdown"]
    assert all(parts[SPEC][part] > 0 for part in PARTS) and parts["autoregressive"]["draft"] == 0
