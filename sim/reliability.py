"""Does the draft mean what it says? Reliability of its probabilities, and where in its ranking the truth ends."""

from __future__ import annotations

import numpy as np
import polars as pl

from sim.calibration import Calibration, calibration
from sim.curves import wilson


def reliability(table: pl.DataFrame, bins: int = 10, by: str | None = None) -> pl.DataFrame:
    """The reliability diagram of `sim.calibration` for the draft's probability of its first choice, as a table.

    :param table: `sim.curves.samples` with ``top1_probability``.

    Columns: (by,) probability (mean in the bin), accepted (share), ci_low, ci_high (Wilson 95%), count.
    """
    parts = {(): table} if by is None else table.sort(by).partition_by(by, maintain_order=True, as_dict=True)
    rows = []
    for value, part in parts.items():
        name = dict(zip([by], value, strict=False))
        for bin in first_choices(part, bins).bins:
            low, high = wilson(bin["accepted"] * bin["nodes"], bin["nodes"])
            row = {"probability": bin["expected"], "accepted": bin["accepted"], "count": bin["nodes"]}
            rows.append(name | row | {"ci_low": float(low), "ci_high": float(high)})
    return pl.DataFrame(rows)


def first_choices(table: pl.DataFrame, bins: int = 10) -> Calibration:
    """How far to trust the draft's probability of its first choice. :param table: as for :func:`reliability`."""
    return calibration(table["top1_probability"].to_numpy(), table["top1"].to_numpy(), bins)


def terminal_ranks(everywhere: pl.DataFrame, bins: int = 20) -> pl.DataFrame:
    """Histogram of the terminal confidence rank (HeteroSpec, arXiv 2505.13254, section 3): where among the verified
    nodes, ranked by path probability, the last accepted one stands.

    :param everywhere: `sim.walkthrough.accepted_everywhere`.

    Columns: from, to (ranks, 1 = best), share (of positions with an accepted node), accepted (their mean accepted
    nodes), cumulative (share up to ``to``).
    """
    some = everywhere.filter(pl.col("terminal_rank") > 0)
    if some.is_empty():
        shares = dict.fromkeys(("share", "accepted", "cumulative"), pl.Float64)
        return pl.DataFrame(schema={"from": pl.Int64, "to": pl.Int64} | shares)
    last = int(some["kept"].max())
    width = max(1, -(-last // bins))
    first = np.arange(1, last + 1, width)
    place = (some["terminal_rank"].to_numpy() - 1) // width
    count = np.bincount(place, minlength=len(first))
    accepted = np.bincount(place, weights=some["accepted"].to_numpy(), minlength=len(first))
    with np.errstate(invalid="ignore"):
        mean = accepted / count
    return pl.DataFrame(
        {
            "from": first,
            "to": np.minimum(first + width - 1, last),
            "share": count / count.sum(),
            "accepted": pl.Series(mean, nan_to_null=True),
            "cumulative": count.cumsum() / count.sum(),
        }
    )
