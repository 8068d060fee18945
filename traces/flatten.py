"""Shards -> flat arrays over the whole recording: the form in which replay reads it. Vectorised, two shards in memory: one
is read while the one before is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from policies.errors import UserError
from traces.cache import Column, Store
from traces.manifest import Manifest, ShardPlan, drafter_names, shard_file
from traces.schema import FINISHES, from_arrow

_POSITION_COLUMNS = (
    "token",
    "logprob",
    "processed_logprob",
    "entropy",
    "margin",
    "uniform",
    "top_tokens",
    "top_logprobs",
)


def domain_names(manifest: Manifest) -> list[str]:
    """Domains in the manifest's order if it has one, else in the plan's."""
    return list(dict.fromkeys([*manifest.get("domains", []), *(plan["domain"] for plan in manifest["plan"])]))


def build(
    store: Store,
    folder: Path,
    manifest: Manifest,
    plans: Sequence[ShardPlan],
    on_shard: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Fill `store` with the arrays that :class:`traces.recording.Recording` names.

    :param on_shard: told how many shards are done, of how many (a shard counts once per drafter).
    """
    _build_sequences(store, folder, manifest, plans)
    _build_positions(store, folder, plans)
    drafters = drafter_names(manifest)
    for index in range(len(drafters)):

        def told(done: int, before: int = index * len(plans)) -> None:
            on_shard(before + done, len(drafters) * len(plans))

        _build_forest(store, folder, manifest, plans, index, told)


def _build_sequences(store: Store, folder: Path, manifest: Manifest, plans: Sequence[ShardPlan]) -> None:
    tables = [pq.read_table(folder / shard_file("sequences", plan.index)) for plan in plans]
    table = pa.concat_tables(tables)
    domains, finishes = pa.array(domain_names(manifest)), pa.array(list(FINISHES))
    store.put("sequence_ids", table["sequence"].to_numpy())
    store.put("domain_index", pc.index_in(table["domain"], domains).to_numpy().astype(np.int64))
    store.put("finish", pc.index_in(table["finish"], finishes).to_numpy().astype(np.int8))
    store.put("length", table["length"].to_numpy().astype(np.int64))
    store.put("temperature", table["temperature"].to_numpy())
    store.put("offset", _offsets(pc.list_value_length(table["tokens"]).to_numpy()))
    store.put("prompt_offset", _offsets(pc.list_value_length(table["prompt_tokens"]).to_numpy()))
    store.put("prompt_token", pc.list_flatten(table["prompt_tokens"]).to_numpy())


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _build_positions(store: Store, folder: Path, plans: Sequence[ShardPlan]) -> None:
    columns: dict[str, Column] = {}
    paths = [folder / shard_file("positions", plan.index) for plan in plans]
    for plan, table in zip(plans, _ahead(lambda path: pq.read_table(path, columns=list(_POSITION_COLUMNS)), paths), strict=True):
        arrays = from_arrow(table)
        for name in _POSITION_COLUMNS:
            values = arrays[name]
            if name not in columns:
                columns[name] = store.column(name, values.dtype, values.shape[1:])
            columns[name].append(_same_width(values, columns[name].tail, folder, plan))
        del table, arrays, values  # the next one is being read already
    store.settle()
    offset, prompt = store.arrays["offset"], np.diff(store.arrays["prompt_offset"])
    start = np.repeat(offset[:-1] - prompt, np.diff(offset))
    store.put("context_length", np.arange(int(offset[-1]), dtype=np.int64) - start)


def _build_forest(
    store: Store, folder: Path, manifest: Manifest, plans: Sequence[ShardPlan], drafter: int, on_shard: Callable[[int], None]
) -> None:
    """The forest of one drafter. Rows keep the order of the shards, hence of positions."""
    name = drafter_names(manifest)[drafter]
    paths = [folder / shard_file("nodes", plan.index) for plan in plans]
    width = pq.read_schema(paths[0]).field("child_tokens").type.list_size
    row_type = np.int32 if sum(_count(path, name) for path in paths) < 2**31 else np.int64
    columns = {
        "position": ((), np.int64),
        "parent": ((), np.int64),
        "rank": ((), np.int16),
        "depth": ((), np.int16),
        "token": ((), np.int32),
        "logprob": ((), np.float32),
        "entropy": ((), np.float32),
        "child_token": ((width,), np.int32),
        "child_logprob": ((width,), np.float32),
        "child_row": ((width,), row_type),
        "on_path_row": ((), row_type),
        "on_path_logprob": ((width,), np.float32),
    }
    prefix = f"forest{drafter}_"
    out = {column: store.column(prefix + column, dtype, tail) for column, (tail, dtype) in columns.items()}
    root = np.full(int(store.arrays["offset"][-1]), -1, np.int64)
    for done, (plan, table) in enumerate(zip(plans, _ahead(lambda path: _nodes_of(path, name), paths), strict=True), 1):
        if len(table):
            first, on_path = out["position"].rows, out["on_path_logprob"].rows
            kept = table.schema.field("child_tokens").type.list_size
            _same_width(np.empty((0, kept)), (width,), folder, plan)
            found, roots = _flat(store, table, width, row_type, first, on_path)
            root[found["position"][roots]] = first + roots
            for column, values in found.items():
                out[column].append(values)
            del found, values
        del table  # the next one is being read already
        on_shard(done)
    store.settle()
    store.put(prefix + "root", root)


