"""Fits of the tree policies: counts and classifier against what the recording says, and from a command to a replay."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.c2t import C2T, features_of, training_set
from policies.errors import UserError
from policies.registry import load_policy
from policies.sequoia import Sequoia, best_trees, expected_tokens, paths_of, rank_acceptance
from sim.fit import fit, main
from sim.replay import replay
from sim.samples import build_samples
from tests.policies.synthetic import Language
from tests.sim import synthetic_recording
from traces.manifest import ShardPlan

LANGUAGE = Language(3, steps=5)
PLAN = [ShardPlan(0, (0, 3, 4, 9), "math"), ShardPlan(1, (1, 2, 5, 7, 8), "story"), ShardPlan(2, (6,), "math")]
SEQUOIA = Sequoia(total_tokens=8, depth=3, branches=3)
C2T_SMALL = C2T(depth=3, top_k=3, hidden=6)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return synthetic_recording.write(tmp_path_factory.mktemp("fit") / "trace", LANGUAGE, PLAN)


def ranks_of_the_truth(recording) -> list[int]:
    """At every position: the rank of the true next token among the root's children, or one beyond the recorded ones."""
    found = []
    for index, sequence in enumerate(recording.sequence_ids):
        start, end = int(recording.offset[index]), int(recording.offset[index + 1])
        text = recording.token[start:end].tolist()
        for place in range(int(recording.length[index]) - 1):
            key = synthetic_recording.key_of(int(sequence))
            tokens = [token for token, _ in LANGUAGE.children_of(key, place, text[place], 24)]
            found.append(tokens.index(text[place + 1]))
    return found


def test_the_rank_acceptance_vector(recording):
    ranks = ranks_of_the_truth(recording)
    samples = build_samples(recording, SEQUOIA, nodes=True)
    rates = rank_acceptance(samples.nodes.rank, samples.nodes.accepted, 3)
    assert rates.tolist() == pytest.approx([ranks.count(rank) / len(ranks) for rank in range(3)])
    assert 0 < rates[2] < rates[1]
    fitted = SEQUOIA.fit(samples)
    assert fitted.acceptance_ == tuple(rates) and len(fitted.tree_) == 7
    with pytest.raises(UserError, match="no sample"):
        rank_acceptance(np.zeros(0, np.int64), np.zeros(0, bool), 3)


class Times:
    """A cost model of a few numbers."""

    def __init__(self, draft: float, verify: float, per_token: float):
        self.draft, self.verify, self.per_token = draft, verify, per_token

    def draft_ms(self, width, context, batch):
        return torch.full(context.shape, self.draft, dtype=torch.float64)

    def verify_ms(self, tokens, context, batch):
        return (self.verify + self.per_token * tokens.to(torch.float64)).expand(context.shape)


@pytest.mark.parametrize("draft, verify, per_token", [(0.1, 10.0, 0.0), (0.5, 10.0, 1.0), (50.0, 1.0, 0.0), (0.1, 1.0, 9.0)])
def test_sequoia_takes_the_cheapest_tree(recording, draft, verify, per_token):
    samples = build_samples(recording, SEQUOIA, nodes=True, cost=Times(draft, verify, per_token))
    fitted = SEQUOIA.fit(samples)
    value, choice = best_trees(np.array(fitted.acceptance_), 8, 3)

    def cost(tree: tuple) -> float:
        levels = max((len(path) for path in tree), default=0)
        return (levels * draft + verify + per_token * (len(tree) + 1)) / expected_tokens(fitted.acceptance_, tree)

    shapes = [(n, d) for n in (1, 2, 4, 8) for d in range(4) if np.isfinite(value[d, n])]
    assert cost(fitted.tree_) == pytest.approx(min(cost(paths_of(choice, n, d)) for n, d in shapes))
    assert bool(fitted.tree_) == (draft < 50 and per_token < 9)  # where drafting does not pay: plain decoding


def test_whole_trees(recording):
    """The accepted nodes, and every third other, tested or not; only for a policy that asks for them."""

    class Tested(C2T):
        fits_on_whole_trees = 0

    class Whole(C2T):
        fits_on_whole_trees = 3

    tested = build_samples(recording, Tested(depth=3, top_k=3), nodes=True).nodes
    whole = build_samples(recording, Whole(depth=3, top_k=3), nodes=True).nodes
    assert rows(whole, whole.accepted) == rows(tested, tested.accepted) and tested.accepted.any()
    drafted = 130 * (3 + 9 + 9) - int(whole.accepted.sum())
    assert 0.25 < int((~whole.accepted).sum()) / drafted < 0.35
    assert not rows(whole, ~whole.accepted) <= rows(tested, ~tested.accepted)
    parts = build_samples(recording, Whole(depth=3, top_k=3), nodes=True, chunk=7).nodes
    assert np.array_equal(parts.sample, whole.sample) and np.array_equal(parts.score, whole.score)


def rows(nodes, chosen: np.ndarray) -> set[tuple]:
    columns = (nodes.sample, nodes.depth, nodes.rank, nodes.score)
    return set(zip(*(column[chosen].tolist() for column in columns), strict=True))


def test_the_classifier_is_scikit_learns(recording):
    from sklearn.neural_network import MLPClassifier

    samples = build_samples(recording, C2T_SMALL, nodes=True)
    features, accepted = training_set(samples.nodes, 1)
    assert accepted.sum() * 2 == len(accepted) == samples.nodes.accepted.sum() * 2
    fitted = C2T_SMALL.fit(samples)
    network = MLPClassifier((6,), batch_size=len(accepted), max_iter=600, n_iter_no_change=600, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.fit(features, accepted)
    wanted = network.predict_proba(features_of(samples.nodes))[:, 1]
    nodes = samples.nodes
    columns = (torch.from_numpy(np.array(column)) for column in (nodes.score, nodes.entropy, nodes.depth))
    got = torch.sigmoid(fitted.logit(*columns).double()).numpy()
    assert got == pytest.approx(wanted, rel=1e-5)
    assert len(fitted.units_) == 6 and len(fitted.output_) == 7
    silent = replace(samples, nodes=replace(nodes, accepted=np.zeros_like(nodes.accepted)))
    with pytest.raises(UserError, match="accepted and rejected"):
        C2T_SMALL.fit(silent)


@pytest.mark.parametrize("spec", ["sequoia(total_tokens=8, depth=3, branches=3)", "c2t(depth=3, top_k=3)"])
def test_from_command_to_replay(recording, spec, tmp_path, monkeypatch, capsys):
    out = tmp_path / "fitted.json"
    monkeypatch.setattr("sys.argv", ["sim.fit", str(recording.folder), "--policy", spec, "--out", str(out)])
    main()
    told = capsys.readouterr().out
    assert "held out:" in told and ("expected" in told or "accepted nodes" in told)
    content = json.loads(out.read_text())
    assert content["fit"]["missing_expansions"] == 0
    log = replay(recording, load_policy(str(out)))
    plain = replay(recording, load_policy("autoregressive"))
    assert len(log.sequence) < len(plain.sequence)
    assert int(log.emitted.sum()) == int(plain.emitted.sum())


def test_what_is_learned_is_the_same_every_time(recording):
    for policy in (SEQUOIA, C2T_SMALL):
        first, _, held_out = fit(recording, policy)
        again, _, _ = fit(recording, policy)
        assert first == again
        assert all("\n" not in line for line in first.describe_fit(held_out))
