"""Datasets out of datasets: what replays from a merge or a slice is what replays from its parts."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from live.bench_batches import recorded_jobs
from live.fidelity import check_policy, check_texts
from policies.registry import load_policy
from sim.replay import replay
from tests.policies.synthetic import Language
from tests.sim import synthetic_recording
from traces.manifest import ShardPlan
from traces.merge import main as merge
from traces.record import main as record
from traces.recording import open_recording
from traces.slice import main as cut

LANGUAGE = Language(3, steps=5)
FIRST = [ShardPlan(0, (0, 3, 4), "math"), ShardPlan(1, (1, 2), "story")]
SECOND = [ShardPlan(0, (10, 11), "math"), ShardPlan(1, (8,), "code")]
POLICIES = ("eagle3(top_k=3, depth=3, total_tokens=8)", "chain(k=2)", "autoregressive")


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two recordings of one made-up pair."""
    for name, plan in (("first", FIRST), ("second", SECOND)):
        synthetic_recording.write(tmp_path / name, LANGUAGE, plan)
    return [tmp_path / "first", tmp_path / "second"]


def edit(folder: Path, **changes) -> None:
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(about | changes))


def cycles(folder: Path, spec: str) -> dict[tuple[str, str], list]:
    """Every replayed cycle of every text, by domain and prompt."""
    recording = open_recording(folder, verify=True)
    log = replay(recording, load_policy(spec), keep_trees=True)
    names = [(row["domain"], row["prompt_id"]) for row in recording.sequences()]
    found: dict[tuple[str, str], list] = {name: [] for name in names}
    columns = [field.name for field in fields(log) if field.name != "sequence"]
    for cycle, sequence in enumerate(log.sequence.tolist()):
        values = [getattr(log, name)[cycle] for name in columns]
        found[names[sequence]].append(
            [value[(value != -1) & (value != 0)].tolist() if value.ndim else int(value) for value in values]
        )
    return found


def test_replaying_the_merged_is_replaying_the_parts(parts, tmp_path, capsys):
    merge([*map(str, parts), "--out", str(tmp_path / "all")])
    assert "merged 8 texts of 2 recordings" in capsys.readouterr().out
    merged = open_recording(tmp_path / "all", verify=True)
    assert merged.complete and merged.domains == ["math", "story", "code"]
    assert merged.sequence_ids.tolist() == [0, 3, 4, 1, 2, 10, 11, 8]  # none collide: all keep their numbers
    for spec in POLICIES:
        assert cycles(tmp_path / "all", spec) == cycles(parts[0], spec) | cycles(parts[1], spec)


def test_a_slice_is_the_part_it_names(parts, tmp_path):
    def taken(name: str, *options: str) -> Path:
        cut([str(parts[0]), *options, "--out", str(tmp_path / name)])
        return tmp_path / name

    whole = cycles(parts[0], POLICIES[0])
    by_domain = taken("story", "--domain", "story")
    assert cycles(by_domain, POLICIES[0]) == {name: one for name, one in whole.items() if name[0] == "story"}
    assert open_recording(by_domain).sequence_ids.tolist() == [1, 2] and open_recording(by_domain).domains == ["story"]
    by_number = taken("some", "--sequence", "0-2", "4")
    assert open_recording(by_number).sequence_ids.tolist() == [0, 4, 1, 2]
    assert cycles(by_number, POLICIES[0]) == {name: one for name, one in whole.items() if name[1] != "3"}
    both = taken("both", "--sequence", "0-2", "4", "--domain", "math", "--temperature", "0")
    assert open_recording(both).sequence_ids.tolist() == [0, 4]
    # and the two halves of a recording are that recording again, to the byte
    rest = taken("rest", "--sequence", "3")
    merge([str(both), str(rest), str(by_domain), "--out", str(tmp_path / "again")])
    again, first = open_recording(tmp_path / "again"), open_recording(parts[0])
    assert sorted(again.sequence_ids.tolist()) == sorted(first.sequence_ids.tolist())
    everything = taken("everything", "--domain", "math", "story")
    for path in parts[0].glob("*.parquet"):
        assert (everything / path.name).read_bytes() == path.read_bytes()


