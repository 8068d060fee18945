"""``traces.record --fill`` adds what a policy wants, and touches nothing that was recorded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from live.eagle_network import EagleNetwork
from live.fidelity import check_policy
from policies.registry import load_policy
from sim.replay import replay
from sim.samples import build_samples
from tests.tiny_pair import TinyPair
from traces.manifest import finished
from traces.record import main
from traces.recording import open_recording
from traces.writer import RecordingWriter

WANTED = ("eagle3(top_k=6, depth=16)", "chain(k=25)")


@pytest.fixture(scope="module")
def recorded(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short texts with the default cover, in float64."""
    out = tmp_path_factory.mktemp("recorded") / "trace"
    main(tiny_pair.record(out, "--dtype", "float64", "--limit", "1", "--max-new-tokens", "16"))
    return out


@pytest.fixture(scope="module")
def filled(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(recorded, tmp_path_factory.mktemp("fill") / "trace")
    main(["--fill", str(out), "--policy", WANTED[0], "--policy", WANTED[1], "--positions", "20"])
    return out


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("spec", WANTED)
def test_what_was_missing_is_there(recorded, filled, drafter, spec):
    before, after, policy = open_recording(recorded), open_recording(filled, verify=True), load_policy(spec)
    assert build_samples(before, policy, drafter).missing.sum() > 0
    assert build_samples(after, policy, drafter).missing.sum() == 0
    assert replay(after, policy, drafter).coverage == 1.0 and after.complete


def test_coverage_was_below_one(recorded):
    assert replay(open_recording(recorded), load_policy(WANTED[0]), "draft").coverage < 1


def test_recorded_numbers_stay_bit_for_bit(recorded, filled):
    before, after = RecordingWriter.reopen(recorded), RecordingWriter.reopen(filled)
    for plan in finished(before.manifest):
        old, new = before.read_nodes(plan.index), after.read_nodes(plan.index)
        kept = np.isin(key_of(new), key_of(old))
        assert kept.sum() == len(old["node"]) < len(new["node"])
        for name, values in old.items():
            assert new[name][kept].tobytes() == values.tobytes(), name
    for table in ("sequences", "positions"):
        for path in recorded.glob(f"{table}-*.parquet"):
            assert path.read_bytes() == (filled / path.name).read_bytes()


def key_of(nodes: dict[str, np.ndarray]) -> np.ndarray:
    """(sequence, position, drafter, node) as one number, int64 [E]."""
    sequence, position, drafter, node = (nodes[n].astype(np.int64) for n in ("sequence", "position", "drafter", "node"))
    return ((sequence * 1000 + position) * 2 + drafter) * 1_000_000 + node


def test_additions_on_the_true_path_bear_the_targets_numbers(recorded, filled):
    """All rows on the true path do, whoever recorded them, and no others."""
    recording = open_recording(filled)
    for name in recording.drafters:
        forest = recording.forest(name)
        on_path = forest.depth == 0
        for row in np.flatnonzero(forest.depth > 0):
            place = forest.position[row] + forest.depth[row]
            sequence = np.searchsorted(recording.offset, forest.position[row], side="right") - 1
            inside = place < recording.offset[sequence + 1]
            on_path[row] = on_path[forest.parent[row]] and inside and forest.token[row] == recording.token[place]
        told = forest.on_path_row >= 0
        assert not (told & ~on_path).any()
        missing = np.flatnonzero(on_path & ~told)  # only where no true token follows
        follows = forest.position[missing] + forest.depth[missing] + 1
        ends = recording.offset[np.searchsorted(recording.offset, forest.position[missing], side="right")]
        assert (follows >= ends).all()


def test_the_manifest_tells(filled):
    cover = open_recording(filled).manifest["envelope"]["cover"]
    assert [entry for entry in cover if entry == load_policy(WANTED[0]).to_json()]
    assert [entry for entry in cover if entry == load_policy(WANTED[1]).to_json()]


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
def test_fidelity_holds_behind_a_fill(filled, pair64, drafter):
    recording = open_recording(filled)
    for spec in WANTED:
        report = check_policy(recording, pair64, load_policy(spec), drafter, 8)
        assert report.identical == report.cycles > 0 and not report.notes


def test_filling_again_adds_nothing(filled, capsys):
    before = {path.name: path.read_bytes() for path in filled.glob("*.parquet")}
    main(["--fill", str(filled), "--policy", WANTED[1]])
    assert "0 expansions added" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in filled.glob("*.parquet")} == before


def test_a_fill_shows_a_policy_the_root(recorded, tmp_path):
    """A policy may look at the token that its tree hangs from."""
    file = tmp_path / "by_root.py"
    file.write_text(
        "from policies.chain import Chain\n"
        "from policies.contract import Expansion\n"
        "from policies.registry import policy\n"
        "@policy('by-root', paper='https://example.org')\n"
        "class ByRoot(Chain):\n"
        "    def expand(self, tree, cycle, state):\n"
        "        if tree.levels == 26:\n"
        "            return None\n"
        "        goes_on = (tree.levels < 2) | (tree.token[:, :1] % 2 == 1)\n"
        "        return Expansion(tree.frontier(1).masked_fill(~goes_on, -1), 1)\n"
        "    def select(self, tree, cycle, state):\n"
        "        return tree.exists\n"
    )
    spec, out = f"{file}:ByRoot", shutil.copytree(recorded, tmp_path / "trace")
    missing = [replay(open_recording(out), load_policy(spec), name).coverage for name in ("eagle3", "draft")]
    assert min(missing) < 1
    main(["--fill", str(out), "--policy", spec])
    assert all(replay(open_recording(out), load_policy(spec), name).coverage == 1 for name in ("eagle3", "draft"))


def test_a_fill_that_cannot_be(filled, recorded, tmp_path, refused):
    assert "unknown policy" in refused(lambda: main(["--fill", str(filled), "--policy", "chian"]))
    assert "must be fitted" in refused(lambda: main(["--fill", str(filled), "--policy", "heterospec"]))
    refused(lambda: main(["--fill", str(tmp_path), "--policy", "chain"]))
    broken = shutil.copytree(recorded, tmp_path / "broken")
    with open(broken / "nodes-00001.parquet", "ab") as stream:
        stream.write(b"more")
    assert "nodes-00001.parquet" in refused(lambda: main(["--fill", str(broken), "--policy", "chain"]))


def test_a_fill_goes_on_with_less_memory(recorded, filled, tmp_path, capsys, monkeypatch, refused):
    """More than three trees at their second level are too much: fewer grow side by side, and the same is added."""
    grow, most = EagleNetwork.grow, 3

    def short_grow(self, parent, token, width):
        if len(parent) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return grow(self, parent, token, width)

    monkeypatch.setattr(EagleNetwork, "grow", short_grow)
    short = shutil.copytree(recorded, tmp_path / "trace")
    command = ["--fill", str(short), "--policy", WANTED[0], "--policy", WANTED[1], "--positions", "20"]
    main(command)
    assert "memory ran out: going on with" in "".join(capsys.readouterr())
    less, whole = open_recording(short, verify=True), open_recording(filled)
    for name in whole.drafters:
        np.testing.assert_array_equal(less.forest(name).child_token, whole.forest(name).child_token)
        np.testing.assert_allclose(less.forest(name).child_logprob, whole.forest(name).child_logprob, atol=1e-6)
    most = 0
    again = shutil.copytree(recorded, tmp_path / "again")
    command[1] = str(again)
    assert "positions one at a time" in refused(lambda: main(command))
