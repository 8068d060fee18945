"""Whole conversations, how prompts are written, private prompts, and texts that cannot be recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import live.model
from live.contenders import as_generate_takes_it
from live.fidelity import check_policy
from live.fidelity import main as fidelity
from live.pair import encode_prompt
from policies.errors import UserError
from policies.plural import counted
from policies.registry import load_policy
from sim.replay import replay
from sim.split import prompt_index
from traces import inspect
from traces.plan import shard_plan, turns_of
from traces.prompts import Prompt, load_prompts, with_system
from traces.record import main
from traces.recording import open_recording
from traces.shard import hashed

QUICK = ("--cover", "chain(k=2)", "--max-new-tokens", "6", "--dtype", "float64")
TURNS = [
    {"question_id": 81, "category": "writing", "turns": ["the cat sat on the mat", "a dog ran home"], "reference": []},
    {"question_id": 82, "category": "math", "turns": ["count to 10"]},
]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TURNS))
    return str(path)


def recorded(pair, out: Path, prompts: str, *options: str):
    main(["--target", pair.target, "--draft", pair.draft, "--prompts", prompts, "--out", str(out), *QUICK, *options])
    return open_recording(out, verify=True)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_shards_hold_whole_conversations():
    def prompt(domain: str, number: int, later: int) -> Prompt:
        return Prompt(domain, f"f:{number}", ({"role": "user", "content": "x"},), ("y",) * later)

    prompts = [prompt("a", 1, 1), prompt("b", 2, 0), prompt("a", 3, 0), prompt("a", 4, 2)]
    turns = turns_of(prompts, 2)
    assert [turn.number for turn in turns] == list(range(14))
    assert [turn.prompt.turn_id(turn.turn) for turn in turns[:4]] == ["f:1/1", "f:1/2", "f:2", "f:3"]
    assert [(plan.domain, plan.sequences) for plan in shard_plan(turns, 2)] == [
        ("a", (0, 1, 3)), ("a", (4, 5, 6)), ("b", (2,)), ("a", (7, 8, 10)), ("a", (11, 12, 13)), ("b", (9,)),
    ]  # fmt: skip


def test_a_conversation_goes_on_from_the_answers():
    prompt = Prompt("a", "f:1", ({"role": "user", "content": "one"},), ("two", "three"))
    assert prompt.conversation() == prompt.messages
    said = [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"), ("user", "three")]
    assert [(message["role"], message["content"]) for message in prompt.conversation(["1", "2"])] == said
    system = {"role": "system", "content": "Be brief."}
    assert with_system([prompt], "Be brief.")[0].messages == (system, *prompt.messages)
    own = Prompt("a", "f:2", ({"role": "system", "content": "mine"}, *prompt.messages))
    assert with_system([own], "Be brief.") == [own]


BENCHMARKS = Path(__file__).parent / "questions"


@pytest.mark.parametrize("name", ["mt_bench", "gsm8k", "humaneval", "alpaca", "cnn_dm"])
def test_benchmark_files_load(name):
    """Lines of the five benchmarks' shape: ids from 0 or 81, categories that may be empty, references that may be missing."""
    prompts = load_prompts([str(BENCHMARKS / f"{name}.jsonl")])
    assert len(prompts) == 2 and all(prompt.domain == name for prompt in prompts)
    assert [prompt.turns for prompt in prompts] == ([2, 2] if name == "mt_bench" else [1, 1])
    assert prompts[0].id == f"{name}:{ {'mt_bench': 81, 'cnn_dm': 241}.get(name, 0) }"


# ---- recorded --------------------------------------------------------------------------------------------------------


def test_later_turns_are_fed_the_targets_own_answers(tiny_pair, pair64, questions, tmp_path):
    recording = recorded(tiny_pair, tmp_path / "trace", questions, "--temperature", "0", "--temperature", "0.8")
    rows = recording.sequences()
    assert [row["prompt_id"] for row in rows] == 2 * ["bench:81/1", "bench:81/2", "bench:82"]
    for first, second in ((rows[0], rows[1]), (rows[3], rows[4])):
        asked = [("user", TURNS[0]["turns"][0]), ("assistant", first["text"]), ("user", TURNS[0]["turns"][1])]
        messages = [{"role": role, "content": content} for role, content in asked]
        assert second["prompt_tokens"] == encode_prompt(pair64.tokenizer, messages)
        assert second["prompt_text"] == "\n".join(content for _, content in asked)
    assert rows[1]["prompt_tokens"] != rows[4]["prompt_tokens"]  # each group answers to its own answers
    assert prompt_index(recording).tolist() == [0, 0, 2, 0, 0, 2]  # so a split keeps what answers one prompt together
    for temperature in (0.0, 0.8):
        report = check_policy(recording, pair64, load_policy("chain(k=2)"), "draft", 99, temperature)
        assert report.identical == report.cycles > 0


