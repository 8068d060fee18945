"""Compare: two policies on one recording, or one policy on two recordings; where they differ, and how surely."""

from __future__ import annotations

import numpy as np
import polars as pl
import streamlit as st
import torch

from dashboard.common import (
    choose_policy,
    chosen_row,
    differences_of,
    escaped,
    friendly,
    nothing_drafted,
    policy_key,
    policy_of,
    replayed,
    show_chart,
    show_table,
    words,
)
from dashboard.opening import opened
from dashboard.view import View, current, says_which_texts
from policies.contract import Policy
from policies.errors import UserError
from sim import charts, walkthrough
from sim.compare import aligned, check_same_tokenizer, paired_texts
from sim.finding import files_of, key_of
from sim.setting import Setting
from sim.tally import Tally
from sim.trial import run_trial
from traces.recording import Recording

# No bare strings in pages: Streamlit would show them.
FIGURES = {"tau": "tau", "kept": "verified per cycle", "levels": "levels", "ms_per_token": "ms per token", "speedup": "speedup"}
MOST = 100  # positions listed
NUMBER = st.column_config.NumberColumn


def page() -> None:
    view = current()
    if nothing_drafted(view):
        return
    ways = ["two policies", "two recordings"]
    way = st.segmented_control("Compare", ways, default=ways[0], required=True, key="way", bind="query-params")
    with friendly():
        if way == ways[0]:
            two_policies(view)
        else:
            two_recordings(view)


def two_policies(view: View) -> None:
    left, right = st.columns(2)
    with left:
        ours = choose_policy("Policy A", "a", "eagle3")
    with right:
        theirs = choose_policy("Policy B", "b", "static")
    one, other = policy_of(ours), policy_of(theirs)
    table = differences_of(replayed(view, one), replayed(view, other))
    by_domain(table, "A", "B")
    st.subheader("Where do they differ most?", anchor=False)
    places(view, one, other)


def by_domain(table: pl.DataFrame, ours: str, theirs: str) -> None:
    known = [figure for figure in FIGURES if figure in set(table["figure"])]
    figure = st.segmented_control(
        "Figure", known, format_func=FIGURES.get, default="tau", required=True, key="differing", bind="query-params"
    )
    part = table.filter(figure=figure)
    left, right = st.columns(2)
    with left:
        show_chart(
            charts.difference_chart(part, f"{FIGURES[figure]}: {ours} minus {theirs}", "domain"),
            part,
            "difference_by_domain",
            "By domain, and the mean over domains. Lines: 95% intervals, the same texts drawn for both; none where a domain has a "
            f"single text. {says_which_texts(current())}",
        )
    with right:
        numbers = {name: NUMBER(format="%.3f") for name in ("ours", "theirs", "difference", "low", "high")}
        numbers |= {"ours": NUMBER(ours, format="%.3f"), "theirs": NUMBER(theirs, format="%.3f")}
        show_table(part.drop("figure"), "differences", numbers, table)


@st.cache_resource(max_entries=20, show_spinner="Drafting at every position")
def everywhere(key: str, policy_key: str, _view: View, _policy: Policy) -> pl.DataFrame:
    return walkthrough.accepted_everywhere(_view.recording, _policy, _view.drafter, _view.few_texts, _view.cost(_policy.name))


def places(view: View, one: Policy, other: Policy) -> None:
    """The positions at which the two would accept the most different numbers of nodes."""
    parts = [everywhere(view.priced_key, policy_key(policy), view, policy) for policy in (one, other)]
    both = parts[0].join(parts[1], on=["text", "position"], suffix="_b")
    gap = (pl.col("accepted") - pl.col("accepted_b")).alias("difference")
    both = both.with_columns(gap)
    counts = both.group_by("difference").len("positions").sort("difference")
    left, right = st.columns([2, 3])
    with left:
        show_chart(
            charts.count_chart(counts, "difference", "accepted by A minus accepted by B"),
            counts,
            "accepted_differences",
            f"{len(both):,} positions; each policy drafts there afresh, whether or not one of its cycles begins there. "
            + says_which_texts(view, view.few_texts),
        )
    with right:
        worst = both.sort(pl.col("difference").abs(), descending=True, maintain_order=True).head(MOST)
        worst = worst.filter(pl.col("difference") != 0)
        chosen = st.dataframe(
            described(view, worst), hide_index=True, selection_mode="single-row", on_select="rerun", key="places", height=300
        )
        if worst.is_empty():
            st.info("Both accept the same everywhere.")
            return
        labels = [f"{text}.{position}" for text, position in worst.select("text", "position").rows()]
        row = worst.row(chosen_row("place", labels, chosen.selection.rows), named=True)
        domain = view.recording.domains[view.recording.domain_index[row["text"]]]
        st.page_link(
            "dashboard/explorer.py",
            label=f"See text {row['text']}, position {row['position']} in the Token explorer",
            icon=":material/account_tree:",
            query_params={
                "text": f"{row['text']} · {domain}",
                "at": str(row["position"]),
                "a": st.session_state["a"],
                "b": st.session_state["b"],
            },
        )


def described(view: View, rows: pl.DataFrame) -> pl.DataFrame:
    recording, behind = view.recording, []
    for text, position in rows.select("text", "position").rows():
        tokens = recording.token[recording.offset[text] : recording.offset[text] + position + 1]
        behind.append(words().text(tokens[-8:]))
    return rows.select(
        "text",
        "position",
        pl.Series("behind", behind, dtype=pl.String),
        pl.col("accepted").alias("A accepts"),
        pl.col("accepted_b").alias("B accepts"),
        pl.col("kept").alias("A verifies"),
        pl.col("kept_b").alias("B verifies"),
    )


def two_recordings(view: View) -> None:
    if not view.others:
        st.info("Open the dashboard with two recordings: `streamlit run app.py -- FIRST SECOND`.")
        return
    left, right = st.columns(2)
    name = left.selectbox("Compared with the recording", list(view.others), key="other", bind="query-params")
    with right:
        spec = choose_policy("Policy", "both", "eagle3")
    folder = view.others[name]
    theirs = opened(str(folder), files_of(folder))
    drafter = view.drafter if view.drafter in theirs.drafters else theirs.drafters[0]
    policy = policy_of(spec)
    check_same_tokenizer(view.recording, theirs)
    at = float(view.recording.temperature[view.texts[0]])
    pairs = paired_texts(view.recording, theirs, at, at)
    pairs = pairs[np.isin(pairs[:, 0], view.texts)]
    if not len(pairs):
        raise UserError("none of the texts looked at has a partner there: look at every text (in the sidebar)")
    setting = Setting(drafter, temperature=at)
    partners = tuple(sorted(pairs[:, 1].tolist()))
    there = _replayed_there(key_of(theirs), policy_key(policy), setting, partners, theirs, policy)
    st.caption(
        f"{len(pairs):,} texts have a partner with the same prompt there. Drafters: {escaped(view.drafter)} here, "
        f"{escaped(drafter)} there. The answers need not be the same text. {says_which_texts(view)}"
    )
    by_domain(differences_of(*aligned([replayed(view, policy), there], pairs)), "here", "there")


@st.cache_data(max_entries=20, show_spinner="Replaying the other recording")
def _replayed_there(
    key: str, policy_key: str, setting: Setting, texts: tuple[int, ...], _recording: Recording, _policy: Policy
) -> Tally:
    return run_trial(_recording, _policy, setting, sequences=torch.tensor(texts))


if __name__ == "__main__":
    page()
