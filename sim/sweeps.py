"""Read what a sweep left behind, and find its front: the settings that no other beats in both respects."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from policies.errors import UserError
from sim.sweepstore import RESULTS

NEEDED = ("policy", "domain", "tau")
COSTS = {
    "ms_per_token": False,
    "speedup": True,
    "tokens_per_second": True,
    "tau": True,
    "kept": False,
    "verified": False,
    "levels": False,
}
"""Figures that an axis can show, and whether more of one is better."""


def read_sweep(path: Path) -> pl.DataFrame:
    """Result rows of a sweep's folder or Parquet (one per policy, parameters, domain, temperature, batch), with ``setting``: the
    policy and its parameters in short.

    :raises UserError: when the file is missing, no Parquet, or holds no result rows.
    """
    try:
        table = pl.read_parquet(path / RESULTS if path.is_dir() else path)
    except FileNotFoundError:
        raise UserError(f"there is no sweep {path}: write it with python -m sim.sweep") from None
    except Exception as error:  # whatever polars calls a broken file
        reason = str(error).splitlines()[0]
        raise UserError(f"the sweep {path} cannot be read ({reason}): write it again with python -m sim.sweep") from None
    if lacking := [name for name in NEEDED if name not in table.columns]:
        raise UserError(f"{path} is no sweep: it has no column {lacking[0]}; write one with python -m sim.sweep")
    return table.with_columns(pl.Series("setting", [_setting(row) for row in table.iter_rows(named=True)], dtype=pl.String))


def _setting(row: dict) -> str:
    try:
        values = json.loads(row["parameters"])["parameters"]
    except (KeyError, TypeError, ValueError):
        return row["policy"]
    return f"{row['policy'].partition('(')[0]}({', '.join(f'{name}={value}' for name, value in values.items())})"


def with_front(table: pl.DataFrame, x: str, y: str) -> pl.DataFrame:
    """Mark the rows that no other row beats in both ``x`` and ``y`` (see :data:`COSTS` for what is better): ``front``. Of rows that
    are equal in both, the one with fewer draft levels."""
    signs = [1 if COSTS[name] else -1 for name in (x, y)]
    levels = pl.col("levels").fill_null(0) if "levels" in table.columns else pl.lit(0)
    axes = (pl.col(name) * sign for name, sign in zip((x, y), signs, strict=True))
    place = table.with_row_index("row").select("row", *(axis.alias(to) for axis, to in zip(axes, "xy", strict=True)), levels=levels)
    place = place.drop_nulls().sort("x", "y", "levels", descending=[True, True, False], maintain_order=True)
    front, best = set(), float("-inf")
    for row, _, value, _ in place.rows():  # best x first: a row is on the front when it sets a new best y
        if value > best:
            front.add(row)
            best = value
    return table.with_columns(front=pl.Series([row in front for row in range(len(table))], dtype=pl.Boolean))
