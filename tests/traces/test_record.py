"""What the recorder writes: the target's texts and distributions, the drafters' forests, and the manifest."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.registry import load_policy
from sim.samples import build_samples
from traces.capture import CaptureSettings, generate_texts
from traces.cover import DEFAULT_COVER, TRUE_PATH_DEPTH
from traces.loops import loop_onset
from traces.recording import open_recording
from traces.schema import FINISHES


def test_texts_are_the_targets_own(tiny_recording, pair64):
    recording = open_recording(tiny_recording, verify=True)
    assert recording.complete and recording.drafters == ["eagle3", "draft"] and recording.domains == ["story", "math"]
    assert recording.sequence_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert recording.domain_index.tolist() == 3 * [0] + 3 * [1]
    rows = recording.sequences()
    assert {row["finish"] for row in rows} == {"eos", "length"}
    for index, row in enumerate(rows):
        ids = torch.tensor([row["prompt_tokens"]])
        told = pair64.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32 + TRUE_PATH_DEPTH + 1,
            pad_token_id=0,
        )
        assert row["tokens"] == told[0, ids.shape[1] :].tolist()  # the tokens beyond the limit as well
        assert recording.prompt_tokens(index).tolist() == row["prompt_tokens"]
        if row["finish"] == "eos":
            assert row["length"] == len(row["tokens"]) <= 32 and row["tokens"][-1] in pair64.end_tokens
            assert not set(row["tokens"][:-1]) & set(pair64.end_tokens)
        else:
            beyond = len(row["tokens"]) - row["length"]
            assert row["length"] == 32 and (beyond == 25 or row["tokens"][-1] in pair64.end_tokens)


def test_positions_hold_the_targets_distribution(tiny_recording, pair64):
    recording = open_recording(tiny_recording)
    for index, row in enumerate(recording.sequences()[:2]):
        whole, first = torch.tensor([row["prompt_tokens"] + row["tokens"]]), len(row["prompt_tokens"])
        with torch.no_grad():
            logprob = torch.log_softmax(pair64.model(input_ids=whole).logits[0, first - 1 : -1], dim=-1)
        here = slice(recording.offset[index], recording.offset[index + 1])
        best = logprob.sort(dim=-1, descending=True)
        assert recording.token[here].tolist() == best.indices[:, 0].tolist()
        assert np.array_equal(recording.top_tokens[here], best.indices[:, :8].numpy())
        for name, wanted in {
            "logprob": best.values[:, 0],
            "top_logprobs": best.values[:, :8],
            "entropy": -(logprob.exp() * logprob).sum(-1),
            "margin": best.values[:, 0] - best.values[:, 1],
        }.items():
            assert np.allclose(getattr(recording, name)[here], wanted.numpy(), atol=2e-6), name
        assert recording.context_length[here].tolist() == list(range(first, first + len(row["tokens"])))


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
def test_the_default_cover_is_covered_everywhere(tiny_recording, drafter):
    recording = open_recording(tiny_recording)
    positions = int((recording.length - 1).sum())
    for spec in (*DEFAULT_COVER, "eagle3", "chain(k=3)", "static"):
        missing = build_samples(recording, load_policy(spec), drafter).missing
        assert missing.shape == (positions,) and missing.sum() == 0, spec
    assert build_samples(recording, load_policy("eagle3(top_k=6, depth=16)"), drafter).missing.sum() > 0


def test_the_true_path_is_covered_and_bears_the_targets_numbers(tiny_recording, pair64):
    recording = open_recording(tiny_recording)
    rows = recording.sequences()
    longest = 0
    for name in recording.drafters:
        forest = recording.forest(name)
        for sequence in (0, 3):
            first, tokens = int(recording.offset[sequence]), rows[sequence]["tokens"]
            whole = torch.tensor([rows[sequence]["prompt_tokens"] + tokens])
            with torch.no_grad():
                logprob = torch.log_softmax(pair64.model(input_ids=whole).logits[0], dim=-1)
            before = len(rows[sequence]["prompt_tokens"])
            for position in range(rows[sequence]["length"] - 1):
                node, depth = int(forest.root[first + position]), 0
                while node >= 0 and position + depth + 1 < len(tokens):
                    wanted = logprob[before + position + depth][torch.from_numpy(forest.child_token[node].astype(np.int64))]
                    assert np.allclose(forest.target_logprob[node], wanted.numpy(), atol=2e-6)
                    hit = np.flatnonzero(forest.child_token[node] == tokens[position + depth + 1])
                    depth += 1
                    if not len(hit) or depth == TRUE_PATH_DEPTH:
                        break
                    node = int(forest.child_row[node, hit[0]])
                    assert node >= 0, "a proposed true token was not expanded"
                longest = max(longest, depth)
    assert longest >= 3


def test_off_the_true_path_there_are_no_target_numbers(tiny_recording):
    recording = open_recording(tiny_recording)
    forest = recording.forest("draft")
    tokens = recording.token[np.minimum(forest.position + forest.depth, len(recording.token) - 1)]
    off = (forest.depth > 0) & (forest.token != tokens)
    assert off.any() and (forest.on_path_row[off] == -1).all()
    assert (forest.on_path_row[forest.depth == 0] >= 0).all()


def test_the_manifest_says_what_is_needed_to_trust_it(tiny_recording, tiny_pair, pair64):
    about = json.loads((tiny_recording / "manifest.json").read_text())
    assert (about["format"], about["version"], about["status"]) == ("specreplay-recording", 1, "complete")
    assert (about["dtype"], about["max_new_tokens"], about["overrun"], about["top_m"]) == ("float64", 32, 25, 8)
    assert [(d["name"], d["kind"], d["id"]) for d in about["drafters"]] == [
        ("eagle3", "eagle3", tiny_pair.eagle3),
        ("draft", "lm", tiny_pair.draft),
    ]
    assert about["drafters"][0]["captured_layers"] == [2, 3, 3]
    for entry, folder in zip([about["target"], *about["drafters"]], ("target", "eagle3", "draft"), strict=True):
        digest = hashlib.sha256((tiny_pair.folder / folder / "model.safetensors").read_bytes()).hexdigest()
        wanted = hashlib.sha256(f"model.safetensors {digest}\n".encode()).hexdigest()
        assert entry["weights_sha256"] == wanted
    assert len(about["target"]["tokenizer_sha256"]) == 64
    assert about["envelope"]["top_k"] == 10 and about["envelope"]["true_path_depth"] == TRUE_PATH_DEPTH
    assert about["envelope"]["cover"] == [load_policy(spec).to_json() for spec in DEFAULT_COVER]
    assert about["sampling"][0]["temperature"] == 0.0 and about["loop_rule"] is None
    assert about["end_tokens"] == pair64.end_tokens and len(about["end_tokens"]) == 2
    assert about["context_limit"] == 256 and about["libraries"]["torch"] == torch.__version__
    assert [(p["domain"], p["sequences"]) for p in about["plan"]] == [
        ("story", [0, 1]), ("story", [2]), ("math", [3, 4]), ("math", [5])
    ]  # fmt: skip
    assert len(about["shards"]) == 3 * len(about["plan"])
    for name, entry in about["shards"].items():
        content = (tiny_recording / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))


def test_the_format_page_has_every_key(tiny_recording):
    """Both ways: what a recording holds stands on the page, and what the page says is there."""
    about = json.loads((tiny_recording / "manifest.json").read_text())
    page = (Path(__file__).parents[2] / "traces" / "README.md").read_text().split("## manifest.json")[1].split("## ")[0]
    always, sometimes = ({}, {})
    for part, table in zip((always, sometimes), page.split("Some are there on occasion:"), strict=True):
        for names, meaning in re.findall(r"^\| (`.*?`) \| (.*) \|$", table, re.M):
            part |= dict.fromkeys(re.findall(r"`(\w+)`", names), set(re.findall(r"`(\w+)`", meaning)))
    assert set(always) == set(about) and not set(sometimes) & set(about)
    for key in ("target", "drafters", "envelope", "sampling", "libraries", "machine", "plan", "shards"):
        values = list(about["shards"].values()) if key == "shards" else about[key]
        inside = {name for value in (values if isinstance(values, list) else [values]) for name in value}
        others = {"machine": {"gpu", "gpu_memory_gib", "driver", "cuda"}, "plan": {"shift"}, "drafters": {"levels", "block_size"}}
        of_others = others.get(key, set())
        assert always[key] - inside == of_others and inside <= always[key], key


def test_loops_end_texts(pair64):
    settings = CaptureSettings(90, 25, 8, 10, (), cut_loops=True)
    prompts = [[5, 6, 7], [8, 9], [30, 31, 32, 33]]
    # An untrained model seldom loops within 90 tokens; without layers it is a bigram model, which must.
    tails = [layer.mlp.down_proj.weight for layer in pair64.model.model.layers]
    tails += [layer.self_attn.o_proj.weight for layer in pair64.model.model.layers]
    before = [weight.clone() for weight in tails]
    with torch.no_grad():
        for weight in tails:
            weight.zero_()
        cut = generate_texts(pair64, prompts, settings)
        whole = generate_texts(pair64, prompts, CaptureSettings(90, 25, 8, 10, (), cut_loops=False))
        for weight, old in zip(tails, before, strict=True):
            weight.copy_(old)
    assert "loop" in {text.finish for text in cut}
    for text, full in zip(cut, whole, strict=True):
        onset = loop_onset(full.tokens[: full.length])
        assert (text.finish, text.length) == ((full.finish, full.length) if onset is None else ("loop", onset))
        assert text.finish in FINISHES and text.tokens == full.tokens[: text.length + settings.overrun]


def test_trees_stand_where_a_cycle_may_start_and_nowhere_else(tiny_recording):
    recording = open_recording(tiny_recording)
    for name in recording.drafters:
        root = recording.forest(name).root
        for sequence, length in enumerate(recording.length.tolist()):
            here = root[recording.offset[sequence] : recording.offset[sequence + 1]]
            assert (here[: length - 1] >= 0).all() and (here[length - 1 :] == -1).all()
