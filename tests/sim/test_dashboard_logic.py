"""What the dashboard's pages compute: intervals, opened cycles, strata, calibration, sweeps, specs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks import repeated
from policies.errors import UserError
from policies.registry import load_policy
from sim import curves, finding, glance, lab, reliability, strata, sweeps, token_charts, walkthrough
from sim.bootstrap import Resamples
from sim.metrics import replay_rows
from sim.replay import replay
from sim.setting import Setting
from sim.surfaces import fitted, measured
from sim.tally import FIGURES
from sim.trial import run_trial
from sim.vocabulary import Vocabulary, find_vocabulary
from tests.made_up_recording import write_profile, write_recording
from traces.costs import load_profile
from traces.recording import Recording, open_recording

SPECS = ("autoregressive", "chain(k=3)", "eagle3(total_tokens=8, depth=4, top_k=3)", "static(tree=((0,), (1,), (0, 0)))")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return open_recording(write_recording(tmp_path_factory.mktemp("made-up") / "trace", {"math": 6.0, "story": 3.0}, texts=4))


@pytest.mark.parametrize("spec", SPECS)
def test_figures_are_those_of_result_rows(recording: Recording, spec: str, tmp_path: Path):
    cost = load_profile(write_profile(tmp_path / "profile.json")).cost("eagle3")
    setting, policy = Setting("eagle3"), load_policy(spec)
    sums = run_trial(recording, policy, setting, cost)
    table = glance.rows_with_intervals({"mine": (policy, sums)}, setting, Resamples(sums))
    assert set(table["policy"]) == {"mine"}
    for row in replay_rows(recording, load_policy(spec), cost=cost):
        mine = table.filter(domain=row.domain).row(0, named=True)
        for figure in FIGURES:
            assert mine[figure] == getattr(row, figure)
        for figure in ("tau", "ms_per_token", "speedup"):
            assert mine[f"{figure}_low"] <= mine[figure] * (1 + 1e-12) and mine[figure] <= mine[f"{figure}_high"] * (1 + 1e-12)


def test_tables_leave_out_what_was_not_predicted(recording: Recording):
    setting, policy = Setting("eagle3"), load_policy("chain(k=3)")
    sums = run_trial(recording, policy, setting)
    table = glance.rows_with_intervals({"chain": (policy, sums)}, setting, Resamples(sums))
    assert "tau_low" in table.columns and not {"speedup", "speedup_low", "ms_per_token"} & set(table.columns)


def test_differences_are_paired(recording: Recording):
    chain, plain = (run_trial(recording, load_policy(spec), Setting("eagle3")) for spec in ("chain(k=3)", "autoregressive"))
    draws = Resamples(chain)
    same = glance.difference_table(chain, chain, draws)
    assert same.select("difference", "low", "high").to_numpy().max() == 0  # the same draws for both
    apart = glance.difference_table(chain, plain, draws).filter(domain="mean", figure="tau").row(0, named=True)
    alone = draws.estimate(chain, "tau")
    assert (apart["ours"], apart["theirs"], apart["difference"]) == (alone.value, 1.0, alone.value - 1)
    assert (apart["low"], apart["high"]) == pytest.approx((alone.low - 1, alone.high - 1))  # plain decoding's tau is 1
    assert apart["texts"] == 8


@pytest.mark.parametrize("spec", SPECS)
def test_an_opened_text_is_the_replayed_one(recording: Recording, spec: str):
    policy, text = load_policy(spec), 5
    shown = walkthrough.cycles(recording, policy, None, text)
    log = replay(recording, policy)
    mine = log.sequence == text
    assert [each.position for each in shown] == log.position[mine].tolist()
    assert [each.accepted for each in shown] == log.accepted[mine].tolist()
    assert [each.kept for each in shown] == log.kept[mine].tolist()
    tokens = walkthrough.token_table(recording, shown, text)
    assert len(tokens) == recording.length[text] and tokens["source"][0] == "prefill"
    assert tokens.filter(pl.col("cycle") > 0).group_by("cycle").len().sort("cycle")["len"].to_list() == log.emitted[mine].tolist()
    drafted = int((tokens["source"] == "drafted").sum())
    assert drafted == int(np.minimum(log.accepted[mine], log.emitted[mine]).sum())


def test_a_tree_knows_the_true_path(recording: Recording):
    policy, text = load_policy("eagle3(total_tokens=8, depth=4, top_k=3)"), 1
    everywhere = walkthrough.accepted_everywhere(recording, policy, None, np.array([text]))
    words = recording.token[recording.offset[text] : recording.offset[text + 1]]
    for position in range(int(recording.length[text]) - 1):
        shown = walkthrough.cycle_at(recording, policy, None, text, position)
        tree = walkthrough.tree_table(recording, shown, text)
        children = {node: (parent, token) for node, parent, token in tree.select("node", "parent", "token").rows()}
        for node, true in tree.select("node", "true").rows():
            path = []
            while node:
                parent, token = children[node]
                path.append(token)
                node = parent
            assert true == (path[::-1] == words[position + 1 : position + 1 + len(path)].tolist())
        assert tree.filter(pl.col("kept") & pl.col("true")).height == shown.accepted + 1
        row = everywhere.filter(position=position).row(0, named=True)
        assert (row["accepted"], row["kept"]) == (shown.accepted, shown.kept)
        kept = tree.filter(pl.col("kept") & (pl.col("depth") > 0)).sort("score", descending=True, maintain_order=True)
        last = tree.filter("accepted").sort("depth").row(-1, named=True)
        assert row["terminal_rank"] == (kept["node"].to_list().index(last["node"]) + 1 if last["node"] else 0)


def test_a_drawn_tree_keeps_parents_between_their_children_and_marks_the_targets_own(recording: Recording):
    policy = load_policy("chain(k=2)")
    shown = walkthrough.cycle_at(recording, policy, None, 0, 0)
    tree = walkthrough.tree_table(recording, shown, 0)
    following = int(recording.token[recording.offset[0] + shown.accepted + 1])
    layout = token_charts.tree_layout(token_charts.with_bonus(tree, following))
    assert layout["y"].n_unique() >= 1 and set(layout["state"]) <= set(token_charts.STATES)
    truth = layout.filter("true").sort("depth")["token"].to_list()
    assert truth == recording.token[: len(truth)].tolist()
    wide = walkthrough.cycle_at(recording, load_policy("eagle3(total_tokens=8, depth=4, top_k=3)"), None, 0, 0)
    layout = token_charts.tree_layout(token_charts.with_bonus(walkthrough.tree_table(recording, wide, 0), -1), whole=True)
    for node, y in layout.select("node", "y").rows():
        below = layout.filter(parent=node)["y"]
        assert below.is_empty() or y == pytest.approx((below.min() + below.max()) / 2)
    leaves = layout.filter(~pl.col("node").is_in(layout["parent"].to_list()))["y"].sort()
    assert leaves.to_list() == list(range(len(leaves)))


def test_reliability_of_a_draft_that_means_what_it_says():
    rng = np.random.default_rng(0)
    said = rng.random(40_000)
    table = pl.DataFrame({"top1_probability": said, "top1": rng.random(len(said)) < said})
    found = reliability.reliability(table)
    assert len(found) == 10 and found["count"].sum() == len(said)
    assert (found["probability"] - found["accepted"]).abs().max() < 0.03
    assert reliability.first_choices(table).ece < 0.02
    assert reliability.first_choices(table.with_columns(top1=pl.lit(True))).ece == pytest.approx(1 - said.mean())
    halves = table.with_columns(domain=pl.when(pl.col("top1_probability") < 0.5).then(pl.lit("low")).otherwise(pl.lit("high")))
    apart = reliability.reliability(halves, by="domain")
    assert apart.drop("domain").sort("probability").equals(found) and apart["domain"].to_list() == ["high"] * 5 + ["low"] * 5


def test_terminal_ranks_by_hand():
    everywhere = pl.DataFrame({"terminal_rank": [0, 1, 1, 2, 40], "kept": [40] * 5, "accepted": [0, 1, 3, 2, 5]})
    found = reliability.terminal_ranks(everywhere, bins=20)
    assert found["share"].sum() == 1 and found.row(0) == (1, 2, 0.75, 2.0, 0.75) and found["share"][-1] == 0.25


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed: int):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 6, (30, 2)).astype(float)
    table = pl.DataFrame({"kept": points[:, 0], "tau": points[:, 1]})
    front = sweeps.with_front(table, "kept", "tau")
    for (kept, tau), on in zip(points, front["front"], strict=True):
        beaten = ((points[:, 0] <= kept) & (points[:, 1] >= tau) & ((points[:, 0] < kept) | (points[:, 1] > tau))).any()
        assert not (on and beaten)  # of equal points one is on the front
        if not beaten:
            assert front.filter(pl.col("front") & (pl.col("kept") == kept) & (pl.col("tau") == tau)).height == 1


def test_of_equal_settings_the_front_takes_the_shallowest():
    table = pl.DataFrame({"kept": [7.0, 7.0, 7.0, 9.0], "tau": [2.5, 2.5, 2.4, 2.5], "levels": [12.0, 4.0, 3.0, 2.0]})
    assert sweeps.with_front(table, "kept", "tau")["front"].to_list() == [False, True, False, False]


def test_specs_are_written_as_a_command_line_reads_them():
    spec = lab.with_parameter("eagle3(depth=5)", "total_tokens", 24)
    assert spec == "eagle3(total_tokens=24, depth=5)"
    assert lab.with_parameter(spec, "depth", 8) == "eagle3(total_tokens=24)"
    hetero = lab.with_parameter("heterospec", "thresholds_", (1.5, 2.5))
    hetero = lab.with_parameter(hetero, "confidence", "local")
    policy = load_policy(hetero)
    assert (policy.thresholds_, policy.confidence) == ((1.5, 2.5), "local")
    assert load_policy(lab.spec_of(policy.to_json())) == policy
    assert lab.literal("(0.3, 1)") == (0.3, 1) and lab.literal("None") is None and lab.literal("local") == "local"
    with pytest.raises(UserError, match="cannot read"):
        lab.literal("(1,")


def test_a_dragged_threshold_is_the_one_that_was_taken_up():
    assert strata.dragged([9.0, 10.0, 11.0], 7.4, 9.02) == [7.4, 10.0, 11.0]  # from 9 to the left
    assert strata.dragged([9.0, 10.0, 11.0], 8.9, 12.5) == [10.0, 11.0, 12.5]  # from 9 to the right, past the others
    assert strata.dragged([9.0, 10.0, 11.0], 10.4, 11.1) == [9.0, 10.0, 10.4]
    assert strata.dragged([5.0], 1.0, 2.0) == [1.0]


def test_batches_are_those_that_were_measured_and_can_be_filled(tmp_path: Path):
    assert lab.batches(None, 5) == [1, 2, 4] and lab.batches(None, 1) == [1]
    profile = load_profile(write_profile(tmp_path / "profile.json"))
    assert lab.batches(profile, 100) == [1]


def test_profiles_of_other_models_are_found_for_a_what_if(recording: Recording, tmp_path: Path):
    mine = write_profile(tmp_path / "mine.json")
    other = write_profile(tmp_path / "other.json", target_hash="99" * 32)
    (tmp_path / "none.json").write_text("{}")
    fitting = finding.found_profiles(tmp_path / "nowhere", tmp_path, recording, "eagle3")
    assert fitting == [mine] and finding.other_profiles(tmp_path, fitting, "eagle3") == [other]


def test_fitted_surfaces_go_through_what_was_measured(tmp_path: Path):
    profile = load_profile(write_profile(tmp_path / "profile.json"))
    points, lines = measured(profile, "verify"), fitted(profile, "verify")
    joined = points.join(lines, on=["tokens", "context", "batch"], suffix="_fitted")
    assert len(joined) == len(points) == 4 and joined["ms"].to_list() == pytest.approx(joined["ms_fitted"].to_list())
    assert len(lines) > 100


def test_words_of_the_shipped_target():
    root = Path(lab.__file__).parent.parent
    sample = open_recording(root / "traces" / "samples" / "reference")
    vocabulary = find_vocabulary(sample.manifest, root / "live" / "reference" / "target")
    row = sample.sequences()[0]
    assert vocabulary.known and "".join(map(vocabulary.piece, row["tokens"][: row["length"]])).startswith(row["text"])
    assert vocabulary.label(row["tokens"][1]) == vocabulary.piece(row["tokens"][1]).replace(" ", "␣").replace("\n", "⏎")
    unknown = find_vocabulary({"target": {"id": "nobody/nothing", "vocabulary": 9}}, root / "nowhere")
    assert not unknown.known and unknown.label(7) == "#7" and Vocabulary().text([1, 2, -1]) == "#1 #2"
    assert not find_vocabulary({"target": {"id": "reference", "vocabulary": 9}}, root / "live" / "reference" / "target").known


def test_some_texts_are_spread_over_all(recording: Recording):
    texts = np.arange(len(recording.length))
    assert walkthrough.some_texts(recording, texts, 10**6).tolist() == texts.tolist()
    half = walkthrough.some_texts(recording, texts, int(recording.length.sum()) // 2)
    assert half.tolist() == [0, 2, 4, 6]
    assert walkthrough.some_texts(recording, texts, 1).tolist() == [0, 2, 4, 6]  # two of each domain, for an interval
    assert walkthrough.some_texts(recording, texts[:5], 1).tolist() == [0, 2, 4]  # where a domain has them


def test_samples_of_some_texts_are_those_among_all(recording: Recording):
    some = np.array([1, 4, 6])
    every = curves.samples(recording)
    wanted = every.filter(pl.col("sequence").is_in(recording.sequence_ids[some].tolist()))
    assert len(wanted) < len(every) and curves.samples(recording, texts=some).equals(wanted)


def test_a_repeated_recording_is_the_same_texts_again(recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repeated, "SHARD", 1)  # one copy of a shard after the other
    folder = repeated.repeat(recording.folder, tmp_path / "large", 2 * int(recording.length.sum()) - 5)
    large = open_recording(folder, verify=True)
    assert len(large.token) == 2 * len(recording.token) and len(set(large.sequence_ids.tolist())) == len(large.length)
    assert np.bincount(large.domain_index).tolist() == [8, 8]
    once, twice = (replay_rows(each, load_policy("chain(k=3)")) for each in (recording, large))
    assert [row.tau for row in twice] == [row.tau for row in once] and twice[-1].cycles == 2 * once[-1].cycles
