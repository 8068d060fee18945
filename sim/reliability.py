"""Does the draft mean what it says? Reliability of its probabilities, and where in its ranking the truth ends."""

from __future__ import annotations

import numpy as np
import polars as pl

from sim.curves import wilson


def reliability(table: pl.DataFrame, bins: int = 10, by: str | None = None) -> pl.DataFrame:
    """Accepted share against the draft's probability of its first choice, in bins of equal width over [0, 1].

    :param table: `sim.curves.samples` with ``top1_probability``.

    Columns: (by,) probability (mean in the bin), accepted (share), ci_low, ci_high (Wilson 95%), count.
    """
    keys = [] if by is None else [by]
    place = (pl.col("top1_probability").clip(0, 1) * bins).floor().clip(0, bins - 1).cast(pl.Int64).alias("bin")
    numbers = [
        pl.col("top1_probability").mean().alias("probability"),
        pl.col("top1").mean().alias("accepted"),
        pl.len().cast(pl.Int64).alias("count"),
    ]
    found = table.with_columns(place).group_by([*keys, "bin"]).agg(numbers).sort([*keys, "bin"]).drop("bin")
    low, high = wilson(found["accepted"].to_numpy() * found["count"].to_numpy(), found["count"].to_numpy())
    return found.with_columns(ci_low=pl.Series(low), ci_high=pl.Series(high))


def calibration_error(found: pl.DataFrame) -> float:
    """Expected calibration error of :func:`reliability`: the mean gap between said and seen, weighted by samples.

    Naeini, Cooper and Hauskrecht (2015), "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    gap = (found["probability"] - found["accepted"]).abs()
    total = found["count"].sum()
    return float((gap * found["count"]).sum() / total) if total else float("nan")


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
