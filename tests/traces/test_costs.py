"""Cost tables against hand-computed values, and everything a profile file can have wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import UserError
from traces.costs import Profile, check_profile, load_profile
from traces.grid import Grid

CONTENT: dict[str, Any] = {
    "format": "specreplay-profile",
    "version": 1,
    "kind": "measured",
    "interpolation": "linear",
    "target": {"id": "big", "weights_sha256": "aa" * 32},
    "drafters": [{"name": "head", "id": "org/head", "weights_sha256": "bb" * 32}],
    "verify": {
        "tokens": [1, 5, 9], "context": [100, 200], "batch": [1, 2],
        "ms": [[[5, 6], [7, 8]], [[9, 10], [13, 14]], [[11, 12], [17, 20]]],
    },
    "commit": {"tokens": [1, 4], "batch": [1, 2], "ms": [[0.1, 0.2], [0.4, 0.5]]},
    "plain": {"context": [100, 200], "batch": [1, 2], "ms": [[5.5, 6.5], [7.5, 8.5]]},
    "draft": {"head": {"width": [1, 10], "context": [100], "batch": [1, 2], "ms": [[[1, 2]], [[1.9, 2.9]]]}},
    "catch_up": {"head": {"tokens": [0, 2], "context": [100], "batch": [1, 2], "ms": [[[0.5, 1]], [[2.5, 3]]]}},
    "overhead": {
        "eagle3": {"levels": [0, 8], "batch": [1, 2], "ms": [[0.3, 0.4], [1.1, 1.2]]},
        "chain": {"levels": [0, 8], "batch": [1, 2], "ms": [[0.2, 0.3], [0.6, 0.7]]},
    },
}  # fmt: skip


def changed(**parts: Any) -> dict[str, Any]:
    """A deep copy of the profile with other parts; None takes one away."""
    content = json.loads(json.dumps(CONTENT)) | parts
    return {key: value for key, value in content.items() if value is not None}


def cost(**parts: Any):
    return Profile(changed(**parts)).cost("head")


def test_between_the_points():
    model = cost()
    assert float(model.verify_ms(5, 100, 1)) == 9
    assert float(model.verify_ms(3, 100, 1)) == 7  # half way between 5 and 9
    assert float(model.verify_ms(3, 150, 1)) == 8.5  # between 7 and 10
    assert float(model.verify_ms(5, 100, 2)) == 10
    assert float(model.draft_ms(4, 777, 1)) == pytest.approx(1.3)  # one context measured: context is free
    assert float(model.catch_up_ms(1, 100, 1)) == 1.5
    assert float(model.commit_ms(2, 1)) == pytest.approx(0.2)
    assert float(model.overhead_ms(4, 1)) == pytest.approx(0.7)
    assert float(model.plain_ms(150, 1)) == 6.5


def test_beyond_the_points():
    model = cost()
    assert float(model.verify_ms(13, 100, 1)) == pytest.approx(13)  # 0.5 ms per token from 11 at 9 tokens
    assert float(model.verify_ms(13, 200, 1)) == pytest.approx(21)  # 1 ms per token from 17
    assert float(model.verify_ms(9, 300, 1)) == pytest.approx(23)  # 0.06 ms per token of context
    assert float(model.verify_ms(13, 300, 1)) == pytest.approx(17 + 4 + 6)
    assert float(model.verify_ms(1, 10, 1)) == 5  # below: the first point's
    assert float(model.draft_ms(20, 100, 1)) == pytest.approx(2.9)


def test_nothing_asked_costs_nothing():
    model = cost()
    assert float(model.draft_ms(0, 100, 1)) == 0 and float(model.verify_ms(0, 100, 1)) == 0
    assert float(model.commit_ms(0, 1)) == 0
    assert float(model.catch_up_ms(0, 100, 1)) == 0.5  # the root's children
    assert float(model.overhead_ms(0, 1)) == 0.3


def test_staircase_takes_the_next_point_and_slopes_beyond_the_last():
    model = cost(interpolation="staircase")
    found = model.verify_ms(torch.tensor([1, 2, 5, 6, 9, 13]), torch.tensor(100), torch.tensor(1))
    assert found.tolist() == pytest.approx([5, 9, 9, 11, 11, 13])
    assert float(model.verify_ms(2, 150, 1)) == 11  # the context stays linear
    assert float(model.overhead_ms(4, 1)) == pytest.approx(0.7)  # the loop is in no graph


def test_a_dip_is_raised_to_the_running_maximum():
    noisy = Grid("verify", {"tokens": [1, 4, 8], "context": [10, 20]}, [[5, 4], [4, 6], [5.5, 5]])
    assert [float(noisy(n, 10)) for n in (1, 4, 8)] == [5, 5, 5.5]
    assert [float(noisy(n, 20)) for n in (1, 4, 8)] == [5, 6, 6]


def test_overhead_of_the_policy_that_was_measured():
    profile = Profile(CONTENT)
    assert float(profile.cost("head", "chain").overhead_ms(0, 1)) == 0.2
    assert float(profile.cost("head", "heterospec").overhead_ms(0, 1)) == 0.3


def test_where_a_policy_was_not_seen_its_overhead_changes_as_the_defaults():
    loops = CONTENT["overhead"] | {"goodput": {"levels": [2, 3], "batch": [1, 2], "ms": [[0.9, 1.0], [1.5, 1.6]]}}
    overhead = Profile(changed(overhead=loops)).cost("head", "goodput").overhead_ms
    assert [float(overhead(n, 1)) for n in (2, 3)] == [0.9, 1.5]
    assert float(overhead(0, 1)) == pytest.approx(0.9 - 0.2)
    assert float(overhead(8, 2)) == pytest.approx(1.6 + 0.5), "not five more of the slope between 2 and 3"
    assert float(overhead(9, 1)) == pytest.approx(1.5 + 0.5 + 0.1)


def test_plain_decoding_without_its_own_table():
    assert float(cost(plain=None).plain_ms(100, 1)) == pytest.approx(5 + 0.3)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["linear", "staircase"]))
def test_never_cheaper_for_more(data, interpolation):
    axes = {}
    for name, sizes in (("tokens", (2, 4)), ("context", (1, 3)), ("batch", (1, 3))):
        points = st.lists(st.integers(1, 12), min_size=sizes[0], max_size=sizes[1], unique=True)
        axes[name] = sorted(data.draw(points))
    shape = [len(points) for points in axes.values()]
    size = shape[0] * shape[1] * shape[2]
    values = data.draw(st.lists(st.floats(0, 100), min_size=size, max_size=size))
    grid = Grid("verify", axes, torch.tensor(values, dtype=torch.float64).reshape(shape), interpolation)
    batch = torch.arange(axes["batch"][0], axes["batch"][-1] + 1)
    found = grid(torch.arange(0, 30)[:, None, None], torch.arange(0, 30)[:, None], batch)
    assert bool((found >= 0).all())
    for dim in range(3):
        assert bool((found.diff(dim=dim) >= -1e-6).all()), f"falls along axis {dim}"


def test_same_bits_alone_and_among_many():
    model, generator = cost(), torch.Generator().manual_seed(3)
    tokens, context = (torch.randint(1, 400, (1003,), generator=generator) for _ in range(2))
    batch = torch.randint(1, 3, (1003,), generator=generator)
    together = model.verify_ms(tokens, context, batch)
    assert together.dtype == torch.float64
    alone = torch.stack([model.verify_ms(*one) for one in zip(tokens, context, batch, strict=True)])
    assert torch.equal(together, alone)
    strided = model.verify_ms(tokens[::3], context[::3], batch[::3])
    assert torch.equal(together[::3], strided)


def test_arguments_broadcast():
    model = cost()
    assert model.verify_ms(torch.tensor([[1], [2], [3]]), torch.tensor([100, 200]), torch.tensor(1)).shape == (3, 2)
    assert model.draft_ms(torch.tensor([1, 2]), torch.tensor([[5], [6], [7]]), torch.tensor(1)).shape == (3, 2)
    assert model.verify_ms(torch.ones(0, dtype=torch.int64), torch.tensor(5), torch.tensor(1)).shape == (0,)


def test_round_trip(tmp_path: Path):
    content = changed(method={"note": "two  spaces [ kept ]", "names": ["a  b", "c"]})
    Profile(content).save(tmp_path / "p.json")
    again = load_profile(tmp_path / "p.json")
    assert again.content == content and again.drafters == ["head"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert '"tokens": [1, 5, 9]' in (tmp_path / "p.json").read_text()


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path):
    with pytest.raises(UserError, match="there is no profile .*traces.profile --out"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{oops")
    with pytest.raises(UserError, match="is not JSON"):
        load_profile(tmp_path / "text.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_profile(tmp_path)
    with pytest.raises(UserError, match="cannot write the profile"):
        Profile(CONTENT).save(tmp_path / "nowhere" / "p.json")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"format": "other"}, "is not a SpecReplay profile"),
        ({"version": 2}, "newer than version 1"),
        ({"interpolation": "cubic"}, "linear or staircase"),
        ({"verify": None}, "no table 'verify'"),
        ({"draft": {}}, "no table 'draft'"),
        ({"catch_up": {"other": CONTENT["catch_up"]["head"]}}, "disagree about the drafter"),
        ({"overhead": {"chain": CONTENT["overhead"]["chain"]}}, "no overhead of the policy eagle3"),
        ({"commit": {"tokens": [1, 4], "batch": [1], "ms": [[1, 2]]}}, r"shape \(1, 2\), its axes say \(2, 1\)"),
        ({"commit": {"tokens": [4, 1], "batch": [1], "ms": [[1], [2]]}}, "does not increase"),
        ({"commit": {"tokens": [1.5, 2], "batch": [1], "ms": [[1], [2]]}}, "no whole numbers"),
        ({"commit": {"tokens": [1, 2], "batch": [1], "ms": [[1], [-2]]}}, "no milliseconds"),
        ({"commit": {"tokens": [1, 2], "batch": [1], "ms": [[1], "x"]}}, "not a regular table"),
        ({"verify": {"tokens": [1], "context": [1], "batch": [1], "ms": [[[1]]]}}, "two are needed"),
        ({"plain": {"context": [1], "batch": [1], "ms": [[0]]}}, "'plain' holds times that are not above 0 to 1e"),
        ({"commit": {"tokens": [1], "batch": [1], "ms": [[1e308]]}}, "'commit' holds times that are not from 0 to 1e"),
        ({"target": "big"}, "lacks a valid 'target'"),
        ({"machine": ["a", "b"]}, "lacks a valid 'machine'"),
        ({"drafters": {"name": "head"}}, "lacks a valid 'drafters'"),
        ({"drafters": [{"id": "org/head"}]}, "names no model under 'name'"),
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, parts: dict, message: str):
    (tmp_path / "p.json").write_text(json.dumps(changed(**parts)))
    with pytest.raises(UserError, match=message) as error:
        load_profile(tmp_path / "p.json")
    assert "p.json" in str(error.value)


def test_what_was_not_measured():
    with pytest.raises(UserError, match="no drafter 'lm': it holds head"):
        Profile(CONTENT).cost("lm")
    with pytest.raises(UserError, match="batch 1 to 2 in its table verify, not 3.*--batches"):
        cost().verify_ms(torch.tensor([1, 1]), torch.tensor(100), torch.tensor([1, 3]))
    with pytest.raises(UserError, match="^the profile p.json holds batch 1 to 2 in its table catch_up of head, not 3"):
        Profile(CONTENT, "the profile p.json").cost("head").catch_up_ms(1, 100, 3)
    with pytest.raises(UserError, match="batch 1 to 2 in its table commit, not 0"):
        cost().commit_ms(1, 0)


def test_profile_of_other_models():
    drafters = [dict(CONTENT["drafters"][0]), {"name": "lm", "id": "x"}]
    manifest = {"target": dict(CONTENT["target"]), "drafters": drafters}
    check_profile(Profile(CONTENT), manifest)
    read = [CONTENT["drafters"][0] | {"config_sha256": one * 32} for one in ("aa", "ee")]
    check_profile(Profile(CONTENT | {"drafters": read[:1]}), manifest | {"drafters": read[:1]})
    with pytest.raises(UserError, match="whose settings .config.json, or the options behind the name. differ"):
        check_profile(Profile(CONTENT | {"drafters": read[:1]}), manifest | {"drafters": read[1:]})
    manifest["drafters"][0]["weights_sha256"] = "cc" * 32
    with pytest.raises(UserError, match=r"drafter org/head \(weights b{12}\).*with org/head \(weights c{12}\)"):
        check_profile(Profile(CONTENT), manifest)
    manifest["target"] = {"id": "bigger", "weights_sha256": "dd" * 32}
    with pytest.raises(UserError, match="target big .*was made with bigger"):
        check_profile(Profile(CONTENT), manifest)


def test_every_policy_pays_for_its_own_decisions():
    profile = Profile(CONTENT)
    cost = profile.cost("head").behind(7)
    assert float(cost.of("chain").overhead_ms(0, 1)) == 0.2
    assert float(cost.of("heterospec").overhead_ms(0, 1)) == float(cost.of("chain").of("eagle3").overhead_ms(0, 1)) == 0.3
    assert float(cost.of("chain").verify_ms(3, 50, 1)) == float(cost.verify_ms(3, 50, 1))


LOOKED_UP = {
    "eagle3": {"levels": [0, 1, 8], "batch": [1, 2], "ms": [[0.3, 0.4], [0.6, 0.7], [0.95, 1.4]]},
    "chain": {"levels": [0, 1, 4], "batch": [1, 2], "ms": [[0.2, 0.3], [0.5, 0.6], [0.65, 0.9]]},
}


def test_what_looking_up_takes():
    """By levels; and where a rule before a network finds nothing, beyond the loop's first level."""
    profile = Profile(changed(looked_up=LOOKED_UP))
    alone = profile.cost("suffix", "chain")
    assert [round(float(alone.overhead_ms(n, 1)), 9) for n in (0, 1, 3, 4)] == [0.2, 0.5, 0.6, 0.65], "0: it does not look"
    assert float(alone.overhead_ms(8, 2)) == pytest.approx(0.9 + 0.4), "beyond, as the default's changes"
    assert float(alone.look_ms(1)) == 0, "it is in the price of the levels"
    assert float(alone.of("eagle3").overhead_ms(8, 1)) == 0.95
    both = profile.cost("suffix+head")
    assert float(both.overhead_ms(1, 1)) == pytest.approx(0.4) and float(both.looked_up_ms(1, 1)) == 0.6
    assert float(both.look_ms(1)) == pytest.approx(0.2)
    assert float(both.of("chain").looked_up_ms(4, 1)) == 0.65
    assert float(both.of("chain").behind(3).look_ms(2)) == pytest.approx(0.6 - 0.35)
    assert float(both.of("heterospec").looked_up_ms(8, 1)) == 0.95


