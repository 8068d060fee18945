"""Two recordings compared: pairing, differences, refusals."""

from __future__ import annotations

import json
import shutil

import pytest

from policies.registry import load_policy
from sim.compare import main
from sim.metrics import replay_rows
from tests.policies.synthetic import Language
from tests.sim import synthetic_recording
from tests.sim.many_texts import write_many, write_profile
from traces.manifest import ShardPlan
from traces.recording import open_recording

POLICIES = ["--policy", "eagle3(total_tokens=8, depth=3, top_k=3)", "--policy", "chain(k=2)", "--resamples", "200"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return write_many(tmp_path_factory.mktemp("first") / "trace")


def run(first, second, out, *options):
    main([str(first), str(second), *POLICIES, "--json", str(out), *options])
    return json.loads(out.read_text())


def test_a_recording_and_itself(first, tmp_path):
    profile = write_profile(tmp_path / "p.json")
    found = run(first, first, tmp_path / "c.json", "--profile", str(profile), "--parquet", str(tmp_path / "c.parquet"))
    assert found["pairs"] == 10 and found["same_text"] == 1.0 and len(found["rows"]) == 6
    for row in found["rows"]:
        assert row["tau_difference"] == row["tau_low"] == row["tau_high"] == 0 and row["ms_per_token_share"] == 0.5


def test_another_language_on_some_of_the_prompts(first, tmp_path, capsys):
    plan = [ShardPlan(0, (5, 8, 11), "story"), ShardPlan(1, (0, 3), "math")]  # another order, and a prompt of its own
    synthetic_recording.write(tmp_path / "second", Language(8, steps=5), plan)
    found = run(first, tmp_path / "second", tmp_path / "c.json")
    assert found["pairs"] == 4 and found["same_text"] == 0.0
    mean = next(row for row in found["rows"] if row["domain"] == "mean" and row["policy"] == "chain(k=2)")
    shared = [ShardPlan(0, (5, 8), "story"), ShardPlan(1, (0, 3), "math")]
    expected = []
    for name, seed in (("a", 3), ("b", 8)):
        recording = synthetic_recording.write(tmp_path / name, Language(seed, steps=5), shared)
        expected.append(replay_rows(recording, load_policy("chain(k=2)"))[-1].tau)
    assert [mean["tau_first"], mean["tau_second"]] == pytest.approx(expected)
    assert mean["tau_difference"] == pytest.approx(expected[1] - expected[0])
    assert mean["tau_low"] <= mean["tau_difference"] <= mean["tau_high"]
    assert "4 texts paired by prompt" in capsys.readouterr().out


def test_no_common_prompt_is_refused(first, tmp_path, refused):
    synthetic_recording.write(tmp_path / "second", Language(3), [ShardPlan(0, (77,), "math")])
    assert "share no prompt" in refused(lambda: run(first, tmp_path / "second", tmp_path / "c.json"))
    assert not (tmp_path / "c.json").exists()


def test_different_tokenizers_are_refused(first, tmp_path, refused):
    folders = []
    for name in ("aa", "bb"):
        folders.append(shutil.copytree(first, tmp_path / name))
        manifest = json.loads((folders[-1] / "manifest.json").read_text())
        manifest["target"] = {"id": f"org/{name}", "tokenizer_sha256": name * 32}
        (folders[-1] / "manifest.json").write_text(json.dumps(manifest))
    told = refused(lambda: run(*folders, tmp_path / "c.json"))
    assert "have different tokenizers" in told and "org/aa" in told and "org/bb" in told


def test_two_drafters_of_the_sample(tmp_path):
    from pathlib import Path

    sample = Path(__file__).parents[2] / "traces" / "samples" / "reference"
    found = run(sample, sample, tmp_path / "c.json", "--second-drafter", "draft")
    recording = open_recording(sample)
    row = next(row for row in found["rows"] if row["policy"] == "chain(k=2)" and row["domain"] == "mean")
    assert row["tau_second"] == replay_rows(recording, load_policy("chain(k=2)"), "draft")[-1].tau
    assert row["tau_low"] is None and found["same_text"] == 1.0
