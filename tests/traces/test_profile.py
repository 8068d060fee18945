"""Profiling and estimating a tiny random pair, from end to end."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from live.lm_network import LanguageModelNetwork
from live.model import CachedModel
from live.pair import Pair
from policies.errors import UserError
from policies.registry import load_policy
from tests.live.tiny import build
from traces.campaign import Campaign, Shapes, _mean, _with_loops
from traces.capture import CaptureSettings
from traces.costs import load_profile
from traces.estimate import estimate, print_estimate
from traces.estimate import render as render_estimate
from traces.manifest import ShardPlan
from traces.measure import IN_A_ROW, DraftStage, TargetStage
from traces.overhead import measured_policies
from traces.profile import main, measure_pair, render


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A random Llama with a random draft LM, in memory."""
    model, draft = build("llama"), build("llama", seed=1, num_hidden_layers=1)
    networks = {"small": LanguageModelNetwork(CachedModel(draft), "small")}
    description = {
        "target": {"id": "tiny", "weights_sha256": "aa" * 32},
        "drafters": [{"name": "small", "kind": "lm", "id": "smaller", "weights_sha256": "bb" * 32}],
        "dtype": "float32",
        "device": "cpu",
        "context_limit": 128,
    }
    return Pair(model, SimpleNamespace(eos_token_id=None), networks, (), description)


def random_text(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(0))


def test_profile_of_a_tiny_pair(pair: Pair, tmp_path: Path, capsys):
    shapes = Shapes(tokens=(1, 4, 9), widths=(1, 3), contexts=(20, 40), batches=(1, 2))
    profile = measure_pair(pair, random_text(2, shapes.text_length), shapes, repeats=3)
    content = profile.content
    assert content["method"]["rounds"] == 3 and content["machine"]["threads"] == 1
    assert content["overhead"]["eagle3"]["levels"] == [0, 2, 8]
    assert content["overhead"]["autoregressive"]["levels"] == [0]
    assert content["overhead"]["static"]["levels"] == [5] and "eagle3" in content["method"]["policies"]
    assert "heterospec" in content["overhead"], "who decides while drafting is measured deciding"
    assert {0, 1, 2} <= set(content["overhead"]["goodput"]["levels"]), "with few levels and with many"
    assert set(content["looked_up"]) == set(content["overhead"]) - {"autoregressive"}
    looking = {name: part["levels"] for name, part in content["looked_up"].items()}
    assert all(1 in levels for levels in looking.values()), "where nothing is found there is one level"
    assert {0, 8} <= set(looking["chain"]) and min(content["looked_up"]["chain"]["ms"])[0] > 0
    tables = [content[name] for name in ("verify", "commit", "plain")]
    for table in [*tables, content["draft"]["small"], content["catch_up"]["small"]]:
        assert torch.tensor(table["ms"]).min() > 0
        assert torch.tensor(table["ms"]).shape == torch.tensor(table["spread_ms"]).shape
    profile.save(tmp_path / "p.json")
    cost = load_profile(tmp_path / "p.json").cost("small")
    tokens = torch.arange(1, 30)
    for batch in (1, 2):
        where = torch.tensor(30), torch.tensor(batch)
        for found in (cost.verify_ms(tokens, *where), cost.draft_ms(tokens, *where), cost.catch_up_ms(tokens, *where)):
            assert float(found[0]) > 0 and bool((found.diff() > -1e-9).all())
        assert float(cost.plain_ms(30, batch)) > 0 and float(cost.overhead_ms(3, batch)) > 0
    shown = render(profile)
    assert "small: draft level" in shown and "overhead: chain" in shown


def test_loops_of_other_policies_are_measured_on_request():
    usual, asked = measured_policies(), measured_policies(["chain(k=3)", "chain(k=9)", "svip"])
    assert asked["chain"] == ("chain(k=3)", "chain(k=9)") and asked["svip"] == ("svip",)
    assert asked["eagle3"] == usual["eagle3"] and asked.keys() == usual.keys() | {"svip"}
    with pytest.raises(UserError, match="must be fitted first"):
        measured_policies(["heterospec"])


def test_time_runs_out_after_three_rounds(pair: Pair):
    shapes = Shapes(tokens=(1, 2), widths=(1, 2), contexts=(16,), catch_up=(0, 1), commit=(1, 2))
    profile = measure_pair(pair, random_text(1, shapes.text_length), shapes, repeats=50, seconds=0.001)
    assert profile.content["method"]["rounds"] == 3


