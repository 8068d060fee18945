"""Replay equals live decoding; and the comparison would notice if it did not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import live.decode
import live.verifier
from live.eagle_network import EagleNetwork
from live.explain import Answer, TapedDrafter, largest_difference, same_decision
from live.fidelity import check_policy, check_texts, main
from live.network import Ancestry
from live.witness import check_witness, why_not
from policies.chain import Chain
from policies.contract import Cycle
from policies.drafting import draft
from policies.errors import run_command
from policies.registry import load_policy
from policies.tree import Children
from policies.verification import pack
from traces.recording import Recording, open_recording
from traces.writer import RecordingWriter

HETEROSPEC = "heterospec(thresholds_=[1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0], depth=4)"
FOUNDATION = ("autoregressive", "chain(k=5)", "static", "eagle3", "eagle3(total_tokens=16, depth=5, top_k=8)", HETEROSPEC)
SMALL = "eagle3(total_tokens=12, depth=3, top_k=4)"


@pytest.fixture
def recording(tiny_recording: Path) -> Recording:
    return open_recording(tiny_recording)


# ---- it holds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("spec", FOUNDATION)
def test_float64_is_the_proof(recording, pair64, spec, drafter):
    report = check_policy(recording, pair64, load_policy(spec), drafter, 24)
    assert report.identical == report.cycles >= 24 and not report.notes
    assert report.largest < 1e-5


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("spec", [SMALL, "chain(k=5)"])
def test_float32_leaves_nothing_unexplained(tiny_recording32, pair32, spec, drafter):
    report = check_policy(open_recording(tiny_recording32), pair32, load_policy(spec), drafter, 40)
    assert report.cycles >= 40 and report.unexplained == 0, report.notes
    assert report.identical + report.explained == report.cycles and report.largest < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("spec", FOUNDATION)
def test_whole_recordings(recording, tiny_recording32, pair64, pair32, spec, drafter):
    report = check_policy(recording, pair64, load_policy(spec), drafter, 10_000)
    assert report.identical == report.cycles
    report = check_policy(open_recording(tiny_recording32), pair32, load_policy(spec), drafter, 10_000)
    assert report.unexplained == report.lacking == 0, report.notes


def test_the_command(tiny_recording, tmp_path, capsys):
    report = tmp_path / "report.json"
    options = ["--policy", SMALL, "--policy", "chain(k=2)", "--cycles", "12", "--witness", "2", "--json", str(report)]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([str(tiny_recording), *options]))
    told = capsys.readouterr().out
    assert end.value.code == 0 and told.count(" ok") == 4 and "fidelity holds" in told
    content = json.loads(report.read_text())
    expected = [(load_policy(spec).spec(), drafter, 0) for drafter in ("eagle3", "draft") for spec in (SMALL, "chain(k=2)")]
    assert [(p["policy"], p["drafter"], p["unexplained"]) for p in content["policies"]] == expected
    assert content["dtype"] == "float64" and content["generate"]["identical"] == content["generate"]["texts"] == 6
    assert content["witness"]["cycles"] > 0 and content["witness"]["unexplained"] == 0


@pytest.mark.long
def test_checks_side_by_side_report_the_same(tiny_recording, tmp_path):
    options = ["--policy", SMALL, "--policy", "chain(k=2)", "--cycles", "12", "--skip-generate", "--witness", "0"]
    assert main([str(tiny_recording), *options, "--json", str(tmp_path / "1")]) == 0
    program = [sys.executable, "-m", "live.fidelity"]  # what it sends to other processes must be found there
    subprocess.run([*program, str(tiny_recording), *options, "--jobs", "2", "--json", str(tmp_path / "2")], check=True)
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()


def test_a_stream_policy_learns_on_in_both_worlds(recording, pair64):
    class Learning(Chain):
        scope = "stream"

        def init(self, rows, key):
            return {"accepted": torch.zeros(1, dtype=torch.int64)}

        def select(self, tree, cycle, state):
            return tree.exists & (tree.depth <= 1 + state["accepted"] // 4)

        def observe(self, outcome, cycle, state):
            return {"accepted": state["accepted"] + outcome.accepted.sum()}

    report = check_policy(recording, pair64, Learning(k=3), "draft", 60)
    assert report.identical == report.cycles > 40


# ---- planted bugs ----------------------------------------------------------------------------------------------------


def one_token_less(monkeypatch, pair64) -> None:
    """The verifier stops one token too early: the text is still right, the cycles are not."""
    real = live.verifier.walk

    def walk(kept, choice):
        found = real(kept, choice)
        if int(found.accepted[0]) == 0 or int(found.bonus[0]) < 0:
            return found
        last = found.path[:, -1]
        path = found.path.clone()
        path[:, -1] = -1
        return found._replace(path=path, accepted=found.accepted - 1, bonus=kept.token.gather(1, last[:, None])[:, 0])

    monkeypatch.setattr(live.verifier, "walk", walk)


def one_node_less(monkeypatch, pair64) -> None:
    """The live loop drops the last kept node."""
    real = live.decode.run_cycle

    class Forgetful:
        def __init__(self, policy):
            self.policy = policy

        def __getattr__(self, name):
            return getattr(self.policy, name)

        def select(self, tree, cycle, state):
            kept = self.policy.select(tree, cycle, state)
            kept[0, kept[0].nonzero()[-1]] = False
            return kept

        def observe(self, outcome, cycle, state):
            return state

    monkeypatch.setattr(live.decode, "run_cycle", lambda policy, *rest: real(Forgetful(policy), *rest))


def positions_off_by_one(monkeypatch, pair64) -> None:
    """Drafted nodes of both drafters sit one place too far."""
    eagle, model = pair64.networks["eagle3"], pair64.networks["draft"].model
    tree, grow = model.forward_tree, EagleNetwork.grow
    monkeypatch.setattr(
        model,
        "forward_tree",
        lambda tokens, prefix, places, sees: tree(tokens, prefix, places + 1, sees),
        raising=False,
    )

    def shifted(self, parent, token, width):
        project = eagle.head.project
        eagle.head.project = lambda hidden, tokens, places: project(hidden, tokens, places + 1)
        try:
            return grow(self, parent, token, width)
        finally:
            del eagle.head.project

    monkeypatch.setattr(EagleNetwork, "grow", shifted)


def siblings_swapped(monkeypatch, pair64) -> None:
    """The drafter names its first two children the wrong way round."""
    for network in (pair64.networks["eagle3"], pair64.networks["draft"]):
        real = network.grow

        def swapped(parent, token, width, real=real):
            found = real(parent, token, width)
            index = found.index.clone()
            index[..., :2] = index[..., :2].flip(-1)
            return found._replace(index=index)

        monkeypatch.setattr(network, "grow", swapped, raising=False)


def a_blind_node(monkeypatch, pair64) -> None:
    """Drafted nodes do not see their parents."""
    real = Ancestry.add

    def add(self, parent):
        sees = real(self, parent)
        return sees & (torch.arange(self.size) >= self.size - parent.shape[1])

    monkeypatch.setattr(Ancestry, "add", add)


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("bug", [one_token_less, one_node_less, positions_off_by_one, siblings_swapped, a_blind_node])
def test_planted_bugs_are_found(recording, pair64, monkeypatch, bug, drafter):
    bug(monkeypatch, pair64)
    report = check_policy(recording, pair64, load_policy(SMALL), drafter, 20)
    assert report.unexplained > 0 and report.explained == 0
    assert report.identical + report.unexplained == report.cycles and len(report.notes) == report.unexplained


def test_a_stale_draft_cache_is_found(recording, pair64, monkeypatch):
    """The draft forgets to catch up on the last committed token's features."""
    real = EagleNetwork.advance

    def stale(self, tokens, features, counts, everywhere=False):
        return real(self, tokens, features if everywhere else features.flip(1), counts, everywhere)

    monkeypatch.setattr(EagleNetwork, "advance", stale)
    assert check_policy(recording, pair64, load_policy(SMALL), "eagle3", 20).unexplained > 0


