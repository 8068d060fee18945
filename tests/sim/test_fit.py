"""Samples, split and fit, against lists and loops; and the command from a recording to a policy that replays."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import UserError
from policies.heterospec import HeteroSpec
from policies.registry import load_policy
from policies.strata import fit_edges
from sim.fit import fit, main
from sim.outputs import write_json
from sim.replay import replay
from sim.samples import build_samples
from sim.split import prompt_index, split_sequences, split_texts
from tests.policies import brute
from tests.policies.synthetic import Language
from tests.sim import synthetic_recording
from traces.manifest import ShardPlan

LANGUAGE = Language(3, steps=5)
PLAN = [ShardPlan(0, (0, 3, 4, 9), "math"), ShardPlan(1, (1, 2, 5, 7, 8), "story"), ShardPlan(2, (6,), "math")]
POLICY = HeteroSpec(total_tokens=12, depth=3, top_k=3, alpha=0, samples="all", minimum_samples=5)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return synthetic_recording.write(tmp_path_factory.mktemp("fit") / "trace", LANGUAGE, PLAN)


def by_brute_force(recording, sequence: int, position: int):
    """(entropy, rank, accepted of EAGLE-3's kept nodes, tested nodes with their labels) at one position."""
    start = int(recording.offset[sequence])
    text = recording.token[start : int(recording.offset[sequence + 1])].tolist()
    key = synthetic_recording.key_of(int(recording.sequence_ids[sequence]))

    def children_of(depth: int, token: int, branching: int):
        return LANGUAGE.children_of(key, position + depth, token, branching)

    rules = brute.HeteroRules([], [(0, 12)])
    nodes, kept, _, entropy, rank = brute.heterospec(text[position], children_of, 3, 3, rules)
    behind = text[position + 1 :]
    accepted, _ = brute.walk(kept, behind)
    on_path, _ = brute.walk(nodes, behind)
    tested = []
    for node in nodes[1:]:
        if node.parent.depth < len(behind) and any(node.parent is one for one in [nodes[0], *on_path]):
            tested.append((node.depth, node.rank, float(node.logprob), any(node is one for one in on_path)))
    return entropy, rank, len(accepted), tested


def test_samples_are_what_brute_force_finds(recording):
    samples = build_samples(recording, POLICY, nodes=True)
    assert len(samples.sequence) == 10 * 13
    where = 0
    for index, (sequence, position) in enumerate(zip(samples.sequence, samples.position, strict=True)):
        entropy, rank, accepted, tested = by_brute_force(recording, sequence, position)
        assert samples.columns["entropy"][index] == pytest.approx(entropy, rel=1e-6)
        assert samples.columns["rank"][index] == rank
        assert samples.accepted[index] == accepted
        nodes = samples.nodes
        here = slice(where, where + len(tested))
        got = zip(nodes.depth[here], nodes.rank[here], nodes.logprob[here], nodes.accepted[here], strict=True)
        assert [tuple(value.item() for value in one) for one in got] == tested
        assert set(nodes.sample[here].tolist()) == {index}
        first_level = nodes.entropy[here][nodes.depth[here] == 1]
        root = recording.token[recording.offset[sequence] + position]
        assert np.allclose(first_level, 0.01 * root)
        where += len(tested)
    assert where == len(samples.nodes.sample)
    assert not samples.missing.any()
    assert [recording.domains[d] for d in samples.domain[:13]] == ["math"] * 13
    assert samples.accepted.max() >= 2 and samples.accepted.min() == 0


@pytest.mark.parametrize("chunk", [1, 7, 130])
def test_chunks_change_nothing(recording, chunk):
    whole = build_samples(recording, POLICY, nodes=True)
    parts = build_samples(recording, POLICY, nodes=True, chunk=chunk)
    for name in ("entropy", "rank"):
        assert np.array_equal(whole.columns[name], parts.columns[name])
    for name in ("sample", "score", "entropy", "accepted"):
        assert np.array_equal(getattr(whole.nodes, name), getattr(parts.nodes, name))
    assert np.array_equal(whole.accepted, parts.accepted)


def test_samples_of_some_sequences(recording):
    some = build_samples(recording, POLICY, sequences=np.array([2, 0]))
    assert some.sequence.tolist() == [2] * 13 + [0] * 13
    assert some.position.tolist() == [*range(13)] * 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=60),
    st.integers(1, 6),
    st.integers(0, 100),
)
def test_edges_against_loops(pairs, minimum, seed):
    """Both criteria against a tree that tries every edge; a little noise makes the best one unique."""
    noise = np.random.default_rng(seed).random(len(pairs)) * 1e-3
    x = np.array([float(a) / 2 for a, _ in pairs])
    y = np.array([b for _, b in pairs]) + noise

    def cost(part: np.ndarray, weighted: bool) -> float:
        return float(np.var(part)) * (len(part) if weighted else 1)

    def tree(inside: np.ndarray, levels: int, weighted: bool) -> list[float]:
        options = []
        values = sorted(set(x[inside]))
        for low, high in zip(values, values[1:], strict=False):
            edge = (low + high) / 2
            left, right = inside & (x <= edge), inside & (x > edge)
            if min(left.sum(), right.sum()) >= minimum:
                options.append((cost(y[left], weighted) + cost(y[right], weighted), edge))
        if levels == 0 or not options:
            return []
        edge = min(options)[1]
        below, above = (tree(inside & side, levels - 1, weighted) for side in (x <= edge, x > edge))
        return [*below, edge, *above]

    everything = np.ones(len(x), dtype=bool)
    if len(x) >= 2 * minimum:
        assert fit_edges(x, y, "cart", minimum) == pytest.approx(tree(everything, 3, weighted=True))
        if minimum > 1:  # two single samples have variance 0 wherever one cuts
            assert fit_edges(x, y, "paper", minimum) == pytest.approx(tree(everything, 3, weighted=False))
    else:
        assert fit_edges(x, y, "cart", minimum) == fit_edges(x, y, "paper", minimum) == ()


