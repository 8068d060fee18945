"""Recordings of sampled text: groups, the numbers behind every choice, and that replay and live agree on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from live.fidelity import check_policy, check_texts
from live.sampling import inverse_cdf, process
from policies.contract import Sampling
from policies.philox import uniform
from policies.registry import load_policy
from sim.recorded import RecordedText
from sim.replay import replay
from traces import inspect
from traces.record import main
from traces.recording import open_recording

SETTINGS = {"temperature": 1.0, "top_k": 60, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 4}
SMALL = "eagle3(total_tokens=12, depth=3, top_k=4)"


def test_groups_are_sequences_of_their_own(tiny_sampled):
    recording = open_recording(tiny_sampled, verify=True)
    rows = recording.sequences()
    assert recording.sequence_ids.tolist() == list(range(8)) and recording.temperature.tolist() == [0.0] * 4 + [1.0] * 4
    for greedy, sampled in zip(rows[:4], rows[4:], strict=True):  # prompt ids pair the groups
        assert (greedy["prompt_id"], greedy["prompt_tokens"]) == (sampled["prompt_id"], sampled["prompt_tokens"])
        assert greedy["tokens"] != sampled["tokens"]
    about = recording.manifest
    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.1}
    assert about["sampling"] == [plain | {"seed": None}, SETTINGS]
    assert recording.sampling(0) == plain | {"seed": 0} and recording.sampling(7) == SETTINGS
    assert [plan["sequences"] for plan in about["plan"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_every_choice_can_be_made_again(tiny_sampled, pair64):
    """From the recorded text alone: logits, penalty, uniform number, token, its probability, its margin."""
    recording = open_recording(tiny_sampled)
    for index, row in enumerate(recording.sequences()):
        here = slice(recording.offset[index], recording.offset[index + 1])
        whole, first = row["prompt_tokens"] + row["tokens"], len(row["prompt_tokens"])
        sampling = Sampling(**recording.sampling(index))
        with torch.no_grad():
            logits = pair64.model(input_ids=torch.tensor([whole])).logits[0, first - 1 : -1]
        count = len(row["tokens"])
        u = uniform(4, torch.full((count,), row["sequence"]), torch.arange(count))
        for place in range(count):
            seen = torch.zeros(logits.shape[1], dtype=torch.bool)
            seen[whole[: first + place]] = True
            found = process(logits[place : place + 1], sampling, seen[None])
            recorded = {name: float(getattr(recording, name)[here][place]) for name in ("margin", "uniform", "processed_logprob")}
            share = (found.weight / found.weight.sum())[0]
            if sampling.temperature == 0:
                best = found.weight[0].log().topk(2)
                assert int(best.indices[0]) == row["tokens"][place]
                assert np.isnan(recorded["uniform"]) and recorded["processed_logprob"] == 0
                assert recorded["margin"] == pytest.approx(float(best.values[0] - best.values[1]), abs=2e-6)
                continue
            token = int(inverse_cdf(found.weight, u[place : place + 1]))
            assert token == row["tokens"][place] and recorded["uniform"] == float(u[place])
            assert recorded["processed_logprob"] == pytest.approx(float(share[token].log()), abs=2e-6)
            upper = float(share.cumsum(0)[token])
            edges = [edge for edge in (upper - float(share[token]), upper) if 1e-12 < edge < 1 - 1e-12]
            nearest = min([abs(edge - float(u[place])) for edge in edges] + [float(found.cutoff), 1.0])
            assert recorded["margin"] == pytest.approx(nearest, abs=2e-6)


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("spec", ["autoregressive", "chain(k=5)", "static", SMALL])
def test_float64_is_the_proof(tiny_sampled, pair64, spec, temperature, drafter):
    report = check_policy(open_recording(tiny_sampled), pair64, load_policy(spec), drafter, 25, temperature)
    assert report.identical == report.cycles >= 25 and not report.notes


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
def test_float32_leaves_nothing_unexplained(tiny_sampled32, pair32, drafter):
    for spec in ("chain(k=5)", SMALL):
        report = check_policy(open_recording(tiny_sampled32), pair32, load_policy(spec), drafter, 60, 1.0)
        assert report.cycles >= 20 and report.unexplained == report.lacking == 0, report.notes
    found = check_texts(open_recording(tiny_sampled32), pair32, exact=False)
    assert found["unexplained"] == 0 and found["texts"] == 8


def test_texts_are_those_of_plain_decoding(tiny_sampled, pair64):
    found = check_texts(open_recording(tiny_sampled), pair64, exact=True)
    assert found["identical"] == found["texts"] == 8 and "model.generate and our plain decoding" in found["line"]


def another_seed(monkeypatch) -> None:
    monkeypatch.setattr("live.sampling.uniform", lambda seed, text, position: uniform(seed + 1, text, position))


def one_position_late(monkeypatch) -> None:
    monkeypatch.setattr("live.sampling.uniform", lambda seed, text, position: uniform(seed, text, position + 1))


def no_nucleus(monkeypatch) -> None:
    monkeypatch.setattr("live.sampling._cut", lambda scores, top_k, top_p: (scores, torch.full_like(scores[..., 0], torch.inf)))


@pytest.mark.parametrize("bug", [another_seed, one_position_late, no_nucleus])
def test_planted_bugs_are_found(tiny_sampled, pair64, monkeypatch, bug):
    bug(monkeypatch)
    report = check_policy(open_recording(tiny_sampled), pair64, load_policy("static"), "draft", 60, 1.0)
    assert report.unexplained > 0 and report.explained == 0


def test_replay_tells_policies_how_each_row_is_sampled(tiny_sampled):
    recording = open_recording(tiny_sampled)
    assert RecordedText(recording).sampling.top_k.tolist() == [0] * 4 + [60] * 4
    heard = []

    class Listening(type(load_policy("chain(k=2)"))):
        def expand(self, tree, cycle, state):
            heard.append((cycle.sequence.tolist(), cycle.sampling.temperature.tolist(), cycle.sampling.seed.tolist()))
            return super().expand(tree, cycle, state)

    replay(recording, Listening(k=2), "draft")
    assert heard
    for sequences, temperatures, seeds in heard:
        assert temperatures == [float(index >= 4) for index in sequences] and seeds == [4 * (index >= 4) for index in sequences]


def test_inspect_shows_the_groups(tiny_sampled, capsys):
    assert inspect.main([str(tiny_sampled), "--json", "--no-tau"]) == 0
    groups = json.loads(capsys.readouterr().out)["temperatures"]
    recording = open_recording(tiny_sampled)
    tokens = [int(recording.length[:4].sum()), int(recording.length[4:].sum())]
    assert groups == [{"temperature": t, "texts": 4, "tokens": n} for t, n in zip((0.0, 1.0), tokens, strict=True)]
    assert inspect.main([str(tiny_sampled), "--no-tau"]) == 0
    assert f"groups    T = 0: 4 texts, {tokens[0]} tokens; T = 1: 4 texts, {tokens[1]} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--temperature", "nan"], "--temperature must be 0 or more"),
        (["--temperature", "1", "--temperature", "1.0"], "--temperature 1 was given twice"),
        (["--temperature", "0", "--temperature", "0"], "--temperature 0 was given twice"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--top-k", "-2"], "--top-k must be 0"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
        (["--seed", "-1"], "--seed must be a number from 0"),
    ],
)
def test_settings_that_make_no_sense(tiny_pair, tmp_path, refused, options, cure):
    assert cure in refused(lambda: main(tiny_pair.record(tmp_path / "new", *options)))
    assert not (tmp_path / "new").exists()
