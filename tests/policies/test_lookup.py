"""Training-free drafters: what they propose, against brute force; that they see nothing of the future or of other rows."""

from __future__ import annotations

import math

import pytest
import torch

from policies.errors import UserError
from policies.lookup.drafter import LookupDrafter
from policies.lookup.matching import longest_match, own_matches
from policies.lookup.rule import all_rules, is_rule, load_rule
from policies.lookup.trie import follow
from policies.tree import DraftTree
from tests.policies import lookup_brute as brute
from tests.policies.lookups import by_path, logprobs, past_of, texts, tree_of

SPECS = ("prompt_lookup", "prompt_lookup(ngram=1, tokens=3, latest=True)", "prompt_lookup(least=2)", "suffix",
         "suffix(factor=2.5, least=0.0)", "racer", "racer(shortest=1, retrieval=0.8)")  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("least", [1, 2, 3])
def test_prompt_lookup_copies_what_followed(seed, least):
    rows, roots = texts(seed, vocabulary=6), [59, 40, 21, 8, 1, 0]
    spec = f"prompt_lookup(tokens=5, least={least})"
    for row, root, found in zip(rows, roots, tree_of(spec, past_of(rows, roots, 4)), strict=True):
        copied = brute.prompt_lookup(row[: root + 1], 3, 5, least=least)
        assert logprobs(found) == {tuple(copied[: size + 1]): 0.0 for size in range(len(copied))}
        assert tree_of(spec, past_of([row], [root], 4)) == [found]


@pytest.mark.parametrize("latest", [True, False])
@pytest.mark.parametrize("longest, count, depth", [(1, 1, 4), (5, 1, 10), (6, 4, 3), (24, 32, 24), (3, 70, 80)])
def test_matches_of_one_row_are_those_of_many(longest, count, depth, latest):
    """A single row on the host is looked through by NumPy."""
    for row in texts(6, rows=6, vocabulary=3):
        for root in (0, 1, 2, 17, 59):
            context, last = torch.tensor([row[: root + 1]]), torch.tensor([root])
            one = own_matches(context, last, longest, count, depth, latest)
            two = own_matches(context.repeat(2, 1), last.repeat(2), longest, count, depth, latest)
            assert torch.equal(one.length, two.length[:1]) and torch.equal(one.behind, two.behind[:1])


