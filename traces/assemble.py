"""Make a recording out of shards of others: what traces.merge and traces.slice share. It appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from policies.errors import UserError
from traces import manifest as mf
from traces.manifest import Manifest, ShardPlan, shard_file
from traces.schema import Arrays, from_arrow
from traces.writer import DiskFull, RecordingWriter


class Piece(NamedTuple):
    """What is taken of one shard: which sequences of it, and what is added to their ids."""

    folder: Path
    manifest: Manifest
    plan: ShardPlan
    wanted: tuple[int, ...]
    shift: int = 0


def whole_recording(folder: Path) -> Manifest:
    """The manifest of a recording, every shard of it checked. Raises UserError when it is damaged or unfinished."""
    manifest = mf.settle(folder, mf.read_manifest(folder))
    if damages := mf.find_damage(folder, manifest):
        first = damages[0]
        raise UserError(f"{folder / first.file} is {first.reason}: restore it, or record it again with traces.record --resume")
    if manifest["status"] != "complete":
        raise UserError(f"{folder} is not finished: go on with it by traces.record --resume first")
    return manifest


def texts_of(folder: Path, plan: ShardPlan) -> list[dict[str, Any]]:
    """Of each text of a shard: sequence, domain, prompt_id, temperature."""
    columns = ["sequence", "domain", "prompt_id", "temperature"]
    return pq.read_table(folder / shard_file("sequences", plan.index), columns=columns).to_pylist()


def assemble(out: Path, fields: Mapping[str, Any], pieces: Sequence[Piece]) -> None:
    """Write the pieces as the shards of a new recording in ``out``, one in memory at a time.

    :param fields: the new manifest's, less what the writer adds.
    Raises UserError when there is something at ``out`` already, or no room for it.
    """
    plan = [
        ShardPlan(index, tuple(number + piece.shift for number in piece.wanted), piece.plan.domain, piece.plan.shift + piece.shift)
        for index, piece in enumerate(pieces)
    ]
    with new_folder(out) as building:
        writer = RecordingWriter.create(building, fields, plan)
        for shard, piece in zip(plan, pieces, strict=True):
            writer.write_shard(shard.index, *_tables(piece))
        writer.finish()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to build in beside ``out``, which becomes ``out`` at the end; whatever goes wrong, nothing is left of it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name another folder with --out")
    building = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out} ({error.strerror}): name another one with --out") from error
    try:
        yield building
        os.replace(building, out)
    except DiskFull as error:
        raise UserError(f"there is no room for {out} on its disk: free some and start again") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _tables(piece: Piece) -> tuple[list[dict[str, Any]], Arrays, Arrays, list[dict[str, Any]]]:
    """Sequences, positions, nodes and skipped texts of a piece, renumbered."""
    names = mf.drafter_names(piece.manifest)
    rows = pq.read_table(piece.folder / shard_file("sequences", piece.plan.index)).to_pylist()
    positions = from_arrow(pq.read_table(piece.folder / shard_file("positions", piece.plan.index)))
    nodes = from_arrow(pq.read_table(piece.folder / shard_file("nodes", piece.plan.index)), names)
    skipped = [entry for entry in piece.manifest.get(mf.SKIPPED, []) if entry["sequence"] in piece.wanted]
    wanted = np.array(piece.wanted)
    return (
        [row | {"sequence": row["sequence"] + piece.shift} for row in rows if row["sequence"] in piece.wanted],
        _taken(positions, wanted, piece.shift),
        _taken(nodes, wanted, piece.shift),
        [entry | {"sequence": entry["sequence"] + piece.shift} for entry in skipped],
    )


def _taken(columns: Arrays, wanted: np.ndarray, shift: int) -> Arrays:
    """The rows of these sequences, their ids shifted."""
    mine = np.isin(columns["sequence"], wanted)
    taken = {name: values[mine] for name, values in columns.items()}
    return taken | {"sequence": taken["sequence"] + shift}
