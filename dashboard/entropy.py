"""Entropy and acceptance: curves, a brush that says who stands behind a range, HeteroSpec's strata, calibration."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import streamlit as st

from dashboard.common import (
    FITTED,
    View,
    current,
    differences_of,
    escaped,
    friendly,
    nothing_drafted,
    policy_of,
    replayed,
    samples_of,
    show_chart,
    show_table,
    title,
    words,
)
from policies.heterospec import HeteroSpec
from policies.registry import load_policy
from sim import charts, curves, reliability, strata, walkthrough
from sim.metrics import ALL

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
    title("Entropy and acceptance", "Does the draft know when it is right?")
    if nothing_drafted(view):
        return
    table = samples_of(view.key, view)
    if table.is_empty():
        st.info(f"The recording holds no tree of the drafter {escaped(view.drafter)}.")
        return
    left, right = st.columns([3, 2])
    x = left.segmented_control(
        "Against", list(MEASURES), format_func=MEASURES.get, default="draft_entropy", required=True, key="x", bind="query-params"
    )
    outcome = right.segmented_control(
        "Accepted is", list(OUTCOMES), format_func=OUTCOMES.get, default="top1", required=True, key="outcome", bind="query-params"
    )
    acceptance(view, table, x, outcome)
    who_is_there(view, table, x, outcome)
    with friendly():
        thresholds(view)
    trust(view, table)


# --- curves


@st.cache_data(max_entries=50, show_spinner=False)
def curve_of(key: str, x: str, by: str, outcome: str, _table: pl.DataFrame) -> pl.DataFrame:
    """By depth over all depths; by domain over the roots alone, so that no easy place counts more often."""
    return curves.curve(roots(_table) if by == "domain" else _table, x, by, outcome=outcome)


def roots(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("depth") == 0)


def acceptance(view: View, table: pl.DataFrame, x: str, outcome: str) -> None:
    told = {
        "domain": "By domain, at the root of every position (the first drafted token).",
        "depth": "By depth of the node that proposes (0 = the root). Deeper nodes exist only where the draft's top K held the "
        "text all the way: a selection of easy places.",
    }
    for column, (by, caption) in zip(st.columns(2), told.items(), strict=True):
        with column:
            found = curve_of(view.key, x, by, outcome, table)
            show_chart(charts.acceptance_chart(found, x, outcome, by, height=340), found, f"acceptance_by_{by}", caption)
    st.caption(
        f"{len(table):,} samples. Each point holds equally many; bands are Wilson 95% intervals, which take samples as "
        "independent: neighbouring places of one text are not, so true intervals are somewhat wider."
    )


# --- linked brushing


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
    names = {
        "top1_probability": NUMBER("draft's probability", format="%.3f"),
        "draft_entropy": NUMBER("draft entropy (nats)", format="%.2f"),
    }
    show_table(tokens_of(view, chosen, outcome), "tokens_inside", names)


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


# --- HeteroSpec's strata


def partly(view: View) -> str:
    """What to add where a large recording was not looked at whole."""
    return f" of {len(view.some_texts):,} texts, evenly spread" if len(view.some_texts) < len(view.texts) else ""


def fitted() -> HeteroSpec:
    path = FITTED / "heterospec.json"
    return load_policy(str(path) if path.is_file() else "heterospec(thresholds_=[9, 10, 11])")


@st.cache_data(max_entries=10, show_spinner="Drafting the base tree at every position")
def paths_of(key: str, _view: View) -> pl.DataFrame:
    return strata.meta_paths(_view.recording, fitted(), _view.drafter, _view.some_texts)


def thresholds(view: View) -> None:
    st.subheader("HeteroSpec's strata", anchor=False)
    st.markdown(
        "After the base tree is drafted, HeteroSpec adds up the draft's entropy along its most probable path. Below the first "
        "threshold it drafts deeper and verifies least; above the last it is EAGLE-3. Move the thresholds."
    )
    paths = paths_of(view.key, view)
    if paths["entropy"].null_count() == len(paths):
        st.info("No position's base tree reaches the depth that HeteroSpec looks at.")
        return
    policy = fitted()
    top = float(round(paths["entropy"].max() + 1))
    chosen = []
    for number, column in enumerate(st.columns(3), 1):
        start = min((policy.thresholds_ or (9.0, 10.0, 11.0))[min(number, len(policy.thresholds_ or (9, 10, 11))) - 1], top)
        chosen.append(
            column.slider(f"threshold {number} (nats)", 0.0, top, round(start, 1), 0.1, key=f"t{number}", bind="query-params")
        )
    policy = strata.with_thresholds(policy, chosen)
    found, curve = strata.strata(paths, policy), strata.accepted_by_entropy(paths)
    left, right = st.columns([3, 2])
    with left:
        show_chart(
            charts.strata_chart(curve, list(policy.thresholds_)),
            curve,
            "strata",
            f"How many nodes of the base tree ({policy.total_tokens} tokens, {policy.depth} levels) the target accepts, at "
            f"{len(paths):,} positions{partly(view)}; bands are 95% intervals.",
        )
    with right:
        names = {
            "above": NUMBER("above (nats)", format="%.1f"),
            "up_to": NUMBER("up to (nats)", format="%.1f"),
            "positions": NUMBER(format="percent"),
            "accepted": NUMBER(format="%.2f"),
            "extra_levels": NUMBER("extra levels"),
            "verified": NUMBER("verified tokens", help="root included"),
        }
        show_table(found, "strata_table", names)
        against_base(view, policy)


def against_base(view: View, policy: HeteroSpec) -> None:
    """The thresholds' policy replayed beside its own base, EAGLE-3."""
    base = replace(policy, thresholds_=())
    table = differences_of(replayed(view, policy), replayed(view, base))
    names = {"tau": "tau", "kept": "verified nodes per cycle", "levels": "draft levels per cycle", "ms_per_token": "ms per token"}
    mean = table.filter((pl.col("domain") == ALL) & pl.col("figure").is_in(list(names)))
    st.markdown("With these thresholds, replayed on every text:")
    for column, row in zip(st.columns(2) * 2, mean.rows(named=True), strict=False):
        better = "inverse" if row["figure"] != "tau" else "normal"
        column.metric(names[row["figure"]], f"{row['ours']:.2f}", f"{row['difference']:+.2f} to EAGLE-3", delta_color=better)


# --- can the draft's numbers be trusted?


@st.cache_data(max_entries=10, show_spinner="Verifying EAGLE-3's tree at every position")
def ranks_of(key: str, spec: str, _view: View) -> pl.DataFrame:
    return walkthrough.accepted_everywhere(_view.recording, policy_of(spec), _view.drafter, _view.some_texts)


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
            f"{nothing:.0%} of {len(everywhere):,} positions{partly(view)}.",
        )


if __name__ == "__main__":
    page()
