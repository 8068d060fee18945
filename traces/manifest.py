"""`manifest.json`: what a recording is, which shards it will have, and the checksum of each that is finished.

The manifest is the only place that says a shard exists. It is replaced atomically and last, so that a kill at any
moment leaves either the shard and its entry, or neither. While several recorders share the work, each keeps a manifest of
its own (`manifest-00001-of-00004.json`), and the recording's is what they say together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.errors import UserError
from traces.schema import TABLES, odd_column

FORMAT = "specreplay-recording"
VERSION = 1
NAME = "manifest.json"
_PART = re.compile(r"^manifest-\d{5}-of-\d{5}\.json$")
RUN = "run"
"""Manifest key for facts about this run (command line, times): the one key that may differ on resume."""

SKIPPED = "skipped"
"""Manifest key for planned texts that could not be recorded, where there are any: sequence, domain, prompt_id, reason."""

PROMPTS = "prompts_sha256"
"""Manifest key: what was asked, by domain. Older recordings have none, and are resumed without that check."""

Manifest = dict[str, Any]
_NEEDED = {"status": str, "drafters": list, "plan": list, "shards": dict}
_KINDS = _NEEDED | {"target": dict, "sampling": list, "envelope": dict, "machine": dict, "libraries": dict, "prompts_sha256": dict}
_KINDS |= {"dtype": str, "device": str, "context_limit": int, "max_new_tokens": int, "overrun": int, "top_m": int, "text": bool}
_KINDS |= {"end_tokens": list, "domains": list, "skipped": list, "merged": list}
_ENTRIES = {
    "drafters": {"name": str},
    "sampling": {"temperature": (int, float)},
    "plan": {"index": int, "sequences": list, "domain": str},
    "shards": {"sha256": str, "rows": int, "bytes": int},
}
"""What each entry of these has at least."""


@dataclass(frozen=True)
class ShardPlan:
    """What one shard will hold, fixed before the start.

    `sequences` are ids in increasing order (unique in the recording), all of one `domain`. `shift` was added to the ids that
    the texts were recorded under (traces/merge.py); uniform numbers are keyed by those.
    """

    index: int
    sequences: tuple[int, ...]
    domain: str
    shift: int = 0


@dataclass(frozen=True)
class Damage:
    """A file that is not what the manifest says. `reason` reads on after "is"."""

    index: int
    file: str
    reason: str


def shard_file(table: str, index: int) -> str:
    """File name of one table of one shard."""
    return f"{table}-{index:05d}.parquet"


def plan_of(manifest: Manifest) -> list[ShardPlan]:
    """The shard plan, in order."""
    return [ShardPlan(p["index"], tuple(p["sequences"]), p["domain"], p.get("shift", 0)) for p in manifest["plan"]]


def plan_to_json(plan: Sequence[ShardPlan]) -> list[dict[str, Any]]:
    """The plan as it stands in the manifest. Raises ValueError when ids repeat or do not increase within a shard."""
    ids = [i for shard in plan for i in shard.sequences]
    if len(set(ids)) != len(ids) or any(list(s.sequences) != sorted(s.sequences) for s in plan):
        raise ValueError("sequence ids must be unique, and increase within each shard")
    if len({shard.index for shard in plan}) != len(plan):
        raise ValueError("shard indices must be unique")
    return [
        {"index": shard.index, "sequences": list(shard.sequences), "domain": shard.domain}
        | ({"shift": shard.shift} if shard.shift else {})
        for shard in plan
    ]


def drafter_names(manifest: Manifest) -> list[str]:
    """Names of the recorded drafters; a node row's `drafter` is one of these."""
    return [drafter["name"] for drafter in manifest["drafters"]]


def sampling_entry(manifest: Manifest, temperature: float) -> dict[str, Any]:
    """How the texts at a temperature (float32, as the sequences table has it) were chosen: temperature, top_k, top_p,
    repetition_penalty and seed, as numbers. Greedy texts of manifests that do not say so are greedy."""
    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0}
    for entry in manifest.get("sampling", []):
        if np.float32(entry["temperature"]) == np.float32(temperature):
            return plain | {name: entry[name] for name in plain if entry.get(name) is not None}
    if temperature == 0:
        return plain
    raise UserError(f"the recording does not say how its texts at temperature {temperature:g} were sampled: record it again")


def keeps_prompts(manifest: Manifest) -> bool:
    """False when it was recorded with --no-text: prompts are then neither text nor tokens."""
    return manifest.get("text", True)


def finished(manifest: Manifest) -> list[ShardPlan]:
    """The planned shards whose three files are in the manifest, in plan order."""
    shards = manifest["shards"]
    return [p for p in plan_of(manifest) if all(shard_file(table, p.index) in shards for table in TABLES)]


def part_name(rank: int, count: int) -> str:
    """File name of the manifest of one of several recorders."""
    return f"manifest-{rank:05d}-of-{count:05d}.json"


def part_files(folder: Path) -> list[Path]:
    """Manifests of single recorders that have not been taken over into the whole one."""
    return sorted(path for path in folder.iterdir() if _PART.match(path.name)) if folder.is_dir() else []


