"""The recordings that are brought home, as ``OUT/sample-DTYPE.tar``: some 6,000 positions in all, at most 25 MB.

Each archive holds two recordings of the same prompts, greedy and at temperature 1: ``eagle3`` with the published tree of the
EAGLE-3 head, and ``draft`` with chains of the draft language model. The recorder's default cover would take twice the room.
"""

from __future__ import annotations

import tarfile
from typing import Any

from benchmarks.gpu.recording import DTYPES, TOY_COVER, covering, record_here
from benchmarks.gpu.results import LARGEST, Job
from benchmarks.gpu.setting import Setting
from policies.errors import UserError

DRAFTS = {"eagle3": ("eagle3", "chain(k=8)"), "draft": ("chain(k=8)",)}
"""Drafters, and for whom they draft."""
PROMPTS, TOKENS = 3, 110
"""Of each domain, and for each prompt: 3,300 positions at most, less what ends early or falls into a loop."""


def jobs(setting: Setting) -> list[Job]:
    return [Job(dtype, lambda _, d=dtype: sample(setting, d), 20, 90) for dtype in DTYPES]


def sample(setting: Setting, dtype: str) -> dict[str, Any]:
    """Both recordings of a precision, packed into one file.

    :raises UserError: when it is too large to be carried.
    """
    size = ["--limit", str(setting.pick(PROMPTS, 1)), "--max-new-tokens", str(setting.pick(TOKENS, 10))]
    folder = setting.work / f"sample-{dtype}"
    told = {}
    for name, cover in DRAFTS.items():
        options = [*size, *covering(setting.pick(cover, TOY_COVER)), "--draft", f"reference/{name}"]
        told[name] = record_here(setting, dtype, folder / name, options)
    packed = setting.out / f"sample-{dtype}.tar"
    with tarfile.open(packed, "w") as tar:
        for file in sorted(folder.glob("*/*.*")):
            if file.is_file():
                tar.add(file, f"{folder.name}/{file.parent.name}/{file.name}")
    if (size := packed.stat().st_size) > LARGEST:
        packed.unlink()
        raise UserError(f"{packed} would have {size >> 20} MiB: record fewer tokens")
    return {"packed": packed.name, "packed_bytes": size, "recordings": told}