def test_several_temperatures(tmp_path):
    synthetic_recording.write(tmp_path / "cold", LANGUAGE, FIRST)
    synthetic_recording.write(tmp_path / "warm", LANGUAGE, FIRST, temperature=0.7)
    merge([str(tmp_path / "cold"), str(tmp_path / "warm"), "--out", str(tmp_path / "both")])
    both = open_recording(tmp_path / "both")
    assert [entry["temperature"] for entry in both.manifest["sampling"]] == [0.0, 0.7]
    assert both.sequence_ids.tolist() == [0, 3, 4, 1, 2, 5, 8, 9, 6, 7] and both.uniform_keys.tolist() == 2 * [0, 3, 4, 1, 2]
    assert sorted(job.text for job in recorded_jobs(both, range(10))) == sorted(both.uniform_keys.tolist())
    cut([str(tmp_path / "both"), "--temperature", "0.7", "--out", str(tmp_path / "again")])
    again = open_recording(tmp_path / "again")
    assert [entry["temperature"] for entry in again.manifest["sampling"]] == [pytest.approx(0.7)]
    assert (again.temperature == np.float32(0.7)).all() and again.uniform_keys.tolist() == [0, 3, 4, 1, 2]
    assert cycles(tmp_path / "again", POLICIES[0]) == cycles(tmp_path / "warm", POLICIES[0])


def test_settings_of_a_temperature_that_the_first_recording_lacks(tmp_path, refused):
    synthetic_recording.write(tmp_path / "cold", LANGUAGE, FIRST)
    for name, plan in (("warm", FIRST), ("other", SECOND)):
        synthetic_recording.write(tmp_path / name, LANGUAGE, plan, temperature=0.7)
    edit(tmp_path / "other", sampling=[{"temperature": 0.7, "top_p": 0.5, "seed": 7}])
    parts = [str(tmp_path / name) for name in ("cold", "warm", "other")]
    told = refused(lambda: merge([*parts, "--out", str(tmp_path / "all")]))
    assert "warm and" in told and "sampled temperature 0.7 with different settings (top_p)" in told


def test_renumbered_sampled_texts_are_still_what_the_target_says(tiny_pair, pair64, tmp_path):
    """Both recordings count from 0; the uniform numbers of the second one's texts belong to the numbers it gave them."""
    quick = [
        "--cover",
        "chain(k=2)",
        "--max-new-tokens",
        "6",
        "--top-m",
        "8",
        "--dtype",
        "float64",
        "--temperature",
        "1",
        "--seed",
        "3",
    ]
    for number, text in enumerate(("the cat sat on the mat", "a dog ran home")):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
        prompts = ["--prompts", f"story={tmp_path / f'{number}.jsonl'}", "--out", str(tmp_path / f"part{number}")]
        record(["--target", tiny_pair.target, "--draft", tiny_pair.draft, *prompts, *quick])
    merge([str(tmp_path / "part0"), str(tmp_path / "part1"), "--out", str(tmp_path / "all")])
    merged = open_recording(tmp_path / "all", verify=True)
    assert merged.sequence_ids.tolist() == [0, 1] and merged.uniform_keys.tolist() == [0, 0]
    assert [part["recording"] for part in merged.manifest["merged"]] == ["part0", "part1"]
    assert "prompts_sha256" in merged.manifest["merged"][1] and "prompts_sha256" not in merged.manifest
    report = check_policy(merged, pair64, load_policy("chain(k=2)"), "draft", 99, 1.0)
    assert report.identical == report.cycles > 0 and check_texts(merged, pair64, exact=True)["identical"] == 2


