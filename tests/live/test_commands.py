"""``live.generate`` and ``live.bench`` on the tiny pair."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch

from benchmarks import batch_throughput, live_speed, lossless
from live import bench, fidelity, generate
from live.pair import encode_prompt
from policies.errors import UserError
from policies.registry import load_policy
from tests.sim.many_texts import content as priced
from traces import record
from traces.costs import Profile
from traces.recording import open_recording

SMALL = "eagle3(total_tokens=8, depth=3, top_k=4)"


def asked(tiny_pair, *options: str, prompt: str = "the cat sat on the mat") -> list[str]:
    return [prompt, "--target", tiny_pair.target, "--draft", tiny_pair.eagle3, "--dtype", "float64", *options]


@pytest.fixture(scope="module")
def answer(pair64) -> str:
    ids = torch.tensor([encode_prompt(pair64.tokenizer, [{"role": "user", "content": "the cat sat on the mat"}])])
    told = pair64.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0)
    return pair64.tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("policy", ["autoregressive", SMALL])
def test_generate_streams_the_targets_text(tiny_pair, answer, capsys, policy):
    generate.main(asked(tiny_pair, "--policy", policy, "--max-new-tokens", "20"))
    told = capsys.readouterr()
    assert told.out == answer + "\n" and answer
    assert "tokens per cycle" in told.err


@pytest.mark.parametrize("drafter", ["suffix", "racer(top=4)", "prompt_lookup(least=2)+{eagle3}"])
def test_generate_by_looking_up(tiny_pair, answer, capsys, drafter, refused):
    words = ["the cat sat on the mat", "--target", tiny_pair.target, "--dtype", "float64", "--max-new-tokens", "20"]
    generate.main([*words, "--draft", drafter.format(eagle3=tiny_pair.eagle3), "--policy", SMALL])
    told = capsys.readouterr()
    assert told.out == answer + "\n" and "tokens per cycle" in told.err
    assert "no parameter 'dept'" in refused(lambda: generate.main([*words, "--draft", "suffix(dept=4)"]))


def test_a_training_free_drafter_is_not_recorded(tiny_pair, tmp_path, refused):
    told = refused(lambda: record.main(tiny_pair.record(tmp_path / "new", "--draft", "suffix")))
    assert "'suffix' is training-free" in told and "--drafter suffix" in told and not (tmp_path / "new").exists()
    for other in ("other", "org/other", "org/other(revision=abc)"):
        told = refused(lambda o=other: record.main(tiny_pair.record(tmp_path / "new", "--draft", f"suffix+{o}")))
        assert "'suffix' is training-free" in told and f"give {other} alone" in told
        assert "name it as --drafter suffix+other where" in told  # as the recording will call it


def test_generate_reads_standard_input(tiny_pair, answer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat sat on the mat"))
    generate.main(asked(tiny_pair, "--policy", "chain(k=2)", "--max-new-tokens", "20", prompt="-"))
    assert capsys.readouterr().out == answer + "\n"


def test_generate_one_token(tiny_pair, capsys):
    generate.main(asked(tiny_pair, "--max-new-tokens", "1"))
    assert "tokens per cycle" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--policy", "eagle"], "did you mean eagle3"),
        (["--policy", "eagle3(topk=3)"], "top_k"),
        (["--policy", "heterospec"], "sim.fit"),
        (["--policy", "nowhere.json"], "nowhere.json"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--dtype", "int8"], "float64"),
        (["--profile", "nowhere.json"], "nowhere.json"),
        (["--draft", "another"], "give --draft once"),
    ],
)
def test_generate_refuses(tiny_pair, refused, options, cure):
    assert cure in refused(lambda: generate.main(asked(tiny_pair, *options)))


def test_generate_refuses_prompts(tiny_pair, refused):
    assert "prompt is empty" in refused(lambda: generate.main(asked(tiny_pair, prompt=" ")))
    assert "shorten it" in refused(lambda: generate.main(asked(tiny_pair, prompt="the cat sat on the mat " * 40)))
    words = ["the cat", "--target", tiny_pair.target]
    assert "--draft" in refused(lambda: generate.main(words))
    assert "there is no model folder" in refused(lambda: generate.main([*words, "--draft", "./nowhere"]))


def test_generate_takes_text_alone(tiny_pair, refused, monkeypatch):
    """Bytes that are no UTF-8 come as lone surrogates where the locale is C, and as an error elsewhere."""
    assert "not UTF-8 text: convert it" in refused(lambda: generate.main(asked(tiny_pair, prompt="h\udce9")))
    for errors in ("surrogateescape", "strict"):
        for words in (asked(tiny_pair, prompt="-"), asked(tiny_pair, "--chat")[1:]):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"h\xe9\n"), "utf-8", errors=errors))
            assert "not UTF-8 text: convert it" in refused(lambda w=words: generate.main(w))


def test_generate_weighs_costs_of_its_own_models(tiny_pair, tmp_path, capsys, refused):
    """A policy that needs a profile asks for it in front of the text; one of other models is none."""
    words = ["--policy", "smartspec", "--max-new-tokens", "4"]
    assert "pass --profile FILE" in refused(lambda: generate.main(asked(tiny_pair, *words)))
    with pytest.raises(UserError):
        generate.main(asked(tiny_pair, *words))
    assert capsys.readouterr().out == ""
    tables = {name: {"eagle3": priced()[name]["made-up"]} for name in ("draft", "catch_up")}
    for target in ({}, {"id": "another", "weights_sha256": "aa" * 32}):
        Profile(priced(**tables) | {"target": target}).save(tmp_path / "p.json")
        command = asked(tiny_pair, *words, "--profile", str(tmp_path / "p.json"))
        if target:
            assert "another (weights aaaaaaaaaaaa), the one to run is " in refused(lambda c=command: generate.main(c))
        else:
            generate.main(command)
            assert capsys.readouterr().out


def test_generate_says_that_the_context_is_full(tiny_pair, capsys):
    """None of these texts ends by itself."""
    told = []
    for limit in ("2000", "20"):
        generate.main(["the cat", "--target", tiny_pair.target, "--draft", "suffix", "--max-new-tokens", limit])
        told.append("the context of 256 tokens is full" in capsys.readouterr().err)
    assert told == [True, False]


@pytest.mark.parametrize("measured, warned", [(10.0, False), (10.9, False), (9.1, False), (11.2, True), (7.0, True)])
def test_a_profile_of_another_moment_is_named(measured, warned):
    told = bench.other_moment(10.0, measured)
    assert len(told) == warned and all(f"10.00 ms a token, here it took {measured:.2f}." in line for line in told)
    assert bench.other_moment(None, measured) == []
    assert ["--rounds" in line for line in bench.other_moment(10.0, measured, in_turns=True)] == [True] * warned


def test_times_are_added_up():
    """Per domain all milliseconds over all tokens, rounds and texts alike; then the mean over domains."""
    rounds = [("math", 10, 20.0), ("math", 10, 50.0), ("math", 30, 30.0), ("code", 5, 5.0)]
    entries = [{"text": 0, "domain": domain, "tokens": tokens, "ms": ms} for domain, tokens, ms in rounds]
    assert bench.mean_ms(entries) == pytest.approx((100 / 50 + 5 / 5) / 2)


def test_bench_says_what_plain_decoding_was_to_take(tiny_recording, tmp_path, capsys):
    profile = Profile(priced(**{name: {"draft": priced()[name]["made-up"]} for name in ("draft", "catch_up")}))
    profile.save(tmp_path / "p.json")
    bench.main([str(tiny_recording), "--policy", SMALL, "--drafter", "draft", "--profile", str(tmp_path / "p.json")])
    told = capsys.readouterr().out
    recording = open_recording(tiny_recording)
    rows = bench.predict(recording, load_policy(SMALL), "draft", profile.cost("draft"), bench.at_temperature(recording, None))
    expected = sum(row.speedup * row.ms_per_token for row in rows[:-1]) / 2  # plain decoding of each domain; then their mean
    plain, own = (next(line for line in told.splitlines() if line.startswith(name)).split() for name in ("(plain loop)", SMALL))
    assert plain[-5] == f"{expected:.2f}" and own[-3] == f"{expected / rows[-1].ms_per_token:.2f}x"
    assert len(rows) == 3 and rows[0].speedup != rows[1].speedup


def test_bench_prints_one_table(tiny_recording, tmp_path, capsys):
    out = tmp_path / "bench.json"
    policies = ["--policy", "autoregressive", "--policy", SMALL]
    bench.main([str(tiny_recording), *policies, "--drafter", "draft", "--json", str(out)])
    told = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in told.splitlines() if line}
    assert {
        "autoregressive",
        "eagle3(total_tokens=8, depth=3, top_k=4)",
        "(plain loop)",
        "(model.generate)",
    } <= rows.keys()
    assert rows["autoregressive"].split()[1] == "1.00" and rows["autoregressive"].endswith("100%")
    assert "prefill excluded" in told and "plain decoding (" in told and "Means over 2 domains. Replay: 6 texts, " in told
    content = json.loads(out.read_text())
    assert {row["domain"] for row in content["predicted"]} == {"story", "math", "mean"}
    for entries in content["measured"].values():
        assert [entry["domain"] for entry in entries] == ["story", "math"] and all(entry["ms"] > 0 for entry in entries)
    tokens = {name: [entry["tokens"] for entry in entries] for name, entries in content["measured"].items()}
    assert len({tuple(counts) for counts in tokens.values()}) == 1  # all write the same texts
    cycles = {name: sum(entry["cycles"] for entry in entries) for name, entries in content["measured"].items()}
    assert cycles[SMALL] < cycles["autoregressive"] == cycles["plain loop"] == cycles["model.generate"]


def test_bench_refuses(tiny_recording, tmp_path, refused):
    def told(trace, *options: str) -> str:
        return refused(lambda: bench.main([str(trace), "--policy", "chain", *options]))

    assert "holds no drafter 'nobody'" in told(tiny_recording, "--drafter", "nobody")
    assert "--texts" in told(tiny_recording, "--texts", "0")
    assert "must be fitted" in told(tiny_recording, "--policy", "heterospec")
    assert "two of the policies are chain: give each once" in told(tiny_recording, "--policy", "chain")
    assert "nowhere.json" in told(tiny_recording, "--profile", str(tmp_path / "nowhere.json"))
    assert "nowhere" in told(tmp_path / "nowhere")
    gone = shutil.copytree(tiny_recording, tmp_path / "gone")
    about = json.loads((gone / "manifest.json").read_text())
    about["target"]["id"] = str(tmp_path / "moved")
    (gone / "manifest.json").write_text(json.dumps(about))
    assert "there is no model folder" in told(gone)


@pytest.mark.parametrize("command", [bench, fidelity, batch_throughput, live_speed, lossless])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, refused):
    models = ["--target", "none", "--draft", "none"] if command in (batch_throughput, lossless) else [str(tmp_path)]
    told = refused(lambda: command.main([*models, "--json", str(tmp_path / "none" / "figures.json")]))
    assert told.startswith("cannot write ") and "name a file in a folder" in told


def test_generate_samples_the_same_text_under_any_policy(tiny_pair, capsys):
    told = []
    for options in (["--policy", "autoregressive"], ["--policy", SMALL], ["--policy", SMALL, "--seed", "2"]):
        generate.main(asked(tiny_pair, *options, "--temperature", "1", "--top-p", "0.9", "--max-new-tokens", "20"))
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]


def test_bench_decodes_a_sampled_recording_with_its_own_sampling(tiny_sampled, tmp_path, capsys, refused):
    out = tmp_path / "bench.json"
    policies = ["--policy", "autoregressive", "--policy", "chain(k=3)"]
    bench.main([str(tiny_sampled), *policies, "--drafter", "draft", "--temperature", "1", "--json", str(out)])
    assert "Replay: 4 texts at temperature 1," in capsys.readouterr().out
    content = json.loads(out.read_text())
    lengths = [entry["tokens"] + 1 for entry in content["measured"]["plain loop"]]
    recording = open_recording(tiny_sampled)
    assert lengths == [int(recording.length[index]) for index in (4, 6)]  # the recorded texts, whoever decodes
    for entries in content["measured"].values():
        assert [entry["tokens"] + 1 for entry in entries] == lengths
    assert {row["texts"] for row in content["predicted"] if row["domain"] == "mean"} == {4}
    assert "no texts at temperature 0.5: choose one of its own (0, 1)" in refused(
        lambda: bench.main([str(tiny_sampled), *policies, "--temperature", "0.5"])
    )
