"""The recorder says when a drafter drafts hardly better than chance, and keeps quiet about a sound one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from traces.record import main as record
from traces.schema import from_arrow
from traces.selftest import level_one, warn_near_chance

DRAFTERS = [{"name": "head", "kind": "eagle3"}, {"name": "small", "kind": "lm"}]


def tables(guesses: np.ndarray, truth: np.ndarray, drafter: int = 0):
    """One text ``truth`` [n + 1]; roots at places 0 .. n - 1 guess ``guesses`` [n]; each has one child that must not count."""
    count = len(guesses)
    positions = {"sequence": np.full(count + 1, 4), "position": np.arange(count + 1), "token": truth}
    nodes = {
        "sequence": np.full(2 * count, 4),
        "position": np.repeat(np.arange(count), 2),
        "drafter": np.full(2 * count, drafter, dtype=np.int8),
        "parent": np.tile([-1, 0], count),
        "child_tokens": np.stack([np.repeat(guesses, 2), np.full(2 * count, -7)], axis=1),
    }
    nodes["child_tokens"][1::2, 0] = np.repeat(truth, 2)[2::2][:count] + 1
    return positions, nodes


@pytest.mark.parametrize(("share", "warns"), [(0.0, True), (0.1, True), (0.2, True), (0.45, False), (1.0, False)])
def test_warns_near_chance(share, warns, capsys):
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 500, 401)
    guesses = np.where(np.arange(400) < share * 400, truth[1:], draw.integers(0, 500, 400))
    count, right, chance = level_one(*tables(guesses, truth), 0)
    assert count == 400 and abs(right - share) < 0.02 and chance < 0.01
    warn_near_chance(*tables(guesses, truth), DRAFTERS)
    told = capsys.readouterr().err
    assert ("head drafts" in told and "layers" in told) == warns and "small" not in told


def test_chance_knows_frequent_tokens(capsys):
    """Always guessing the commonest token is right often, and no better than chance."""
    draw = np.random.default_rng(0)
    truth = np.where(draw.random(401) < 0.6, 9, draw.integers(0, 500, 401))
    _, right, chance = level_one(*tables(np.full(400, 9), truth), 0)
    assert right > 0.55 and abs(right - chance) < 0.01
    warn_near_chance(*tables(np.full(400, 9), truth, drafter=1), DRAFTERS)
    assert "small drafts" in capsys.readouterr().err
    warn_near_chance(*tables(np.full(400, 9), np.full(401, 9)), DRAFTERS)  # a text of one token tells nothing
    warn_near_chance(*tables(np.zeros(20, dtype=int), truth[:21]), DRAFTERS)  # nor do twenty positions
    warn_near_chance({}, {}, DRAFTERS)
    assert not capsys.readouterr().err


def test_the_sample_recording_is_sound(capsys):
    folder, drafters = Path(__file__).parents[2] / "traces/samples/reference", ["eagle3", "draft"]
    positions, nodes = (
        from_arrow(pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob(f"{table}-*.parquet"))), drafters)
        for table in ("positions", "nodes")
    )
    for drafter in range(2):
        count, right, chance = level_one(positions, nodes, drafter)
        assert count > 100 and right > 0.5 > 4 * chance
    warn_near_chance(positions, nodes, DRAFTERS)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("layers", [None, [0, 0, 0]])
def test_planted_layers_are_noticed_at_record_time(tmp_path, layers, capsys):
    """The shipped head, fed nothing but the embeddings."""
    head = "reference/eagle3" if layers is None else f"reference/eagle3(layers={layers})"
    prompts = tmp_path / "prompts.jsonl"
    questions = (
        "Tell me a story about a small dog.",
        "Ann sold clips to 48 of her friends. How many clips did she sell altogether?",
    )
    prompts.write_text("".join(f'{{"prompt": "{question}"}}\n' for question in questions))
    size = ["--max-new-tokens", "40", "--cover", "chain(k=1)", "--no-cut-loops"]
    record(["--draft", head, "--prompts", f"story={prompts}", *size, "--out", str(tmp_path / "trace")])
    told = capsys.readouterr().err
    assert "reads what enters layers" in told
    assert ("warning: eagle3 drafts" in told) == (layers is not None), told