@pytest.mark.parametrize("criterion", ["cart", "paper"])
def test_edges_of_plain_cases(criterion):
    steps = np.repeat(np.arange(8.0), 100)  # eight plateaus: eight leaves, edges half way
    assert fit_edges(steps, steps * 10, criterion, 50) == pytest.approx([0.5 + i for i in range(7)])
    assert fit_edges(steps, np.full(800, 3), criterion, 50) == ()  # nothing to tell apart
    assert fit_edges(np.zeros(800), np.arange(800), criterion, 50) == ()  # nothing to tell them apart by
    assert fit_edges(np.arange(99.0), np.arange(99.0), criterion, 50) == ()
    assert fit_edges(np.arange(100.0), np.arange(100.0), criterion, 50) == (49.5,)
    with pytest.raises(UserError, match="no sample"):
        fit_edges(np.zeros(0), np.zeros(0), criterion, 50)


def test_split():
    ids, domain = np.arange(1000, 1050), np.array([0] * 30 + [1] * 19 + [2])
    split = split_sequences(ids, domain, 0.5, seed=1)
    assert sorted([*split.train, *split.held_out]) == list(range(50))
    assert np.bincount(domain[split.train], minlength=3)[:2].tolist() == [15, 10]
    again = split_sequences(ids, domain, 0.5, seed=1)
    assert np.array_equal(split.train, again.train)
    assert not np.array_equal(split.train, split_sequences(ids, domain, 0.5, seed=2).train)
    backwards = split_sequences(ids[::-1], domain[::-1], 0.5, seed=1)  # shards in another order
    assert set(ids[split.train]) == set(ids[::-1][backwards.train])
    tiny = split_sequences(np.arange(4), np.array([0, 0, 1, 1]), 0.01, seed=0)
    assert len(tiny.train) == 2 and len(tiny.held_out) == 2
    assert len(split_sequences(ids, domain, 1.0).held_out) == 0
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            split_sequences(ids, domain, share)


