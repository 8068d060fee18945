"""goodput's decisions against loops over nodes, and its estimate of acceptance against what it was fitted on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policies.acceptance_table import MEMORY, RANK_EDGES, Acceptance, fit_acceptance, histories, remember
from policies.drafting import draft
from policies.errors import UserError
from policies.goodput import Goodput
from policies.lookahead import GRID, LookAhead, Opening, Plan, fit_look_ahead, fit_opening
from policies.registry import from_json
from tests.policies.cases import SETTINGS, make
from tests.policies.synthetic import Language, SyntheticDrafter, cycle_at, fresh


def chance_of(policy: Goodput, rank: int, depth: int, logprob: float, entropy: float, history: float) -> float:
    group = sum(rank >= edge for edge in RANK_EDGES)
    row = sum(logprob > edge for edge in policy.logprob_edges_)
    column = sum(entropy > edge for edge in policy.entropy_edges_)
    slope = policy.slopes_[min(group, 1)]
    return 1 / (1 + math.exp(-(policy.odds_[group][row][column] + slope[0] * depth + slope[1] * history)))


def ahead_of(table: tuple, share: float) -> list[float]:
    return [float(np.interp(min(share, 1.0), GRID, row)) for row in table]


def opening_gain(policy: Goodput, root_entropy: float, value: float, patience: float) -> float:
    """What drafting brings at a root, ms."""
    table = policy.opening_[sum(root_entropy > edge for edge in policy.root_edges_)]
    price, first, further = policy.verify_ms_[7] / 8, policy.level_ms_[0][0], policy.level_ms_[1][min(4, policy.top_k) - 1]
    worth = enumerate(ahead_of(table, price / value))
    return max(patience * value * ahead - first - more * further for more, ahead in worth)


@pytest.mark.parametrize("spec", SETTINGS["goodput"])
@pytest.mark.parametrize("history", [0.0, 0.3, -0.9])
def test_decisions_by_loops(spec, history):
    policy, language, rows = make(spec), Language(3, steps=5), 12
    cycle = cycle_at(list(range(rows)), [0] * rows)
    state = policy.begin(cycle, {"history": torch.full((rows,), history, dtype=torch.float64)})
    got = draft(policy, SyntheticDrafter(language, [language.truth(key, 3) for key in range(rows)]), cycle, state)
    tree, verify, depths = got.tree, (0.0, *policy.verify_ms_), set()
    price, value, opened = verify[8] / 8, state["plan"].value[0], set()
    for row in range(rows):
        chance, level_of = [1.0], {0: [0]}
        for node in range(1, int(tree.size[row])):
            parent, depth = int(tree.parent[row, node]), int(tree.depth[row, node])
            entropy = float(tree.entropy[row, parent])
            own = chance_of(policy, int(tree.rank[row, node]), depth, float(tree.logprob[row, node]), entropy, history)
            chance.append(chance[parent] * own)
            level_of.setdefault(depth, []).append(node)
        passed = -math.inf
        opens = opening_gain(policy, float(cycle.root_entropy[row]), value, policy.patience_) > 0
        assert bool(tree.expanded[row, 0]) == opens
        opened.add(opens)
        for depth in range(1 if opens else policy.depth, policy.depth):
            score = {node: float(tree.score[row, node]) for node in level_of.get(depth, [])}
            beam = sorted(score, key=lambda node: (-score[node], node))[: policy.top_k]
            open_ = [node for node in beam if score[node] > passed]
            this, behind = (policy.level_ms_[min(depth + more, policy.depth - 1)] for more in (0, 1))
            best, width = 0.0, 0
            for w in range(1, len(open_) + 1):
                for more in range(len(policy.ahead_)):
                    worth = [value * chance[n] * ahead_of(policy.ahead_, price / (value * chance[n]))[more] for n in open_[:w]]
                    gain = policy.patience_ * sum(worth) - this[w - 1] - more * behind[w - 1]
                    best, width = (gain, w) if gain > best + 1e-9 else (best, width)
            expanded = [node for node in beam if bool(tree.expanded[row, node])]
            assert sorted(expanded) == sorted(open_[:width])
            passed = max([passed, *(score[node] for node in beam if node not in expanded)])
        order = sorted(range(1, len(chance)), key=lambda node: (-np.float32(chance[node]), node))[: policy.total_tokens - 1]
        gain = [value * sum(chance[node] for node in order[:n]) - verify[n] for n in range(len(order) + 1)]
        count = int(np.argmax(gain))
        assert set(got.kept[row].nonzero()[:, 0].tolist()) == {0, *order[:count]}
        depths.add(max(level_of))
    assert len(opened) == 2 and (len(depths) > 2 or history < 0)


def test_a_token_is_worth_what_a_cycle_takes():
    """At the rate, the plain token and what drafting brings at the mean root together are worth their milliseconds."""
    policy = make(SETTINGS["goodput"][0])
    rate = fresh(policy, cycle_at([0], [0]))["plan"].value[0] / policy.markup_
    gains = [max(opening_gain(policy, entropy, rate, 1.0), 0.0) for entropy in (0.1, 0.5, 0.9)]
    assert gains[0] > gains[1] > gains[2] == 0 and rate + np.mean(gains) == pytest.approx(policy.plain_ms_)


class Machine:
    """A cost model whose every part is a multiple of one plain token, drafting and verifying at a share of it."""

    def __init__(self, plain: float, draft: float, verify: float):
        self.plain, self.draft, self.verify = plain, draft, verify

    def verify_ms(self, tokens, context, batch):
        return self.plain + self.verify * (tokens + 0 * context * batch - 1).double()

    def draft_ms(self, width, context, batch):
        return self.draft + 0.0 * (width + context + batch).double()

    catch_up_ms = draft_ms

    def commit_ms(self, tokens, batch):
        return 0.0 * (tokens + batch).double()

    overhead_ms = commit_ms


def drafted_under(cost: Machine) -> tuple[float, float]:
    """Mean levels and kept nodes of some cycles on a machine."""
    policy, language = make(SETTINGS["goodput"][0]), Language(3, steps=5)
    cycle = replace(cycle_at(list(range(12)), [0] * 12), cost=cost)
    drafter = SyntheticDrafter(language, [language.truth(key, 3) for key in range(12)])
    got = draft(policy, drafter, cycle, fresh(policy, cycle))
    return float((got.widths > 0).sum(1).double().mean()), float(got.kept.sum(1).double().mean()) - 1


def test_one_fit_serves_every_machine():
    """Prices come from the cycle's cost model; scaling all of them changes nothing."""
    cheap, dear = drafted_under(Machine(10.0, 0.1, 0.0)), drafted_under(Machine(10.0, 0.1, 1.0))
    assert cheap[1] > dear[1] > 0, "where verifying costs, fewer nodes are verified"
    assert drafted_under(Machine(10.0, 1.5, 0.0))[0] < cheap[0], "where drafting costs, fewer levels are drafted"
    assert drafted_under(Machine(10.0, 20.0, 0.0)) == (0.0, 0.0), "where it does not pay, nothing is"
    assert drafted_under(Machine(40.0, 0.4, 4.0)) == dear


