"""A recording as long as one wishes: the texts of a real one again and again, each time under new numbers.

Replay computes every text on its own, so a repeated text costs what a new one costs; only intervals over texts mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from traces.manifest import ShardPlan, shard_file
from traces.recording import Recording, open_recording
from traces.schema import from_arrow
from traces.writer import RecordingWriter

OWN = ("format", "version", "status", "plan", "shards", "skipped")
"""Keys of a manifest that every recording has of its own."""
SHARD = 5000
"""Counted tokens of a shard, about."""


def repeat(trace: str | Path, folder: str | Path, positions: int) -> Path:
    """Write a recording of at least ``positions`` counted tokens, of the given one's first drafter; returns ``folder``."""
    recording = open_recording(trace)
    drafter = recording.drafters[0]
    sources = [_shard(recording, plan, drafter) for plan in recording.plans]
    counted = [sum(row["length"] for row in rows) for rows, _, _ in sources]
    times = [max(1, SHARD // count) for count in counted]
    order, held = [], 0
    while held < positions:
        source = len(order) % len(sources)
        copies = min(times[source], -(-(positions - held) // counted[source]))
        order.append((source, copies))
        held += copies * counted[source]
    plans, first = [], 0
    for index, (source, copies) in enumerate(order):
        texts = copies * len(sources[source][0])
        plans.append(ShardPlan(index, tuple(range(first, first + texts)), recording.plans[source].domain))
        first += texts
    fields = {name: value for name, value in recording.manifest.items() if name not in OWN}
    fields["drafters"] = [described for described in fields["drafters"] if described["name"] == drafter]
    writer = RecordingWriter.create(folder, fields, plans, overwrite=True)
    for plan, (source, copies) in zip(plans, order, strict=True):
        writer.write_shard(plan.index, *_copies(*sources[source], copies, plan.sequences[0]))
    writer.finish()
    return Path(folder)


def _shard(recording: Recording, plan: ShardPlan, drafter: str) -> tuple[list[dict[str, Any]], dict, dict]:
    """Rows, positions and nodes of a shard, its texts numbered from 0."""
    tables = [pq.read_table(recording.folder / shard_file(name, plan.index)) for name in ("sequences", "positions", "nodes")]
    rows, positions, nodes = tables[0].to_pylist(), from_arrow(tables[1]), from_arrow(tables[2], recording.drafters)
    own = nodes["drafter"] == recording.drafters.index(drafter)
    nodes = {name: column[own] for name, column in nodes.items()}
    nodes["drafter"] = np.zeros_like(nodes["drafter"])
    ids = np.array([row["sequence"] for row in rows])
    for table in (positions, nodes):
        table["sequence"] = np.searchsorted(ids, table["sequence"])
    return rows, positions, nodes


def _copies(rows: list[dict[str, Any]], positions: dict, nodes: dict, count: int, first: int) -> tuple[list, dict, dict]:
    texts = len(rows)
    many = [
        row | {"sequence": first + copy * texts + place, "prompt_id": f"{row['prompt_id']}#{first + copy * texts + place}"}
        for copy in range(count)
        for place, row in enumerate(rows)
    ]
    return many, *(_below(table, count, first, texts) for table in (positions, nodes))


def _below(table: dict[str, np.ndarray], count: int, first: int, texts: int) -> dict[str, np.ndarray]:
    """The table ``count`` times, one copy below the other."""
    length = len(table["sequence"])
    found = {name: np.concatenate([column] * count) for name, column in table.items()}
    found["sequence"] = found["sequence"] + first + texts * np.repeat(np.arange(count), length)
    return found
