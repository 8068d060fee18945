"""A rule before a network as one drafter: how it is written, whose a row is, and that a row does not know of its company."""

from __future__ import annotations

import copy

import pytest
import torch

from policies.children import Children, lacking
from policies.drafting import Growth, draft
from policies.errors import UserError
from policies.lookup.drafter import LookupDrafter
from policies.lookup.first import LookupFirst, by_row
from policies.lookup.name import DrafterName, read_name
from policies.lookup.rule import load_rule
from policies.registry import load_policy
from tests.policies.lookups import past_of, texts
from tests.policies.synthetic import Language, SyntheticDrafter, cycle_at, fresh

RULES = ("prompt_lookup(ngram=4, least=3)", "suffix(depth=7, matches=8)", "racer(shortest=3, top=2)")
POLICIES = ("chain(k=6)", "eagle3(total_tokens=9, depth=3, top_k=3)", "survival(threshold=0.2, most=5)", "static")


@pytest.mark.parametrize(
    "text, rule, network",
    [
        ("eagle3", None, "eagle3"),
        ("suffix", "suffix", None),
        ("suffix+eagle3", "suffix", "eagle3"),
        (" suffix (depth=3) + eagle3", "suffix (depth=3)", "eagle3"),
        ("prompt_lookup(ngram=5, least=3)+eagle3", "prompt_lookup(ngram=5, least=3)", "eagle3"),
        ("suffix(corpus='a+b)+c')+eagle3", "suffix(corpus='a+b)+c')", "eagle3"),
        ("suffix+org/head(layers=[2, 16, 29])", "suffix", "org/head(layers=[2, 16, 29])"),
        ("suffix+x+y", "suffix", "x+y"),
        ("racer+lm", None, "racer+lm"),  # a network's own name comes first
        ("suffix+suffix", "suffix", "suffix"),  # and so behind the '+', where one is called so
        ("nobody+eagle3", None, "nobody+eagle3"),  # no network of that name: whoever looks for it says so
    ],
)
def test_names(text, rule, network):
    known = ("eagle3", "racer+lm", "x+y", *(["suffix"] if text == "suffix+suffix" else []))
    assert read_name(text, known) == DrafterName(rule, network)


def test_a_name_reads_as_it_was_written():
    assert [str(read_name(text)) for text in ("eagle3", "suffix", "suffix+eagle3")] == ["eagle3", "suffix", "suffix+eagle3"]


@pytest.mark.parametrize("text", ["suffix+", "suffix+racer", "suffix(depth=3)+prompt_lookup(ngram=2)", "suffix+racer+eagle3"])
def test_names_without_a_network(text):
    with pytest.raises(UserError, match="no network behind its"):
        read_name(text, ["eagle3"])


@pytest.fixture(scope="module", params=[False, True])
def world(request):
    """Texts that repeat themselves, the places to start at, their past, and a network that drafts on them."""
    rows, roots = texts(7, rows=8, vocabulary=5), [59, 50, 41, 33, 30, 12, 2, 0]
    network = SyntheticDrafter(Language(3, holes=9 if request.param else 0), rows)
    return roots, past_of(rows, roots, 1), network


def cut(past, rows: list[int]):
    """The past of some rows."""
    return past._replace(**{name: getattr(past, name)[rows] for name in ("first", "root", "shift", "told")})


def drafted(rule: str | None, network, past, roots, rows, spec):
    """The draft of some of the rows by the rule, the network or both."""
    policy, cycle = load_policy(spec), cycle_at(rows, [roots[row] for row in rows])
    lookup = None if rule is None else LookupDrafter(load_rule(rule), lambda _: cut(past, rows))
    drafter = network if lookup is None else lookup if network is None else LookupFirst(lookup, copy.copy(network))
    return draft(policy, drafter, cycle, fresh(policy, cycle))


def of_row(found, row: int) -> list:
    """What a draft holds of one row, without its padding."""
    tree, size = found.tree, int(found.tree.size[row])
    columns = [getattr(tree, name)[row, :size].tolist() for name in ("token", "parent", "depth", "rank", "logprob", "score")]
    widths = [width for width in found.widths[row].tolist() if width]
    return [columns, found.kept[row, :size].tolist(), widths, int(found.looked_up[row]), int(found.missing[row])]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spec", POLICIES)