def test_what_lies_ahead():
    """f_m by hand: families of two children with chances 0.5 and 0.25, and of one with 0.5."""
    columns = {"sample": [0, 0, 1], "depth": [1, 1, 1], "rank": [0, 1, 0]}
    nodes = Nodes(**{name: np.array(value) for name, value in columns.items()}, logprob=None, entropy=None, accepted=None)
    table = fit_look_ahead(np.array([0.5, 0.25, 0.5]), nodes, 3)
    assert table[0][0] == pytest.approx((0.75 + 0.5) / 2) and table[0][-1] == 0
    u = GRID[8]
    one = ((0.5 - u) + max(0.25 - u, 0) + (0.5 - u)) / 2
    assert table[0][8] == pytest.approx(one, abs=1e-6)
    assert table[1][0] == pytest.approx(0.625 + 0.625 * 0.625, abs=1e-5)
    with pytest.raises(UserError, match="write it with sim.fit"):
        LookAhead(((0.5,),))


def test_what_lies_behind_a_root_depends_on_its_entropy():
    """Two roots, each with one child and one grandchild: the sure one's child has chance 0.8, the other's 0.2."""
    columns = {"sample": [0, 0, 1, 1], "depth": [1, 2, 1, 2], "rank": [0, 0, 0, 0]}
    nodes = Nodes(**{name: np.array(value) for name, value in columns.items()}, logprob=None, entropy=None, accepted=None)
    chance = np.array([0.8, 0.5, 0.2, 0.5])
    ahead = fit_look_ahead(chance, nodes, 3)
    edges, tables = fit_opening(chance, nodes, 3, ahead, np.array([0.1, 2.0], dtype=np.float32))
    sure, unsure = tables[0], tables[-1]
    assert sure[0][0] == pytest.approx(0.8) and unsure[0][0] == pytest.approx(0.2)
    assert sure[1][0] == pytest.approx(0.8 + 0.8 * ahead[0][0]) and unsure[1][0] == pytest.approx(0.2 + 0.2 * ahead[0][0])
    assert edges == (pytest.approx(0.1),) and len(tables) == 2
    taller = (*tables[1:], (*tables[0], tables[0][-1]))
    for wrong in ((edges, tables[:-1]), ((0.5, 0.1), (*tables, tables[0])), (("x",), tables), (None, None), (edges, taller)):
        with pytest.raises(UserError, match="write it with sim.fit"):
            Opening(*wrong)


