"""A large recording made of a small one: its texts again and again, under new ids. For timings alone: no new text is in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from traces.manifest import NAME, shard_file
from traces.recording import open_recording
from traces.schema import TABLES


def write_repeated(source: Path, folder: Path, positions: int) -> Path:
    """Write as many copies of the recording ``source`` as hold ``positions`` recorded tokens; the folder of the result.

    A folder that holds such a recording already is left as it is. Raises UserError when ``source`` cannot be opened.
    """
    if (folder / NAME).exists():
        return folder
    recording = open_recording(source)
    copies = -(-positions // len(recording.token))
    manifest = json.loads((source / NAME).read_text())
    step = int(recording.sequence_ids.max()) + 1
    plan, shards = [], {}
    folder.mkdir(parents=True, exist_ok=True)
    for copy in range(copies):
        for shard in manifest["plan"]:
            index = len(plan)
            plan.append(shard | {"index": index, "sequences": [each + copy * step for each in shard["sequences"]]})
            for table in TABLES:
                content = pq.read_table(source / shard_file(table, shard["index"]))
                path = folder / shard_file(table, index)
                pq.write_table(_renumbered(content, copy * step), path, compression="zstd")
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                shards[path.name] = {"sha256": digest, "rows": len(content), "bytes": path.stat().st_size}
    (folder / NAME).write_text(json.dumps(manifest | {"plan": plan, "shards": shards}))  # last: now it is a recording
    return folder


def _renumbered(table: pa.Table, add: int) -> pa.Table:
    place = table.schema.get_field_index("sequence")
    return table.set_column(place, table.schema.field(place), pc.add(table["sequence"], add))