def test_the_command_fails_on_a_bug(tiny_recording, pair64, monkeypatch, capsys):
    one_token_less(monkeypatch, pair64)
    with pytest.raises(SystemExit) as end:
        run_command(
            lambda: main([str(tiny_recording), "--policy", SMALL, "--cycles", "10", "--drafter", "draft", "--skip-generate"])
        )
    told = capsys.readouterr().out
    assert end.value.code == 1 and "FIDELITY BROKEN" in told and "BROKEN" in told.splitlines()[0]
    assert told.splitlines()[1].startswith("    first at text 0, position ")


@pytest.fixture
def changed(tiny_recording: Path, tmp_path: Path) -> Path:
    """The recording with 0.01 nats less on one child of the first root, under a valid checksum."""
    out = shutil.copytree(tiny_recording, tmp_path / "changed")
    writer = RecordingWriter.reopen(out)
    nodes = writer.read_nodes(0)
    first = int(((nodes["node"] == 0) & (nodes["drafter"] == 1)).argmax())
    nodes["child_logprobs"] = nodes["child_logprobs"].copy()
    nodes["child_logprobs"][first, 3] -= 0.01
    writer.rewrite_nodes(0, nodes)
    return out


def test_a_changed_number_in_a_recording_is_found(changed, pair64):
    """Even where the decision stays the same."""
    recording = open_recording(changed, verify=True)
    report = check_policy(recording, pair64, load_policy("chain(k=2)"), "eagle3", 5)
    assert report.unexplained == 0  # the other drafter's numbers
    report = check_policy(recording, pair64, load_policy(SMALL), "draft", 5)
    assert report.unexplained == 1 and report.largest == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(SystemExit) as end:
        options = ["--policy", SMALL, "--cycles", "5", "--drafter", "draft", "--skip-generate", "--witness", "0"]
        run_command(lambda: main([str(changed), *options]))
    assert end.value.code == 1