def test_what_cannot_be_merged(parts, tmp_path, refused):
    out, (first, second) = tmp_path / "all", parts

    def told(**changes) -> str:
        before = (second / "manifest.json").read_text()
        edit(second, **changes)
        sentence = refused(lambda: merge([str(first), str(second), "--out", str(out)]))
        (second / "manifest.json").write_text(before)
        assert not out.exists() and not list(tmp_path.glob(".all*"))
        return sentence

    assert "different pairs (target.weights_sha256)" in told(target={"weights_sha256": "ab"})
    assert "different pairs (drafters[0].name)" in told(drafters=[{"name": "other", "kind": "lm"}])
    assert "different envelopes (cover)" in (envelope := told(envelope={"cover": [{"policy": "eagle3"}]})) and "--fill" in envelope
    assert "with top_m = None, " in told(top_m=3)
    assert "is not finished" in told(status="recording")
    assert "sampled temperature 0 with different settings (seed)" in told(sampling=[{"temperature": 0.0, "top_p": 1.0, "seed": 8}])
    assert "there is nothing to merge" in refused(lambda: merge([str(first), "--out", str(out)]))
    both = refused(lambda: merge([str(first), str(second), str(first), "--out", str(out)]))
    assert "both hold prompt 0 of math at temperature 0" in both and "traces.slice" in both
    assert "exists already: name another" in refused(lambda: merge([str(first), str(second), "--out", str(first)]))
    assert "holds no recording" in refused(lambda: merge([str(first), str(tmp_path), "--out", str(out)]))
    (second / "nodes-00001.parquet").write_bytes(b"")
    assert "nodes-00001.parquet is" in refused(lambda: merge([str(first), str(second), "--out", str(out)]))
    assert not out.exists()


def test_what_cannot_be_cut_out(parts, tmp_path, refused):
    def told(*options: str) -> str:
        return refused(lambda: cut([str(parts[0]), *options, "--out", str(tmp_path / "new")]))

    assert "say what to take" in told()
    assert "holds no domain maths: it has math, story" in told("--domain", "maths")
    assert "holds no temperature 1: it has 0" in told("--temperature", "1")
    assert "neither a number nor a range" in told("--sequence", "1:3")
    assert "holds no text 7-9: see" in told("--sequence", "7-9") and "holds no text 5: see" in told("--sequence", "0-2", "5")
    assert "holds no such texts" in told("--sequence", "0", "--domain", "story")
    assert "exists already" in refused(lambda: cut([str(parts[0]), "--domain", "math", "--out", str(parts[1])]))
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_nothing(parts, tmp_path, refused, monkeypatch):
    def full(table, path):
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("traces.writer.write_parquet", full)
    assert "there is no room" in refused(lambda: merge([*map(str, parts), "--out", str(tmp_path / "all")]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_folder_that_cannot_be_made(parts, tmp_path, refused):
    (tmp_path / "file").write_text("")
    told = refused(lambda: merge([*map(str, parts), "--out", str(tmp_path / "file" / "all")]))
    assert "cannot make the folder" in told and "--out" in told


def test_texts_that_were_skipped_stay_skipped(parts, tmp_path):
    plan = [ShardPlan(0, (0, 1, 2), "new")]
    synthetic_recording.write(tmp_path / "third", LANGUAGE, plan)
    about = json.loads((tmp_path / "third" / "manifest.json").read_text())
    about["plan"][0]["sequences"].append(5)
    about["skipped"] = [{"sequence": 5, "domain": "new", "prompt_id": "5", "reason": "NaN"}]
    (tmp_path / "third" / "manifest.json").write_text(json.dumps(about))
    merge([str(parts[1]), str(parts[0]), str(tmp_path / "third"), "--out", str(tmp_path / "all")])
    merged = open_recording(tmp_path / "all")
    assert [(entry["sequence"], entry["reason"]) for entry in merged.manifest["skipped"]] == [(17, "NaN")]
    assert merged.sequence_ids.tolist()[-3:] == [12, 13, 14] and torch.tensor(merged.uniform_keys[-3:]).tolist() == [0, 1, 2]
