"""The columns of a recording, format version 1: what each table holds and how it lies in Parquet.

`traces/README.md` is the promise made to readers; this file is its single source in code. Two forms of a table exist:
an Arrow table (on disk) and a dictionary of numpy arrays (what the recorder hands over and gets back), and
:func:`to_arrow` / :func:`from_arrow` convert one into the other without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TABLES = ("sequences", "positions", "nodes")
CACHE = ".cache"
"""Subfolder of a recording that only this program reads; it may be deleted at any time."""
FINISHES = ("eos", "length", "loop")
ROOT = -1
"""Parent and rank of a root; also the token that pads a row with fewer than K children."""

_ROW_GROUP = 1 << 18
_COMPRESSION_LEVEL = 3  # measured: 9 saves nothing, since mantissas do not compress

Arrays = dict[str, np.ndarray]
"""Column name -> array with one entry per row; list columns are [rows, width]."""


def sequences_schema() -> pa.Schema:
    """One row per generated text."""
    return pa.schema(
        [
            ("sequence", pa.int64()),
            ("domain", pa.string()),
            ("prompt_id", pa.string()),
            ("prompt_text", pa.string()),
            ("prompt_tokens", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.int32())),
            ("length", pa.int32()),
            ("finish", pa.string()),
            ("temperature", pa.float32()),
            ("text", pa.string()),
        ]
    )


def positions_schema(top_m: int) -> pa.Schema:
    """One row per generated token; `top_m` = M target candidates kept per position."""
    return pa.schema(
        [
            ("sequence", pa.int64()),
            ("position", pa.int32()),
            ("token", pa.int32()),
            ("logprob", pa.float32()),
            ("processed_logprob", pa.float32()),
            ("entropy", pa.float32()),
            ("margin", pa.float32()),
            ("uniform", pa.float64()),
            ("top_tokens", pa.list_(pa.int32(), top_m)),
            ("top_logprobs", pa.list_(pa.float32(), top_m)),
        ]
    )


def nodes_schema(top_k: int) -> pa.Schema:
    """One row per expanded draft node; `top_k` = K children kept per expansion."""
    return pa.schema(
        [
            ("sequence", pa.int64()),
            ("position", pa.int32()),
            ("drafter", pa.dictionary(pa.int8(), pa.string())),
            ("node", pa.int32()),
            ("parent", pa.int32()),
            ("rank", pa.int16()),
            ("depth", pa.int16()),
            ("entropy", pa.float32()),
            ("child_tokens", pa.list_(pa.int32(), top_k)),
            ("child_logprobs", pa.list_(pa.float32(), top_k)),
            ("target_logprobs", pa.list_(pa.float32(), top_k)),
        ]
    )


def odd_column(path: Path, table: str) -> str | None:
    """What is wrong with the columns of a Parquet file, in words; None where they are those of a table. Others may be there too."""
    wanted = {"sequences": sequences_schema(), "positions": positions_schema(1), "nodes": nodes_schema(1)}[table]
    try:
        found = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        return f"no Parquet: {error}"
    for field in wanted:
        if field.name not in found.names:
            return f"it has no column {field.name!r}"
        if not _alike(field.type, found.field(field.name).type):
            return f"its column {field.name!r} holds {found.field(field.name).type}, not {field.type}"
    return None


def _alike(ours: pa.DataType, theirs: pa.DataType) -> bool:
    """Whether two types are the same but for the number of candidates kept, and for the width of a dictionary's indices."""
    if ours.id != theirs.id:
        return False
    return ours.value_type == theirs.value_type if hasattr(ours, "value_type") else ours == theirs


# Bytes of like significance lie together: the exponents of log-probabilities compress, and so do the high bytes of token
# ids. Counters are near-constant differences. Everything else repeats, and takes a dictionary.
_SPLIT = {"logprob", "processed_logprob", "entropy", "margin", "uniform"}
_SPLIT |= {"top_tokens", "top_logprobs", "child_tokens", "child_logprobs", "target_logprobs"}
_DELTA = {"position", "node", "parent"}
_REPEATED = {"sequence", "domain", "drafter", "rank", "depth", "length", "finish", "temperature"}