def test_without_a_rule_nobody_looks():
    head = Profile(changed(looked_up=LOOKED_UP)).cost("head")
    assert float(head.look_ms(1)) == 0 and float(head.overhead_ms(8, 1)) == 1.1
    unknown = Profile(CONTENT).cost("suffix+head")
    assert float(unknown.look_ms(1)) == 0 and float(unknown.looked_up_ms(4, 1)) == pytest.approx(0.7), "as drafted ones"
    assert float(Profile(CONTENT).cost("suffix").overhead_ms(4, 1)) == pytest.approx(0.7)
    assert float(Profile(changed(looked_up={})).cost("suffix").overhead_ms(4, 1)) == pytest.approx(0.7)
    only_chain = Profile(changed(looked_up={"chain": LOOKED_UP["chain"]}))
    assert float(only_chain.cost("suffix", "chain").overhead_ms(4, 1)) == 0.65
    assert float(only_chain.cost("suffix").overhead_ms(4, 1)) == pytest.approx(0.7)
    assert float(only_chain.cost("suffix+head", "chain").of("eagle3").looked_up_ms(4, 1)) == pytest.approx(0.7)


def test_who_was_not_measured_looking_up_keeps_the_price_of_its_decisions():
    loops = CONTENT["overhead"] | {"heterospec": {"levels": [0, 8], "batch": [1, 2], "ms": [[5.0, 5.0], [9.0, 9.0]]}}
    profile = Profile(changed(overhead=loops, looked_up=LOOKED_UP))
    assert [float(profile.cost("suffix", "heterospec").overhead_ms(n, 1)) for n in (0, 8)] == [5.0, 9.0]
    both = profile.cost("suffix+head", "heterospec")
    assert float(both.looked_up_ms(8, 1)) == 9.0 and float(both.look_ms(1)) == 0
    assert float(both.of("dyspec").looked_up_ms(8, 1)) == 0.95, "nor decoding at all: as the default does both"


def test_a_table_of_looking_up_is_checked_as_others_are():
    with pytest.raises(UserError, match="no table 'looked_up'"):
        Profile(changed(looked_up=[1]))
    with pytest.raises(UserError, match="no table 'looked_up' of chain with the axes levels, batch"):
        Profile(changed(looked_up={"chain": {"levels": [1], "ms": [[1]]}}))
