"""Prompt files as people have them, and as they break them."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest

from policies.errors import UserError
from traces.prompts import SAMPLES, load_prompts, sample_specs


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def test_benchmark_questions_keep_their_turns(tmp_path):
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]},
        {"question_id": 82, "category": "math", "turns": ["Add."], "reference": ["4"]},
    ]
    first, second = load_prompts([f"bench={write(tmp_path / 'mt_bench.jsonl', *rows)}"])
    assert (first.domain, first.id, first.text, first.later_turns) == (
        "bench",
        "mt_bench:81",
        "Compose.",
        ("Rewrite.",),
    )
    assert (second.domain, second.id, second.later_turns) == ("bench", "mt_bench:82", ())


def test_chats_rows_and_text(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "x"}]
    chats = load_prompts([write(tmp_path / "chat.jsonl", {"messages": chat})])
    assert chats[0].messages == (chat[0], {"role": "user", "content": "Hi"}) and chats[0].domain == "chat"
    assert chats[0].text == "Be brief.\nHi"
    rows = [{"prompt": " indented", "response": "r", "source": "s"}]
    assert load_prompts([write(tmp_path / "rows.jsonl", *rows)])[0].text == " indented"
    for name in ("question", "problem"):  # as GSM8K and MATH have them
        assert load_prompts([write(tmp_path / "rows.jsonl", {name: "2 + 2?", "answer": "4"})])[0].text == "2 + 2?"
    lines = load_prompts([write(tmp_path / "plain.txt", "one", "", "two = 2")])
    assert [(p.id, p.text) for p in lines] == [("plain:1", "one"), ("plain:3", "two = 2")]


@pytest.mark.parametrize(("suffix", "opener"), [("xz", lzma.open), ("gz", gzip.open)])
def test_compressed_files(tmp_path, suffix, opener):
    path = tmp_path / f"math.heldout.jsonl.{suffix}"
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "2 + 2?"}) + "\n")
    (prompt,) = load_prompts([str(path)])
    assert (prompt.domain, prompt.id) == ("math", "math.heldout:1")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be decompressed"):
        load_prompts([str(path)])


def test_limits_are_per_domain_and_draws_are_seeded(tmp_path):
    files = [write(tmp_path / f"{name}.txt", *(f"{name} {i}" for i in range(20))) for name in ("a", "b", "c")]
    specs = [f"x={files[0]}", f"y={files[1]}", f"x={files[2]}"]
    assert [p.text for p in load_prompts(specs, limit=2)] == ["a 0", "a 1", "b 0", "b 1"]
    drawn = load_prompts(specs, limit=5, seed=3)
    assert drawn == load_prompts(specs, limit=5, seed=3) != load_prompts(specs, limit=5, seed=4)
    assert [p.domain for p in drawn] == ["x"] * 5 + ["y"] * 5
    assert len(load_prompts(specs)) == 60


def test_shipped_samples_are_five_domains_of_short_prompts():
    prompts = load_prompts(sample_specs())
    domains = [p.domain for p in prompts]
    assert {d: domains.count(d) for d in domains} == dict.fromkeys(("math", "code", "chat", "dialogue", "story"), 48)
    assert max(len(p.text) for p in prompts) <= 600
    licensed = (SAMPLES / "README.md").read_text()
    for path in SAMPLES.glob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            assert set(row) == {"prompt", "source"} and f"`{row['source']}`" in licensed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not valid JSON .*one JSON object per line"),
        ("[1]", "line 2: not a JSON object"),
        ({"answer": "4"}, "line 2: no prompt found: give 'turns', 'messages', 'prompt', 'question' or 'problem'"),
        ({"question": ["?"]}, "line 2: 'question' must be a text"),
        ({"turns": []}, "line 2: 'turns' must be"),
        ({"turns": ["a", 3]}, "line 2: 'turns' must be"),
        ({"prompt": " "}, "line 2: 'prompt' must be"),
        ({"messages": "hi"}, "line 2: 'messages' must be"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "line 2: each message needs a 'role'"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "line 2: the chat ends with the assistant"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(UserError, match=f"bad.jsonl, {message}"):
        load_prompts([path])


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_prompts([str(tmp_path / "absent.jsonl")])
    with pytest.raises(UserError, match="is empty"):
        load_prompts([write(tmp_path / "empty.jsonl", "", "  ")])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts([str(tmp_path / "latin.txt")])
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts([str(tmp_path)])
    for spec in (f"mean={tmp_path / 'latin.txt'}", str(tmp_path / "mean.jsonl")):
        with pytest.raises(UserError, match="no domain can be called 'mean'"):
            load_prompts([spec])
    with pytest.raises(UserError, match="no prompts given"):
        load_prompts([])
    path = write(tmp_path / "twice.jsonl", {"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"})
    with pytest.raises(UserError, match="'twice:1' occurs twice"):
        load_prompts([path])
    with pytest.raises(UserError, match="give at least 1"):
        load_prompts([path], limit=0)
