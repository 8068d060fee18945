"""Frozen corpora in live decoding and beside it in replay: equal in every cycle; how one is made, and where it may not be used."""

from __future__ import annotations

import json

import pytest
import torch

import live
from live.corpus import main, read_texts, text_of
from live.decode import SpeculativeDecoder
from live.fidelity import check_policy
from live.fidelity import main as fidelity
from live.generate import main as generate
from live.identity import tokenizer_hash
from policies.errors import UserError
from policies.lookup.corpus import read_corpus, write_corpus
from policies.registry import load_policy
from sim.replay import replay
from traces.recording import open_recording

DRAFTERS = ("prompt_lookup(ngram=2, corpus='{}')", "suffix(corpus='{}')", "racer(corpus='{}')")
EAGLE = "eagle3(total_tokens=16, depth=5, top_k=8)"


@pytest.fixture(scope="module")
def corpus(tiny_recording, tmp_path_factory):
    """Much of what the target says in the recording, out of its place."""
    recording = open_recording(tiny_recording)
    said = [recording.token[first + 3 : first + 20].tolist() for first in recording.offset[:-1].tolist()]
    path = tmp_path_factory.mktemp("corpus") / "earlier.safetensors"
    write_corpus(path, said, recording.manifest["target"]["tokenizer_sha256"], [{"name": "made-up"}])
    return path


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("spec", [EAGLE, "chain(k=5)"])
def test_float64_is_the_proof(tiny_recording, pair64, corpus, drafter, spec):
    recording, policy = open_recording(tiny_recording), load_policy(spec)
    report = check_policy(recording, pair64, policy, drafter.format(corpus), 24)
    assert report.identical == report.cycles >= 24 and not report.notes
    assert report.largest < 1e-5
    without = drafter.replace(", corpus='{}'", "").replace("(corpus='{}')", "")
    cycles = [len(replay(recording, policy, name).sequence) for name in (drafter.format(corpus), without)]
    assert cycles[0] < cycles[1]  # the corpus has been looked into


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_texts_too(tiny_sampled, pair64, corpus, drafter):
    report = check_policy(open_recording(tiny_sampled), pair64, load_policy(EAGLE), drafter.format(corpus), 16, 1.0)
    assert report.identical == report.cycles >= 16, report.notes


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_and_batch(pair64, corpus, drafter):
    """The text is the target's own, and rows side by side decode as they do alone."""
    prompts, limits = [[5, 6, 7, 8, 5, 6, 7], [9, 3, 9, 3, 9], [11, 12]], [40, 25, 33]
    draft = pair64.draft(drafter.format(corpus))
    decoder = SpeculativeDecoder(pair64.target(), draft, load_policy(EAGLE), pair64.end_tokens)
    plain = SpeculativeDecoder(pair64.target(), draft, load_policy("autoregressive"), pair64.end_tokens)
    together = decoder.generate(prompts, limits)
    assert together.tokens == plain.generate(prompts, limits).tokens
    for row, limit in enumerate(limits):
        alone = decoder.generate([prompts[row]], limit, text=torch.tensor([row]))
        assert alone.tokens == [together.tokens[row]] and alone.cycles == [together.cycles[row]]


def test_inside_generate(pair64, corpus, tmp_path):
    """Hugging Face's own greedy text; a corpus of another tokenizer is refused there, too."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    hook = live.speculate(DRAFTERS[1].format(corpus), EAGLE)
    assert torch.equal(pair64.model.generate(ids, **settings, custom_generate=hook), pair64.model.generate(ids, **settings))
    other = tmp_path / "other.safetensors"
    write_corpus(other, [[1, 2]], "t", [])
    with pytest.raises(UserError, match="another tokenizer"):
        pair64.model.generate(ids, **settings, custom_generate=live.speculate(DRAFTERS[1].format(other), EAGLE))


def test_made_of_files_and_recordings(tiny_pair, pair64, tiny_recording, tmp_path, capsys, refused):
    (tmp_path / "notes.txt").write_text("the cat sat\n\non the mat\n")
    rows = [{"text": "a dog ran home"}, {"prompt": "add 14", "response": " and 27"}, {"turns": ["once", "upon"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    files, out = [str(tmp_path / "notes.txt"), str(tmp_path / "rows.jsonl")], tmp_path / "c.safetensors"
    main([*files, str(tiny_recording), "--target", tiny_pair.target, "--out", str(out)])
    frozen, recording = read_corpus(out), open_recording(tiny_recording)
    assert f"{frozen.texts} texts" in capsys.readouterr().out and frozen.texts == 4 + len(recording.length)
    said = pair64.tokenizer.decode(frozen.index.token.tolist())
    assert said.startswith("the cat sat\n\non the mat" + "a dog ran home" + "add 14\n and 27" + "once\nupon")
    last = frozen.index.token[-int(recording.length[-1]) :].tolist()
    assert last == recording.token[recording.offset[-2] :][: int(recording.length[-1])].tolist()
    about = frozen.facts()
    assert about["tokenizer_sha256"] == tokenizer_hash(pair64.tokenizer) == recording.manifest["target"]["tokenizer_sha256"]
    assert [source["texts"] for source in about["sources"]] == [1, 3, len(recording.length)]

    # what it was made of is not scored with it
    drafter = f"suffix(corpus='{out}')"
    told = refused(lambda: fidelity([str(tiny_recording), "--drafter", drafter, "--policy", "chain(k=2)"]))
    assert f"answers to {len(recording.length)} of the recording's {len(recording.length)} prompts" in told
    again, before = [*files, "--target", tiny_pair.target, "--out"], out.read_bytes()
    assert "already exists: replace it by --overwrite" in refused(lambda: main([*again, str(out)]))
    assert out.read_bytes() == before
    for path in (tmp_path, tmp_path / "misspelt" / "c.safetensors"):
        assert "name a file in a folder that is there" in refused(lambda p=path: main([*again, str(p)]))
    main([*again, str(out), "--overwrite"])
    options = ["--policy", "chain(k=2)", "--cycles", "6", "--witness", "0", "--skip-generate"]
    assert fidelity([str(tiny_recording), "--drafter", drafter, *options]) == 0

    # another tokenizer, no file
    shipped = ["the cat sat", "--policy", "chain(k=2)", "--max-new-tokens", "4"]
    assert "is of another tokenizer" in refused(lambda: generate([*shipped, "--draft", drafter]))
    assert "does not exist" in refused(lambda: generate([*shipped, "--draft", "racer(corpus='none')"]))
    assert "separate files" in refused(lambda: main([str(tiny_recording), files[0], "--out", str(tmp_path / "new")]))


def test_files_without_text(tmp_path):
    cases = {"[1]": "no text found", '{"turns": [1]}': "no text found", '{"text"': "not valid JSON", '{"messages": [3]}': "no text"}
    for line, told in cases.items():
        with pytest.raises(UserError, match=told):
            text_of(line, "x.jsonl, line 1")
    assert text_of('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "") == "a\nb"
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, told in {"none.jsonl": "does not exist", "empty.txt": "is empty"}.items():
        with pytest.raises(UserError, match=told):
            read_texts(tmp_path / name)
