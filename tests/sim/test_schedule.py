"""Who decodes with whom: schedules drawn on paper, and what a shared step costs."""

from __future__ import annotations

import pytest
import torch

from policies.errors import UserError
from sim.pricing import plain_ms, price, price_parts
from sim.replay import CycleLog
from sim.schedule import steps_of
from tests.sim.many_texts import content
from traces.costs import Profile

COST = Profile(content()).cost("made-up")


def cycles(*counts: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_requests_join_when_one_leaves():
    # places A and B: text 0 holds A for 3 steps, text 1 B for one, text 2 follows on B for four, text 3 on A
    steps = steps_of(cycles(3, 1, 4, 2), batch=2)
    assert steps.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert torch.bincount(steps).tolist() == [2, 2, 2, 2, 2]


def test_fixed_groups_admit_nobody():
    steps = steps_of(cycles(3, 1, 4, 2), batch=2, joining=False)
    assert steps.tolist() == [0, 1, 2, 0, 3, 4, 5, 6, 3, 4]
    assert torch.bincount(steps).tolist() == [2, 1, 1, 2, 2, 1, 1]


def test_one_at_a_time_is_one_after_the_other():
    assert steps_of(cycles(2, 3), batch=1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch", [0, 4])
def test_a_batch_larger_than_the_recording(batch):
    with pytest.raises(UserError, match="has 3 texts to decode; choose a batch between 1 and 3"):
        steps_of(cycles(3, 1, 4), batch)


def two_requests() -> CycleLog:
    """One step of two requests: a tree of three levels, and a request that does not draft."""
    columns = {
        "sequence": [0, 1], "position": [0, 0], "context_length": [10, 30], "kept": [10, 0], "accepted": [2, 0],
        "emitted": [3, 1], "widths": [[1, 11, 6], [0, 0, 0]], "looked_up": [0, 0], "catch_up": [2, 0], "drafted": [30, 0],
        "missing": [0, 0],
    }  # fmt: skip
    return CycleLog(**{name: torch.tensor(value) for name, value in columns.items()})


def test_the_largest_row_is_what_all_pay_for():
    step = torch.zeros(2, dtype=torch.int64)
    parts = {name: value.tolist() for name, value in price_parts(two_requests(), COST, step, "max").items()}
    assert parts["verify"] == pytest.approx([9.5 * (1 + 0.1)])  # 11 tokens each
    assert parts["draft"] == pytest.approx([1.5 + 1.25])
    assert parts["catch_up"] == pytest.approx([1.0])
    assert parts["commit"] == pytest.approx([0.3])
    assert parts["overhead"] == pytest.approx([0.35])
    looked_up = CycleLog(**{**vars(two_requests()), "looked_up": torch.tensor([0, 3])})  # as many levels as the other drafts
    assert price_parts(looked_up, COST, step, "max")["overhead"].tolist() == parts["overhead"]
    deeper = CycleLog(**{**vars(two_requests()), "looked_up": torch.tensor([0, 5])})
    assert price_parts(deeper, COST, step, "max")["overhead"].tolist() > parts["overhead"]
    table = {"levels": [0, 1, 5], "batch": [1, 4], "ms": [[0.2] * 2, [0.5] * 2, [0.9] * 2]}
    looking = Profile(content() | {"looked_up": {"eagle3": table}}).cost("suffix+made-up")
    waits = [float(price_parts(log, looking, step)["overhead"]) for log in (two_requests(), looked_up, deeper)]
    assert waits == pytest.approx([0.35 + 0.25, 0.35 + 0.25, 0.35 + 0.25 + 0.2]), "two levels more than the other drafts"
    both = price(two_requests(), COST, step, "max")
    assert both[0] == both[1] == pytest.approx(sum(value[0] for value in parts.values()))


def test_the_sum_of_tokens_is_what_all_pay_for():
    step = torch.zeros(2, dtype=torch.int64)
    parts = {name: value.tolist() for name, value in price_parts(two_requests(), COST, step, "sum").items()}
    assert parts["verify"] == pytest.approx([(4 + 0.5 * 6) * 1.1])  # 12 tokens, 6 each
    assert parts["draft"] == pytest.approx([1.5 + 1.25])  # one request drafts, alone
    assert parts["commit"] == pytest.approx([0.2])  # 4 tokens, 2 each
    log = two_requests()
    odd = CycleLog(**{**vars(log), "kept": torch.tensor([9, 0])})
    assert price_parts(odd, COST, step, "sum")["verify"].tolist() == pytest.approx([(4 + 0.5 * 5.5) * 1.1])


@pytest.mark.parametrize("ragged", ["max", "sum"])
def test_steps_of_one_cost_what_a_request_alone_costs_to_the_bit(ragged):
    log = two_requests()
    assert torch.equal(price(log, COST, torch.arange(2), ragged), price(log, COST))
    assert torch.equal(price(log, COST, None, ragged), price(log, COST))


def test_plain_decoding_side_by_side():
    # texts of 3, 2 and 2 tokens take 2, 1 and 1 steps; in a batch of two, the third joins at the second step
    context, offset, length = torch.zeros(7, dtype=torch.int64), torch.tensor([0, 3, 5, 7]), torch.tensor([3, 2, 2])
    two = 5.0 * 1.1
    assert plain_ms(context, offset, length, COST, batch=2).tolist() == pytest.approx([2 * two, two, two])
    fixed = plain_ms(context, offset, length, COST, batch=2, joining=False)
    assert fixed.tolist() == pytest.approx([two + 5.0, two, 5.0])
