"""Make a folder ready for a recording: what is in it already, whether it may be gone on with, and what must go first."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from policies.errors import UserError
from traces import manifest as mf
from traces.manifest import Manifest, shard_file
from traces.schema import CACHE
from traces.share import Share

_SHARD_FILE = re.compile(r"^\.?(?:sequences|positions|nodes)-(\d{5,})\.parquet(?:\.tmp)?$")


def begin(folder: Path, manifest: Manifest, share: Share, resume: bool, overwrite: bool) -> tuple[Manifest, frozenset[int]]:
    """Clear the folder of what no manifest names.

    :param manifest: a fresh one, of what is to be recorded.
    Returns the manifest to go on with, and the indices of finished shards that only other recorders' manifests name. Raises
    UserError when the folder holds what may be neither resumed nor replaced; nothing is changed then.
    """
    _make_folder(folder)
    if overwrite and not share.alone:
        raise UserError("--overwrite would have one recorder delete what another has written: delete the folder first instead")
    if overwrite:
        (folder / mf.NAME).unlink(missing_ok=True)
        drop_parts(folder)
        shutil.rmtree(folder / CACHE, ignore_errors=True)
    elif _taken(folder, share) and not resume:
        raise UserError(
            f"{folder} already holds a recording: go on with it by --resume, replace it by --overwrite, or name another folder"
        )
    # shards are looked for before manifests: another recorder's manifest stands before its first shard
    elif any(_SHARD_FILE.match(path.name) for path in folder.iterdir()) and not mf.holds_recording(folder):
        raise UserError(f"{folder} holds shards but no {mf.NAME}: put it back, or replace the recording by --overwrite")
    elsewhere: frozenset[int] = frozenset()
    if not overwrite and mf.holds_recording(folder):
        manifest, elsewhere = _resumed(folder, manifest, share)
    for path in folder.iterdir():
        if (told := _SHARD_FILE.match(path.name)) and path.name not in manifest["shards"]:
            if share.holds(int(told[1])) and int(told[1]) not in elsewhere:
                path.unlink()
    return manifest, elsewhere


def _taken(folder: Path, share: Share) -> bool:
    """Whether the folder holds a recording that this recorder, started afresh, has no part in."""
    if share.alone or (folder / mf.NAME).exists():
        return mf.holds_recording(folder)
    others = {mf.part_name(rank, share.count) for rank in range(share.count) if rank != share.rank}
    return any(path.name not in others for path in mf.part_files(folder))


def _resumed(folder: Path, ours: Manifest, share: Share) -> tuple[Manifest, frozenset[int]]:
    """The manifest to go on with, less damaged shards, and the indices of sound shards that only other manifests name.

    Raises UserError when what is in the folder was recorded with another configuration than ours.
    """
    theirs = mf.settle(folder, mf.read_manifest(folder))
    mine, recorded = mf.configuration(ours), mf.configuration(theirs)
    if mf.PROMPTS not in recorded:
        mine.pop(mf.PROMPTS, None)
    if difference := mf.first_difference(mine, recorded):
        key, now, then = difference
        if key.startswith(mf.PROMPTS):
            raise UserError(
                f"cannot resume {folder}: the prompts of {key.partition('.')[2] or 'its domains'} are not those it was begun "
                "with; bring the old prompt file back, or start afresh with --overwrite"
            )
        if key == "draft_step":
            raise UserError(
                f"cannot resume {folder}: an earlier version began it and rounded a draft's numbers otherwise; "
                "start afresh with --overwrite"
            )
        raise UserError(
            f"cannot resume {folder}: it was recorded with {key} = {_short(then)}, now it is {_short(now)}; "
            "give the same options, or start afresh with --overwrite"
        )
    damaged = {damage.index for damage in mf.find_damage(folder, theirs)}
    sound = [plan.index for plan in mf.finished(theirs) if plan.index not in damaged]
    elsewhere: frozenset[int] = frozenset()
    if not share.alone:
        elsewhere = frozenset(index for index in sound if not share.holds(index))
        sound = [index for index in sound if share.holds(index)]
    keep = {shard_file(table, index) for index in sound for table in mf.TABLES}
    theirs["shards"] = {name: entry for name, entry in theirs["shards"].items() if name in keep}
    if len(sound) < len(theirs["plan"]):
        theirs["status"] = "recording"
    return theirs, elsewhere


def drop_parts(folder: Path) -> None:
    """Delete single recorders' manifests, once the whole one has taken them over."""
    for path in mf.part_files(folder):
        path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): name another one") from error
    if not writable:
        raise UserError(f"cannot write to the folder {folder}: name another one")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
