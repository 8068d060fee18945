"""Training-free drafters in replay: run again on the recorded text, priced at nothing, refused where they cannot run."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from policies.errors import UserError
from policies.lookup.corpus import read_corpus, write_corpus
from policies.registry import load_policy
from sim.family import replay_family
from sim.looked_up import RecordedPast, replayed_drafter
from sim.recorded import RecordedText
from sim.replay import replay
from tests.sim.many_texts import content, write_many
from traces.costs import Profile
from traces.recording import open_recording


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return open_recording(write_many(tmp_path_factory.mktemp("many") / "trace"))


def test_the_past_is_the_recorded_text(recording):
    text = RecordedText(recording)
    sequence, position = torch.tensor([7, 0, 3]), torch.tensor([0, 5, 12])
    past = RecordedPast(recording, text)(SimpleNamespace(sequence=sequence, position=position))
    context, last = past.context()
    for row, (index, place) in enumerate(zip(sequence.tolist(), position.tolist(), strict=True)):
        first = int(recording.offset[index])
        wanted = recording.prompt_tokens(index).tolist() + recording.token[first : first + place + 1].tolist()
        assert context[row, : int(last[row]) + 1].tolist() == wanted and bool((context[row, int(last[row]) + 1 :] == -1).all())
        prompt = len(recording.prompt_tokens(index))
        assert int(past.told[row] - past.first[row]) == prompt + 1
        if place:
            told, _ = past.target_top(torch.full((3, 1), prompt), 1)  # behind the first generated token
            assert int(told[row, 0, 0]) == int(recording.top_tokens[first + 1, 0])


def test_nothing_is_missing_and_families_agree(recording):
    members = [load_policy(f"eagle3(top_k=2, depth=3, total_tokens={total})") for total in (2, 6)]
    logs = replay_family(recording, members, "suffix(least=0)")
    for policy, log in zip(members, logs, strict=True):
        alone = replay(recording, policy, "suffix(least=0)")
        assert alone.coverage == 1.0 and int(alone.emitted.sum()) == int((recording.length - 1).sum())
        assert torch.equal(alone.position, log.position) and torch.equal(alone.accepted, log.accepted)


@pytest.mark.parametrize("rule", ["suffix(least=0)", "prompt_lookup(least=2)"])
def test_a_family_counts_what_was_looked_up_as_its_members_alone_do(recording, rule):
    members = [load_policy(f"eagle3(top_k=2, depth={depth}, total_tokens=6)") for depth in (1, 2, 4)]
    logs = replay_family(recording, members, f"{rule}+made-up")
    for policy, log in zip(members, logs, strict=True):
        alone = replay(recording, policy, f"{rule}+made-up")
        assert torch.equal(alone.looked_up, log.looked_up) and torch.equal(alone.levels, log.levels)
        assert bool((alone.looked_up > 0).any()) and bool((alone.levels > 0).any())
        assert not bool(((alone.looked_up > 0) & (alone.levels > 0)).any())  # a cycle is the rule's or the network's


def test_drafting_costs_nothing():
    profile = Profile(content())
    free, paid = profile.cost("suffix(depth=3)"), profile.cost("made-up")
    width, one = torch.tensor([[1], [4]]), torch.tensor([1, 2])
    assert torch.equal(free.draft_ms(width, one, one), torch.zeros(2, 2, dtype=torch.float64))
    assert float(free.behind(5).catch_up_ms(torch.tensor(3), torch.tensor(1), torch.tensor(1))) == 0.0
    assert torch.equal(free.verify_ms(width, one, one), paid.verify_ms(width, one, one))
    assert bool((paid.draft_ms(width, one, one) > 0).all())
    with pytest.raises(UserError):
        profile.cost("sufix")


def test_the_command(recording, tmp_path, capsys):
    from sim.contest import main

    options = ["--policy", "chain(k=2)", "--drafter", "prompt_lookup(ngram=2)", "--profile", str(tmp_path / "p.json")]
    table = {"levels": [1, 4], "batch": [1], "ms": [[0.1], [0.2]]}
    known, unknown = "what looking takes prompt lookup", "nothing: this profile has no times of looking"
    for timed, price in (({"eagle3": table}, known), ({"svip": table}, unknown), ({}, unknown)):
        Profile(content(looked_up=timed)).save(tmp_path / "p.json")
        main([str(recording.folder), *options, "--resamples", "100", "--json", str(tmp_path / "out.json")])
        assert f"prompt_lookup(ngram=2) is priced at {price}" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows[-1]["drafter"] == "prompt_lookup(ngram=2)" and rows[-1]["coverage"] == 1.0


def test_refusals(recording):
    held = recording.top_tokens.shape[1]
    with pytest.raises(UserError, match=f"the recording holds {held}"):
        replayed_drafter(recording, f"racer(top={held + 1})", RecordedText(recording))
    with pytest.raises(UserError, match="holds no drafter 'sufix'"):
        replayed_drafter(recording, "sufix", RecordedText(recording))


def test_a_frozen_corpus(recording, tmp_path, capsys, refused):
    """Results say what was looked into; a corpus of another tokenizer, or of answers to the same prompts, is refused."""
    from sim.contest import main

    folder, corpus = shutil.copytree(recording.folder, tmp_path / "trace"), tmp_path / "c.safetensors"
    drafter = f"suffix(least=0, corpus='{corpus}')"
    options = ["--policy", "chain(k=2)", "--resamples", "100", "--json", str(tmp_path / "out.json")]
    said = [recording.token[first : first + 14].tolist() for first in recording.offset[:-1].tolist()]

    def frozen(tokenizer: str, prompts: list[list[int]]) -> None:
        write_corpus(corpus, said, tokenizer, [{"name": "made-up"}], prompts)

    frozen("t", [])
    assert "does not say which tokenizer" in refused(lambda: main([str(folder), *options, "--drafter", drafter]))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["target"]["tokenizer_sha256"] = "t"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    main([str(folder), *options, "--drafter", drafter])
    assert f"looks into the frozen corpus {corpus} as well (10 texts, 140 tokens, sha256" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["about"]["corpus"] == read_corpus(corpus).facts()
    alone = replay(recording, load_policy("chain(k=2)"), "suffix(least=0)")
    mean = content["rows"][-1]["tau"]
    assert mean > float(alone.emitted.sum()) / len(alone.emitted)
    frozen("u", [])
    with_corpus = [str(folder), *options, "--drafter", drafter]
    assert "another tokenizer (sha256 u) than the recording (t)" in refused(lambda: main(with_corpus))
    frozen("t", [[1]])
    assert "1 of the recording's 1 prompts" in refused(lambda: main(with_corpus))
    main([str(folder), *options, "--drafter", "suffix(least=0)"])
    assert "corpus" not in json.loads((tmp_path / "out.json").read_text())["about"]