@pytest.mark.parametrize("told", [0.0, 0.25, 0.3, 9.0, math.inf, math.nan])
def test_a_root_is_opened_alone_as_among_others(told):
    """A single row on a CPU is decided by plain Python. A target that is broken says NaN."""
    policy, language = make(SETTINGS["goodput"][0]), Language(3, steps=5)

    def opened(rows: int) -> list[bool]:
        root = torch.full((rows,), told), torch.zeros(rows)
        cycle = replace(cycle_at([0] * rows, [0] * rows), root_told=lambda: root)
        got = draft(policy, SyntheticDrafter(language, [language.truth(0, 3)]), cycle, fresh(policy, cycle))
        return got.tree.expanded[:, 0].tolist()

    assert opened(1) * 2 == opened(2) == [told < 0.75] * 2


def test_where_drafting_does_not_pay_it_decodes_plainly():
    policy, language = make(SETTINGS["goodput"][0]), Language(3)
    costly = Goodput(**{**policy.parameters(), "level_ms_": tuple(tuple(9.0 for _ in level) for level in policy.level_ms_)})
    cycle = cycle_at([0, 1], [0, 0])
    got = draft(costly, SyntheticDrafter(language, [[1], [2]]), cycle, fresh(costly, cycle))
    assert got.tree.width == 1 and got.widths.shape[1] == 0


