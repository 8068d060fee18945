"""Cost: what each part of a cycle takes on the chosen machine, and whether predictions come true there."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from dashboard.common import allowed, escaped, friendly, show_chart, show_table
from dashboard.view import View, current
from sim import cost_charts, surfaces
from traces.costs import Profile

# No bare strings in pages: Streamlit would show them.
NO_PROFILE = """No hardware profile is chosen. Measure this machine (40 seconds with --quick) and open the dashboard with it:

    python -m traces.profile --out profile.json --quick
    streamlit run app.py -- TRACE --profile profile.json"""
NO_BENCH = """No bench to show yet. Decode some texts live, beside their prediction:

    python -m live.bench TRACE --profile profile.json --json bench.json
    streamlit run app.py -- TRACE --profile profile.json --bench bench.json"""
TOLD = {
    "verify": "the target's pass over the kept nodes and the root",
    "draft": "one draft level over so many frontier nodes",
    "catch_up": "the draft's pass over tokens committed since it last drafted",
    "plain": "one token of plain decoding",
    "commit": "moving accepted tokens into place in the cache",
    "overhead": "the loop, the tree and the policy, for so many draft levels",
    "looked_up": "the same where a training-free rule looked the levels up, the looking included",
}


def page() -> None:
    view = current()
    st.subheader("Latency, measured and as the cost model reads it", anchor=False)
    if view.profile is None:
        st.info(NO_PROFILE)
    else:
        latency(view.profile)
    st.subheader("Prediction against measurement", anchor=False)
    with friendly():
        bench(view)


def latency(profile: Profile) -> None:
    how = profile.content.get("kind", "measured")
    between = profile.content["interpolation"]
    st.markdown(f"**{escaped(profile.machine)}** · {escaped(str(how))} · between points: {between}")
    kinds = [kind for kind in surfaces.AXES if profile.content.get(kind)]
    left, right, third = st.columns(3)
    kind = left.selectbox("Part of a cycle", kinds, key="part", bind="query-params")
    owners = surfaces.owners(profile, kind)
    owner = None
    if owners:
        label = "Policy" if kind in surfaces.BY_POLICY else "Drafter"
        owner = right.selectbox(label, owners, key=f"owner_{kind}", bind="query-params")
    points, lines = surfaces.measured(profile, kind, owner), surfaces.fitted(profile, kind, owner)
    batches = sorted(points["batch"].unique().to_list())
    batch = third.selectbox("Batch", batches, key="cost_batch", bind="query-params") if len(batches) > 1 else batches[0]
    points, lines = points.filter(batch=batch), lines.filter(batch=batch)
    axis, *others = surfaces.AXES[kind]
    by = others[0] if others[0] != "batch" else None
    show_chart(
        cost_charts.latency_chart(points, lines, axis, by),
        points,
        f"cost_{kind}",
        f"Milliseconds of {TOLD[kind]} (batch {batch}). Points: "
        + ("as measured, with their interquartile range" if "spread_ms" in points.columns else "as the profile holds them")
        + "; lines: what the cost model answers, never cheaper for more.",
    )


def bench(view: View) -> None:
    folder = view.recording.folder
    beside = [*folder.glob("*bench*.json"), *folder.parent.glob("*bench*.json"), *Path.cwd().glob("*bench*.json")]
    known = list(dict.fromkeys(str(path) for path in [*view.benches, *sorted(beside)]))
    name = st.selectbox(
        "Bench", known, 0 if known else None, key="bench", bind="query-params", accept_new_options=True, placeholder="a JSON file"
    )
    if name is None:
        st.info(NO_BENCH)
        return
    table = surfaces.read_bench(Path(name) if name in known else allowed(Path(name)))
    both = table.drop_nulls()
    if both.is_empty():
        st.info("This bench was run without --profile, so it holds no predictions.")
    else:
        show_chart(
            cost_charts.prediction_chart(both),
            table,
            "prediction",
            "Prefill excluded; the shorter the line, the truer the prediction. Predictions are for the whole recording, "
            "measurements for the texts that were decoded.",
        )
    number = st.column_config.NumberColumn
    columns = {"predicted_ms": number("predicted ms per token", format="%.2f")}
    columns |= {"measured_ms": number("measured ms per token", format="%.2f")}
    show_table(table, "bench", columns)


if __name__ == "__main__":
    page()
