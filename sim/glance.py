"""A recording at a glance: what it holds by domain, and what policies reach on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from policies.contract import Policy
from sim.metrics import replay_rows, result_rows
from sim.setting import Setting
from sim.tally import FIGURES, TIMES, Tally
from traces.recording import Recording
from traces.schema import FINISHES

if TYPE_CHECKING:
    import polars as pl

    from sim.bootstrap import Resamples
    from traces.costs import CostModel


def overview(recording: Recording) -> pl.DataFrame:
    """One row per domain and one for "all": texts, tokens (those that count), positions (recorded tokens),
    ended_by_loop and ended_by_eos (shares of texts)."""
    import polars as pl

    from sim.curves import domain_of

    table = pl.DataFrame(
        {
            "domain": domain_of(recording, np.arange(len(recording.length))),
            "tokens": recording.length,
            "positions": np.diff(recording.offset),
            "ended_by_loop": recording.finish == FINISHES.index("loop"),
            "ended_by_eos": recording.finish == FINISHES.index("eos"),
        }
    )
    numbers = [
        pl.len().cast(pl.Int64).alias("texts"),
        pl.col("tokens", "positions").sum(),
        pl.col("ended_by_loop", "ended_by_eos").mean(),
    ]
    rows = table.group_by("domain", maintain_order=True).agg(numbers)
    return pl.concat([rows, table.select(pl.lit("all").alias("domain"), *numbers)])


def policy_rows(recording: Recording, policy: Policy, drafter: str | None = None, cost: CostModel | None = None) -> pl.DataFrame:
    """Replay one policy: one row per domain and one for their mean, with the figures of :class:`sim.metrics.ResultRow`.

    accepted_by_depth and parameters come as JSON texts; ms_per_token and speedup are missing without a ``cost``.
    """
    return table_of([row.to_json() for row in replay_rows(recording, policy, drafter, cost)])


def rows_with_intervals(named: dict[str, tuple[Policy, Tally]], setting: Setting, draws: Resamples) -> pl.DataFrame:
    """Rows of several policies, replayed on the same texts, as :func:`policy_rows` gives them, under the given names; and for
    tau and predicted times the ends ``_low`` and ``_high`` of their 95% intervals (null where a domain has a single text)."""
    return table_of([row for name, (policy, sums) in named.items() for row in rows_of_one(name, policy, sums, setting, draws)])


def rows_of_one(name: str, policy: Policy, sums: Tally, setting: Setting, draws: Resamples) -> list[dict[str, Any]]:
    """A single policy's part of :func:`rows_with_intervals`."""
    from sim.contest import add_intervals

    rows = [row.to_json() | {"policy": name} for row in result_rows(sums, policy, setting)]
    add_intervals(rows, sums, draws)
    return rows


def table_of(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Result rows as a table. What is no number or word comes as JSON text; predicted times are left out where there are none."""
    import polars as pl

    plain = []
    for row in rows:
        texts = {name: json.dumps(row[name]) for name in ("accepted_by_depth", "parameters")}
        plain.append(row | texts | {name: int(row[name]) for name in ("texts", "cycles", "emitted")})
    table = pl.DataFrame(plain, infer_schema_length=None)
    unknown = [name for name in TIMES if table[name].null_count() == len(table)]
    return table.drop(*(f"{name}{end}" for name in unknown for end in ("", "_low", "_high")), strict=False)


def difference_table(ours: Tally, theirs: Tally, draws: Resamples, only: Sequence[str] | None = None) -> pl.DataFrame:
    """How one policy's figures differ from another's on the same texts, per domain and on the mean: one row per figure.

    Columns: domain, figure, ours, theirs, difference (ours - theirs), low, high (95%, paired over texts), texts.

    :param only: the figures asked for; by default all that both have.
    """
    import polars as pl

    from sim.compare import differences

    table = []
    for row in differences("", theirs, ours, draws, only):
        for figure in (figure for figure in FIGURES if f"{figure}_difference" in row):
            ends = {"ours": "second", "theirs": "first", "difference": "difference", "low": "low", "high": "high"}
            values = {name: row[f"{figure}_{end}"] for name, end in ends.items()}
            table.append({"domain": row["domain"], "figure": figure} | values | {"texts": row["texts"]})
    return pl.DataFrame(table, infer_schema_length=None)