def test_whose_a_row_is(world, rule, spec):
    """Where the rule proposes anything, the cycle is the rule's own and takes no draft forward; elsewhere it is the network's."""
    roots, past, network = world
    everyone = list(range(len(roots)))
    both = drafted(rule, network, past, roots, everyone, spec)
    looked_up = drafted(rule, None, past, roots, everyone, spec)
    plain = drafted(None, copy.copy(network), past, roots, everyone, spec)
    rules = [int(looked_up.tree.size[row]) > 1 for row in everyone]
    assert any(rules) and not all(rules)
    for row in everyone:
        wanted = of_row(looked_up if rules[row] else plain, row)
        if rules[row]:
            assert wanted[2]  # the rule alone counts its levels; here they are known to be free
            wanted[2:] = [[], len(wanted[2]), 0]
        assert of_row(both, row) == wanted
        alone = drafted(rule, network, past, roots, [row], spec)
        assert of_row(alone, 0) == wanted  # the same bits in company


def test_the_network_is_not_asked_where_no_row_is_left(world):
    roots, past, _ = world

    class Never:
        deepest = None

        def root(self, cycle):
            return torch.zeros_like(cycle.position)

        def expand(self, tree, nodes, branching):
            raise AssertionError("asked")

    found = drafted(RULES[0], Never(), past, roots, [0], "chain(k=6)")
    assert found.widths[0].tolist() == [0] * found.widths.shape[1] and int(found.tree.size) > 1
    assert int(found.looked_up) == found.widths.shape[1]
    with pytest.raises(AssertionError, match="asked"):
        drafted(RULES[0], Never(), past, roots, [0, 7], "chain(k=6)")


def test_a_copy_remembers_another_cycle(world):
    roots, past, network = world
    one = LookupFirst(LookupDrafter(load_rule(RULES[0]), lambda cycle: cut(past, cycle.sequence.tolist())), network)
    other = copy.copy(one)
    policy, cycles = load_policy("chain(k=6)"), [cycle_at([row], [roots[row]]) for row in (0, 7)]
    growths = [Growth(policy, drafter.root(cycle), cycle, {}) for drafter, cycle in zip((one, other), cycles, strict=True)]
    while wishes := [(growth, wish) for growth in growths if (wish := growth.wish()) is not None]:
        for growth, wish in wishes:  # in turns, as two threads would
            drafter = one if growth is growths[0] else other
            growth.take(wish, drafter.expand(growth.tree, wish.nodes, 1))
    for growth, row in zip(growths, (0, 7), strict=True):
        alone = drafted(RULES[0], network, past, roots, [row], "chain(k=6)")
        assert growth.tree.token.tolist() == alone.tree.token.tolist() and growth.all_widths().tolist() == alone.widths.tolist()


def test_the_narrower_answer_is_padded():
    """Two rows, one node each: the rule's has one child, the recording two of the three that were asked for."""
    token, logprob = torch.tensor([[[5]], [[-1]]]), torch.tensor([[[0.0]], [[-torch.inf]]])
    found = Children(token, logprob, torch.zeros(2, 1), torch.ones_like(token))
    recorded = Children(
        token=torch.tensor([[[-1, -1]], [[7, 8]]]),
        logprob=torch.tensor([[[-torch.inf] * 2], [[-0.5, -1.5]]]),
        entropy=torch.tensor([[-1.0], [0.75]]),
        handle=torch.tensor([[[0, 0]], [[40, 41]]]),
        missing=torch.zeros(2, 1, dtype=torch.bool),
    )
    known, nodes = torch.tensor([True, False]), torch.tensor([[0], [0]])
    both = by_row(known, found, recorded, 3)
    assert both.token.tolist() == [[[5, -1, -1]], [[7, 8, -1]]] and both.handle.tolist() == [[[1, -1, -1]], [[40, 41, -1]]]
    assert both.logprob.tolist() == [[[0.0, -torch.inf, -torch.inf]], [[-0.5, -1.5, -torch.inf]]]
    assert both.entropy.tolist() == [[0.0], [0.75]] and lacking(both, nodes, 3).tolist() == [[False], [True]]
    assert lacking(both, nodes, torch.tensor([[3], [2]])).tolist() == [[False], [False]], "each node for itself"
    enough = by_row(known, found, recorded, 2)
    assert lacking(enough, nodes, 2).tolist() == [[False], [False]] and enough.token.shape == (2, 1, 2)
    live = by_row(known, found, recorded._replace(missing=None), 3)
    assert lacking(live, nodes, 3) is None
