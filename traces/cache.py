"""Flat arrays made out of the shards, kept beside them so that the second opening only maps files into memory.

The cache is made of `.npy` files in `RECORDING/.cache/KEY/`, built shard by shard (memory: two shards), published by one
rename, and deleted when another key replaces it. KEY covers the checksum, size and modification time of every shard: a
cache whose key fits was built from files that were verified and have not been touched since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from traces.manifest import Manifest, ShardPlan, shard_file
from traces.schema import CACHE, TABLES

_VERSION = 1  # of the arrays in the cache; a new one makes old caches stale
_MAPPED_FROM = 1 << 16  # bytes; smaller arrays are read, since every mapping costs a file handle and a page
_ABANDONED = 24 * 3600  # seconds after which a half-built cache is somebody's crash


class Column:
    """An array that grows by appended rows: a file, or, without one, memory."""

    def __init__(self, path: Path | None, dtype: np.dtype | type | str, tail: tuple[int, ...]):
        self.path, self.dtype, self.tail, self.rows = path, np.dtype(dtype), tail, 0
        self._parts: list[np.ndarray] = []
        self._stream = None if path is None else open(path, "wb")
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        """Add rows [n, ...]. Written, not mapped: a mapped page costs a fault before it can be filled."""
        values = np.ascontiguousarray(values, self.dtype)
        if values.shape[1:] != self.tail:
            raise ValueError(f"rows of shape {values.shape[1:]} where {self.tail} was begun")
        self.rows += len(values)
        if self._stream is None:
            self._parts.append(values.copy() if values.base is not None else values)
        else:
            self._stream.write(values.reshape(-1).view(np.uint8))  # not tofile, which overlooks a full disk

    def finished(self) -> np.ndarray:
        """The whole array, read-only where it is a file; nothing can be appended any more."""
        if self._stream is None:
            return np.concatenate([np.zeros((0, *self.tail), self.dtype), *self._parts])
        self._stream.seek(0)
        self._write_header()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return _load(self.path)

    def _write_header(self) -> None:
        """Numpy leaves room in it for the number of rows, so that it keeps its length."""
        if self._stream is not None:
            kind = np.lib.format.dtype_to_descr(self.dtype)
            facts = {"descr": kind, "fortran_order": False, "shape": (self.rows, *self.tail)}
            np.lib.format.write_array_header_1_0(self._stream, facts)


@dataclass
class Store:
    """Named arrays: files in a folder, or, when no folder can be written, in memory."""

    folder: Path | None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    _growing: dict[str, Column] = field(default_factory=dict)

    def column(self, name: str, dtype: np.dtype | type | str, tail: tuple[int, ...] = ()) -> Column:
        """A new array [0, *tail] to which the caller appends; it is among ``arrays`` once :meth:`settle` was called."""
        path = None if self.folder is None else self.folder / f"{name}.npy"
        self._growing[name] = Column(path, dtype, tail)
        return self._growing[name]

    def settle(self) -> None:
        """Finish what was appended to."""
        while self._growing:
            name, column = self._growing.popitem()
            self.arrays[name] = column.finished()

    def put(self, name: str, values: np.ndarray) -> None:
        """Store a finished array."""
        self.column(name, values.dtype, values.shape[1:]).append(values)
        self.settle()


Build = Callable[[Store], None]


def load(folder: Path, key: str, build: Build) -> Mapping[str, np.ndarray]:
    """The arrays of the recording in `folder`, read-only, built first when no cache has this key.

    Where the folder cannot be written (a read-only mount, a full disk), the arrays go to a temporary folder that lasts
    as long as the result is used, and, failing that too, to memory.
    """
    home = folder / CACHE / key
    there = [lambda: _open(home)] if home.is_dir() else []  # unless another process is just deleting it
    for attempt in (*there, lambda: _publish(home, build), lambda: _build_temporary(build)):
        try:
            return attempt()
        except OSError:
            continue
    store = Store(None)
    build(store)
    return _read_only(store.arrays)


def has(folder: Path, key: str) -> bool:
    """Whether a cache with this key is there."""
    return (folder / CACHE / key).is_dir()


def key_of(folder: Path, manifest: Manifest, plans: Sequence[ShardPlan]) -> str:
    """What a cache of these shards is called. Raises OSError when a file is missing."""
    files = []
    for name in (shard_file(table, plan.index) for plan in plans for table in TABLES):
        status = (folder / name).stat()
        files.append([name, manifest["shards"][name]["sha256"], status.st_size, status.st_mtime_ns])
    facts = [_VERSION, manifest["drafters"], manifest.get("domains"), files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _publish(home: Path, build: Build) -> Mapping[str, np.ndarray]:
    home.parent.mkdir(exist_ok=True)
    (home.parent / ".gitignore").write_text("*\n")
    work = Path(tempfile.mkdtemp(prefix="building-", dir=home.parent))
    try:
        _build(work, build)
        try:
            os.rename(work, home)
        except OSError:
            if not home.is_dir():  # else another process was faster, and built the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _remove_others(home)
    return _open(home)


def _build_temporary(build: Build) -> Mapping[str, np.ndarray]:
    work = Path(tempfile.mkdtemp(prefix="specreplay-"))
    try:
        _build(work, build)
        arrays = _Arrays(_open(work))
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    weakref.finalize(arrays, shutil.rmtree, work, True)
    return arrays


class _Arrays(dict):
    """A dictionary that can be watched for its end."""


def _build(work: Path, build: Build) -> None:
    build(Store(work))


def _open(home: Path) -> dict[str, np.ndarray]:
    arrays = _read_only({path.stem: _load(path) for path in _array_files(home)})
    if not arrays:  # somebody who published another key has just deleted it
        raise FileNotFoundError(f"{home} holds no array")
    return arrays


def _array_files(home: Path) -> Iterator[Path]:
    return iter(sorted(home.glob("*.npy")))


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r" if path.stat().st_size >= _MAPPED_FROM else None)


def _read_only(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def _remove_others(home: Path) -> None:
    """Delete stale caches. Who has them mapped keeps them until it closes them."""
    for other in home.parent.iterdir():
        building = other.name.startswith("building-")
        if not other.is_dir() or other == home or (building and time.time() - other.stat().st_mtime < _ABANDONED):
            continue
        shutil.rmtree(other, ignore_errors=True)
