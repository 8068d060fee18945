"""Altair charts for the dashboard: axes with units, colours that colour-blind people can tell apart."""

from __future__ import annotations

import altair as alt
import polars as pl

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, without black and yellow, which vanish in one of the two themes."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
"""Colour is never the only sign."""
LEGEND = alt.Legend(orient="bottom", symbolOpacity=1, columns=3)
DEPTHS = (0, 1, 2, 4, 8)
"""Depths drawn; more lines than these hide one another."""

X_TITLES = {
    "draft_entropy": "entropy of the draft's distribution (nats)",
    "top1_probability": "draft's probability of its first choice",
    "target_entropy": "entropy of the target's distribution (nats)",
    "top1_logprob": "draft's log-probability of its first choice (nats)",
}
Y_TITLES = {
    "top1": "accepted (draft's first choice)",
    "topk": "accepted (any of draft's top K)",
}
VALUE_TITLES = {
    "tau": "tau: tokens emitted per cycle",
    "speedup": "predicted speedup over plain decoding",
    "ms_per_token": "predicted milliseconds per token",
    "kept": "drafted tokens verified per cycle, root not counted",
    "levels": "draft forwards per cycle",
    "coverage": "share of cycles whose every expansion was recorded",
}
GREY = "#8c8c8c"
"""Rules and bars that carry no category; seen in both themes."""