@pytest.mark.parametrize("latest", [True, False])
@pytest.mark.parametrize("longest, depth", [(1, 4), (5, 10), (70, 80)])
def test_the_longest_match_of_one_row_is_the_first_of_many(longest, depth, latest):
    """It is found in a string of characters, whatever numbers the tokens have."""
    numbers = torch.tensor([0, 0xD800, 0xDFFF, 262_143])  # surrogates are no characters of their own
    for row in texts(6, rows=6, vocabulary=4):
        for root in (0, 1, 2, 17, 59):
            text = numbers[torch.tensor(row[: root + 1])]
            length, tokens = longest_match(text.numpy(), longest, depth, latest)
            among = own_matches(text.repeat(2, 1), torch.tensor([root, root]), longest, 1, depth, latest)
            assert length == int(among.length[0, 0])
            assert tokens == [token for token in among.behind[0, :, 0].tolist() if token >= 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor, least", [(1.0, 0.1), (2.5, 0.0), (0.5, 0.3)])
@pytest.mark.parametrize("depth", [6, 9])
def test_suffix_against_a_heap(seed, factor, least, depth):
    """The same nodes wherever the cut does not fall between equals; always the same probabilities, and as many."""
    rows, roots = texts(seed), [59, 50, 41, 30, 12, 0]
    past = past_of(rows, roots, 4)
    spec = f"suffix(tree=true, depth={depth}, tokens=10, factor={factor}, least={least}, matches=64)"
    for row, root, found in zip(rows, roots, tree_of(spec, past, levels=8), strict=True):
        wanted = brute.suffix(row[: root + 1], depth, True, 10, factor, least)
        ours = by_path(found)
        assert sorted(ours.values()) == pytest.approx(sorted(wanted.values()), abs=1e-6)
        assert all(path[:-1] in ours or len(path) == 1 for path in ours)
        lowest = min(wanted.values(), default=0.0) + 1e-6
        assert {p for p, v in ours.items() if v > lowest} == {p for p, v in wanted.items() if v > lowest}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor, least, depth", [(1.0, 0.1, 9), (2.5, 0.0, 9), (0.5, 0.3, 9), (3.0, 0.0, 6)])
def test_suffix_path_against_counting(seed, factor, least, depth):
    rows, roots = texts(seed, vocabulary=3), [59, 50, 41, 30, 12, 0]
    spec = f"suffix(depth={depth}, tokens=5, factor={factor}, least={least}, matches=64)"
    longest = 0
    for row, root, found in zip(rows, roots, tree_of(spec, past_of(rows, roots, 4), levels=8), strict=True):
        wanted, ours = brute.suffix(row[: root + 1], depth, False, 5, factor, least), by_path(found)
        assert ours == pytest.approx(wanted, abs=1e-6)
        longest = max(longest, len(ours))
    assert longest >= 2


def test_how_many_nodes_a_match_proposes():
    for spec, long, nodes in (("factor=1.4, tokens=99", 45, 63), ("offset=-1.0", 5, 4), ("tokens=3", 5, 3), ("factor=0.5", 1, 0)):
        assert load_rule(f"suffix({spec})")._nodes(long) == nodes  # 1.4 * 45 is a little less than 63 in floating point


@pytest.mark.parametrize("depth, copied", [(24, 12), (64, 20)])
def test_a_suffix_tree_is_only_so_deep(depth, copied):
    """Match and continuation share its levels: of a match of twenty, twelve tokens are used, which leave twelve to copy."""
    text = [*range(100, 120), *range(50, 75), *range(100, 120)]
    for rows in (1, 2):
        found = tree_of(f"suffix(depth={depth})", past_of([text] * rows, [len(text) - 1] * rows, 1), levels=24)
        assert [list(by_path(one)) for one in found] == [[tuple(range(50, 51 + last)) for last in range(copied)]] * rows


@pytest.mark.parametrize("seed", range(2))
def test_racer_mixes_continuations_and_logits(seed):
    rows, roots = texts(seed, vocabulary=7), [59, 50, 41, 30, 12, 2]
    past = past_of(rows, roots, 5, seed)
    spec = "racer(longest=6, shortest=2, depth=4, matches=64, retrieval=0.7)"
    for index, (row, root) in enumerate(zip(rows, roots, strict=True)):
        first = int(past.first[index])
        told = {i: list(zip(past.top_tokens[first + i].tolist(), past.top_logprobs[first + i].tolist(), strict=True))
                for i in range(6, root + 1)}  # fmt: skip
        found = tree_of(spec, past, levels=2)[index]
        for path in [(), *(path for path in found if len(path) == 1)]:
            wanted = brute.racer(row[: root + 1], path, told, 6, 2, 4, 0.7)
            ours = {p[-1]: math.exp(v) for p, (v, _) in found.items() if p[:-1] == path}
            assert ours == pytest.approx(wanted, abs=1e-6)
            if ours:
                entropy = next(h for p, (_, h) in found.items() if p[:-1] == path)
                mass = sum(wanted.values())
                assert entropy == pytest.approx(-sum(v / mass * math.log(v / mass) for v in wanted.values()), abs=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_children_come_most_probable_first(spec):
    past = past_of(texts(1), [59, 50, 41, 30, 12, 0], 4)
    drafter = LookupDrafter(load_rule(spec), lambda cycle: past)
    tree = DraftTree(drafter.root(None))
    children = drafter.expand(tree, tree.root_nodes(), 5)
    assert bool((children.logprob[..., 1:] <= children.logprob[..., :-1]).all())
    assert bool(((children.token >= 0) == (children.logprob > -torch.inf)).all()) and bool((children.token[:3, 0, 0] >= 0).all())


@pytest.mark.parametrize("spec", SPECS)
def test_rows_do_not_know_of_each_other(spec):
    rows, roots = texts(2, length=70), [69, 50, 41, 30, 12, 0]
    together = tree_of(spec, past_of(rows, roots, 4), 3, 4)
    past = past_of(rows, roots, 4)
    for row in range(len(rows)):
        alone = past._replace(first=past.first[[row]], root=past.root[[row]], shift=past.shift[[row]], told=past.told[[row]])
        assert tree_of(spec, alone, 3, 4) == [together[row]]  # the same bits


@pytest.mark.parametrize("spec", SPECS)
def test_the_future_changes_nothing(spec):
    rows, roots = texts(3), [40, 33, 20, 9, 25, 5]
    past = past_of(rows, roots, 4)
    before = tree_of(spec, past, 3, 4)
    place = torch.arange(len(past.text)) - past.first.repeat_interleave(60)
    future = place > torch.tensor(roots).repeat_interleave(60)
    other = past._replace(
        text=torch.where(future, past.text.flip(0), past.text),
        top_tokens=torch.where(future[:, None], 3, past.top_tokens),
        top_logprobs=torch.where(future[:, None], -0.1, past.top_logprobs),
    )
    assert tree_of(spec, other, 3, 4) == before
    seen = past._replace(text=torch.where(place == 3, 99, past.text), top_logprobs=past.top_logprobs * 2)
    assert tree_of(spec, seen, 3, 4) != before  # the test can fail


def test_a_text_of_one_token_proposes_nothing():
    for spec in SPECS:
        assert tree_of(spec, past_of([[3]], [0], 0)) == [{}]


def test_names_and_parameters():
    assert set(all_rules()) == {"prompt_lookup", "suffix", "racer"}
    assert is_rule("suffix(tokens=3)") and not is_rule("eagle3")
    assert load_rule("suffix(factor=2)").factor == 2.0
    assert all(cls.__doc__ and cls.paper.startswith("https://") for cls in all_rules().values())
    for spec, told in {
        "sufix": "unknown training-free drafter 'sufix': did you mean suffix",
        "suffix(depht=3)": "drafter 'suffix' has no parameter 'depht': did you mean depth",
        "suffix(depth=x)": "drafter 'suffix': depth must be of type int",
        "suffix(depth=1)": "depth must be 2 or more",
        "suffix(least=2)": "least must lie between 0 and 1",
        "racer(retrieval=-1)": "retrieval must lie between 0 and 1",
        "prompt_lookup(3)": "cannot read drafter",
        "prompt_lookup(least=0)": "least must be 1 or more",
        "prompt_lookup(ngram=2, least=3)": "least must not be above ngram, which is 2, not 3",
    }.items():
        with pytest.raises(UserError) as error:
            load_rule(spec)
        assert told in str(error.value), spec


@pytest.mark.parametrize("spec, levels", [
    *((spec, 12) for spec in (*SPECS[:3], "suffix(matches=1)")),
    *((spec, 4) for spec in (*SPECS[3:5], "suffix(least=0.3, tokens=4)", "suffix(depth=3, matches=5)", "suffix(tree=true)")),
])  # fmt: skip
@pytest.mark.parametrize("root", [59, 41, 30, 8, 1, 0])
def test_one_row_is_what_it_is_among_others(spec, levels, root):
    """A single row counts in lists, several rows in tensors."""
    row = texts(4, rows=1, vocabulary=6)[0]
    alone = tree_of(spec, past_of([row], [root], 1), levels, 4)
    assert [alone[0], alone[0]] == tree_of(spec, past_of([row, row], [root, root], 1), levels, 4) and (root < 30 or alone[0])


def test_one_match_leads_where_it_would_beside_others():
    behind = torch.tensor([[[4], [7], [-1]], [[-1], [-1], [-1]], [[2], [2], [2]], [[5], [6], [7]]])
    matched = torch.tensor([[True], [True], [True], [False]])
    alone = follow(behind, matched)
    among = follow(behind.expand(-1, -1, 2), torch.cat([matched, torch.zeros_like(matched)], 1))
    assert torch.equal(alone.group[:, :, 0], among.group[:, :, 0])
    going = alone.group[:, :, 0] >= 0
    assert torch.equal(alone.token[:, :, 0][going], among.token[:, :, 0][going])
