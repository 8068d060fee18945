"""Policy lab: choose policies, turn the parameters of one, replay on the spot, take away what reproduces it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace

import polars as pl
import streamlit as st

from dashboard import takeaway
from dashboard.common import (
    choose_policies,
    choose_policy,
    differences_of,
    download,
    drawn_alone,
    escaped,
    friendly,
    known_specs,
    nothing_drafted,
    policy_key,
    policy_of,
    replayed,
    rows_of,
    show_chart,
    show_table,
)
from dashboard.view import View, current, every_core, says_which_texts
from policies.contract import Policy
from policies.errors import UserError
from policies.registry import load_policy
from sim import charts, lab
from sim.bounds import Placing, place
from sim.finding import digest_of
from sim.metrics import ALL
from sim.opening import about, says
from sim.setting import EXECUTIONS, RAGGED, Setting
from sim.tally import Tally
from traces.costs import CostModel

# No bare strings in pages: Streamlit would show them.
START = ("autoregressive", "chain", "static", "eagle3", "heterospec")  # compared at first, where they can run
NUMBER = st.column_config.NumberColumn
COLUMNS = {
    "tau": ("tau", "acceptance length: tokens emitted per cycle", "%.2f"),
    "tau_95": ("95% interval", "of tau, bootstrap over texts", None),
    "kept": ("verified", "drafted tokens sent to verification per cycle, without the root", "%.1f"),
    "levels": ("levels", "draft forwards per cycle", "%.2f"),
    "ms_per_token": ("ms per token", "predicted, prefill excluded", "%.2f"),
    "tokens_per_second": ("tokens/s", "predicted, of all requests that decode together", "%.0f"),
    "speedup": ("speedup", "predicted, over plain decoding of the same texts", "%.2f"),
    "speedup_95": ("95% interval", "of the speedup, bootstrap over texts", None),
    "coverage": ("coverage", "cycles that found all they wanted in the recording", "percent"),
}

PLACES = {
    "tau": ("tau", "tokens emitted per cycle", "%.2f"),
    "ms_per_token": ("ms per token", "predicted, prefill excluded", "%.3f"),
    "coverage": ("coverage", "cycles that found all they wanted in the recording", "percent"),
    "of_plain": ("gap closed from plain", "of the gap between plain decoding and the bound", "percent"),
    "of_static": ("gap closed from static", "of the gap between the best static setting and the bound", "percent"),
    "faster": ("less than static", "how much less it takes per token than the best static setting", "percent"),
    "low": ("from", "lower end of its 95% interval, paired over texts", "percent"),
    "high": ("to", "upper end", "percent"),
}


@drawn_alone
def page() -> None:
    view = current()
    if nothing_drafted(view):
        return
    left, right = st.columns([1, 3], gap="medium")
    with left:
        study = turn()
    specs = known_specs()
    with right:
        setting = choose_setting(view)
        start = [spec for spec in specs if any(lab.head_of(spec) == name or f"{name}.json" in spec for name in START)]
        against = choose_policies("Compared with", "against", start)
        chosen = [study, *against] if study else against
        setting = under_one_schedule(setting, chosen)
        tallies = replay_all(view, setting, chosen)
        if tallies:
            rows = rows_of(view, tallies, setting)
            results(view, rows)
    if tallies:
        figures(view, setting, rows)
    if study in tallies:
        differences(tallies, study)
        how_far(view, study)
        takeaway.show(view, setting, study, tallies[study])


# --- the policy under study


def turn() -> str | None:
    """The spec under study and a control for each of its parameters; None when it cannot be read."""
    spec = choose_policy("Policy under study", "study", "eagle3")
    try:
        policy = policy_of(spec)
    except UserError as error:
        st.error(escaped(str(error)))
        return None
    about = " ".join((type(policy).__doc__ or "").split("\n\n")[0].split())
    st.caption(escaped(about) + (f" [paper]({policy.paper})" if policy.paper else ""))
    for each in lab.parameters(policy):
        control(spec, each)
    st.code(spec, language=None, wrap_lines=True)
    return spec


def control(spec: str, parameter: lab.Parameter) -> None:
    key = f"turn_{lab.head_of(spec)}_{parameter.name}"
    literal = parameter.kind == "literal"
    st.session_state[key] = repr(parameter.value) if literal else parameter.value  # the spec is what counts
    ask = {"key": key, "on_change": turned, "args": (spec, parameter.name, key, literal)}
    label = parameter.name + (" (fitted)" if parameter.learned else "")
    if parameter.kind == "switch":
        st.toggle(label, **ask)
    elif parameter.kind == "whole":
        st.number_input(label, step=1, **ask)
    elif parameter.kind == "real":
        st.number_input(label, step=max(abs(parameter.value) / 20, 0.01), format="%g", **ask)
    else:
        st.text_input(label, **ask)


def turned(spec: str, name: str, key: str, literal: bool) -> None:
    """A control was moved: write the new spec, or say why it cannot be."""
    try:
        value = st.session_state[key]
        new = lab.with_parameter(spec, name, lab.literal(value) if literal else value)
        load_policy(new)
    except UserError as error:
        st.toast(escaped(str(error)), icon=":material/error:")
        return
    st.session_state["study"] = new


def choose_setting(view: View) -> Setting:
    """Batch and execution; what there is to choose follows from the profile and from how many texts there are."""
    columns = st.columns(3)
    batches = lab.batches(view.profile, len(view.texts))
    ask = {"bind": "query-params"}
    batch = columns[0].selectbox("Batch", batches, key="batch", help="requests that decode together", **ask)
    setting = replace(view.setting, batch=batch)
    if view.profile is None:
        return setting
    if batch > 1:
        told = "max: rows are padded, all pay for the largest; sum: tokens are packed, as engines with variable-length kernels do"
        ragged = columns[1].segmented_control(
            "Unequal requests pay for the", RAGGED, default="max", required=True, key="ragged", help=told, **ask
        )
        return replace(setting, ragged=ragged)
    told = "pipelined: the draft works on the next cycle while the target verifies this one, on hardware of its own"
    execution = columns[1].segmented_control(
        "Execution", EXECUTIONS, default="serial", required=True, key="execution", help=told, **ask
    )
    return replace(setting, execution=execution)


def under_one_schedule(setting: Setting, specs: list[str]) -> Setting:
    """Price everybody in fixed groups where one decides for the whole batch."""
    policies = []
    for spec in specs:
        with suppress(UserError):  # said where it is replayed
            policies.append(policy_of(spec))
    return setting.scheduled(policies)


# --- replay and results


def replay_all(view: View, setting: Setting, specs: list[str]) -> dict[str, Tally]:
    """The sums of every policy that could be replayed, by spec; the same policy once, under its first name."""
    tallies: dict[str, Tally] = {}
    seen: set[str] = set()
    bar = st.empty()
    for number, spec in enumerate(specs):
        with friendly():
            policy = policy_of(spec)
            if (digest := policy_key(policy)) in seen:
                continue
            bar.progress(number / len(specs), text=f"replaying {escaped(spec)}")
            seen.add(digest)
            tallies[spec] = replayed(view, policy, setting)
    bar.empty()
    return tallies


def results(view: View, rows: pl.DataFrame) -> None:
    """Who wins, as a picture."""
    covered = rows.filter((pl.col("coverage") == 1.0).all().over("policy"))
    partial = [spec for spec in rows["policy"].unique(maintain_order=True) if spec not in set(covered["policy"])]
    if partial:
        st.caption(
            f"Not ranked, since the recording lacks some of what they wanted: {escaped(', '.join(partial))}; "
            "add it with `python -m traces.record --fill TRACE --policy POLICY`."
        )
    if covered.is_empty():
        return
    value = "speedup" if "speedup" in covered.columns and covered["speedup"].null_count() < len(covered) else "tau"
    told = "Bars: mean over domains, best first; dark lines: its 95% interval over texts; points: the domains."
    if value == "tau":
        told += " Tau alone crowns the policy that verifies most; choose a hardware profile in the sidebar to see what it costs."
    show_chart(charts.policy_chart(covered, value), covered, f"policies_{value}", f"{told} {says_which_texts(view)}")


@st.fragment
def figures(view: View, setting: Setting, rows: pl.DataFrame) -> None:
    """The same as numbers."""
    domains = [domain for domain in rows["domain"].unique(maintain_order=True) if domain != ALL]
    of = st.segmented_control("Texts", [ALL, *domains], default=ALL, required=True, key="of", bind="query-params")
    shown = rows.filter(pl.col("domain") == of)
    for figure in ("tau", "speedup"):
        if f"{figure}_low" in shown.columns and shown[f"{figure}_low"].null_count() < len(shown):
            ends = shown.select(f"{figure}_low", f"{figure}_high").rows()
            shown = shown.with_columns(pl.Series(f"{figure}_95", [span(*each) for each in ends], pl.String))
    names = [name for name in COLUMNS if name in shown.columns and (name != "tokens_per_second" or setting.batch > 1)]
    config = {name: st.column_config.Column(label, help=told) for name, (label, told, _) in COLUMNS.items()}
    config |= {name: NUMBER(label, help=told, format=how) for name, (label, told, how) in COLUMNS.items() if how}
    st.dataframe(shown.select("policy", *names), column_config=config, hide_index=True)
    with st.container(horizontal=True):
        st.caption(" ".join(said(view, setting)) or "Means over domains, or one domain.", width="stretch")
        download(rows, "policies", "every domain")


def said(view: View, setting: Setting) -> list[str]:
    """Notes that belong under predicted times."""
    lines = says(about(view.recording, view.profile, setting.drafter), setting)
    return [f"{line[0].upper()}{line[1:]}." for line in map(escaped, lines)]


def span(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:.2f} to {high:.2f}"


# --- how sure, and against what


@st.fragment
def differences(tallies: dict[str, Tally], study: str) -> None:
    others = [spec for spec in tallies if spec != study]
    if not others:
        return
    st.subheader("Is the policy under study better?", anchor=False)
    known = {"tau": "tau", "kept": "verified per cycle", "ms_per_token": "ms per token", "speedup": "speedup"}
    priced = all("speedup" in sums.figures for sums in tallies.values())
    choices = [name for name in known if priced or name in ("tau", "kept")]
    first = "speedup" if priced else "tau"
    figure = st.segmented_control(
        "Figure", choices, format_func=known.get, default=first, required=True, key="figure", bind="query-params"
    )
    parts = []
    for spec in others:
        part = differences_of(tallies[study], tallies[spec], (figure,))
        parts.append(part.with_columns(policy=pl.lit(spec)))
    table = pl.concat(parts)
    sure = table["low"].null_count() == 0
    show_chart(
        charts.difference_chart(table.filter(domain=ALL), f"{known[figure]}: this minus the other", "policy"),
        table,
        "differences",
        "Difference of the means over domains, the same texts drawn for both (paired bootstrap, 95%). A line that crosses zero "
        "leaves it open." + ("" if sure else " Intervals need two texts in every domain; this recording has fewer."),
    )


@st.cache_data(max_entries=20, show_spinner="Searching the best static setting")
def best_static(key: str, cost_key: str, _view: View, _cost: CostModel | None) -> Policy | None:
    return place(_view.recording, [], _cost, _view.drafter, texts=_view.texts).static


@st.cache_data(max_entries=50, show_spinner="Placing the policy")
def placed(key: str, policy_key: str, cost_key: str, _view: View, _policy: Policy, _cost: CostModel | None) -> Placing:
    static = best_static(key, cost_key, _view, _cost)
    return place(_view.recording, [_policy], _cost, _view.drafter, static=static, texts=_view.texts)


@st.fragment
def how_far(view: View, study: str) -> None:
    """The policy between plain decoding, the best static setting and what a clairvoyant would need."""
    st.subheader("How far from possible?", anchor=False)
    told = "Replays some hundred settings on half of the texts: seconds on a small recording, minutes on a large one."
    if not st.toggle("Bound and best static setting", key="bound", bind="query-params", help=told):
        return
    with friendly(), every_core():
        policy, profile = policy_of(study), view.profile
        cost = profile and profile.cost(view.drafter)
        found = placed(view.key, policy_key(policy), digest_of(profile) if profile else "", view, policy, cost)
        table = pl.DataFrame([asdict(line) for line in found.lines], infer_schema_length=None)
        table = table[[column.name for column in table if column.null_count() < len(table)]]
        config = {name: NUMBER(label, help=about, format=how) for name, (label, about, how) in PLACES.items()}
        show_table(table, "bound", config | {"name": "policy"})
        search = "Choose a hardware profile to have the best static setting searched."
        if found.static:
            search = f"Best static setting, searched on the others: {escaped(found.static.spec())}."
        st.caption(
            f"Scored on {len(found.split.held_out):,} of the texts. {search} The bound knows the text and drafts just what will "
            "be accepted: nothing beats it inside the recording. A fitted policy may have seen some of these texts."
        )
        if found.static and not any(each.learned and each.value for each in lab.parameters(found.static)):  # else no spec says it
            label = "Open the best static setting in the lab"
            spec = found.static.spec()
            st.page_link("dashboard/lab.py", label=label, icon=":material/science:", query_params={"study": spec})


if __name__ == "__main__":
    page()