def _flat(
    store: Store, table: pa.Table, width: int, row_type: type, first: int, on_path: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The forest's columns of a shard's trees, and which rows are roots.

    :param table: nodes of one drafter.
    :param first, on_path: how many rows of the forest, and of those on the true path, came before.
    """
    targets = table["target_logprobs"].combine_chunks()
    nodes = from_arrow(table.drop_columns(["target_logprobs"]))
    count = len(table)
    roots = np.flatnonzero(nodes["node"] == 0)
    sizes = np.diff(roots, append=count)
    parent = np.repeat(roots, sizes) + nodes["parent"]
    inner = np.flatnonzero(nodes["parent"] >= 0)
    slot = parent[inner] * width + nodes["rank"][inner]
    position = _flat_positions(store, nodes["sequence"][roots]) + nodes["position"][roots]

    token, logprob = np.empty(count, np.int32), np.zeros(count, np.float32)
    token[roots] = store.arrays["token"][position]
    token[inner] = nodes["child_tokens"].reshape(-1)[slot]
    logprob[inner] = nodes["child_logprobs"].reshape(-1)[slot]
    child_row = np.full(count * width, -1, row_type)
    child_row[slot] = first + inner
    parent += first
    parent[roots] = -1
    known = targets.is_valid().to_numpy(zero_copy_only=False)  # on the true path
    found = {
        "position": np.repeat(position, sizes),
        "parent": parent,
        "token": token,
        "logprob": logprob,
        "child_token": nodes["child_tokens"],
        "child_logprob": nodes["child_logprobs"],
        "child_row": child_row.reshape(count, width),
        "on_path_row": np.where(known, on_path + np.cumsum(known) - 1, -1),
        "on_path_logprob": targets.flatten().to_numpy(zero_copy_only=False).reshape(-1, width),
    }
    return found | {name: nodes[name] for name in ("rank", "depth", "entropy")}, roots


def _ahead(read: Callable[[Path], pa.Table], paths: Sequence[Path]) -> Iterator[pa.Table]:
    """What ``read`` gives of each file, in order; the next one is read while the caller works on this one."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(read, paths[0])
        for following in [*paths[1:], None]:
            table = waiting.result()
            if following is not None:
                waiting = reader.submit(read, following)
            yield table


def _nodes_of(path: Path, drafter: str) -> pa.Table:
    """The nodes of a drafter in a shard, without its name."""
    file = pq.ParquetFile(path)
    if _count(path, drafter) == file.metadata.num_rows:  # a filter copies all that it lets through
        return file.read(columns=[name for name in file.schema_arrow.names if name != "drafter"])
    return pq.read_table(path, filters=pc.field("drafter") == drafter).drop_columns(["drafter"])


def _count(path: Path, drafter: str) -> int:
    """How many nodes of a drafter a shard has."""
    return pc.sum(pc.equal(pq.read_table(path, columns=["drafter"])["drafter"], drafter)).as_py() or 0


def _flat_positions(store: Store, sequence: np.ndarray) -> np.ndarray:
    """Flat position at which each sequence begins. `sequence` [n] holds ids."""
    ids = store.arrays["sequence_ids"]
    order = np.argsort(ids, kind="stable")
    return store.arrays["offset"][order[np.searchsorted(ids[order], sequence)]]


def _same_width(values: np.ndarray, tail: tuple[int, ...], folder: Path, plan: ShardPlan) -> np.ndarray:
    if values.shape[1:] != tail:
        raise UserError(
            f"shard {plan.index} of {folder} keeps {values.shape[1]} candidates and the first one {tail[0]}: "
            "record them with the same settings"
        )
    return values
