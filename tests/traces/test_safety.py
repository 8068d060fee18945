"""Nothing finished is lost, nothing damaged is believed, and bad input gets one sentence."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from policies.errors import UserError
from traces import inspect
from traces import writer as writer_module
from traces.manifest import file_sha256
from traces.store import RecordingWriter, merge_nodes, open_recording


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def edit_manifest(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def test_recording_again_gives_the_same_bytes(fake, recording, tmp_path):
    fake.write(tmp_path / "again")
    assert shard_bytes(tmp_path / "again") == shard_bytes(recording)
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (recording / "manifest.json").read_bytes()


def record_and_die(write, folder, step):
    """In a child process: record, and be killed (no cleanup of any kind) at the given call of os.replace."""
    original, calls = os.replace, [0]

    def replace(source, destination):
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, destination)

    os.replace = replace
    write(folder)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 8, 13])
def test_a_kill_at_any_rename_loses_at_most_the_shard_in_hand(fake, recording, tmp_path, step):
    folder = tmp_path / "killed"
    child = multiprocessing.get_context("fork").Process(target=record_and_die, args=(fake.write, folder, step))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    survived = json.loads((folder / "manifest.json").read_text())["shards"] if step > 1 else {}
    assert len(survived) == 3 * max((step - 2) // 4, 0), "a kill lost a finished shard"
    if survived:
        assert not open_recording(folder).complete
    fake.write(folder, resume=True)
    assert shard_bytes(folder) == shard_bytes(recording)
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_resume_records_only_what_is_pending(fake, tmp_path):
    writer = RecordingWriter.create(tmp_path, fake.FIELDS, fake.PLAN)
    writer.write_shard(1, *fake.make_shard(fake.PLAN[1]))
    with pytest.raises(ValueError, match="2 shards are still to be recorded"):
        writer.finish()
    partial = open_recording(tmp_path)
    assert not partial.complete and partial.sequence_ids.tolist() == [2]
    resumed = RecordingWriter.create(tmp_path, fake.FIELDS, fake.PLAN, resume=True)
    assert [plan.index for plan in resumed.pending()] == [0, 2]


def truncate(path):
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def edit(path):
    """Change one byte and hide it from size and time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES = [(lambda path: path.unlink(), "missing"), (truncate, "truncated"), (edit, "checksum")]


@pytest.mark.parametrize(("damage", "word"), DAMAGES)
@pytest.mark.parametrize("table", ["sequences", "positions", "nodes"])
def test_a_damaged_shard_is_named_and_recorded_again(fake, recording, damage, word, table):
    before = shard_bytes(recording)
    damage(recording / f"{table}-00001.parquet")
    with pytest.raises(UserError, match=rf"{table}-00001.parquet is .*{word}.*--resume"):
        open_recording(recording)
    rest = open_recording(recording, skip_damaged=True)
    assert rest.sequence_ids.tolist() == [0, 1, 3, 4] and not rest.complete
    assert [item.file for item in rest.damaged] == [f"{table}-00001.parquet"]
    resumed = RecordingWriter.create(recording, fake.FIELDS, fake.PLAN, resume=True)
    assert [plan.index for plan in resumed.pending()] == [1]
    fake.write(recording, resume=True)
    assert shard_bytes(recording) == before and open_recording(recording).complete


def test_the_cache_does_not_hide_damage(recording):
    open_recording(recording)
    edit(recording / "nodes-00000.parquet")  # size and time as before: only the checksum can tell
    with pytest.raises(UserError, match="checksum"):
        open_recording(recording, verify=True)
    os.utime(recording / "nodes-00000.parquet")
    with pytest.raises(UserError, match="checksum"):
        open_recording(recording)


def test_another_configuration_is_not_resumed(fake, recording):
    fields = fake.FIELDS | {"envelope": {"cover": ["eagle3"], "top_k": 8}}
    with pytest.raises(UserError, match=r"envelope.top_k = 4, now it is 8; .*--overwrite"):
        RecordingWriter.create(recording, fields, fake.PLAN, resume=True)
    with pytest.raises(UserError, match="recorded with plan"):
        RecordingWriter.create(recording, fake.FIELDS, fake.PLAN[:2], resume=True)
    RecordingWriter.create(recording, fake.FIELDS | {"run": {"command": "another"}}, fake.PLAN, resume=True)
    assert len(shard_bytes(recording)) == 9


