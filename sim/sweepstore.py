"""What a sweep has finished: one line of JSON per point, appended as it is done, in a folder of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from policies.contract import Policy
from policies.errors import UserError
from sim.setting import Setting
from sim.tally import Tally
from traces.manifest import first_difference

RESULTS = "results.parquet"
"""What a finished sweep leaves in its folder: all its rows."""

NAME = "points.jsonl"


class SweepStore:
    """Finished points by policy. The first line of the file says which recording, setting and profile they belong to."""

    def __init__(self, path: Path, finished: dict[str, Tally]):
        self.path, self.finished = path, finished

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> SweepStore:
        """Open or begin the store of a sweep.

        A last line that a kill cut short is dropped. :raises UserError: when the folder holds another sweep, or cannot be
        written to.
        """
        path = folder / NAME
        identity = json.loads(json.dumps(identity))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n") if path.exists() else []
            if len(lines) < 2:  # nothing whole yet: the last piece lies behind the last line break
                path.write_bytes(json.dumps(identity).encode() + b"\n")
                return cls(path, {})
            whole = lines[:-1]
            if lines[-1]:
                path.write_bytes(b"\n".join(whole) + b"\n")
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}): name another folder with --out") from None
        try:
            theirs, *entries = (json.loads(line) for line in whole)
            finished = {entry["policy"]: Tally.from_json(entry["tally"]) for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): delete the folder, and sweep again") from None
        if differs := first_difference(identity, _as_of_today(theirs)):
            key, ours, other = differs
            raise UserError(f"{folder} holds a sweep with another {key} ({other}, now {ours}): name another folder with --out")
        return cls(path, finished)

    def get(self, policy: Policy) -> Tally | None:
        """The point's sums, if it is finished."""
        return self.finished.get(_key(policy))

    def add(self, policy: Policy, sums: Tally) -> None:
        """Keep a finished point; it is on the disk when this returns."""
        line = json.dumps({"policy": _key(policy), "tally": sums.to_json()}) + "\n"
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self.finished[_key(policy)] = sums


def _as_of_today(identity: dict[str, Any]) -> dict[str, Any]:
    """Of stores from before there was a choice of schedule: those of single requests go on, as it changes nothing there."""
    setting = identity.get("setting", {})
    return identity | {"setting": {"schedule": Setting.schedule} | setting} if setting.get("batch") == 1 else identity


def _key(policy: Policy) -> str:
    return json.dumps(policy.to_json(), sort_keys=True)
