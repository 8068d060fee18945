"""``live.bench --batch`` and the two benchmarks on the tiny pair: tables whose figures can be checked, refusals with cures."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import batch_throughput, lossless
from benchmarks.lossless_subjects import RULE, loaded
from live import bench
from live.bench_batches import GENERATE, PLAIN
from live.verifier import LiveVerifier
from policies.contract import Sampling
from policies.registry import load_policy
from sim.setting import Setting
from sim.trial import run_trial
from tests.sim.many_texts import content as priced
from traces.costs import Profile
from traces.recording import open_recording

SMALL = "eagle3(total_tokens=8, depth=3, top_k=4)"


def rows(told: str) -> dict[str, list[str]]:
    return {line.split("  ")[0]: line.split() for line in told.splitlines() if line}


def test_bench_in_batches(tiny_recording, tmp_path, capsys, refused):
    out = tmp_path / "bench.json"
    options = ["--policy", SMALL, "--drafter", "draft", "--texts", "2", "--batch", "3", "--rounds", "2", "--json", str(out)]
    bench.main([str(tiny_recording), *options])
    told = capsys.readouterr().out
    table = rows(told)
    assert {SMALL, f"({PLAIN})", f"({GENERATE})"} <= table.keys() and "4 texts, 3 requests at a time, 2 rounds" in told
    assert all(table[name][-1] == "100%" for name in (SMALL, f"({PLAIN})", f"({GENERATE})"))
    assert table[f"({GENERATE})"][-3] == "1.00x" and table[f"({PLAIN})"][-2] == "1.00x"
    content = json.loads(out.read_text())
    counts = {name: [one["tokens"] for one in rounds] for name, rounds in content["throughput"].items()}
    assert content["batch"] == 3 and len({tuple(own) for own in counts.values()}) == 1 and len(counts[SMALL]) == 2
    assert "leave out --batch" in refused(lambda: bench.main([str(tiny_recording), *options, "--breakdown"]))
    for batch, told in {"5": "does not fit the 4 texts", "-1": "must be 1 or more", "0": "--batch must be 1 or more"}.items():
        assert told in refused(lambda b=batch: bench.main([str(tiny_recording), *options, "--batch", b]))


def test_predictions_in_batches_are_made_under_one_schedule(tiny_recording, tmp_path, capsys):
    own = {name: {"draft": priced()[name]["made-up"]} for name in ("draft", "catch_up")}
    profile, chain, whole = Profile(priced(**own)), "chain(k=2)", "tetris(k=1, extra=1)"
    profile.save(tmp_path / "p.json")
    words = [str(tiny_recording), "--drafter", "draft", "--texts", "2", "--batch", "3", "--rounds", "1"]
    words += ["--profile", str(tmp_path / "p.json"), "--json", str(tmp_path / "bench.json")]
    recording, found = open_recording(tiny_recording), {}
    for schedule, specs, said in (("joining", [chain], "in the predictions too"), ("fixed", [chain, whole], "for fixed groups")):
        bench.main([*words, *(word for spec in specs for word in ("--policy", spec))])
        found[schedule] = json.loads((tmp_path / "bench.json").read_text())
        assert found[schedule]["predicted_schedule"] == schedule and said in capsys.readouterr().out
        setting = Setting("draft", 3, schedule=schedule)
        for spec in specs:
            speedup = run_trial(recording, load_policy(spec), setting, profile.cost("draft")).mean("speedup")
            assert found[schedule]["predicted_speedup"][spec] == pytest.approx(speedup, rel=1e-12)
    assert found["joining"]["predicted_speedup"][chain] != found["fixed"]["predicted_speedup"][chain]


def test_throughput_of_batch_sizes(tiny_pair, tmp_path, capsys, refused):
    out = tmp_path / "batches.json"
    models = ["--target", tiny_pair.target, "--draft", tiny_pair.draft, "--dtype", "float64", "--prompts", *tiny_pair.prompts]
    size = ["--texts", "2", "--max-new-tokens", "10", "--rounds", "1", "--batch", "1", "--batch", "3"]
    batch_throughput.main([*models, *size, "--policy", SMALL, "--json", str(out)])
    told = capsys.readouterr().out
    assert "batch 1: 4 texts" in told and "batch 3: 4 texts" in told and told.count("100%") == 6
    content = json.loads(out.read_text())
    for found in content["batches"].values():
        assert len({rounds[0]["tokens"] for rounds in found.values()}) == 1
    assert "--batch" in refused(lambda: batch_throughput.main([*models, "--batch", "0"]))
    assert "--max-new-tokens" in refused(lambda: batch_throughput.main([*models, "--max-new-tokens", "1"]))


def asked(tiny_pair, *options: str) -> list[str]:
    models = ["--target", tiny_pair.target, "--draft", tiny_pair.eagle3, "--prompts", *tiny_pair.prompts]
    return [*models, "--max-new-tokens", "12", "--policy", "chain(k=2)", "--policy", SMALL, *options]


def test_the_lossless_table(tiny_pair, tmp_path, capsys):
    out = tmp_path / "lossless.json"
    lossless.main(asked(tiny_pair, "--dtype", "float64", "--dtype", "float32", "--json", str(out)))
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert len(found) == 2 * 2 * 2 * 2 and "lossless: 16 rows hold" in told  # dtypes, temperatures, drafters, policies
    assert {row["drafter"] for row in found} == {"eagle3", RULE} and {row["temperature"] for row in found} == {0.0, 0.8}
    assert all(row["alone"] == row["batched"] == row["texts"] == 2 for row in found if row["dtype"] == "float64")


def test_a_text_that_is_not_the_targets_own_is_found(tiny_pair, capsys, monkeypatch):
    """The verifier takes the second best token now and then: alone and in batches, at both temperatures."""
    real = LiveVerifier._choice

    def careless(self, cycle, kept, sees):
        choice = real(self, cycle, kept, sees)
        second = self.logits.topk(2).indices[..., 1]
        return torch.where((cycle.position % 4 == 3)[:, None], second, choice)

    monkeypatch.setattr(LiveVerifier, "_choice", careless)
    with pytest.raises(SystemExit) as stop:
        lossless.main(asked(tiny_pair, "--dtype", "float64"))
    told = capsys.readouterr().out
    assert stop.value.code == 1 and "NOT LOSSLESS" in told and "first: chain(k=2)" in told


def test_margins_say_how_unsure_the_target_was(tiny_pair):
    subject = loaded(tiny_pair.target, [tiny_pair.draft], "float64", "cpu", tiny_pair.prompts, 1)
    (text, _), ids = subject.reference(Sampling(), 3), torch.tensor([subject.prompts[0]])
    gap = torch.log_softmax(subject.model(input_ids=ids).logits[0, -1], -1).topk(2).values
    assert subject.margin(0, [], Sampling()) == pytest.approx(float(gap[0] - gap[1]), abs=1e-12)
    sampling = Sampling(0.8, seed=3)
    drawn = subject.reference(sampling, 4)
    assert 0 < subject.margin(1, drawn[1][:2], sampling) < 1 and text != drawn[0]
    assert lossless.first_difference([1, 2], [1, 2, 3]) == 2 and lossless.first_difference([1], [1]) is None


@pytest.mark.long
def test_tiny_architectures_are_lossless(tiny_pair, capsys):
    lossless.main(asked(tiny_pair, "--dtype", "float64", "--architectures"))
    told = capsys.readouterr().out
    assert "tiny mixtral" in told and "tiny gemma3_text" in told and "rows hold" in told


def test_lossless_refuses(tiny_pair, refused):
    for option in ("--texts", "--batch", "--temperature"):
        assert option in refused(lambda name=option: lossless.main(asked(tiny_pair, name, "0")))