def test_a_recording_is_not_overwritten_unasked(fake, recording):
    (recording / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds a recording: .*--resume.*--overwrite"):
        RecordingWriter.create(recording, fake.FIELDS, fake.PLAN)
    (recording / "manifest.json").rename(recording.parent / "manifest.json")
    with pytest.raises(UserError, match=r"holds shards but no manifest.json"):
        RecordingWriter.create(recording, fake.FIELDS, fake.PLAN, resume=True)
    assert len(shard_bytes(recording)) == 9
    writer = RecordingWriter.create(recording, fake.FIELDS, fake.PLAN, overwrite=True)
    assert writer.pending() == fake.PLAN and not shard_bytes(recording)
    assert (recording / "notes.txt").read_text() == "mine"


def test_bad_manifests(recording, tmp_path):
    with pytest.raises(UserError, match=r"holds no recording .*give a folder"):
        open_recording(tmp_path)
    edit_manifest(recording, version=2)
    with pytest.raises(UserError, match="format version 2, newer than version 1.*upgrade specreplay"):
        open_recording(recording)
    edit_manifest(recording, version=1, shards=None)
    with pytest.raises(UserError, match="lacks a valid 'shards'"):
        open_recording(recording)
    whole = json.loads((recording / "manifest.json").read_text()) | {"shards": {}}
    odd = {"target": None, "sampling": "x", "context_limit": "256", "drafters": [{}], "plan": [{"index": 0}], "shards": {"a": 1}}
    for key, value in odd.items():
        edit_manifest(recording, **whole | {key: value})
        with pytest.raises(UserError, match=f"lacks a valid '{key}': restore it"):
            open_recording(recording)
    with pytest.raises(UserError, match=r"holds no recording .*give a folder"):
        open_recording(recording / "manifest.json")
    edit_manifest(recording, format="other")
    with pytest.raises(UserError, match="does not describe a SpecReplay recording"):
        open_recording(recording)
    truncate(recording / "manifest.json")
    with pytest.raises(UserError, match="is damaged"):
        open_recording(recording)


@pytest.mark.parametrize("column", ["length", "temperature"])
def test_a_column_of_another_type_is_damage(recording, capsys, column):
    """Whatever checksum stands in the manifest."""
    path = recording / "sequences-00001.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, table[column].cast("string")), path)
    shards = json.loads((recording / "manifest.json").read_text())["shards"]
    shards[path.name] |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    edit_manifest(recording, shards=shards)
    with pytest.raises(UserError, match=rf"{path.name} is of another form \(its column '{column}' holds string, not .*restore it"):
        open_recording(recording)
    assert open_recording(recording, skip_damaged=True).sequence_ids.tolist() == [0, 1, 3, 4]
    for options in ([], ["--verify"]):
        assert inspect.main([str(recording), *options]) == 1
        assert "DAMAGED   sequences-00001.parquet is of another form" in capsys.readouterr().out


def test_nothing_finished_yet(fake, tmp_path):
    RecordingWriter.create(tmp_path, fake.FIELDS, fake.PLAN)
    with pytest.raises(UserError, match="no finished shard: .*--resume"):
        open_recording(tmp_path)


def test_a_full_disk_is_found_before_and_during_a_shard(fake, tmp_path, monkeypatch):
    writer = RecordingWriter.create(tmp_path, fake.FIELDS, fake.PLAN)
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"no disk space .*--resume"):
            writer.write_shard(0, *fake.make_shard(fake.PLAN[0]))

    def fill_up(table, path):
        path.write_bytes(b"half a shard")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_parquet", fill_up)
        with pytest.raises(UserError, match=r"disk of .* is full: .*--resume"):
            writer.write_shard(0, *fake.make_shard(fake.PLAN[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    writer.write_shard(0, *fake.make_shard(fake.PLAN[0]))


def test_an_output_folder_that_is_a_file(fake, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        RecordingWriter.create(tmp_path / "file", fake.FIELDS, fake.PLAN)


def additions(nodes, k):
    """Expand the first unexpanded child of every root, as a fill would."""
    rows = []
    for first in np.flatnonzero(nodes["node"] == 0):
        last = first + 1
        while last < len(nodes["node"]) and nodes["node"][last]:
            last += 1
        taken = nodes["rank"][first:last][nodes["parent"][first:last] == 0]
        free = [rank for rank in range(k) if rank not in taken]
        if free:
            rows.append((first, last - first, free[0]))
    sources, sizes, ranks = (np.array(column) for column in zip(*rows, strict=True))
    added = {name: values[sources].copy() for name, values in nodes.items()}
    added |= {"node": sizes, "parent": np.zeros_like(sizes), "rank": ranks, "depth": np.ones_like(sizes)}
    return added | {"target_logprobs": np.full((len(sizes), k), np.nan, dtype=np.float32)}


@pytest.mark.parametrize("killed_at", [None, 1, 2, 3])
def test_filling_adds_nodes_whole_or_not_at_all(fake, recording, monkeypatch, killed_at):
    writer = RecordingWriter.reopen(recording)
    before, nodes = open_recording(recording).forest("lm"), writer.read_nodes(0)
    merged = merge_nodes(nodes, additions(nodes, fake.K))
    replace, calls = os.replace, [0]

    def stop(source, destination):
        calls[0] += 1
        if calls[0] == killed_at:
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        if killed_at:
            with pytest.raises(KeyboardInterrupt):
                writer.rewrite_nodes(0, merged)
        else:
            writer.rewrite_nodes(0, merged)
    opened = open_recording(recording)
    assert opened.complete
    grown = len(opened.forest("lm").parent) > len(before.parent)
    assert grown == (killed_at in (None, 3))
    RecordingWriter.reopen(recording).rewrite_nodes(0, merged)
    assert len(open_recording(recording).forest("lm").parent) > len(before.parent)


def test_reopening_a_damaged_recording_is_refused(recording):
    truncate(recording / "nodes-00002.parquet")
    with pytest.raises(UserError, match="nodes-00002.parquet is"):
        RecordingWriter.reopen(recording)
