"""A synthetic recording of ten texts in two domains, and a profile that prices it, for the simulator's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.policies.synthetic import Language
from tests.sim import synthetic_recording
from traces.costs import Profile
from traces.manifest import ShardPlan

PLAN = [ShardPlan(0, (0, 3, 4, 9), "math"), ShardPlan(1, (1, 2, 5, 7, 8), "story"), ShardPlan(2, (6,), "math")]
BATCHES = [1, 10]


def write_many(folder: Path, seed: int = 3) -> Path:
    """EAGLE-3's expansions to depth 3, three wide, over 14 counted tokens of each text."""
    synthetic_recording.write(folder, Language(seed, steps=5), PLAN)
    return folder


def content(**parts: Any) -> dict[str, Any]:
    """Verifying costs 4 ms and half a ms per token, each request of a batch a tenth more; drafting a level 1 ms."""
    return {
        "format": "specreplay-profile",
        "version": 1,
        "interpolation": "linear",
        "verify": {
            "tokens": [1, 11],
            "context": [0, 100],
            "batch": BATCHES,
            "ms": [[[4.5, 8.55], [4.5, 8.55]], [[9.5, 18.05], [9.5, 18.05]]],
        },
        "commit": {"tokens": [1, 3], "batch": BATCHES, "ms": [[0.1, 0.1], [0.3, 0.3]]},
        "plain": {"context": [0, 100], "batch": BATCHES, "ms": [[5.0, 9.5], [5.0, 9.5]]},
        "draft": {"made-up": {"width": [1, 11], "context": [0], "batch": BATCHES, "ms": [[[1, 1]], [[1.5, 1.5]]]}},
        "catch_up": {"made-up": {"tokens": [0, 2], "context": [0], "batch": BATCHES, "ms": [[[0.5, 0.5]], [[1, 1]]]}},
        "overhead": {"eagle3": {"levels": [0, 10], "batch": BATCHES, "ms": [[0.2, 0.2], [0.7, 0.7]]}},
    } | parts


def write_profile(path: Path, **parts: Any) -> Path:
    Profile(content(**parts)).save(path)
    return path
