"""Shards -> flat arrays over the whole recording: the form in which replay reads it. Vectorised, one shard in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from policies.errors import UserError
from traces.cache import Store
from traces.checks import root_rows
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


def build(store: Store, folder: Path, manifest: Manifest, plans: Sequence[ShardPlan]) -> None:
    """Fill `store` with the arrays that :class:`traces.recording.Recording` names."""
    _build_sequences(store, folder, manifest, plans)
    _build_positions(store, folder, plans)
    for index in range(len(drafter_names(manifest))):
        _build_forest(store, folder, manifest, plans, index)


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
    offset = store.arrays["offset"]
    count = int(offset[-1])
    first = 0
    for plan in plans:
        arrays = from_arrow(pq.read_table(folder / shard_file("positions", plan.index), columns=list(_POSITION_COLUMNS)))
        last = first + len(arrays["token"])
        for name in _POSITION_COLUMNS:
            values = arrays[name]
            if first == 0 and name not in store.arrays:
                store.allocate(name, (count, *values.shape[1:]), values.dtype)
            store.arrays[name][first:last] = _same_width(values, store.arrays[name], folder, plan)
        first = last
        store.rest()
    prompt = np.diff(store.arrays["prompt_offset"])
    start = np.repeat(offset[:-1] - prompt, np.diff(offset))
    store.put("context_length", np.arange(count, dtype=np.int64) - start)


def _build_forest(store: Store, folder: Path, manifest: Manifest, plans: Sequence[ShardPlan], drafter: int) -> None:
    """The forest of one drafter. Rows keep the order of the shards, hence of positions."""
    names = drafter_names(manifest)
    paths = [folder / shard_file("nodes", plan.index) for plan in plans]
    counts = [_count(path, names[drafter]) for path in paths]
    rows, on_path = sum(c[0] for c in counts), sum(c[1] for c in counts)
    width = pq.read_schema(paths[0]).field("child_tokens").type.list_size
    row_type = np.int32 if rows < 2**31 else np.int64
    prefix = f"forest{drafter}_"
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
    }
    out = {name: store.allocate(prefix + name, (rows, *shape), dtype) for name, (shape, dtype) in columns.items()}
    path_logprob = store.allocate(prefix + "on_path_logprob", (on_path, width), np.float32)
    root = store.allocate(prefix + "root", (int(store.arrays["offset"][-1]),), np.int64)
    root[...] = -1

    first = path_first = 0
    for plan, path, (count, path_count) in zip(plans, paths, counts, strict=True):
        if count == 0:
            continue
        table = pq.read_table(path, filters=pc.field("drafter") == names[drafter])
        nodes = from_arrow(table, names)
        here = slice(first, first + count)
        _same_width(nodes["child_tokens"], out["child_token"], folder, plan)
        start = root_rows(nodes["node"])
        inner = np.flatnonzero(nodes["parent"] >= 0)
        parent = np.full(count, -1, np.int64)
        parent[inner] = start[inner] + nodes["parent"][inner]
        position = _flat_positions(store, nodes["sequence"]) + nodes["position"]
        slot = parent[inner] * width + nodes["rank"][inner]

        token, logprob = store.arrays["token"][position], np.zeros(count, np.float32)
        token[inner] = nodes["child_tokens"].reshape(-1)[slot]
        logprob[inner] = nodes["child_logprobs"].reshape(-1)[slot]
        child_row = np.full(count * width, -1, row_type)
        child_row[slot] = first + inner
        on_path_mask = ~np.isnan(nodes["target_logprobs"][:, 0])

        out["position"][here] = position
        out["parent"][here] = np.where(parent >= 0, parent + first, -1)
        out["rank"][here], out["depth"][here] = nodes["rank"], nodes["depth"]
        out["token"][here], out["logprob"][here] = token, logprob
        out["entropy"][here] = nodes["entropy"]
        out["child_token"][here], out["child_logprob"][here] = nodes["child_tokens"], nodes["child_logprobs"]
        out["child_row"][here] = child_row.reshape(count, width)
        out["on_path_row"][here] = np.where(on_path_mask, path_first + np.cumsum(on_path_mask) - 1, -1)
        path_logprob[path_first : path_first + path_count] = nodes["target_logprobs"][on_path_mask]
        roots = np.flatnonzero(parent < 0)
        root[position[roots]] = first + roots
        first, path_first = first + count, path_first + path_count
        store.rest()


def _count(path: Path, drafter: str) -> tuple[int, int]:
    """How many nodes of a drafter a shard has, and how many of them are on the true path."""
    wanted = pc.field("drafter") == drafter
    targets = pq.read_table(path, columns=["target_logprobs"], filters=wanted)["target_logprobs"]
    return len(targets), len(targets) - targets.null_count


def _flat_positions(store: Store, sequence: np.ndarray) -> np.ndarray:
    """Flat position at which each row's sequence begins. `sequence` [E] holds ids."""
    ids = store.arrays["sequence_ids"]
    order = np.argsort(ids, kind="stable")
    return store.arrays["offset"][order[np.searchsorted(ids[order], sequence)]]


def _same_width(values: np.ndarray, out: np.ndarray, folder: Path, plan: ShardPlan) -> np.ndarray:
    if values.shape[1:] != out.shape[1:]:
        raise UserError(
            f"shard {plan.index} of {folder} keeps {values.shape[1]} candidates and the first one {out.shape[1]}: "
            "record them with the same settings"
        )
    return values