def test_a_changed_text_is_found(recording, pair64, monkeypatch):
    token = recording.token.copy()
    token[5] = (token[5] + 1) % 90
    monkeypatch.setitem(recording.arrays, "token", token)
    found = check_texts(recording, pair64, exact=True)
    assert (found["texts"], found["identical"], found["unexplained"]) == (6, 5, 1)


def test_the_witness_notices(recording, pair64, monkeypatch):
    assert check_witness(recording, pair64, "draft", 2)["unexplained"] == 0
    one_token_less(monkeypatch, pair64)
    assert check_witness(recording, pair64, "draft", 2)["unexplained"] > 0


def test_a_draft_of_another_vocabulary_size_has_no_witness(recording, tiny_recording, pair64, monkeypatch, capsys):
    """Assisted generation refuses such a pair, although ours decodes with it."""
    assert why_not(pair64, "draft") == ""
    monkeypatch.setattr(pair64.networks["draft"].model.model.config, "vocab_size", 192)
    assert "pads its vocabulary to 192 tokens" in why_not(pair64, "draft")
    monkeypatch.setattr("live.pair.load_pair", lambda *everything: pair64)
    options = ["--policy", "chain(k=2)", "--drafter", "draft", "--cycles", "5", "--skip-generate"]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([str(tiny_recording), *options]))
    told = capsys.readouterr().out
    assert end.value.code == 0 and "no outside witness for it" in told and "fidelity holds" in told


# ---- explanations ----------------------------------------------------------------------------------------------------


def test_largest_difference():
    live_side = {
        (): Answer([5, 6, 7], [-0.1, -2.0, -3.0], 0.5),
        (5,): Answer([8], [-0.1], 0.2),
        (9,): Answer([1], [-9.0], 0.0),
    }
    assert largest_difference(live_side, live_side) == 0.0
    assert largest_difference({}, live_side) == 0.0
    moved = live_side | {(): Answer([6, 5, 7], [-0.4, -0.5, -3.0], 0.5)}  # order does not matter, tokens do
    assert largest_difference(live_side, moved) == pytest.approx(1.6)
    fallen = {(): Answer([5, 6, 8], [-0.1, -2.0, -3.25], 0.5)}  # 7 fell off the list: at most -3.25 there
    assert largest_difference(live_side, fallen) == pytest.approx(0.25)
    narrow = {(): Answer([5, -1], [-0.1, -torch.inf], 0.5)}
    assert largest_difference(narrow, narrow) == 0.0


class Fixed:
    """A drafter of one row that always proposes the same."""

    deepest = None

    def root(self, cycle):
        return torch.tensor([3])

    def expand(self, tree, nodes, branching):
        count = nodes.shape[1]
        token = torch.tensor([7, 8, 9])[:branching].expand(1, count, -1)
        logprob = torch.tensor([-0.5, -1.0, -2.0])[:branching].expand(1, count, -1)
        entropy = torch.full((1, count), 0.7)
        nothing = (nodes < 0)[:, :, None]
        return Children(token.masked_fill(nothing, -1), logprob.masked_fill(nothing, -torch.inf), entropy, torch.zeros_like(token))


def test_same_decision():
    one = torch.ones(1, dtype=torch.int64)
    cycle = Cycle(one > 0, one, one, one, 5 * one, 9 * one, 9 * one, lambda: (one.float(), one.float()), one)
    policy, other = (
        load_policy("eagle3(total_tokens=5, depth=2, top_k=3)"),
        load_policy("eagle3(total_tokens=4, depth=2, top_k=3)"),
    )
    tape = TapedDrafter(Fixed())
    done = draft(policy, tape, cycle, policy.begin(cycle, {}))
    kept = pack(done.tree, done.kept)
    assert set(tape.answers) == {(), (7,), (8,), (9,)}
    assert same_decision(policy, cycle, {}, tape, kept, 3)
    assert not same_decision(other, cycle, {}, tape, kept, 3)
    tape.answers[(9,)] = Answer([7, 8, 9], [-0.01, -5.0, -6.0], 0.1)  # a child of 9 would have been kept
    tape.answers[()] = Answer([7, 8, 9], [-1.2, -1.25, -1.3], 0.1)
    assert not same_decision(policy, cycle, {}, tape, kept, 3)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_compared(tiny_recording, tmp_path, refused):
    assert "no drafter 'nobody'" in refused(lambda: main([str(tiny_recording), "--drafter", "nobody"]))
    assert "unknown policy" in refused(lambda: main([str(tiny_recording), "--policy", "chian"]))
    refused(lambda: main([str(tmp_path / "nowhere")]))
    for option, least in (("--cycles", "1"), ("--witness", "0"), ("--jobs", "1")):  # nothing compared would read as fidelity
        assert f"{option} must be {least}" in refused(lambda o=option: main([str(tiny_recording), o, "-1"]))
    assert "--cycles must be 1" in refused(lambda: main([str(tiny_recording), "--cycles", "0"]))
    other = shutil.copytree(tiny_recording, tmp_path / "other")
    about = json.loads((other / "manifest.json").read_text())
    about["drafters"][1]["weights_sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(about))
    assert "are not those that were recorded" in refused(lambda: main([str(other)]))