def test_a_later_turn_without_room_is_skipped_and_named(tiny_pair, tmp_path, capsys):
    turns = ["the cat sat on the mat"] + 2 * ["a dog ran home " * 10]
    (tmp_path / "long.jsonl").write_text(json.dumps({"turns": turns}) + "\n" + json.dumps({"turns": turns[:1]}) + "\n")
    recording = recorded(tiny_pair, tmp_path / "trace", str(tmp_path / "long.jsonl"), "--max-new-tokens", "40")
    told = capsys.readouterr()
    ids = [row["prompt_id"] for row in recording.sequences()]
    skipped = recording.manifest["skipped"]
    assert ids + [entry["prompt_id"] for entry in skipped] in (
        ["long:1/1", "long:1/2", "long:2", "long:1/3"],
        ["long:1/1", "long:2", "long:1/2", "long:1/3"],
    )
    assert "leaves no room in the context" in skipped[0]["reason"]
    assert "skipped prompt long:1/3 of long" in told.err and f"{counted(len(skipped), 'text')} skipped" in told.out
    assert replay(recording, load_policy("chain(k=2)"), "draft").coverage == 1.0  # numbers have a gap, nothing else has


def test_how_prompts_are_written(tiny_pair, pair64, questions, tmp_path):
    bare = recorded(tiny_pair, tmp_path / "bare", questions, "--no-chat-template", "--system", "be brief")
    wanted = encode_prompt(pair64.tokenizer, [{"role": "user", "content": "be brief\n" + TURNS[0]["turns"][0]}], False)
    assert bare.prompt_tokens(0).tolist() == wanted and pair64.tokenizer.decode(wanted).startswith("be brief\nthe cat")
    about = bare.manifest
    assert (about["chat_template"], about["system"]) == (False, "be brief") and "text" not in about
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": TURNS[0]["turns"][0]}]
    written = recorded(tiny_pair, tmp_path / "written", questions, "--system", "be brief")
    assert written.prompt_tokens(0).tolist() == encode_prompt(pair64.tokenizer, messages)
    assert "chat_template" not in written.manifest


def test_a_template_that_refuses(pair64, monkeypatch):
    monkeypatch.setattr(pair64.tokenizer, "chat_template", "{{ raise_exception('no system message here') }}")
    with pytest.raises(UserError, match="no system message here.*--no-chat-template"):
        encode_prompt(pair64.tokenizer, [{"role": "user", "content": "hi"}])


def test_private_prompts_stay_out(tiny_pair, questions, tmp_path, refused, capsys):
    options = ("--system", "private words")
    plain = recorded(tiny_pair, tmp_path / "plain", questions, *options)
    private = recorded(tiny_pair, tmp_path / "private", questions, *options, "--no-text")
    for ours, theirs in zip(private.sequences(), plain.sequences(), strict=True):
        assert ours["prompt_text"] is ours["text"] is None and ours["tokens"] == theirs["tokens"]
        assert ours["prompt_tokens"] == hashed(theirs["prompt_tokens"]) and max(ours["prompt_tokens"]) < -1
    stored = b"".join(path.read_bytes() for path in sorted((tmp_path / "private").glob("*")) if path.is_file())
    assert b"cat sat" not in stored and b"private words" not in stored
    one, other = (replay(each, load_policy("chain(k=2)"), "draft", keep_trees=True) for each in (plain, private))
    for name in ("position", "context_length", "kept_tokens", "path", "emitted"):  # replay needs no prompt
        assert torch.equal(getattr(one, name), getattr(other, name))
    with pytest.raises(UserError, match="--no-text"):
        private.prompt_tokens(0)
    assert "--no-text" in refused(lambda: fidelity([str(tmp_path / "private"), "--policy", "chain"]))
    assert "--no-text" in refused(lambda: main(["--fill", str(tmp_path / "private"), "--policy", "chain(k=5)"]))
    capsys.readouterr()
    inspect.main([str(tmp_path / "private"), "--no-tau"])
    assert "kept out (--no-text)" in capsys.readouterr().out


