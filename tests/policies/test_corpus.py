"""A frozen corpus: its index and what drafters propose out of it, against brute force; what is not one is refused."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from policies.errors import UserError
from policies.lookup.corpus import TELLING, read_corpus, write_corpus
from policies.lookup.index import indexed
from policies.lookup.rule import load_rule
from tests.policies import lookup_brute as brute
from tests.policies.lookups import by_path, logprobs, past_of, texts, tree_of

ROOTS = [59, 50, 41, 30, 12, 0]
SPECS = ("prompt_lookup(corpus='{}')", "suffix(least=0.0, corpus='{}')", "racer(shortest=1, corpus='{}')")
words = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@pytest.fixture(scope="module")
def earlier() -> list[list[int]]:
    """Texts of unequal lengths, one there twice, one of a single token."""
    found = [row[: 15 + 9 * number] for number, row in enumerate(texts(11, rows=5, vocabulary=5))]
    return [*found, found[2], [3]]


@pytest.fixture(scope="module")
def corpus(earlier, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "earlier.safetensors"
    write_corpus(path, earlier, "t", [{"name": "made-up"}], prompts=[[1, 2], [4]])
    return str(path)


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=5), st.lists(words, min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 9))
def test_the_longest_matches_of_many_rows(frozen, rows, longest, count):
    """Places and lengths, in order, of rows side by side."""
    index = indexed(torch.tensor(sum(frozen, []), dtype=torch.int32), torch.tensor([len(text) for text in frozen]))
    ending = torch.tensor([([*row[::-1], *[-1] * longest])[:longest] for row in rows])
    place, length = index.matches(ending, count)
    behind = index.behind(place, 3)
    first = [0, *accumulate(len(text) for text in frozen)]
    for row, text in enumerate(rows):
        wanted = brute.frozen_places(frozen, text, longest, count)
        missing = count - len(wanted)
        assert place[row].tolist() == [first[number] + at for _, number, at in wanted] + [-1] * missing
        assert length[row].tolist() == [long for long, _, _ in wanted] + [0] * missing
        for seat, (_, number, at) in enumerate(wanted):
            assert [token for token in behind[row, :, seat].tolist() if token >= 0] == frozen[number][at + 1 : at + 4]


@pytest.mark.parametrize("seed", range(2))
def test_prompt_lookup_takes_the_longer_match(corpus, earlier, seed):
    rows, elsewhere = texts(seed, vocabulary=6), 0
    found = tree_of(f"prompt_lookup(ngram=5, tokens=4, corpus='{corpus}')", past_of(rows, ROOTS, 4))
    for row, root, ours in zip(rows, ROOTS, found, strict=True):
        copied = brute.prompt_lookup(row[: root + 1], 5, 4, earlier)
        assert logprobs(ours) == {tuple(copied[: size + 1]): 0.0 for size in range(len(copied))}
        elsewhere += copied != brute.prompt_lookup(row[: root + 1], 5, 4)
    assert 0 < elsewhere < len(rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor, least", [(1.0, 0.1), (2.5, 0.0)])
@pytest.mark.parametrize("tree", [True, False])
def test_suffix_takes_the_likelier_tree(corpus, earlier, seed, factor, least, tree):
    rows, elsewhere = texts(seed), 0
    spec = f"suffix(depth=8, tree={tree}, tokens=10, factor={factor}, least={least}, matches=200, corpus='{corpus}')"
    for row, root, found in zip(rows, ROOTS, tree_of(spec, past_of(rows, ROOTS, 4), levels=8), strict=True):
        wanted = brute.suffix(row[: root + 1], 8, tree, 10, factor, least, earlier)
        ours = by_path(found)
        assert sorted(ours.values()) == pytest.approx(sorted(wanted.values()), abs=1e-6)
        lowest = min(wanted.values(), default=0.0) + 1e-6
        assert {p for p, v in ours.items() if v > lowest} == {p for p, v in wanted.items() if v > lowest}
        elsewhere += wanted != brute.suffix(row[: root + 1], 8, tree, 10, factor, least)
    assert 0 < elsewhere


def test_racer_counts_both(corpus, earlier):
    rows, elsewhere = texts(1, vocabulary=5), 0
    past = past_of(rows, ROOTS, 5, 1)
    found = tree_of(f"racer(longest=6, shortest=2, depth=4, matches=200, retrieval=0.7, corpus='{corpus}')", past, levels=2)
    for index, (row, root) in enumerate(zip(rows, ROOTS, strict=True)):
        first = int(past.first[index])
        told = {i: list(zip(past.top_tokens[first + i].tolist(), past.top_logprobs[first + i].tolist(), strict=True))
                for i in range(6, root + 1)}  # fmt: skip
        for path in [(), *(path for path in found[index] if len(path) == 1)]:
            wanted = brute.racer(row[: root + 1], path, told, 6, 2, 4, 0.7, earlier)
            assert {p[-1]: math.exp(v) for p, (v, _) in found[index].items() if p[:-1] == path} == pytest.approx(wanted, abs=1e-6)
            elsewhere += wanted != brute.racer(row[: root + 1], path, told, 6, 2, 4, 0.7)
    assert elsewhere


@pytest.mark.parametrize("spec", SPECS)
def test_rows_do_not_know_of_each_other_nor_of_the_future(corpus, spec):
    rows, spec = texts(2, length=70), spec.format(corpus)
    past = past_of(rows, ROOTS, 4)
    together = tree_of(spec, past, 3, 4)
    for row in range(len(rows)):
        alone = past._replace(first=past.first[[row]], root=past.root[[row]], shift=past.shift[[row]], told=past.told[[row]])
        assert tree_of(spec, alone, 3, 4) == [together[row]]  # the same bits
    place = torch.arange(len(past.text)) - past.first.repeat_interleave(70)
    future = place > torch.tensor(ROOTS).repeat_interleave(70)
    assert tree_of(spec, past._replace(text=torch.where(future, 2, past.text)), 3, 4) == together


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("spec", ["prompt_lookup(ngram=4, {})", "suffix({})", "suffix(least=0.0, matches=3, {})"])
def test_one_row_is_what_it_is_among_others(tmp_path, spec, seed):
    """Places in a corpus come in its order, not the longest first: a single row counts them as several rows do."""
    vocabulary = 2 + seed % 4
    earlier = [row[: 4 + 7 * number] for number, row in enumerate(texts(100 + seed, rows=6, vocabulary=vocabulary))]
    write_corpus(tmp_path / "c.safetensors", earlier, "t", [{"name": "made-up"}], prompts=[[9]])
    spec = spec.format(f"corpus='{tmp_path / 'c.safetensors'}'")
    for row, root in zip(texts(seed, vocabulary=vocabulary), ROOTS, strict=True):
        alone = tree_of(spec, past_of([row], [root], 4), 3, 4)
        assert tree_of(spec, past_of([row, row], [root, root], 4), 3, 4) == [alone[0], alone[0]]


def test_places_in_a_corpus_of_unequal_lengths(tmp_path):
    """Two matches of lengths 2 and 3, the shorter one first: the longest alone counts."""
    write_corpus(tmp_path / "c.safetensors", [[0, 2, 2, 5], [1, 2, 2, 6]], "t", [{"name": "made-up"}], prompts=[[9]])
    (found,) = tree_of(f"suffix(corpus='{tmp_path / 'c.safetensors'}')", past_of([[1, 2, 2]], [2], 1))
    assert logprobs(found) == {(6,): 0.0}


def test_a_text_that_never_was_proposes_nothing(corpus):
    for spec in SPECS:
        assert tree_of(spec.format(corpus), past_of([[77]], [0], 0)) == [{}]


def test_the_file_says_what_is_in_it(corpus, earlier, tmp_path):
    frozen = read_corpus(corpus)
    assert frozen.texts == len(earlier) and frozen.index.token.tolist() == sum(earlier, [])
    facts = frozen.facts()
    assert facts["tokenizer_sha256"] == "t" and facts["sources"] == [{"name": "made-up"}] and len(facts["sha256"]) == 64
    again = tmp_path / "again.safetensors"
    assert write_corpus(again, earlier, "t", [{"name": "made-up"}], prompts=[[4], [1, 2]])["sha256"] == facts["sha256"]
    assert again.read_bytes() == open(corpus, "rb").read()
    assert write_corpus(again, earlier, "u", [{"name": "made-up"}], prompts=[[4], [1, 2]])["sha256"] != facts["sha256"]


def test_what_may_be_scored_with_it(corpus, earlier):
    frozen = read_corpus(corpus)
    frozen.check_tokenizer("t", "the recording")
    long = max(earlier, key=len)
    frozen.check_unseen([[99], [1, 99, 3], [*long[:20], 99], long, [*long, 1]])  # a text that ends with the prompt answers nothing
    with pytest.raises(UserError, match="of another tokenizer .sha256 t. than the target .u."):
        frozen.check_tokenizer("u", "the target")
    with pytest.raises(UserError, match="does not say which tokenizer"):
        frozen.check_tokenizer(None, "the recording")
    with pytest.raises(UserError, match="answers to 1 of the recording's 2 prompts"):
        frozen.check_unseen([[1, 2], [99, 1]])
    for size in (TELLING, len(long) - 1):  # a text that goes on from a prompt may be a later turn of its conversation
        with pytest.raises(UserError, match="answers to 1 of the recording's 2 prompts"):
            frozen.check_unseen([long[:size], [99]])
    frozen.check_unseen([long[: TELLING - 1]])


def test_what_is_none_is_refused(corpus, tmp_path):
    content = bytearray(open(corpus, "rb").read())
    content[-40] ^= 1  # a token more or less
    damaged, other = tmp_path / "damaged.safetensors", tmp_path / "other.txt"
    damaged.write_bytes(content)
    other.write_text("no corpus")
    plain = "live/reference/eagle3/model.safetensors"
    headers = ["[]", "3", '{"format": "specreplay-corpus"}', '{"format": "specreplay-corpus", "version": "x"}']
    for header in [*headers, '{"format": "specreplay-corpus", "version": 1}']:
        save_file({"token": torch.zeros(1)}, tmp_path / "odd.safetensors", {"corpus": header})
        with pytest.raises(UserError, match="is no corpus"):
            load_rule(f"suffix(corpus='{tmp_path / 'odd.safetensors'}')")
    told = {tmp_path / "none": "does not exist", damaged: "damaged", other: "is no corpus", plain: "is no corpus"}
    for path, sentence in told.items():
        with pytest.raises(UserError, match=sentence):
            load_rule(f"suffix(corpus='{path}')")
    for folder in (other, tmp_path / "misspelt"):
        with pytest.raises(UserError, match="cannot write the corpus"):
            write_corpus(folder / "below", [[1]], "t", [])
    assert not (tmp_path / "misspelt").exists()
    with pytest.raises(UserError, match="at least one text"):
        write_corpus(tmp_path / "x", [[]], "t", [])
