"""Files that commands write: JSON and Parquet, whole or not at all, and refused before the work rather than after it."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from policies.errors import UserError


def check_writable(*paths: Path | None) -> None:
    """Make sure that files can be made there.

    :raises UserError: when a path is a folder, or lies in none that can be written to.
    """
    for path in paths:
        if path is None:
            continue
        place = path if _is_special(path) else path.resolve().parent
        if path.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"cannot write {path}: name a file in a folder that exists and can be written to")


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file; numbers must be finite."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a Parquet file with one row per dictionary. What is no number or word (parameters) becomes JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(name for row in rows for name in row))
    flat = {name: [_plain(row.get(name)) for row in rows] for name in columns}
    _replace(path, lambda temporary: pq.write_table(pa.table(flat), temporary, compression="zstd"))


def write_results(args: argparse.Namespace, content: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """What the options --json and --parquet ask for (see :func:`sim.options.add_outputs`)."""
    if args.json:
        write_json(args.json, content)
    if args.parquet:
        write_parquet(args.parquet, rows)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else value


def _is_special(path: Path) -> bool:
    """Whether this is a device or a pipe (/dev/null, /dev/stdout), which is written to and never replaced by a file."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path = Path(path)
    if _is_special(path):
        write(path)
        return
    path = path.resolve()  # behind a link, what it points to is replaced, not the link
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name a file in a writable folder") from None
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # else a power cut could leave the new name on an empty file
        temporary.chmod(0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free some space or name another file") from None
    finally:
        temporary.unlink(missing_ok=True)