def holds_recording(folder: Path) -> bool:
    """Whether the folder has a manifest (of any kind)."""
    return (folder / NAME).exists() or bool(part_files(folder))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`, and with it what recorders that share the work have finished so far.

    Raises UserError when there is none, or one that is damaged, of a newer version, or at odds with the others.
    """
    # The parts first: who takes them over writes the whole one before it deletes them, so that a part gone by now is in it.
    parts = [part for path in part_files(folder) if (part := _read(path)) is not None]
    whole = _read(folder / NAME)
    found = parts if whole is None else [whole, *parts]
    if not found:
        raise UserError(f"{folder} holds no recording (no {NAME}): give a folder that traces.record wrote")
    return found[0] if len(found) == 1 and not parts else _united(folder, found)


def _united(folder: Path, manifests: list[Manifest]) -> Manifest:
    """What several recorders' manifests of one recording say together. Raises UserError when they are of different ones."""
    first = manifests[0]
    for other in manifests[1:]:
        if difference := first_difference(configuration(first), configuration(other)):
            raise UserError(f"the recorders of {folder} were given different options ({difference[0]}): start them all anew")
    shards = {name: entry for manifest in manifests for name, entry in manifest["shards"].items()}
    whole = first | {"shards": in_plan_order(first, shards)}
    skipped = {entry["sequence"]: entry for manifest in manifests for entry in manifest.get(SKIPPED, [])}
    if skipped:
        whole[SKIPPED] = [skipped[number] for number in sorted(skipped)]
    whole["status"] = "complete" if len(finished(whole)) == len(whole["plan"]) else "recording"
    return whole


def in_plan_order(manifest: Manifest, shards: dict[str, Any]) -> dict[str, Any]:
    """Entries of shard files in the order of the plan, whoever wrote them when."""
    names = [shard_file(table, plan["index"]) for plan in manifest["plan"] for table in TABLES]
    return {name: shards[name] for name in names if name in shards}


def configuration(manifest: Manifest) -> Manifest:
    """What must be equal for two manifests to be of one recording."""
    return {key: value for key, value in manifest.items() if key not in ("status", "shards", RUN, SKIPPED)}


def _read(path: Path) -> Manifest | None:
    """One manifest, checked; None when there is no such file."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest.get("format") == FORMAT and isinstance(manifest.get("version"), int)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a readable recording") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or record again with --overwrite") from error
    if not known:
        raise UserError(f"{path} does not describe a SpecReplay recording: give another folder")
    if manifest["version"] > VERSION:
        raise UserError(
            f"{path.parent} was written in format version {manifest['version']}, newer than version {VERSION}, "
            "the last this program reads: upgrade specreplay"
        )
    for key, kind in _KINDS.items():
        if (key in manifest or key in _NEEDED) and not (isinstance(manifest.get(key), kind) and _whole(manifest[key], key)):
            raise UserError(f"{path} lacks a valid {key!r}: restore it, or record again with --overwrite")
    return manifest


def _whole(value: Any, key: str) -> bool:
    """Whether all entries of a list or dictionary have what is read of them."""
    entries = list(value.values() if isinstance(value, dict) else value) if key in _ENTRIES else []
    wanted = _ENTRIES.get(key, {}).items()
    return all(isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in wanted) for entry in entries)


def write_manifest(folder: Path, manifest: Manifest, name: str = NAME, mark: str = "") -> None:
    """Replace `manifest.json` whole or not at all, and make sure that it has reached the disk.

    :param mark: sets apart the temporary files of recorders that may write the same manifest at the same time.
    """
    temporary = folder / f".{name}{mark}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, folder / name)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key at which two JSON values differ, as (dotted key, ours, theirs); None when they are equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            found = first_difference(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            found = first_difference(a, b, f"{path}[{index}]")
            if found:
                return found
        return None
    return None if ours == theirs else (path, ours, theirs)


def settle(folder: Path, manifest: Manifest) -> Manifest:
    """Decide which side of an interrupted rewrite is on disk.

    A rewritten shard keeps its name, so its entry carries both checksums for the moment between renaming the file and
    writing the manifest. Whichever the file has is the truth; the other is dropped. Returns the manifest, changed.
    """
    for name, entry in manifest["shards"].items():
        replacement = entry.pop("replacement", None)
        if replacement and (folder / name).exists() and file_sha256(folder / name) == replacement["sha256"]:
            manifest["shards"][name] = replacement
    return manifest


def find_damage(folder: Path, manifest: Manifest, by_content: bool = True, columns: bool = True) -> list[Damage]:
    """Files of finished shards that are missing, truncated, edited, or not of this format.

    :param by_content: compare checksums (reads everything); otherwise only presence and size.
    :param columns: look at the columns' types as well: whoever edits a file may mend its checksum.
    """
    files = [(plan.index, table) for plan in finished(manifest) for table in TABLES]

    def damage(index: int, table: str) -> Damage | None:
        name = shard_file(table, index)
        entry, path = manifest["shards"][name], folder / name
        if not path.is_file():
            return Damage(index, name, "missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            return Damage(index, name, f"{size} bytes long instead of {entry['bytes']} (truncated?)")
        if by_content and file_sha256(path) != entry["sha256"]:
            return Damage(index, name, "changed since it was recorded (checksum differs)")
        if columns and (odd := odd_column(path, table)):
            return Damage(index, name, f"of another form ({odd})")
        return None

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing holds no lock of the interpreter
        return [found for found in pool.map(lambda file: damage(*file), files) if found]
