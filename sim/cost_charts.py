"""Charts of what time costs: a profile's surfaces, and predictions beside what was measured."""

from __future__ import annotations

import altair as alt
import polars as pl

from sim.charts import GREY, LEGEND, PALETTE, SHAPES, one_sign, signs

AXIS_TITLES = {
    "tokens": "tokens per request",
    "width": "frontier nodes per request",
    "context": "context (tokens before the root)",
    "levels": "draft levels of the cycle",
}


def latency_chart(points: pl.DataFrame, lines: pl.DataFrame, axis: str, by: str | None, height: int = 360) -> alt.LayerChart:
    """Measured points and the cost model's lines along ``axis``, one colour per value of ``by``."""
    x = alt.X(f"{axis}:Q", title=AXIS_TITLES[axis])
    y = alt.Y("ms:Q", title="milliseconds", scale=alt.Scale(zero=True))
    if by:
        points, lines = (table.with_columns(pl.col(by).cast(pl.String)) for table in (points, lines))
        order = points[by].unique(maintain_order=True).to_list()
        colour = alt.Color(f"{by}:N", sort=order, scale=alt.Scale(range=list(PALETTE)), legend=LEGEND)
        shape = alt.Shape(f"{by}:N", sort=order, scale=alt.Scale(range=list(SHAPES)), legend=LEGEND)
    else:
        colour, shape = one_sign()
    tooltip = [alt.Tooltip(f"{axis}:Q"), alt.Tooltip("ms:Q", format=".3f")] + ([alt.Tooltip(f"{by}:N")] if by else [])
    layers = [alt.Chart(lines).mark_line().encode(x, y, color=colour)]
    if "spread_ms" in points.columns:
        ends = points.with_columns(low=pl.col("ms") - pl.col("spread_ms") / 2, high=pl.col("ms") + pl.col("spread_ms") / 2)
        low = alt.Y("low:Q", title="milliseconds")
        layers.append(alt.Chart(ends).mark_rule(opacity=0.6).encode(x, low, alt.Y2("high:Q"), color=colour))
    dots = alt.Chart(points).mark_point(filled=True, size=50)
    layers.append(dots.encode(x, y, color=colour, shape=shape, tooltip=tooltip))
    return alt.layer(*layers, height=height)


def prediction_chart(table: pl.DataFrame) -> alt.LayerChart:
    """`sim.surfaces.read_bench`: per policy the predicted and the measured time, joined; short lines are good predictions."""
    table = table.sort("measured_ms")
    names = {"predicted_ms": "predicted", "measured_ms": "measured"}
    long = table.unpivot(list(names), index="policy", variable_name="what", value_name="ms")
    long = long.with_columns(pl.col("what").replace_strict(names))
    y = alt.Y("policy:N", title=None, sort=table["policy"].to_list(), axis=alt.Axis(labelLimit=320, labelFlush=False))
    title = "milliseconds per token"
    numbers = [alt.Tooltip(f"{name}:Q", title=f"{names[name]} ms per token", format=".2f") for name in names]
    gaps = alt.Chart(table).mark_rule(strokeWidth=3, color=GREY, opacity=0.6)
    gaps = gaps.encode(alt.X("predicted_ms:Q", title=title), alt.X2("measured_ms:Q", title=title), y, tooltip=numbers)
    colour, shape = signs("what")
    tooltip = [alt.Tooltip("policy:N"), alt.Tooltip("what:N"), alt.Tooltip("ms:Q", format=".2f")]
    points = alt.Chart(long).mark_point(filled=True, size=90, opacity=1)
    points = points.encode(alt.X("ms:Q", title=title), y, color=colour, shape=shape, tooltip=tooltip)
    return alt.layer(gaps, points, height=30 * len(table) + 110)
