"""Prices of a hand-written log, and of plain decoding."""

from __future__ import annotations

import math

import pytest
import torch

from sim.pricing import plain_ms, plain_ms_per_token, price, price_parts
from sim.replay import CycleLog
from traces.costs import Profile

PROFILE = Profile(
    {
        "format": "specreplay-profile",
        "version": 1,
        "interpolation": "linear",
        "verify": {"tokens": [1, 11], "context": [0, 100], "batch": [1], "ms": [[[4], [5]], [[6], [7]]]},
        "commit": {"tokens": [1, 3], "batch": [1], "ms": [[0.1], [0.3]]},
        "plain": {"context": [0, 100], "batch": [1], "ms": [[4.5], [5.5]]},
        "draft": {"head": {"width": [1, 11], "context": [0, 100], "batch": [1], "ms": [[[1], [2]], [[3], [4]]]}},
        "catch_up": {"head": {"tokens": [0, 2], "context": [0], "batch": [1], "ms": [[[0.5]], [[1.5]]]}},
        "overhead": {"eagle3": {"levels": [0, 10], "batch": [1], "ms": [[0.2], [2.2]]}},
    }
)
COST = PROFILE.cost("head")


def log(**columns) -> CycleLog:
    """Four cycles: a first one of three levels, a later one, one that does not draft, and a root-only draft."""
    values = {
        "sequence": [0, 0, 0, 1],
        "position": [0, 3, 4, 0],
        "context_length": [0, 100, 50, 0],
        "kept": [10, 5, 0, 1],
        "accepted": [2, 0, 0, 1],
        "emitted": [3, 1, 1, 2],
        "widths": [[1, 10, 6], [1, 1, 0], [0, 0, 0], [1, 0, 0]],
        "looked_up": [0, 0, 0, 0],
        "catch_up": [0, 2, 0, 1],
        "drafted": [30, 2, 0, 1],
        "missing": [0, 0, 0, 0],
    } | columns
    return CycleLog(**{name: torch.tensor(value) for name, value in values.items()})


def test_every_part_by_hand():
    parts = {name: values.tolist() for name, values in price_parts(log(), COST).items()}
    assert parts["catch_up"] == pytest.approx([0.5, 1.5, 0, 1.0])
    assert parts["draft"] == pytest.approx([2.8 + 2.0, 2.0, 0, 0])  # the first level has no forward of its own
    assert parts["verify"] == pytest.approx([6, 6, 4.5, 4.2])
    assert parts["commit"] == pytest.approx([0.3, 0.1, 0.1, 0.2])
    assert parts["overhead"] == pytest.approx([0.8, 0.6, 0.2, 0.4])
    total = price(log(), COST)
    assert total.dtype == torch.float64
    assert total.tolist() == pytest.approx([12.4, 10.2, 4.8, 5.8])


def test_a_level_that_was_looked_up_costs_the_loop_its_time_and_no_forward():
    usual, looked_up = price_parts(log(), COST), price_parts(log(looked_up=[0, 0, 2, 0]), COST)
    assert looked_up["overhead"].tolist() == pytest.approx([0.8, 0.6, 0.6, 0.4])
    assert all(torch.equal(looked_up[name], usual[name]) for name in usual if name != "overhead")


def test_looking_up_has_its_own_price():
    table = {"eagle3": {"levels": [0, 1, 11], "batch": [1], "ms": [[0.2], [0.9], [1.9]]}}
    profile = Profile(PROFILE.content | {"looked_up": table})
    looked_up = price_parts(log(looked_up=[0, 0, 3, 0]), profile.cost("suffix+head"))
    usual = price_parts(log(), profile.cost("head"))
    looking = 0.9 - 0.4  # what one level takes more where a rule looks
    assert looked_up["overhead"].tolist() == pytest.approx([0.8 + looking, 0.6 + looking, 1.1, 0.4 + looking])
    assert all(torch.equal(looked_up[name], usual[name]) for name in usual if name != "overhead")
    declined = price_parts(log(), profile.cost("suffix+head"))
    assert declined["overhead"].tolist()[2] == pytest.approx(0.2), "a policy that does not draft does not look"
    alone = price_parts(log(), profile.cost("suffix"))
    assert alone["overhead"].tolist() == pytest.approx([1.1, 1.0, 0.2, 0.9]) and float(alone["draft"].sum()) == 0


def test_padding_and_company_do_not_change_a_price():
    whole = price(log(), COST)
    wide = log()
    wide = CycleLog(**{**vars(wide), "widths": torch.nn.functional.pad(wide.widths, (0, 9))})
    assert torch.equal(price(wide, COST), whole)
    one = CycleLog(**{name: value[:1] for name, value in vars(log()).items() if value is not None})
    assert torch.equal(price(one, COST), whole[:1])


def test_plain_decoding():
    # two texts: roots at contexts 10, 11, (12), of which the third token is past the limit; and a single token
    context = torch.tensor([10, 11, 12, 60, 70])
    offset, length = torch.tensor([0, 4, 5]), torch.tensor([3, 1])
    assert plain_ms(context, offset, length, COST).tolist() == pytest.approx([4.6 + 4.61, 0])
    assert plain_ms_per_token(context, offset, length, COST) == pytest.approx((4.6 + 4.61) / 2)
    assert math.isnan(plain_ms_per_token(context[:1], torch.tensor([0, 1]), torch.tensor([1]), COST))
