"""Entropy and acceptance: curves, a brush that says who stands behind a range, HeteroSpec's strata, calibration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import streamlit as st

from dashboard import thresholds
from dashboard.common import (
    download,
    escaped,
    friendly,
    nothing_drafted,
    policy_of,
    samples_of,
    show_chart,
    words,
)
from dashboard.view import View, current, says_which_texts
from sim import charts, curves, reliability, walkthrough

MEASURES = {
    "draft_entropy": "draft entropy",
    "target_entropy": "target entropy",
    "top1_probability": "draft's top-1 probability",
}
OUTCOMES = {"top1": "first choice", "topk": "any of top K"}
SHOWN_TOKENS = 200
NUMBER = st.column_config.NumberColumn


def page() -> None:
    view = current()
    if nothing_drafted(view):
        return
    table = samples_of(view.key, view)
    if table.is_empty():
        st.info(f"The recording holds no tree of the drafter {escaped(view.drafter)}.")
        return
    if some := says_which_texts(view):
        st.caption(f"What follows looks at {some}")
    left, right = st.columns([3, 2])
    x = left.segmented_control(
        "Against", list(MEASURES), format_func=MEASURES.get, default="draft_entropy", required=True, key="x", bind="query-params"
    )
    outcome = right.segmented_control(
        "Accepted is", list(OUTCOMES), format_func=OUTCOMES.get, default="top1", required=True, key="outcome", bind="query-params"
    )
    acceptance(view, table, x, outcome)
    thresholds.show(view)
    trust(view, table)


# --- curves


@st.cache_data(max_entries=50, show_spinner=False)
def curve_of(key: str, x: str, by: str, outcome: str, _table: pl.DataFrame) -> pl.DataFrame:
    """By depth over all depths; by domain over the roots alone, so that no easy place counts more often."""
    return curves.curve(roots(_table) if by == "domain" else _table, x, by, outcome=outcome)


def roots(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("depth") == 0)


@st.fragment  # a click in here draws the curves and who is there again, nothing else
def acceptance(view: View, table: pl.DataFrame, x: str, outcome: str) -> None:
    told = {
        "domain": "By domain, at the root of every position (the first drafted token).",
        "depth": "By depth of the node that proposes (0 = the root). Deeper nodes exist only where the draft's top K held the "
        "text all the way: a selection of easy places.",
    }
    for column, (by, caption) in zip(st.columns(2), told.items(), strict=True):
        with column:
            one_curve(view, table, x, by, outcome, caption)
    if view.temperature is not None:
        every = replace(view, temperature=None)
        caption = f"By temperature of the text, at the roots. {says_which_texts(every)}"
        one_curve(every, roots(samples_of(every.key, every)), x, "temperature", outcome, caption)
    st.caption(
        f"{len(table):,} samples. Each point holds equally many (click one to see which tokens); bands are Wilson 95% intervals, "
        "which take samples as independent: neighbouring places of one text are not, so true intervals are somewhat wider."
    )
    who_is_there(view, table, x, outcome)


def one_curve(view: View, table: pl.DataFrame, x: str, by: str, outcome: str, caption: str) -> None:
    """One chart of curves; a click on a point chooses its range."""
    name = f"acceptance_by_{by}"

    def clicked() -> None:
        if found := st.session_state[f"chart_{name}"].selection["bin"]:
            st.session_state[f"range_{x}"] = (float(found[0]["low"]), float(found[0]["high"]))

    found = curve_of(view.key, x, by, outcome, table)
    chart = charts.acceptance_chart(found, x, outcome, by, height=340, pick=True)
    show_chart(chart, found, name, caption, on_select=clicked)


# --- linked brushing


@st.fragment  # a move in here draws not even the curves again
def who_is_there(view: View, table: pl.DataFrame, x: str, outcome: str) -> None:
    st.subheader("Who is in a range?", anchor=False)
    low, high = float(table[x].min()), float(table[x].max())
    if low == high:
        return
    name = f"range_{x}"

    def brushed() -> None:
        found = st.session_state["chart_samples"].selection["range"].get("left")
        st.session_state[name] = (max(low, min(found)), min(high, max(found))) if found else (low, high)

    found = curves.histogram(table, x)
    show_chart(
        charts.brush_chart(found, x),
        found,
        "samples",
        "Drag over the bars to choose a range (a click outside clears it), or move the slider's ends.",
        on_select=brushed,
    )
    now = st.session_state.get(name)
    if now and not low <= now[0] <= now[1] <= high:  # other texts have other ends
        st.session_state[name] = tuple(min(max(low, end), high) for end in now)
    low, high = st.slider(
        f"Range of {MEASURES[x]}", low, high, (low, high), step=(high - low) / 200, key=name, bind="query-params", format="%.2f"
    )
    for column, by in zip(st.columns(2), ("domain", "depth"), strict=True):
        with column:
            part = curves.inside(roots(table) if by == "domain" else table, x, low, high, by, outcome)
            if by == "depth":
                part = part.filter(pl.col("depth").is_in(charts.DEPTHS))
            caption = f"By {by}" + (", roots only." if by == "domain" else " of the node that proposes.")
            show_chart(charts.share_chart(part, by, 190), part, f"inside_by_{by}", caption)
    chosen = roots(table).filter(pl.col(x).is_between(low, high))
    st.markdown(f"**{len(chosen):,} positions inside**" + (f", {SHOWN_TOKENS} of them:" if len(chosen) > SHOWN_TOKENS else ":"))
    to_explorer(view, tokens_of(view, chosen, outcome))


def to_explorer(view: View, tokens: pl.DataFrame) -> None:
    """The tokens, and a way from a row to the trees there."""
    names = {
        "top1_probability": NUMBER("draft's probability", format="%.3f"),
        "draft_entropy": NUMBER("draft entropy (nats)", format="%.2f"),
    }
    chosen = st.dataframe(
        tokens, column_config=names, hide_index=True, selection_mode="single-row", on_select="rerun", key="inside", height=300
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        rows = [row for row in chosen.selection.rows if row < len(tokens)]
        if rows:
            row = tokens.row(rows[0], named=True)
            index = int(np.flatnonzero(view.recording.sequence_ids == row["sequence"])[0])
            st.page_link(
                "dashboard/explorer.py",
                label=f"See text {index}, position {row['position']} in the Token explorer",
                icon=":material/account_tree:",
                query_params={"text": f"{index} · {row['domain']}", "at": str(row["position"])},
            )
        else:
            st.caption("Choose a row to see the draft trees there.", width="stretch")
        download(tokens, "tokens_inside")


def tokens_of(view: View, chosen: pl.DataFrame, outcome: str) -> pl.DataFrame:
    """Actual tokens behind samples: what stood before, what the draft would have said, what the target said."""
    shown = chosen.gather_every(max(1, len(chosen) // SHOWN_TOKENS)).head(SHOWN_TOKENS)
    vocabulary, recording = words(), view.recording
    index = {int(name): place for place, name in enumerate(recording.sequence_ids)}
    before = []
    for sequence, position in shown.select("sequence", "position").rows():
        at = recording.offset[index[sequence]] + position
        first = max(int(recording.offset[index[sequence]]), int(at) - 7)
        before.append(vocabulary.text(recording.token[first : at + 1]))
    return shown.select(
        "domain",
        "sequence",
        "position",
        pl.Series("behind", before, dtype=pl.String),
        pl.Series("draft says", [vocabulary.label(token) for token in shown["choice"]], dtype=pl.String),
        pl.Series("target says", [vocabulary.label(token) for token in shown["token"]], dtype=pl.String),
        pl.col(outcome).alias("accepted"),
        "top1_probability",
        "draft_entropy",
    )


# --- can the draft's numbers be trusted?


@st.cache_data(max_entries=10, show_spinner="Verifying EAGLE-3's tree at every position")
def ranks_of(key: str, spec: str, _view: View) -> pl.DataFrame:
    return walkthrough.accepted_everywhere(_view.recording, policy_of(spec), _view.drafter, _view.few_texts)


@st.fragment
def trust(view: View, table: pl.DataFrame) -> None:
    left, right = st.columns(2)
    with left:
        st.subheader("Does the draft mean what it says?", anchor=False)
        by = st.segmented_control(
            "One curve for", ["all texts", "each domain"], default="all texts", required=True, key="curve", bind="query-params"
        )
        by = "domain" if by == "each domain" else None
        found = reliability.reliability(roots(table), by=by)
        error = reliability.first_choices(roots(table)).ece
        show_chart(
            charts.reliability_chart(found, by),
            found,
            "reliability",
            f"At the roots, in bins of 10%. On the dashed line the draft is accepted as often as it says; the mean gap (expected "
            f"calibration error) is {error:.1%}. At temperature 0 a draft is accepted when it guesses the likeliest token.",
        )
    with right, friendly():
        st.subheader("How deep in the ranking does the truth end?", anchor=False)
        spec = st.text_input("Tree", "eagle3", key="ranked", bind="query-params", help="any policy: its verified nodes are ranked")
        everywhere = ranks_of(view.key, spec, view)
        found = reliability.terminal_ranks(everywhere)
        nothing = (everywhere["terminal_rank"] == 0).mean()
        show_chart(
            charts.rank_chart(found),
            found,
            "terminal_ranks",
            f"Terminal confidence rank (HeteroSpec, section 3) at every position where something was accepted; nothing was at "
            f"{nothing:.0%} of {len(everywhere):,} positions. {says_which_texts(view, view.few_texts)}",
        )


if __name__ == "__main__":
    page()