def answers(*rows: tuple[str, list[int]]) -> SimpleNamespace:
    """A recording of texts that answer (prompt id, prompt)."""
    told = [{"domain": "math", "prompt_id": name, "prompt_tokens": prompt} for name, prompt in rows]
    count = len(rows)
    return SimpleNamespace(
        sequences=lambda: told, length=np.full(count, 5), sequence_ids=np.arange(count), domain_index=np.zeros(count, dtype=int)
    )


def test_texts_of_one_prompt_stay_together():
    talks = [(f"{talk}/{turn}", [1, talk, 7, 7, talk][: 3 * turn - 1]) for talk in range(6) for turn in (1, 2)]
    alone = [("alone/1", [1, 8]), ("alone/2", [1, 9, 9])]  # other prompts: the second does not begin with the first
    recording = answers(*2 * [*talks, *alone])  # greedy and sampled
    prompts = prompt_index(recording)
    assert prompts.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 13] * 2
    for seed in range(5):
        split = split_texts(recording, seed=seed)
        assert len(split.train) + len(split.held_out) == 28
        assert not set(prompts[split.train]) & set(prompts[split.held_out])
        assert len(set(prompts[split.train])) == 4
    some = split_texts(recording, np.arange(14, 28))
    assert min(some.train.min(), some.held_out.min()) >= 14 and len(some.train) + len(some.held_out) == 14


def test_which_prompt_a_text_answers():
    longer = [(f"p{size}", list(range(size))) for size in range(1, 6)]
    assert prompt_index(answers(*longer)).tolist() == [0, 1, 2, 3, 4]  # each begins with the one before, and is another prompt
    sliced = [("a/2", [1, 2, 3]), ("a/1", [1]), ("a/2", [1, 5, 3])]  # the greedy first turn was sliced away
    assert prompt_index(answers(*sliced)).tolist() == [0, 0, 0]
    odd = [("run/20261129100500001", [1]), ("run/2", [2])]  # a number is not always a turn
    assert prompt_index(answers(*odd)).tolist() == [0, 1]
    gap = [("a/1", [1]), ("a/3", [1, 2, 3]), ("HumanEval/1", [4]), ("HumanEval/2", [5])]
    assert prompt_index(answers(*gap)).tolist() == [0, 0, 2, 3]


def test_the_split_of_a_seed_is_for_ever():
    """Published splits must be found again by later versions."""
    assert split_sequences(np.arange(10), np.zeros(10, dtype=int), 0.5, seed=0).train.tolist() == GOLDEN_SPLIT


GOLDEN_SPLIT = [3, 4, 7, 8, 9]


def test_fit_learns_from_the_training_part_only(recording):
    fitted, how, held_out = fit(recording, POLICY, train_share=0.5, seed=4)
    split = split_sequences(recording.sequence_ids, recording.domain_index, 0.5, 4)
    assert how["train_sequences"] == recording.sequence_ids[split.train].tolist()
    assert set(held_out.sequence) == set(split.held_out)
    assert how["positions"] == 13 * len(split.train)
    train = build_samples(recording, POLICY, sequences=split.train)
    assert fitted.thresholds_ == fit_edges(train.columns["entropy"], train.columns["rank"], "cart", 5)
    assert 1 <= len(fitted.thresholds_) <= 7
    lines = fitted.describe_fit(held_out)
    assert len(lines) == len(fitted.thresholds_) + 3


