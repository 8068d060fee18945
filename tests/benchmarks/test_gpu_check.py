"""The first look at CUDA graphs: numbers that are none, other children and stale replays are seen, whatever stands beside them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.check import apart, compared, why_no_graphs
from live.graphed_eagle import GraphedEagle
from live.model import CachedModel, Output


@pytest.fixture(autouse=True)
def graphs_are_other_numbers(monkeypatch):
    """A head that is asked for graphs remembers so on a CPU, too, for the tests below to spoil what it says."""
    made = GraphedEagle.__init__

    def init(self, head, name="eagle3", capacity=2048, graphs=True):
        made(self, head, name, capacity, graphs)
        self.spoiled = graphs

    monkeypatch.setattr(GraphedEagle, "__init__", init)


def spoil(monkeypatch, method: str, change) -> None:
    """``change`` what a method of the head gives, from its second call on, where there would be graphs."""
    usual, calls = getattr(GraphedEagle, method), []

    def call(self, *given, **named):
        found = usual(self, *given, **named)
        calls.append(self.spoiled)
        return change(found) if sum(calls) > 1 and self.spoiled else found

    monkeypatch.setattr(GraphedEagle, method, call)


def test_nothing_speaks_against_what_says_the_same(pair64):
    assert why_no_graphs(pair64) == ""


@pytest.mark.parametrize("method", ["open", "grow"])
def test_a_head_that_says_no_numbers_is_seen(pair64, monkeypatch, method):
    spoil(monkeypatch, method, lambda found: found._replace(logprob=found.logprob * float("nan")))
    assert "inf" in why_no_graphs(pair64)


def test_a_catch_up_that_is_wrong_is_seen(pair64, monkeypatch):
    spoil(monkeypatch, "advance", lambda last: last + 1)
    assert why_no_graphs(pair64)


def test_other_children_are_seen(pair64, monkeypatch):
    spoil(monkeypatch, "grow", lambda found: found._replace(index=found.index.roll(1, -1)))
    assert "children" in why_no_graphs(pair64)


def test_a_graph_that_reads_the_numbers_of_its_capture_is_seen(pair64, monkeypatch):
    said: list[torch.Tensor] = []
    usual = GraphedEagle.advance

    def stale(self, *given, **named):
        last = usual(self, *given, **named)
        said.append(last.clone())
        return said[-2] if self.spoiled and len(said) % 2 == 0 else last

    monkeypatch.setattr(GraphedEagle, "advance", stale)
    assert why_no_graphs(pair64)


def test_what_is_no_number_is_no_small_difference(pair64, monkeypatch):
    assert apart(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5
    assert apart(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")
    usual = CachedModel.prefill

    def broken(self, *given, **named):
        output = usual(self, *given, **named)
        return Output(output.logits * float("nan"), output.captured) if self.model is other.model else output

    import copy

    other = copy.copy(pair64)
    other.model = copy.deepcopy(pair64.model)
    pair64.description["target"].setdefault("vocabulary", other.model.config.vocab_size)
    monkeypatch.setattr(CachedModel, "prefill", broken)
    assert compared(pair64, other, [[5, 17, 40, 3]])["largest_difference_nats"] == float("inf")
