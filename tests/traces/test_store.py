"""What is written is what is read, by us and by others."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.errors import UserError
from traces.schema import CACHE, FINISHES
from traces.store import RecordingWriter, ShardPlan, open_recording


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.7]),
    sizes=st.sampled_from([(1, 2), (1, 12), (30, 31)]),
)
def test_arrays_equal_what_was_written(fake, tmp_path_factory, counts, temperature, sizes):
    folder = tmp_path_factory.mktemp("trace")
    ids = iter(range(100, 200))
    plan = [ShardPlan(i, tuple(next(ids) for _ in range(n)), ("math", "story")[i % 2]) for i, n in enumerate(counts)]
    writer = RecordingWriter.create(folder, fake.FIELDS, plan)
    shards = [fake.make_shard(shard, temperature, sizes) for shard in plan]
    for shard, tables in zip(plan, shards, strict=True):
        writer.write_shard(shard.index, *tables)
    writer.finish()
    opened = open_recording(folder)

    rows = [row for shard in shards for row in shard[0]]
    assert opened.complete and opened.drafters == ["eagle3", "lm"] and opened.domains == ["math", "story"]
    assert opened.sequence_ids.tolist() == [row["sequence"] for row in rows]
    assert [opened.domains[i] for i in opened.domain_index] == [row["domain"] for row in rows]
    assert [FINISHES[i] for i in opened.finish] == [row["finish"] for row in rows]
    assert opened.length.tolist() == [row["length"] for row in rows]
    assert opened.temperature.tolist() == [np.float32(temperature)] * len(rows)
    for index, row in enumerate(rows):
        assert opened.prompt_tokens(index).tolist() == row["prompt_tokens"]
        here = slice(*opened.offset[index : index + 2])
        assert opened.token[here].tolist() == row["tokens"].tolist()
        assert opened.context_length[here].tolist() == [
            len(row["prompt_tokens"]) + j for j in range(len(row["tokens"]))
        ]
    for name in ("logprob", "processed_logprob", "entropy", "margin", "uniform", "top_tokens", "top_logprobs"):
        written = np.concatenate([shard[1][name] for shard in shards])
        np.testing.assert_array_equal(getattr(opened, name), written)
        assert getattr(opened, name).dtype == (written.dtype if written.dtype.kind == "f" else np.int32)
    assert opened.sequences()[0]["prompt_text"] == rows[0]["prompt_text"] and opened.sequences()[0]["text"] is None
    for drafter in (0, 1):
        check_forest(opened, drafter, [shard[2] for shard in shards])


def check_forest(opened, drafter, written):
    """Row by row against the written tables, the slow and plain way."""
    forest = opened.forest(opened.drafters[drafter])
    table = {name: np.concatenate([nodes[name] for nodes in written]) for name in written[0]}
    kept = np.flatnonzero(table["drafter"] == drafter)
    first_position = dict(zip(opened.sequence_ids.tolist(), opened.offset.tolist(), strict=False))
    assert len(forest.parent) == len(kept)
    children = {}
    for row, source in enumerate(kept):
        flat = first_position[int(table["sequence"][source])] + int(table["position"][source])
        node, parent, rank = (int(table[name][source]) for name in ("node", "parent", "rank"))
        assert forest.position[row] == flat and forest.rank[row] == rank
        assert forest.depth[row] == table["depth"][source]
        assert forest.entropy[row] == table["entropy"][source]
        assert forest.parent[row] == (-1 if node == 0 else row - node + parent)
        if node == 0:
            assert forest.root[flat] == row
            assert forest.token[row] == opened.token[flat] and forest.logprob[row] == 0
        else:
            assert forest.token[row] == table["child_tokens"][source - node + parent, rank]
            assert forest.logprob[row] == table["child_logprobs"][source - node + parent, rank]
            children[int(forest.parent[row]), rank] = row
    np.testing.assert_array_equal(forest.child_token, table["child_tokens"][kept])
    np.testing.assert_array_equal(forest.child_logprob, table["child_logprobs"][kept])
    np.testing.assert_array_equal(forest.target_logprob, table["target_logprobs"][kept])
    expanded = np.full(forest.child_row.shape, -1)
    for (parent, rank), row in children.items():
        expanded[parent, rank] = row
    np.testing.assert_array_equal(forest.child_row, expanded)


def test_a_position_without_a_tree_has_no_root(fake, tmp_path):
    rows, positions, nodes = fake.make_shard(fake.PLAN[0])
    kept = (nodes["position"] != 1) | (nodes["drafter"] == 0)
    writer = RecordingWriter.create(tmp_path / "trace", fake.FIELDS, fake.PLAN[:1])
    writer.write_shard(0, rows, positions, {name: values[kept] for name, values in nodes.items()})
    writer.finish()
    opened = open_recording(tmp_path / "trace")
    assert (opened.forest("eagle3").root >= 0).all()
    missing = np.flatnonzero(opened.forest("lm").root < 0)
    assert missing.tolist() == [first + 1 for first in opened.offset[:-1]]


def test_a_recording_without_stored_forests_opens(fake, tmp_path):
    fields = fake.FIELDS | {"drafters": []}
    rows, positions, nodes = fake.make_shard(fake.PLAN[0])
    writer = RecordingWriter.create(tmp_path / "trace", fields, fake.PLAN[:1])
    writer.write_shard(0, rows, positions, {name: values[:0] for name, values in nodes.items()})
    writer.finish()
    opened = open_recording(tmp_path / "trace")
    assert opened.drafters == [] and len(opened.token) == len(positions["token"])
    with pytest.raises(UserError, match="no drafter 'eagle3'"):
        opened.forest("eagle3")


def test_other_programs_read_it(recording, fake):
    nodes = pl.read_parquet(recording / "nodes-*.parquet")
    assert nodes.height == sum(len(fake.make_shard(plan)[2]["node"]) for plan in fake.PLAN)
    assert set(nodes["drafter"].cast(pl.String)) == {"eagle3", "lm"}
    key = ["sequence", "position", "drafter"]
    # The join of traces/README.md: a node's token and log-prob are its parent's child at its rank.
    joined = nodes.filter(pl.col("parent") >= 0).join(
        nodes.select(*key, parent="node", tokens="child_tokens", logprobs="child_logprobs"), on=[*key, "parent"]
    )
    joined = joined.with_columns(
        token=pl.col("tokens").arr.get(pl.col("rank")), logprob=pl.col("logprobs").arr.get(pl.col("rank"))
    ).sort(*key, "node")
    forest = open_recording(recording).forest("lm")
    inner = joined.filter(pl.col("drafter").cast(pl.String) == "lm", pl.col("sequence") == 0)
    first = np.flatnonzero((forest.parent >= 0) & (forest.position < open_recording(recording).offset[1]))
    assert inner["token"].to_list() == forest.token[first].tolist()
    assert inner["logprob"].to_list() == forest.logprob[first].tolist()
    on_path = nodes.filter(pl.col("target_logprobs").is_not_null())
    assert 0 < on_path.height < nodes.height


def test_second_opening_maps_the_cache_and_a_touched_shard_makes_it_stale(recording):
    first = open_recording(recording)
    (cache,) = [path for path in (recording / CACHE).iterdir() if path.is_dir()]
    stamp = (cache / "token.npy").stat().st_mtime_ns
    np.testing.assert_array_equal(open_recording(recording).token, first.token)
    assert (cache / "token.npy").stat().st_mtime_ns == stamp
    os.utime(recording / "positions-00000.parquet", ns=(1, 1))
    np.testing.assert_array_equal(open_recording(recording).token, first.token)
    assert not cache.exists(), "a cache of untrusted files was kept"
    assert len([path for path in (recording / CACHE).iterdir() if path.is_dir()]) == 1


def test_building_the_cache_tells_how_far_it_is(recording):
    told = []
    found = open_recording(recording, on_shard=lambda done, of: told.append((done, of)))
    shards = len(found.plans) * len(found.drafters)
    assert shards > 1 and told == [(done, shards) for done in range(1, shards + 1)]
    told.clear()
    open_recording(recording, on_shard=lambda done, of: told.append((done, of)))
    assert told == []


def test_a_disk_that_is_full_is_noticed(tmp_path):
    """In a process of its own, whose files may not grow beyond 4 kB: a shorter array must not pass for the whole one."""
    code = (
        "import resource, signal, sys, numpy as np; from pathlib import Path; from traces.cache import Column\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "column = Column(Path(sys.argv[1]), np.int64, ())\n"
        "try:\n"
        "    [column.append(np.arange(300)) for _ in range(3)]\n"
        "    column.finished()\n"
        "except OSError:\n"
        "    sys.exit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "array.npy")], cwd=Path(__file__).parents[2])
    assert ended.returncode == 7


def test_large_arrays_are_mapped_and_read_only(fake, tmp_path):
    plan = [ShardPlan(0, tuple(range(40)), "math")]
    writer = RecordingWriter.create(tmp_path / "trace", fake.FIELDS, plan)
    writer.write_shard(0, *fake.make_shard(plan[0], nodes=(30, 31)))
    forest = open_recording(tmp_path / "trace").forest("eagle3")
    assert isinstance(forest.child_logprob, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        forest.child_logprob[0] = 0


@pytest.mark.parametrize("temporary_works", [True, False])
def test_a_folder_that_cannot_be_written_is_still_read(recording, tmp_path, monkeypatch, temporary_works):
    expected = open_recording(recording).forest("eagle3").child_row.copy()
    shutil.rmtree(recording / CACHE)
    (recording / CACHE).write_text("a file where the cache should be: fails for root too")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("scratch" if temporary_works else "absent")))
    (tmp_path / "scratch").mkdir()
    opened = open_recording(recording)
    assert bool(list((tmp_path / "scratch").iterdir())) == temporary_works
    np.testing.assert_array_equal(opened.forest("eagle3").child_row, expected)
    del opened
    assert not list((tmp_path / "scratch").iterdir()), "temporary arrays outlived the recording"


def test_inner_checks_refuse_a_broken_forest(fake, tmp_path):
    writer = RecordingWriter.create(tmp_path / "trace", fake.FIELDS, fake.PLAN)
    rows, positions, nodes = fake.make_shard(fake.PLAN[0], nodes=(5, 9))
    inner = np.flatnonzero(nodes["node"] == 3)[0]

    def broken(name, row, value):
        return nodes | {name: np.concatenate([nodes[name][:row], [value], nodes[name][row + 1 :]])}

    for tables, message in [
        (broken("parent", inner, 3), "stands before its parent"),
        (broken("rank", inner, fake.K), "outside the recorded children"),
        (broken("depth", inner, 40), "depth is not its parent's plus one"),
        (broken("entropy", inner, np.float32(np.nan)), "NaN"),
        (broken("drafter", inner, 1 - nodes["drafter"][inner]), "disagree"),
        (broken("node", inner, 7), "not numbered"),
        ({name: values[::-1] for name, values in nodes.items()}, "not a root|not numbered|not ordered"),
        (nodes | {"token": np.full(len(nodes["node"]), 99)}, "token is not its parent's child"),
        ({name: values for name, values in nodes.items() if name != "rank"}, "rank"),
    ]:
        with pytest.raises((ValueError, KeyError), match=message):
            writer.write_shard(0, rows, positions, tables)
    with pytest.raises(ValueError, match="differ from the sequences"):
        writer.write_shard(0, rows, positions | {"token": positions["token"] + 1}, nodes)
    with pytest.raises(ValueError, match="domain 'story' in a shard of 'math'"):
        writer.write_shard(0, [row | {"domain": "story"} for row in rows], positions, nodes)
    with pytest.raises(ValueError, match="not planned"):
        writer.write_shard(1, rows, positions, nodes)
    assert not list(tmp_path.glob("trace/*.parquet")) and writer.pending() == fake.PLAN


def test_shards_are_ordinary_files_under_their_final_names(recording):
    names = {path.name for path in Path(recording).iterdir()}
    tables = {f"{table}-0000{i}.parquet" for table in ("sequences", "positions", "nodes") for i in range(3)}
    assert names == tables | {"manifest.json"}
    assert all(stat.S_ISREG((recording / name).stat().st_mode) for name in names)