def test_heterospec_learns_from_what_was_accepted_in_full(recording):
    """Section 4.2's samples, sought one by one: a verified path was accepted down to the last level."""
    policy = HeteroSpec(total_tokens=4, depth=2, top_k=3, minimum_samples=3)
    samples = build_samples(recording, policy)
    columns = zip(samples.accepted, samples.columns["entropy"], samples.columns["rank"], strict=True)
    full = [(entropy, rank) for accepted, entropy, rank in columns if accepted == 2]
    assert 6 <= len(full) < len(samples.accepted) / 2 and max(rank for _, rank in full) < 4
    fitted = policy.fit(samples)
    assert fitted.thresholds_ == fit_edges(*map(np.array, zip(*full, strict=True)), "cart", 3)
    assert fitted.thresholds_ != replace(policy, samples="all").fit(samples).thresholds_
    assert f"accepted down to its last level: {len(full)} of these" in fitted.describe_fit(samples)[0]
    with pytest.raises(UserError, match=f"of which there are {len(full)} here, not 100: record more text"):
        replace(policy, minimum_samples=50).fit(samples)


def run(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["sim.fit", *map(str, arguments)])
    main()


@pytest.mark.parametrize("criterion", ["cart", "paper"])
def test_the_command(recording, tmp_path, monkeypatch, capsys, criterion):
    out = tmp_path / "policy.json"
    spec = f"heterospec(total_tokens=12, depth=3, top_k=3, alpha=0, samples=all, minimum_samples=5, criterion={criterion})"
    run([recording.folder, "--policy", spec, "--out", out, "--seed", 4], monkeypatch)
    printed = capsys.readouterr().out
    assert "thresholds_" in printed and "held out" in printed and "stratum" in printed
    content = json.loads(out.read_text())
    assert content["policy"] == "heterospec" and content["parameters"]["criterion"] == criterion
    manifest = (recording.folder / "manifest.json").read_bytes()
    assert content["fit"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert (content["fit"]["seed"], content["fit"]["train_share"], content["fit"]["drafter"]) == (4, 0.5, "made-up")
    policy = load_policy(str(out))
    assert policy.thresholds_ == tuple(content["parameters"]["thresholds_"])
    log = replay(recording, policy)
    assert log.coverage == 1.0 and len(set(log.kept.tolist())) > 1  # strata keep different numbers of nodes
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_replay_strata_are_the_fitted_ones(recording):
    """Every replayed cycle keeps what the stratum of its position calls for."""
    fitted, _, _ = fit(recording, POLICY, train_share=0.5, seed=4)
    samples = build_samples(recording, fitted)
    stratum = np.searchsorted(fitted.thresholds_, samples.columns["entropy"].astype(np.float64))
    wanted = {
        (sequence, position): fitted.verified_tokens()[level] - 1
        for sequence, position, level in zip(samples.sequence, samples.position, stratum, strict=True)
    }
    log = replay(recording, fitted)
    for sequence, position, kept in zip(log.sequence.tolist(), log.position.tolist(), log.kept.tolist(), strict=True):
        assert kept == wanted[sequence, position]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--policy", "eagle3"], "nothing to fit"),
        (["--policy", "heterospek"], "did you mean heterospec"),
        (["--policy", "heterospec", "--drafter", "nobody"], "no drafter 'nobody'"),
        (["--policy", "heterospec", "--train-share", "2"], "between 0 and 1"),
        (["--policy", "heterospec", "--train-share", "0"], "training part holds no position"),
    ],
)
def test_bad_input(recording, tmp_path, monkeypatch, arguments, told):
    with pytest.raises(UserError) as error:
        run([recording.folder, "--out", tmp_path / "p.json", *arguments], monkeypatch)
    assert told in str(error.value)
    assert not list(tmp_path.iterdir())


def test_bad_places(recording, tmp_path, monkeypatch):
    for out in (tmp_path, tmp_path / "none" / "p.json"):
        with pytest.raises(UserError, match="name a file in a folder that exists"):
            run([recording.folder, "--policy", "heterospec", "--out", out], monkeypatch)
    with pytest.raises(UserError, match="holds no recording"):
        run([tmp_path, "--policy", "heterospec", "--out", tmp_path / "p.json"], monkeypatch)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "p.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["p.json"]
