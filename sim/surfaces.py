"""A profile's latency tables, measured points beside what the cost model makes of them; and predictions beside a bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from policies.errors import UserError
from traces.costs import Profile

AXES = {
    "verify": ("tokens", "context", "batch"),
    "draft": ("width", "context", "batch"),
    "catch_up": ("tokens", "context", "batch"),
    "plain": ("context", "batch"),
    "commit": ("tokens", "batch"),
    "overhead": ("levels", "batch"),
    "looked_up": ("levels", "batch"),
}
"""The parts of a cycle and what each depends on."""
BY_POLICY = ("overhead", "looked_up")
OWNED = ("draft", "catch_up", *BY_POLICY)
"""Tables that there are several of: one per drafter, or per policy."""
DENSE = 200


def owners(profile: Profile, kind: str) -> list[str]:
    """Drafters (or policies) that the profile has such a table of; empty where there is only one table."""
    return list(profile.content.get(kind, {})) if kind in OWNED else []


def _part(profile: Profile, kind: str, owner: str | None) -> dict[str, Any]:
    part = profile.content[kind]
    return part[owner] if kind in OWNED else part


def measured(profile: Profile, kind: str, owner: str | None = None) -> pl.DataFrame:
    """The measured points: a column per axis, ms, and spread_ms (interquartile range) where it was noted."""
    part = _part(profile, kind, owner)
    axes = AXES[kind]
    grid = np.meshgrid(*(part[axis] for axis in axes), indexing="ij")
    columns = {axis: each.ravel() for axis, each in zip(axes, grid, strict=True)}
    for name in ("ms", "spread_ms"):
        if part.get(name) is not None:
            columns[name] = np.array(part[name], dtype=np.float64).ravel()
    return pl.DataFrame(columns)


def fitted(profile: Profile, kind: str, owner: str | None = None) -> pl.DataFrame:
    """What the cost model answers along the first axis, densely, at the measured values of the others: axes and ms."""
    part, axes = _part(profile, kind, owner), AXES[kind]
    first = part[axes[0]]
    dense = np.unique(np.linspace(first[0], first[-1], DENSE).round().astype(np.int64))
    grid = np.meshgrid(dense, *(part[axis] for axis in axes[1:]), indexing="ij")
    table = profile.tables[kind]
    table = table[owner] if kind in OWNED else table
    ms = table(*(torch.from_numpy(np.ascontiguousarray(each.ravel(), np.int64)) for each in grid))
    return pl.DataFrame({axis: each.ravel() for axis, each in zip(axes, grid, strict=True)} | {"ms": ms.numpy()})


def read_bench(path: Path) -> pl.DataFrame:
    """What `live.bench --json` wrote: one row per policy with policy, predicted_ms, measured_ms (per token), texts.

    Prediction is the mean over domains on the whole recording; measurement the mean over domains on the texts decoded.

    :raises UserError: when the file is missing or no bench.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured_, predicted = content["measured"], content["predicted"]
    except FileNotFoundError:
        raise UserError(f"there is no bench {path}: write it with python -m live.bench --json {path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no bench ({error}): write one with python -m live.bench TRACE --json FILE") from None
    said = {row["policy"]: row["ms_per_token"] for row in predicted if row["domain"] == "mean"}
    rows = []
    for name, entries in measured_.items():
        texts = pl.DataFrame(entries).group_by("text", maintain_order=True)  # the mean over a text's rounds
        texts = texts.agg(pl.col("domain", "tokens").first(), pl.col("ms").mean())
        sums = texts.group_by("domain", maintain_order=True).agg(pl.col("ms", "tokens").sum())
        row = {"policy": name, "predicted_ms": said.get(name), "measured_ms": (sums["ms"] / sums["tokens"]).mean()}
        rows.append(row | {"texts": len(texts)})
    schema = {"policy": pl.String, "predicted_ms": pl.Float64, "measured_ms": pl.Float64, "texts": pl.Int64}
    return pl.DataFrame(rows, schema=schema)
