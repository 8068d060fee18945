"""The one-screen answer to: what is in this folder, and is it intact?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from benchmarks.recording_memory import sizes
from traces import inspect
from traces.manifest import finished
from traces.record import split
from traces.schema import CACHE
from traces.store import RecordingWriter


@pytest.fixture(autouse=True)
def no_simulator(monkeypatch):
    monkeypatch.setattr(inspect, "tau_at_a_glance", lambda folder: {"math": 3.21})


def test_text_and_json_tell_the_same(recording, capsys, fake):
    assert inspect.main([str(recording), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    shards = [(plan, fake.make_shard(plan)) for plan in fake.PLAN]
    for domain, row in summary["domains"].items():
        mine = [tables for plan, tables in shards if plan.domain == domain]
        assert row["sequences"] == sum(len(rows) for rows, _, _ in mine)
        assert row["tokens"] == sum(text["length"] for rows, _, _ in mine for text in rows)
        assert row["positions"] == sum(len(positions["token"]) for _, positions, _ in mine)
        for drafter, name in enumerate(("eagle3", "lm")):
            assert row["nodes"][name] == sum((nodes["drafter"] == drafter).sum() for _, _, nodes in mine)
        assert row["loop"] == sum(text["finish"] == "loop" for rows, _, _ in mine for text in rows)
    assert summary["tau"] == {"math": 3.21}
    assert sum(summary["bytes"].values()) == sum(path.stat().st_size for path in recording.glob("*.parquet"))
    assert not (recording / CACHE).exists(), "looking must not write"

    assert inspect.main([str(recording)]) == 0
    text = capsys.readouterr().out
    for expected in ("complete", "3 of 3 finished", "eagle3", "lm", "top_k 4", "bytes per position", "3.21", "story"):
        assert expected in text
    assert len(text.splitlines()) <= 24


def test_damage_is_named_and_is_the_exit_status(recording, capsys):
    path = recording / "nodes-00001.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    (recording / "positions-00002.parquet").unlink()
    assert inspect.main([str(recording), "--verify"]) == 1
    text = capsys.readouterr().out
    assert "2 DAMAGED FILES" in text and "positions-00002.parquet is missing" in text
    assert "nodes-00001.parquet is changed since it was recorded" in text
    assert "3.21" not in text
    left = [path.stat().st_size for path in recording.glob("*-00000.parquet")]  # the one shard that is whole
    assert f"size      {sum(left) / 1e6:.2f} MB: " in text and text.endswith("in shards that are whole\n")


def test_no_tau_of_a_tree_that_is_not_covered(tiny_recording, tmp_path, monkeypatch, capsys):
    """Beams that lack the expansions off the true path leave more room to those on it."""
    monkeypatch.undo()
    assert list(inspect.tau_at_a_glance(tiny_recording)) == ["story", "math", "mean"]
    part = shutil.copytree(tiny_recording, tmp_path / "part", ignore=shutil.ignore_patterns(CACHE))
    writer = RecordingWriter.reopen(part)
    for plan in finished(writer.manifest):
        nodes = writer.read_nodes(plan.index)
        writer.rewrite_nodes(plan.index, {name: values[nodes["node"] == 0] for name, values in nodes.items()})
    assert inspect.main([str(part)]) == 0
    told = capsys.readouterr().out
    assert "no tau: " in told and f"traces.record --fill {part} --policy eagle3" in told and "tau: EAGLE" not in told


def test_an_unfinished_recording(fake, tmp_path, capsys):
    RecordingWriter.create(tmp_path, fake.FIELDS, fake.PLAN)
    assert inspect.main([str(tmp_path)]) == 0
    assert "0 of 3 finished" in capsys.readouterr().out


def test_the_command_fails_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "traces.inspect", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "holds no recording" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_is_light():
    code = (
        "import sys, traces.inspect, traces.prompts\n"
        "try: traces.inspect.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'scipy', 'pyarrow', 'polars', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_reading_and_writing_need_neither_torch_nor_polars():
    code = "import sys, traces.store; heavy = {'torch', 'transformers', 'polars', 'pandas'} & set(sys.modules); assert not heavy"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_a_node_and_a_position_take(recording):
    """benchmarks.recording_memory adds up what Parquet says of every shard."""
    nodes = [pq.ParquetFile(path) for path in recording.glob("nodes-*.parquet")]
    count = sum(file.metadata.num_rows for file in nodes)
    raw = sum(file.metadata.row_group(i).total_byte_size for file in nodes for i in range(file.metadata.num_row_groups))
    disk = sum(path.stat().st_size for path in recording.glob("nodes-*.parquet"))
    told = sizes(recording)
    assert f"trace: {count:,} expanded nodes, 4 children kept of each" in told
    assert f"an expanded node         {raw / count:8,.0f} bytes raw, {disk / count:8,.0f} bytes on disk" in told
    assert "its tree by eagle3" in told and "its tree by lm" in told


def test_where_the_time_of_a_recording_went():
    seconds = {"generate": 1.0, "target": 0.0, "write": 3.0}
    assert split(seconds) == "time spent: generate 1.0 s (25%), target 0.0 s (0%), write 3.0 s (75%)"