def sequences_to_arrow(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as dictionaries -> Arrow table. Missing `prompt_text` and `text` are null; other columns are required."""
    columns = []
    for field in sequences_schema():
        optional = field.name in ("prompt_text", "text")
        values = [row.get(field.name) if optional else row[field.name] for row in rows]
        if pa.types.is_list(field.type):
            values = [np.asarray(value, dtype=np.int32) for value in values]
        columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=sequences_schema())


def to_arrow(arrays: Mapping[str, np.ndarray], schema: pa.Schema, drafters: Sequence[str] = ()) -> pa.Table:
    """Numpy columns -> Arrow table of `schema`. NaN in `uniform`, and rows of `target_logprobs` that begin with NaN,
    become null; `drafter` holds indices into `drafters`.

    Raises ValueError when a column is missing, has another length or width, or does not fit its type.
    """
    rows = len(arrays["sequence"])
    columns = []
    for field in schema:
        if field.name not in arrays:
            raise ValueError(f"column {field.name!r} is missing")
        values = np.ascontiguousarray(arrays[field.name])
        is_list = pa.types.is_fixed_size_list(field.type)
        expected = (rows, field.type.list_size) if is_list else (rows,)
        if values.shape != expected:
            raise ValueError(f"column {field.name!r} has shape {values.shape}, expected {expected}")
        if is_list:
            null = np.isnan(values[:, 0]) if field.name == "target_logprobs" else None
            flat = pa.array(_cast(values.reshape(-1), field.type.value_type, field.name))
            mask = pa.array(null) if null is not None and null.any() else None
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type, mask=mask))
        elif field.name == "drafter":
            codes = pa.array(_cast(values, pa.int8(), field.name))
            columns.append(pa.DictionaryArray.from_arrays(codes, pa.array(list(drafters), pa.string())))
        elif field.name == "uniform":
            columns.append(pa.array(values.astype(np.float64), field.type, mask=np.isnan(values)))
        else:
            columns.append(pa.array(_cast(values, field.type, field.name)))
    return pa.Table.from_arrays(columns, schema=schema)


def from_arrow(table: pa.Table, drafters: Sequence[str] = ()) -> Arrays:
    """The inverse of :func:`to_arrow`: nulls come back as NaN, `drafter` as int8 indices into `drafters`."""
    arrays: Arrays = {}
    table = table.unify_dictionaries()  # row groups may list the drafters in different orders
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if pa.types.is_fixed_size_list(field.type):
            width = field.type.list_size
            valid = column.is_valid().to_numpy(zero_copy_only=False)
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
            if column.null_count:
                filled = np.full((len(column), width), np.nan, dtype=np.float32)
                filled[valid] = values
                values = filled
            arrays[field.name] = values
        elif field.name == "drafter":
            names = column.dictionary.to_pylist()
            place = np.array([drafters.index(name) for name in names] or [0], dtype=np.int8)
            arrays[field.name] = place[column.indices.to_numpy(zero_copy_only=False)]
        else:
            arrays[field.name] = column.to_numpy(zero_copy_only=False)
            if field.name == "uniform":
                arrays[field.name] = arrays[field.name].astype(np.float64)
    return arrays


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write one table. The same table and the same pyarrow give the same bytes: nothing here depends on time or place."""
    splits, deltas, repeated = {}, {}, []
    for field in table.schema:
        leaf = f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name
        if field.name in _SPLIT:
            splits[leaf] = "BYTE_STREAM_SPLIT"
        elif field.name in _DELTA:
            deltas[leaf] = "DELTA_BINARY_PACKED"
        elif field.name in _REPEATED:
            repeated.append(leaf)
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=_COMPRESSION_LEVEL,
        row_group_size=_ROW_GROUP,
        use_dictionary=repeated,
        column_encoding=splits | deltas,
    )


def _cast(values: np.ndarray, target: pa.DataType, name: str) -> np.ndarray:
    """To the column's type; integers that do not fit are an error, floats are rounded once to float32."""
    dtype = np.dtype(target.to_pandas_dtype())
    if dtype.kind == "i" and values.size:
        if values.dtype.kind not in "iu":
            raise ValueError(f"column {name!r} must hold integers, not {values.dtype}")
        bounds = np.iinfo(dtype)
        if values.min() < bounds.min or values.max() > bounds.max:
            raise ValueError(f"column {name!r} holds values that do not fit {dtype}")
    return values.astype(dtype, copy=False)
