"""HeteroSpec's strata, on the page Entropy and acceptance: thresholds drawn on the curve, to be dragged."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import streamlit as st
import torch

from dashboard.common import FITTED, friendly, policy_key, show_chart, show_table
from dashboard.view import View, says_which_texts
from policies.heterospec import HeteroSpec
from policies.registry import load_policy
from sim import charts, strata
from sim.family import Outlook
from sim.tally import Tally
from sim.trial import tally_of

NUMBER = st.column_config.NumberColumn


def fitted() -> HeteroSpec:
    path = FITTED / "heterospec.json"
    return load_policy(str(path) if path.is_file() else "heterospec(thresholds_=[9, 10, 11])")


def _key(view: View) -> str:
    """What is drafted depends on the view and on the fitted policy, whose file may be written anew."""
    return f"{view.key} {policy_key(fitted())}"


@st.cache_data(max_entries=10, show_spinner="Drafting the base tree at every position")
def paths_of(key: str, _view: View) -> pl.DataFrame:
    return strata.meta_paths(_view.recording, fitted(), _view.drafter, _view.few_texts)


@st.cache_resource(max_entries=10, show_spinner="Drafting every stratum at every position")
def outlooks_of(key: str, _view: View) -> list[Outlook]:
    return strata.outlooks_of(_view.recording, fitted(), _view.drafter, _view.few_texts)


@st.fragment  # a move in here draws nothing else on the page again
def show(view: View) -> None:
    """The section of the page."""
    st.subheader("HeteroSpec's strata", anchor=False)
    st.markdown(
        "After the base tree is drafted, HeteroSpec adds up the draft's entropy along its most probable path. Below the first "
        "threshold it drafts deeper and verifies least; above the last it is EAGLE-3. Drag a threshold in the chart, or move "
        "its slider."
    )
    with friendly():
        strata_of(view)


def strata_of(view: View) -> None:
    paths = paths_of(_key(view), view)
    if paths["entropy"].null_count() == len(paths):
        st.info("No position's base tree reaches the depth that HeteroSpec looks at.")
        return
    policy = chosen_thresholds(float(round(paths["entropy"].max() + 1)))
    found, curve = strata.strata(paths, policy), strata.accepted_by_entropy(paths)
    left, right = st.columns([3, 2])
    with left:
        show_chart(
            charts.strata_chart(curve, list(policy.thresholds_)),
            curve,
            "strata",
            f"How many nodes of the base tree ({policy.total_tokens} tokens, {policy.depth} levels) the target accepts, at "
            f"{len(paths):,} positions; bands are 95% intervals. {says_which_texts(view, view.few_texts)}",
            on_select=dragged,
            key=chart_key(),
        )
    with right:
        against_base(view, policy, paths)
    names = {
        "above": NUMBER("above (nats)", format="%.1f"),
        "up_to": NUMBER("up to (nats)", format="%.1f"),
        "positions": NUMBER("of the positions", format="percent"),
        "accepted": NUMBER("accepted nodes", format="%.2f"),
        "extra_levels": NUMBER("extra levels"),
        "verified": NUMBER("verified tokens", help="root included"),
    }
    show_table(found, "strata_table", names)


def chosen_thresholds(top: float) -> HeteroSpec:
    """The fitted policy with the thresholds of three sliders; ``top``: the largest they can be (nats)."""
    policy = fitted()
    own = policy.thresholds_ or (9.0, 10.0, 11.0)
    chosen = []
    for number, column in enumerate(st.columns(3), 1):
        start = min(round(own[min(number, len(own)) - 1], 1), top)
        chosen.append(column.slider(f"threshold {number} (nats)", 0.0, top, start, 0.1, key=f"t{number}", bind="query-params"))
    return strata.with_thresholds(policy, chosen)


def chart_key() -> str:
    """The chart's key; another one after each drag, so that a fresh chart stands there without the box that was dragged."""
    return f"chart_strata_{st.session_state.get('drags', 0)}"


def dragged() -> None:
    """A threshold was dragged in the chart: move its slider."""
    chart = st.session_state.get(chart_key())
    if chart is None:  # the drag went on in a chart that has been replaced: where it was taken up, there is no threshold any more
        return
    found = chart.selection["drag"].get("entropy")
    if not found:
        return
    st.session_state["drags"] = st.session_state.get("drags", 0) + 1
    keys = ["t1", "t2", "t3"]
    moved = strata.dragged(sorted(st.session_state[key] for key in keys), *sorted(found))
    for key, value in zip(keys, moved, strict=True):
        st.session_state[key] = round(max(value, 0.0), 1)


def against_base(view: View, policy: HeteroSpec, paths: pl.DataFrame) -> None:
    """The thresholds' policy replayed beside its own base, EAGLE-3, on the texts of the chart."""
    ours, base = (replayed(view, each, paths) for each in (policy, replace(policy, thresholds_=())))
    names = {"tau": "tau", "kept": "verified nodes per cycle", "levels": "draft levels per cycle", "ms_per_token": "ms per token"}
    shown = [figure for figure in names if figure in ours.figures]
    st.markdown("With these thresholds, replayed on the same texts:")
    for column, figure in zip(st.columns(2) * 2, shown, strict=False):
        value, better = ours.mean(figure), "inverse" if figure != "tau" else "normal"
        column.metric(names[figure], f"{value:.2f}", f"{value - base.mean(figure):+.2f} to EAGLE-3", delta_color=better)


def replayed(view: View, policy: HeteroSpec, paths: pl.DataFrame) -> Tally:
    """Sums of the policy's replay on the texts of the chart, without predicted times where the profile does not reach."""
    log = strata.replayed(outlooks_of(_key(view), view), paths, policy)
    about = log, view.recording, policy, view.setting
    texts = torch.from_numpy(view.few_texts)
    if view.profile is not None:
        with friendly():
            return tally_of(*about, view.cost(policy.name), texts)
    return tally_of(*about, sequences=texts)
