"""Write a recording so that nothing finished is ever lost: shards whole or not at all, resumable, the same to the byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from policies.errors import UserError
from traces import manifest as mf
from traces.begin import begin, drop_parts
from traces.checks import check_nodes, check_positions, check_sequences
from traces.manifest import Manifest, ShardPlan, shard_file
from traces.schema import (
    Arrays,
    from_arrow,
    nodes_schema,
    positions_schema,
    sequences_to_arrow,
    to_arrow,
    write_parquet,
)
from traces.share import ALONE, Share

_DISK_MARGIN = 16 << 20  # for the manifest and whatever else writes to the same disk


class DiskFull(UserError):
    """No room for the next shard; what is finished is kept."""


class RecordingWriter:
    """Writes one recording folder. Make one with :meth:`create` or :meth:`reopen`.

    Usage: ``for plan in writer.pending(): writer.write_shard(plan.index, ...)``, then ``writer.finish()``. A kill at any
    moment loses at most the shard in hand.
    """

    def __init__(self, folder: Path, manifest: Manifest, share: Share = ALONE, elsewhere: frozenset[int] = frozenset()) -> None:
        """:param elsewhere: indices of finished shards that another manifest names."""
        self.folder = folder
        self.manifest = manifest
        self.share, self.elsewhere = share, elsewhere

    @classmethod
    def create(
        cls,
        folder: str | Path,
        manifest_fields: Mapping[str, Any],
        plan: Sequence[ShardPlan],
        resume: bool = False,
        overwrite: bool = False,
        share: Share = ALONE,
    ) -> RecordingWriter:
        """Start a recording, or go on with one.

        :param manifest_fields: JSON-like configuration, at least `drafters` (list of {"name": ..., ...}); all of it must
            be equal on resume, except what stands under "run".
        :param plan: every shard, fixed now.
        :param resume: go on with the recording in the folder (damaged shards are recorded again).
        :param overwrite: delete the recording in the folder, and nothing else in it.
        :param share: which of several recorders of this recording this is; it writes its own shards only.
        Raises UserError when the folder holds a recording and neither is given, when the configuration differs from the
        one to be resumed (the key is named), or when the folder cannot be written.
        """
        folder = Path(folder)
        reserved = {"format", "version", "status", "plan", "shards"} & manifest_fields.keys()
        if reserved:
            raise ValueError(f"manifest keys {sorted(reserved)} are written by RecordingWriter itself")
        manifest: Manifest = {
            "format": mf.FORMAT,
            "version": mf.VERSION,
            "status": "recording",
            **json.loads(json.dumps(dict(manifest_fields), allow_nan=False)),
            "plan": mf.plan_to_json(plan),
            "shards": {},
        }
        manifest, elsewhere = begin(folder, manifest, share, resume, overwrite)
        writer = cls(folder, manifest, share, elsewhere)
        writer._save()
        if share.alone:
            drop_parts(folder)  # the manifest just written has taken them over
        return writer

    @classmethod
    def reopen(cls, folder: str | Path) -> RecordingWriter:
        """Open an existing recording to add to it (see :meth:`rewrite_nodes`). Raises UserError when it is damaged."""
        folder = Path(folder)
        manifest = mf.settle(folder, mf.read_manifest(folder))
        damages = mf.find_damage(folder, manifest)
        if damages:
            first = damages[0]
            raise UserError(f"{folder / first.file} is {first.reason}: record it again with traces.record --resume")
        writer = cls(folder, manifest)
        if mf.part_files(folder):
            writer._save()
            drop_parts(folder)
        return writer

    def pending(self) -> list[ShardPlan]:
        """The shards still to be recorded by this recorder, in plan order."""
        done = {plan.index for plan in mf.finished(self.manifest)} | self.elsewhere
        return [plan for plan in mf.plan_of(self.manifest) if plan.index not in done and self.share.holds(plan.index)]

    def write_shard(
        self,
        index: int,
        sequences: Sequence[Mapping[str, Any]],
        positions: Arrays,
        nodes: Arrays,
        skipped: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write one shard: three files and their manifest entry, or nothing.

        :param sequences: rows of the sequences table, a dictionary each (`prompt_text` and `text` may be missing);
            planned sequences may be left out, none added.
        :param positions: columns [n] (list columns [n, M]); `uniform` NaN = null.
        :param nodes: columns [E] (list columns [E, K]), ordered by sequence, position, drafter, node; `drafter` indexes
            the manifest's drafters; a row of `target_logprobs` that begins with NaN = null. `token` and `logprob` may be
            given: they are checked against the parent's children, and not stored.
        :param skipped: what was left out, for the manifest: sequence, domain, prompt_id, reason.
        Raises ValueError when the tables contradict each other, UserError when the disk is full.
        """
        plan = {shard.index: shard for shard in mf.plan_of(self.manifest)}[index]
        check_sequences(sequences, plan.sequences, plan.domain)
        check_positions(positions, sequences)
        names = mf.drafter_names(self.manifest)
        check_nodes(nodes, positions, len(names))
        tables = {
            "sequences": sequences_to_arrow(sequences),
            "positions": to_arrow(positions, positions_schema(positions["top_tokens"].shape[1])),
            "nodes": to_arrow(nodes, nodes_schema(nodes["child_tokens"].shape[1]), names),
        }
        entries = self._write_temporary(index, tables)
        for name in entries:
            os.replace(_temporary(self.folder, name), self.folder / name)
        mf.sync_folder(self.folder)
        self.manifest["shards"] = mf.in_plan_order(self.manifest, self.manifest["shards"] | entries)
        before = [entry for entry in self.manifest.get(mf.SKIPPED, []) if entry["sequence"] not in plan.sequences]
        if before or skipped:
            self.manifest[mf.SKIPPED] = sorted([*before, *map(dict, skipped)], key=lambda entry: entry["sequence"])
        self._save()

    def finish(self) -> int:
        """Mark the recording complete, if it is; how many shards other recorders still owe.

        Raises ValueError when shards of this recorder are pending.
        """
        if self.pending():
            raise ValueError(f"{len(self.pending())} shards are still to be recorded")
        if self.share.alone:
            self.update_manifest(status="complete")
            return 0
        whole = mf.read_manifest(self.folder)
        lost = {damage.index for damage in mf.find_damage(self.folder, whole, by_content=False, columns=False)}
        missing = len(whole["plan"]) - len([plan for plan in mf.finished(whole) if plan.index not in lost])
        if missing == 0:  # two recorders may find so at once: they write the same bytes
            with _disk_errors(self.folder):
                mf.write_manifest(self.folder, whole, mark=f".{self.share.rank}")
            drop_parts(self.folder)
            self.manifest = whole
        return missing

    def update_manifest(self, **fields: Any) -> None:
        """Set manifest keys (for example `envelope` after a fill) and save."""
        self.manifest |= json.loads(json.dumps(fields, allow_nan=False))
        self._save()

    def read_positions(self, index: int) -> Arrays:
        """The positions of a finished shard, in the form that :meth:`write_shard` takes."""
        return from_arrow(pq.read_table(self.folder / shard_file("positions", index)))

    def read_nodes(self, index: int) -> Arrays:
        """The nodes of a finished shard, in the form that :meth:`write_shard` takes."""
        table = pq.read_table(self.folder / shard_file("nodes", index))
        return from_arrow(table, mf.drafter_names(self.manifest))

    def rewrite_nodes(self, index: int, nodes: Arrays) -> None:
        """Replace the nodes of a finished shard (for `--fill`; see :func:`merge_nodes`), whole or not at all."""
        names = mf.drafter_names(self.manifest)
        check_nodes(nodes, self.read_positions(index), len(names))
        table = to_arrow(nodes, nodes_schema(nodes["child_tokens"].shape[1]), names)
        ((name, entry),) = self._write_temporary(index, {"nodes": table}).items()
        # The file keeps its name, so between the rename and the last save either version may be on disk: see settle().
        self.manifest["shards"][name]["replacement"] = entry
        self._save()
        os.replace(_temporary(self.folder, name), self.folder / name)
        mf.sync_folder(self.folder)
        self.manifest["shards"][name] = entry
        self._save()

    def _save(self) -> None:
        name = mf.NAME if self.share.alone else mf.part_name(self.share.rank, self.share.count)
        with _disk_errors(self.folder):
            mf.write_manifest(self.folder, self.manifest, name)

    def _write_temporary(self, index: int, tables: Mapping[str, pa.Table]) -> dict[str, dict[str, Any]]:
        """Write tables under temporary names and return their manifest entries; on any failure leave nothing."""
        self._check_space(sum(table.nbytes for table in tables.values()))
        entries = {}
        try:
            with _disk_errors(self.folder):
                for kind, table in tables.items():
                    name = shard_file(kind, index)
                    path = _temporary(self.folder, name)
                    write_parquet(table, path)
                    _sync_file(path)
                    size = path.stat().st_size
                    entries[name] = {"sha256": mf.file_sha256(path), "rows": table.num_rows, "bytes": size}
        except BaseException:
            for kind in tables:
                _temporary(self.folder, shard_file(kind, index)).unlink(missing_ok=True)
            raise
        return entries

    def _check_space(self, raw_bytes: int) -> None:
        """Ask for the uncompressed size: an upper bound, so that a shard is not begun that cannot be ended."""
        free = shutil.disk_usage(self.folder).free
        if free < raw_bytes + _DISK_MARGIN:
            raise DiskFull(
                f"no disk space in {self.folder}: the next shard may need {(raw_bytes + _DISK_MARGIN) / 1e6:.0f} MB and "
                f"{free / 1e6:.0f} MB are free; free some and go on with --resume (what is finished is kept)"
            )


def merge_nodes(*parts: Arrays) -> Arrays:
    """Join node tables (drafters recorded apart, or a fill's additions) and put their rows in order.

    Additions to an existing tree go on with its numbering: `node` and `parent` count from that tree's root.
    """
    names = set.intersection(*(set(part) for part in parts))
    merged = {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}
    order = np.lexsort([merged[name] for name in ("node", "drafter", "position", "sequence")])
    return {name: values[order] for name, values in merged.items()}


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"


def _sync_file(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" into a sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"the disk of {folder} is full: free some space and go on with --resume (what is finished is kept)"
        ) from error
