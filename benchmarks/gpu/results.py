"""Result files: one JSON per stage, written whole after every job, so that an end at any moment loses the job in hand alone."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.errors import UserError

FORMAT = "specreplay-gpu-results"
VERSION = 1
LARGEST = 16 << 20
"""Bytes that a result file may have, to be carried home."""


@dataclass(frozen=True)
class Job:
    """A piece of a stage that is measured and kept as one.

    name   unique in its stage
    run    called with the seconds it may take; returns plain JSON types
    least  seconds that it needs: with fewer left it is left for another run
    most   seconds that it may take
    """

    name: str
    run: Callable[[float], dict[str, Any]]
    least: float
    most: float


class Results:
    """The results of one stage in ``folder/STAGE.json``.

    :param about: what all results of a file share: the machine, the libraries, whether it is a rehearsal.
    :raises UserError: when the file holds results of another machine, of other libraries or of a rehearsal.
    """

    def __init__(self, folder: Path, stage: str, about: dict[str, Any]):
        self.path = folder / f"{stage}.json"
        self.content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "stage": stage, "about": about, "jobs": {}}
        if self.path.is_file():
            found = read_results(self.path)
            if found["about"] != about:
                differs = sorted(key for key in about.keys() | found["about"].keys() if about.get(key) != found["about"].get(key))
                raise UserError(f"{self.path} was measured with another {' and '.join(differs)}: choose another --out")
            self.content = found

    def has(self, job: str) -> bool:
        """Whether the job is done; one that failed is tried again."""
        return "error" not in self.content["jobs"].get(job, {"error": ""})

    def keep(self, job: str, result: dict[str, Any]) -> None:
        """Write a job's result. Raises UserError when the file would become too large to be carried home."""
        self.content["jobs"][job] = finite(result)
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        if len(text) > LARGEST:
            del self.content["jobs"][job]
            raise UserError(f"{self.path} would have {len(text) >> 20} MiB: let the job keep less")
        partial = self.path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)


def finite(value: Any) -> Any:
    """The same with numbers that JSON has not ("nan", "inf") in words: one of them must not cost what was measured beside it."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: Path) -> dict[str, Any]:
    """A result file's content.

    :raises UserError: when it is none of this program's.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): remove it, or give another folder") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise UserError(f"{path} holds no results of benchmarks.gpu: give the folder that its run wrote")
    return found


class Clock:
    """What is left of a budget of ``seconds``."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)


class OutOfTime(BaseException):
    """Raised in a job that overruns; no Exception, as decoding survives those of a draft."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise OutOfTime within the block once it has taken ``seconds`` (0: never)."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def as_far_as_time_goes() -> Iterator[None]:
    """A block in which a job's time may run out: what is finished by then is in the caller's hands, who goes on behind it."""
    try:
        yield
    except OutOfTime:
        pass