def test_most_worth_takes_the_least_of_equal_ones():
    chance = np.array([[0.5, 0.5, 0.25], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    ms = np.broadcast_to(np.arange(5.0), (3, 5))
    plan = SimpleNamespace(value=np.array([2.0, 2.0, 9.0]), verify=ms, _verifying={})
    assert Plan.most_worth(plan, np.arange(3), chance).tolist() == [0, 0, 3]
    assert [Plan.most_worth_alone(plan, place, own.tolist()) for place, own in enumerate(chance)] == [0, 0, 3]


def test_memory_fades_by_tested_first_choices():
    new = remember(np.full(3, 0.8), np.array([0.0, 0.5, -0.5]), np.array([0, 1, 3]))
    wanted = [0.8, 0.8 * MEMORY + 0.5 / 8, 0.8 * MEMORY**3 - 0.5 / 8]
    assert new.tolist() == pytest.approx(wanted)


def test_a_level_is_estimated_as_its_nodes_are():
    """To the bit, at every batch shape: what is decided on is what was fitted and calibrated."""
    policy, numbers = make(SETTINGS["goodput"][0]), np.random.default_rng(0)
    estimate = Acceptance(policy.logprob_edges_, policy.entropy_edges_, policy.odds_, policy.slopes_)
    rows, families, fanout, depth = 9, 4, 7, 3
    logprob = -numbers.exponential(1.5, (rows, families, fanout)).astype(np.float32)
    entropy, history = numbers.uniform(0, 90, (rows, families)).astype(np.float32), numbers.uniform(-1, 1, rows)

    def of_level(*chosen):
        return estimate.of_level(depth, logprob[chosen], entropy[chosen], estimate.by_history(history[chosen[0]], fanout + 3))

    whole = of_level(slice(None))
    rank, place = np.broadcast_to(np.arange(fanout), whole.shape).ravel(), np.full(whole.size, depth)
    by_node = estimate(rank, place, logprob.ravel(), entropy.repeat(fanout), history.repeat(families * fanout))
    assert np.array_equal(whole.ravel(), by_node) and len(np.unique(whole)) > whole.size / 2
    for row in range(rows):
        assert np.array_equal(of_level(slice(row, row + 1)), whole[row : row + 1])
        assert np.array_equal(of_level(slice(row, row + 1), slice(1, 2)), whole[row : row + 1, 1:2])


@dataclass
class Nodes:
    sample: np.ndarray
    depth: np.ndarray
    rank: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray


def nodes_of_known_chance(count: int, seed: int) -> tuple[Nodes, np.ndarray, np.ndarray]:
    """Nodes whose chance is known: not the draft's own, and falling with depth."""
    numbers = np.random.default_rng(seed)
    logprob = -numbers.exponential(1.5, count).astype(np.float32)
    rank, depth = numbers.integers(0, 7, count), numbers.integers(1, 6, count)
    odds = 2.5 + 1.2 * logprob - 0.5 * np.searchsorted(RANK_EDGES, rank, side="right") - 0.2 * depth
    chance = 1 / (1 + np.exp(-odds))
    entropy = numbers.random(count).astype(np.float32)
    nodes = Nodes(np.arange(count) // 8, depth, rank, logprob, entropy, numbers.random(count) < chance)
    return nodes, np.zeros(count // 8 + 1, dtype=np.int64), chance


def test_the_estimate_finds_the_true_chances():
    nodes, sequence, _ = nodes_of_known_chance(60000, 0)
    estimate = fit_acceptance(nodes, sequence)
    fresh_nodes, _, true = nodes_of_known_chance(5000, 1)
    columns = [getattr(fresh_nodes, name) for name in ("rank", "depth", "logprob", "entropy")]
    found = estimate(*columns, np.zeros(5000))
    draft_error = np.abs(np.exp(fresh_nodes.logprob) - true).mean()
    assert np.abs(found - true).mean() < min(0.03, draft_error / 4)
    assert estimate.slopes[0][0] == pytest.approx(-0.2, abs=0.08)


def test_a_drafter_without_doubt_can_be_fitted():
    """Prompt lookup proposes chains, all of probability 1: one value of log-probability, one rank."""
    nodes, sequence, _ = nodes_of_known_chance(4000, 0)
    nodes.logprob[:], nodes.entropy[:], nodes.rank[:] = 0.0, 0.0, 0
    chance = np.where(nodes.depth < 3, 0.8, 0.3)
    nodes.accepted = np.random.default_rng(1).random(4000) < chance
    found = fit_acceptance(nodes, sequence)(nodes.rank, nodes.depth, nodes.logprob, nodes.entropy, np.zeros(4000))
    assert found[nodes.depth == 1].mean() > 0.65 and found[nodes.depth == 5].mean() < 0.4


def test_histories_start_anew_with_each_text():
    nodes = Nodes(*(np.array(column) for column in ([0, 1, 2, 3], [1] * 4, [0] * 4, [-0.1] * 4, [0.5] * 4, [1, 1, 0, 1])))
    got = histories(np.full(4, 0.5), nodes, np.array([0, 0, 0, 1]))
    assert got.tolist() == pytest.approx([0, 0.5 / 8, 0.5 / 8 * MEMORY + 0.5 / 8, 0])


@pytest.mark.parametrize(
    "change", [{"odds_": ((0.0,),)}, {"slopes_": ((0.0, 0.0),)}, {"odds_": "x"}], ids=["shape", "slopes", "no numbers"]
)
def test_a_damaged_estimate_is_named(change):
    policy = make(SETTINGS["goodput"][0])
    given = {**policy.parameters(), **change}
    with pytest.raises(UserError, match="write it with sim.fit"):
        Acceptance(given["logprob_edges_"], given["entropy_edges_"], given["odds_"], given["slopes_"])


def test_it_cannot_outgrow_its_fit():
    policy = make(SETTINGS["goodput"][0])
    with pytest.raises(UserError, match="fit it again"):
        Goodput(**{**policy.parameters(), "depth": 30})
    with pytest.raises(UserError, match="must be fitted first"):
        Goodput().check_fitted()


def test_a_fit_from_before_there_was_an_opening():
    content = make(SETTINGS["goodput"][0]).to_json()
    for name in ("root_edges_", "opening_"):
        del content["parameters"][name]
    with pytest.raises(UserError, match="'goodput' was fitted without root_edges_ and opening_: fit it again, with `python -m sim"):
        from_json(content).check_fitted()