def test_a_context_that_does_not_fit(pair: Pair):
    shapes = Shapes(tokens=(1, 60), widths=(1, 2), contexts=(100,))
    with pytest.raises(UserError, match="100 tokens with 60 to verify does not fit into the models' 128"):
        measure_pair(pair, random_text(1, shapes.text_length), shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "old.json"], "already exists"),
        (["--out", "none/p.json"], "there is no folder none"),
        (["--out", "p.json", "--tokens", "4"], "needs two different numbers"),
        (["--out", "p.json", "--widths", "0", "4"], "--widths must be 1 or more"),
        (["--out", "p.json", "--contexts", "8"], "--contexts must be 16 or more"),
        (["--out", ".", "--overwrite"], "is a folder: name a file"),
        (["--out", "p.json", "--seconds", "-1"], "--seconds must be above 0, not -1"),
        (["--out", "p.json", "--repeats", "0"], "--repeats must be 1 or more"),
        (["--out", "p.json", "--target", "./nowhere", "--draft", "x"], "no model folder"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text("kept")
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"] and Path("old.json").read_text() == "kept"


def test_help_is_light():
    code = "import sys, traces.profile as p; p.parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "scipy"}.isdisjoint(loaded)


def test_estimate_of_a_recording(pair: Pair, capsys):
    cover = (load_policy("eagle3(top_k=2, depth=2, total_tokens=5)"),)
    settings = CaptureSettings(20, 25, 8, 4, cover, cut_loops=True, positions=4)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    plan = [ShardPlan(0, (0, 1), "a"), ShardPlan(1, (2,), "b")]
    found = estimate(pair, prompts, settings, plan)
    assert found.texts == 3 and found.positions == 60 and found.sampled == 4
    assert set(found.seconds) == {"generate", "target", "small"} and min(found.seconds.values()) > 0
    assert min(found.bytes.values()) > 0 and found.memory > 0 and found.nodes["small"] >= 1
    print_estimate(pair, prompts, settings, plan)
    told = capsys.readouterr().out
    assert "an estimate from 4 positions" in told and "3 texts of up to 20 tokens" in told
    small = render_estimate(dataclasses.replace(found, texts=1, bytes={"nodes": 234_000}), settings)
    assert small.startswith("1 text of") and "disk    about 0.2 MB" in small


def test_means_add_up_and_a_hiccup_counts_as_three_medians():
    """A machine that is now quick, now slow: the mean of a step times the steps is what a text takes, the median is not."""
    steps = [6.0, 6.0, 10.0, 6.0, 10.0]
    assert _mean(steps) * len(steps) == pytest.approx(sum(steps))
    assert _mean([1.0, 1.0, 1.0, 50.0]) == pytest.approx((3 + 3) / 4)
    assert _mean([2.5]) == 2.5


def test_a_round_measures_every_shape_and_tables_hold_means(pair: Pair, monkeypatch):
    """What warmed up is forgotten, a pass of the target comes before each catch-up, and loops have rounds of their own."""
    shapes = Shapes(tokens=(1, 4), widths=(1, 2), contexts=(16, 20), catch_up=(0, 1), commit=(1, 2))
    campaign = Campaign(pair, random_text(1, shapes.text_length), shapes)
    order, passing, catching = [], TargetStage.pass_by, DraftStage.catch_up
    monkeypatch.setattr(TargetStage, "pass_by", lambda self: order.append("target") or passing(self))
    monkeypatch.setattr(DraftStage, "catch_up", lambda self, tokens: order.append("catch-up") or catching(self, tokens))
    campaign.warm_up()
    assert not campaign.samples and campaign.rounds == 0
    order.clear()
    campaign.measure(loops=False)
    assert order == ["target", "catch-up"] * 4
    found = {key: len(values) for key, values in campaign.samples.items()}
    assert {key[0] for key in found} == {"plain", "verify", "commit", "draft", "catch_up"}
    assert found["verify", "", (4, 16, 1)] == IN_A_ROW and found["catch_up", "small", (1, 20, 1)] == 1
    campaign.measure(loops=True)
    assert any(key[0] == "overhead" for key in campaign.samples) and campaign.rounds_of_loops == 1 and campaign.rounds == 2
    campaign.samples["verify", "", (4, 16, 1)] = [5.0, 5.0, 8.0]
    assert campaign.tables()["verify"]["ms"][1][0] == [6.0]


def test_loops_are_measured_at_first_and_then_now_and_again():
    assert [number for number in range(10) if _with_loops(number)] == [0, 1, 2, 3, 6, 9]


def test_measurements_leave_the_target_behind_the_same_text(pair: Pair):
    stage = TargetStage(pair.target(2), random_text(2, 70), [])
    with torch.inference_mode():
        stage.settle(30)
        before = list(stage.target.cache.host_lengths)
        for measure in (lambda: stage.verify(9), lambda: stage.commit(2), stage.pass_by, lambda: stage.verify(1)):
            measure()
            assert stage.target.cache.host_lengths == before == [30, 29] and stage.target.cache.tree_size == 0