def test_hashes_tell_no_tokens():
    prompt = [5, 5, 7, 5]
    assert hashed(prompt) == hashed(prompt) and len(set(hashed(prompt))) == 4
    assert not set(hashed(prompt)) & set(hashed([5, 5, 7, 6]))
    assert all(np.iinfo(np.int32).min <= value < -1 for value in hashed(list(range(2000))))


# ---- logits that are not numbers -------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """The target's logits of one prompt break at its third token."""
    real = live.model.CachedModel.prefill
    steps = {"count": 0, "row": 0}

    def prefill(self, tokens, counts=None, logits="last"):
        output = real(self, tokens, counts, logits)
        if logits == "last" and self.rows > steps["row"]:
            steps["count"] += 1
            if steps["count"] == 3:
                output.logits[steps["row"], :, 4] = torch.nan
        return output

    monkeypatch.setattr(live.model.CachedModel, "prefill", prefill)
    return steps


def test_a_broken_text_is_skipped_and_the_others_never_notice(tiny_pair, questions, tmp_path, poisoned, monkeypatch, capsys):
    found = recorded(tiny_pair, tmp_path / "broken", questions)
    told = capsys.readouterr()
    skipped = found.manifest["skipped"]
    assert [entry["prompt_id"] for entry in skipped] == ["bench:81/1", "bench:81/2"]
    assert "logits of the target at position 2 are not numbers" in skipped[0]["reason"]
    assert "turn before it" in skipped[1]["reason"]
    assert "skipped prompt bench:81/1 of bench: the logits" in told.err and "2 texts skipped" in told.out
    monkeypatch.undo()
    whole = recorded(tiny_pair, tmp_path / "whole", questions)
    assert found.sequences() == [whole.sequences()[2]] and found.sequence_ids.tolist() == [2]
    before = (tmp_path / "broken" / "manifest.json").read_bytes()
    recorded(tiny_pair, tmp_path / "broken", questions, "--resume")
    assert (tmp_path / "broken" / "manifest.json").read_bytes() == before
    inspect.main([str(tmp_path / "broken"), "--no-tau"])
    assert "skipped   2 texts (first: bench:81/1 of bench" in capsys.readouterr().out


def test_nothing_that_can_be_recorded(tiny_pair, tmp_path, refused):
    broken = shutil.copytree(tiny_pair.target, tmp_path / "target")
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "p.txt").write_text("the cat\n")
    models = ["--target", str(broken), "--draft", tiny_pair.draft, "--prompts", str(tmp_path / "p.txt"), *QUICK[:4]]
    told = refused(lambda: main([*models, "--out", str(tmp_path / "trace")]))
    assert "none of the 1 texts could be recorded" in told and "position 0" in told


def test_a_broken_draft_is_named(tiny_pair, tmp_path, questions, monkeypatch, capsys):
    from live.lm_network import LanguageModelNetwork

    real = LanguageModelNetwork.grow

    def grow(self, parent, token, width):
        found = real(self, parent, token, width)
        if len(parent) == 5:  # trees of a text of six tokens
            found.entropy[3] = torch.nan
        return found

    monkeypatch.setattr(LanguageModelNetwork, "grow", grow)
    told = []
    try:
        recorded(tiny_pair, tmp_path / "trace", questions)
    except UserError as error:
        told.append(str(error))
    assert "logits of drafter 'draft' at position 3 are not numbers" in "".join(told) + capsys.readouterr().err


# ---- the baseline of the bench ---------------------------------------------------------------------------------------


def test_generate_is_asked_for_as_many_tokens():
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.2, "seed": 0}
    assert as_generate_takes_it(greedy, 9) == {"do_sample": False, "repetition_penalty": 1.2}
    found = as_generate_takes_it(greedy | {"temperature": 0.7, "top_k": 5}, 9)
    assert found["do_sample"] and found["min_new_tokens"] == 9 and (found["temperature"], found["top_k"]) == (0.7, 5)