def acceptance_chart(
    curve: pl.DataFrame, x: str, outcome: str, by: str | None = None, height: int = 420, pick: bool = False
) -> alt.LayerChart:
    """Curves of `sim.curves.curve`: a line with its 95% band, one per value of ``by``.

    :param pick: points can be clicked; the selection "bin" takes the ends ``low`` and ``high`` of one.
    """
    if by == "depth":
        curve = curve.filter(pl.col("depth").is_in(DEPTHS)).with_columns(depth=pl.col("depth").cast(pl.String))
    if by == "temperature":
        curve = curve.with_columns(temperature=pl.col("temperature").cast(pl.Float64).round(3).cast(pl.String))
    base = alt.Chart(curve).encode(x=alt.X("x:Q", title=X_TITLES[x], scale=alt.Scale(zero=False)))
    # a rising scale would be natural for depth, but its ends vanish in one of the two themes
    colour, shape = signs(by) if by else one_sign()
    how = {"title": Y_TITLES[outcome], "scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format="%")}
    share = alt.Y("acceptance:Q", **how)
    tooltip = [alt.Tooltip(f"{by}:N")] if by else []
    tooltip += [
        alt.Tooltip("low:Q", title="from", format=".3f"),
        alt.Tooltip("high:Q", title="to", format=".3f"),
        alt.Tooltip("acceptance:Q", format=".1%"),
        alt.Tooltip("ci_low:Q", title="95% from", format=".1%"),
        alt.Tooltip("ci_high:Q", title="95% to", format=".1%"),
        alt.Tooltip("count:Q", title="samples", format=","),
    ]
    band = base.mark_area(opacity=0.18).encode(alt.Y("ci_low:Q", **how), alt.Y2("ci_high:Q"), color=colour)
    line = base.mark_line().encode(share, color=colour)
    points = base.mark_point(filled=True, opacity=1, size=32, cursor="pointer" if pick else "default")
    points = points.encode(share, color=colour, shape=shape, tooltip=tooltip)
    if pick:
        points = points.add_params(alt.selection_point(name="bin", fields=["low", "high"], empty=False))
    return alt.layer(band, line, points, height=height)


def domain_chart(table: pl.DataFrame, value: str, mean: str = "mean") -> alt.LayerChart:
    """One figure of one policy by domain: bars with 95% intervals, and the mean over domains as a line.

    :param table: rows of `sim.glance.rows_with_intervals` of a single policy.
    """
    parts, means = table.filter(pl.col("domain") != mean), table.filter(pl.col("domain") == mean)
    y = alt.Y("domain:N", title=None, sort=parts["domain"].to_list())
    x = alt.X(f"{value}:Q", title=VALUE_TITLES[value])
    numbers = (value, f"{value}_low", f"{value}_high")
    tooltip = [alt.Tooltip("domain:N"), *(alt.Tooltip(f"{name}:Q", format=".3f") for name in numbers)]
    bars = alt.Chart(parts).mark_bar(color=PALETTE[0], opacity=0.75, height={"band": 0.6}).encode(x, y, tooltip=tooltip)
    spans = _spans(parts, value, y)
    rule = alt.Chart(means).mark_rule(color=PALETTE[1], strokeWidth=2, strokeDash=[6, 3])
    rule = rule.encode(x, tooltip=[alt.Tooltip(f"{value}:Q", title="mean over domains", format=".3f")])
    return alt.layer(bars, spans, rule, height=alt.Step(34))


def difference_chart(table: pl.DataFrame, title: str, by: str) -> alt.LayerChart:
    """Differences with their 95% intervals, one line per value of ``by``; zero is drawn in.

    :param table: rows of `sim.glance.difference_table` of one figure, and the column ``by``.
    """
    y = alt.Y(f"{by}:N", title=None, sort=None, axis=alt.Axis(labelLimit=320, labelFlush=False, labelBound=False))
    numbers = ("ours", "theirs", "difference", "low", "high")
    tooltip = [alt.Tooltip(f"{by}:N"), *(alt.Tooltip(f"{name}:Q", format=".3f") for name in numbers)]
    x = alt.X("difference:Q", title=title)
    zero = alt.Chart(pl.DataFrame({"difference": [0.0]})).mark_rule(color=GREY, strokeDash=[4, 4]).encode(x)
    known = table.filter(pl.col("low").is_not_null())
    spans = alt.Chart(known).mark_rule(strokeWidth=3, color=PALETTE[0], opacity=0.5)
    spans = spans.encode(alt.X("low:Q", title=title), alt.X2("high:Q"), y)
    points = alt.Chart(table).mark_point(filled=True, size=80, color=PALETTE[0], opacity=1).encode(x, y, tooltip=tooltip)
    return alt.layer(zero, spans, points, height=max(100, 28 * len(table) + 60))


def _spans(table: pl.DataFrame, value: str, y: alt.Y) -> alt.Chart:
    """The 95% intervals, where there are any."""
    known = table.filter(pl.col(f"{value}_low").is_not_null())
    return alt.Chart(known).mark_rule(strokeWidth=2, color=GREY).encode(alt.X(f"{value}_low:Q"), alt.X2(f"{value}_high:Q"), y)


def policy_chart(table: pl.DataFrame, value: str = "tau", mean: str = "mean") -> alt.LayerChart:
    """Bars of the mean over domains, best first, and the domains themselves as points.

    :param table: rows of `sim.glance.rows_with_intervals` or `sim.glance.policy_rows`, of any number of policies.
    """
    table = table.drop_nulls(value)
    best_first = "ascending" if value == "ms_per_token" else "descending"
    means = table.filter(pl.col("domain") == mean).sort(value, descending=best_first == "descending", maintain_order=True)
    order = means["policy"].to_list()
    y = alt.Y("policy:N", sort=order, title=None, axis=alt.Axis(labelLimit=320))
    x = alt.X(f"{value}:Q", title=VALUE_TITLES[value])
    tooltip = [alt.Tooltip("policy:N"), alt.Tooltip("domain:N"), alt.Tooltip(f"{value}:Q", format=".2f")]
    bars = alt.Chart(means).mark_bar(color="#999999", opacity=0.45).encode(x, y, tooltip=tooltip)
    domains = table.filter(pl.col("domain") != mean)
    points = alt.Chart(domains).mark_point(filled=True, opacity=1, size=60)
    colour, shape = signs("domain")
    points = points.encode(x, y, color=colour, shape=shape, tooltip=tooltip)
    spans = [_spans(means, value, y)] if f"{value}_low" in table.columns else []
    return alt.layer(bars, points, *spans, height=34 * len(means) + 150)


def signs(column: str) -> tuple[alt.Color, alt.Shape]:
    """A colour and a shape for each value of a column, with one legend for both."""
    colour = alt.Color(f"{column}:N", scale=alt.Scale(range=list(PALETTE)), legend=LEGEND)
    return colour, alt.Shape(f"{column}:N", scale=alt.Scale(range=list(SHAPES)), legend=LEGEND)


def one_sign() -> tuple[alt.ColorValue, alt.ShapeValue]:
    """The colour and the shape of what is not parted into categories."""
    return alt.ColorValue(PALETTE[0]), alt.ShapeValue(SHAPES[0])


def where(test: str, channel: type[alt.SchemaBase], yes: float, no: float) -> alt.SchemaBase:
    """A channel with one value where ``test`` holds of a row, and another elsewhere. `alt.condition` says the same, but Altair then
    tries every kind of condition that Vega-Lite knows, which takes longer than the rest of the chart."""
    return channel(no, condition={"test": test, "value": yes})


def brush_chart(table: pl.DataFrame, x: str, height: int = 150) -> alt.Chart:
    """How many samples there are at each ``x``; the selection "range" takes an interval of it.

    :param table: columns ``left``, ``right``, ``count`` of `sim.curves.histogram`.
    """
    brush = alt.selection_interval(name="range", encodings=["x"])
    return (
        alt.Chart(table)
        .mark_bar(color=PALETTE[0], binSpacing=0)
        .encode(
            alt.X("left:Q", title=X_TITLES[x], bin="binned"),
            alt.X2("right:Q"),
            alt.Y("count:Q", title="samples"),
            opacity=alt.OpacityValue(0.3, condition={"param": "range", "value": 0.85}),
            tooltip=[alt.Tooltip("left:Q", format=".3f"), alt.Tooltip("right:Q", format=".3f"), alt.Tooltip("count:Q", format=",")],
        )
        .properties(height=height)
        .add_params(brush)
    )


def share_chart(table: pl.DataFrame, by: str, height: int = 220) -> alt.LayerChart:
    """Acceptance inside a selected range by domain or depth, with Wilson intervals; bars are as wide as samples are many.

    :param table: ``by``, acceptance, ci_low, ci_high, count, samples (share of the group's samples that is inside).
    """
    y = alt.Y(f"{by}:N", title=None if by == "domain" else by, sort=None)
    scale = alt.Scale(domain=[0, 1])
    tooltip = [alt.Tooltip(f"{by}:N"), alt.Tooltip("acceptance:Q", format=".1%"), alt.Tooltip("count:Q", format=",")]
    tooltip += [alt.Tooltip("samples:Q", title="of its samples inside", format=".1%")]
    x = alt.X("acceptance:Q", title="accepted, inside the range", scale=scale, axis=alt.Axis(format="%"))
    bars = alt.Chart(table).mark_bar(color=PALETTE[0], opacity=0.75, height={"band": 0.6}).encode(x, y, tooltip=tooltip)
    spans = alt.Chart(table).mark_rule(color=GREY, strokeWidth=2).encode(alt.X("ci_low:Q"), alt.X2("ci_high:Q"), y)
    return alt.layer(bars, spans, height=height)


def strata_chart(curve: pl.DataFrame, edges: list[float], height: int = 320) -> alt.LayerChart:
    """`sim.strata.accepted_by_entropy` with thresholds drawn in; the selection "drag" is an interval from where the pointer was
    pressed to where it was let go."""
    drag = alt.selection_interval(name="drag", encodings=["x"], translate=False, zoom=False)
    x = alt.X("entropy:Q", title="cumulative meta-path entropy of the base tree (nats)", scale=alt.Scale(zero=False))
    tooltip = [alt.Tooltip("low:Q", format=".2f"), alt.Tooltip("high:Q", format=".2f")]
    tooltip += [alt.Tooltip("accepted:Q", format=".2f"), alt.Tooltip("count:Q", title="positions", format=",")]
    base = alt.Chart(curve).encode(x)
    title = "accepted nodes of the base tree"
    band = base.mark_area(opacity=0.2, color=PALETTE[0]).encode(alt.Y("ci_low:Q", title=title), alt.Y2("ci_high:Q"))
    line = base.mark_line(color=PALETTE[0]).encode(alt.Y("accepted:Q", title=title))
    points = base.mark_point(filled=True, opacity=1, size=40, color=PALETTE[0]).encode(
        alt.Y("accepted:Q", title=title), tooltip=tooltip
    )
    points = points.add_params(drag)
    names = [f"threshold {number}" for number in range(1, len(edges) + 1)]
    marks = pl.DataFrame({"edge": edges, "name": names}, schema={"edge": pl.Float64, "name": pl.String})
    rules = alt.Chart(marks).mark_rule(color=PALETTE[5], strokeWidth=2, strokeDash=[6, 3])
    rules = rules.encode(alt.X("edge:Q"), tooltip=[alt.Tooltip("name:N"), alt.Tooltip("edge:Q", title="nats", format=".2f")])
    labels = alt.Chart(marks).mark_text(color=PALETTE[5], dx=4, align="left", baseline="top", fontWeight="bold")
    labels = labels.encode(alt.X("edge:Q"), alt.YValue(2), alt.Text("edge:Q", format=".1f"))
    return alt.layer(band, line, points, rules, labels, height=height)


def reliability_chart(found: pl.DataFrame, by: str | None = None, height: int = 320) -> alt.LayerChart:
    """`sim.reliability.reliability`: a draft that means what it says lies on the diagonal."""
    unit = alt.Scale(domain=[0, 1])
    ends = pl.DataFrame({"probability": [0.0, 1.0], "accepted": [0.0, 1.0]})
    x = alt.X("probability:Q", title=X_TITLES["top1_probability"], scale=unit, axis=alt.Axis(format="%"))
    y = alt.Y("accepted:Q", title="accepted (draft's first choice)", scale=unit, axis=alt.Axis(format="%"))
    diagonal = alt.Chart(ends).mark_line(color=GREY, strokeDash=[4, 4]).encode(x, y)
    colour, shape = signs(by) if by else one_sign()
    tooltip = [alt.Tooltip(f"{by}:N")] if by else []
    tooltip += [alt.Tooltip("probability:Q", format=".1%"), alt.Tooltip("accepted:Q", format=".1%")]
    tooltip += [alt.Tooltip("count:Q", title="samples", format=",")]
    base = alt.Chart(found)
    lines = base.mark_line().encode(x, y, color=colour)
    spans = base.mark_rule(opacity=0.6).encode(x, alt.Y("ci_low:Q"), alt.Y2("ci_high:Q"), color=colour)
    points = base.mark_point(filled=True, size=45).encode(x, y, color=colour, shape=shape, tooltip=tooltip)
    return alt.layer(diagonal, lines, spans, points, height=height)


def rank_chart(found: pl.DataFrame, height: int = 320) -> alt.Chart:
    """`sim.reliability.terminal_ranks`."""
    tooltip = [alt.Tooltip("from:Q"), alt.Tooltip("to:Q"), alt.Tooltip("share:Q", format=".1%")]
    tooltip += [alt.Tooltip("cumulative:Q", title="up to here", format=".1%"), alt.Tooltip("accepted:Q", format=".2f")]
    return (
        alt.Chart(found.with_columns(end=pl.col("to") + 1))
        .mark_bar(color=PALETTE[2], opacity=0.85)
        .encode(
            alt.X("from:Q", bin="binned", title="rank of the last accepted node (1 = most probable)"),
            alt.X2("end:Q"),
            alt.Y("share:Q", title="share of positions", axis=alt.Axis(format="%")),
            tooltip=tooltip,
        )
        .properties(height=height)
    )


def count_chart(table: pl.DataFrame, x: str, title: str, height: int = 260) -> alt.Chart:
    """How many positions there are with each whole number ``x``. :param table: ``x`` and positions."""
    bars = alt.Chart(table).mark_bar(color=PALETTE[0], opacity=0.8)
    axis = alt.Axis(labelAngle=0)
    tooltip = [alt.Tooltip(f"{x}:O"), alt.Tooltip("positions:Q", format=",")]
    return bars.encode(
        alt.X(f"{x}:O", title=title, axis=axis), alt.Y("positions:Q", title="positions"), tooltip=tooltip
    ).properties(height=height)


def pareto_chart(
    table: pl.DataFrame, x: str, y: str, x_title: str, y_title: str, picked: str | None = None, height: int = 460
) -> alt.LayerChart:
    """A cloud of settings and its front; the selection "setting" takes one.

    :param table: ``x``, ``y``, setting, kind (of policy), front.   :param picked: the setting to draw a ring around.
    """
    pick = alt.selection_point(name="setting", fields=["setting"], empty=False)
    across = alt.X(f"{x}:Q", title=x_title, scale=alt.Scale(zero=False))
    up = alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=False))
    colour, shape = signs("kind")
    tooltip = [alt.Tooltip("setting:N"), alt.Tooltip(f"{x}:Q", format=".3f"), alt.Tooltip(f"{y}:Q", format=".3f")]
    line = alt.Chart(table.filter("front").sort(x)).mark_line(color=GREY, interpolate="step-after", strokeDash=[5, 3])
    line = line.encode(across, up)
    points = alt.Chart(table).mark_point(filled=True, cursor="pointer").encode(
        across, up, color=colour, shape=shape, tooltip=tooltip,
        size=where("datum.front", alt.SizeValue, 110, 45),
        opacity=where("datum.front", alt.OpacityValue, 1, 0.45),
    )  # fmt: skip
    ring = alt.Chart(table.filter(pl.col("setting") == (picked or ""))).mark_point(size=330, color=PALETTE[5], strokeWidth=2.5)
    return alt.layer(line, ring.encode(across, up), points.add_params(pick), height=height)
