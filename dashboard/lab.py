"""Policy lab: choose policies, turn the parameters of one, replay on the spot, take away what reproduces it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

import polars as pl
import streamlit as st

from dashboard.common import (
    View,
    choose_policies,
    choose_policy,
    current,
    differences_of,
    download,
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
    title,
)
from policies.contract import Policy
from policies.errors import UserError
from policies.registry import load_policy
from sim import charts, lab
from sim.bounds import Placing, place
from sim.export import Export, exported_from
from sim.finding import digest_of
from sim.metrics import ALL, result_rows
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


def page() -> None:
    view = current()
    title("Policy lab", "What would each policy have done on these very texts? Every cycle replayed, none estimated.")
    if nothing_drafted(view):
        return
    left, right = st.columns([1, 3], gap="medium")
    with left:
        study = turn()
    specs = known_specs()
    with right:
        start = [spec for spec in specs if any(lab.head_of(spec) == name or f"{name}.json" in spec for name in START)]
        against = choose_policies("Compared with", "against", start)
        tallies = replay_all(view, [study, *against] if study else against)
        if tallies:
            results(view, tallies, study)
    if study in tallies:
        differences(tallies, study)
        how_far(view, study)
        take_away(view, study, tallies[study])


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


# --- replay and results


def replay_all(view: View, specs: list[str]) -> dict[str, Tally]:
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
            tallies[spec] = replayed(view, policy)
    bar.empty()
    return tallies


def results(view: View, tallies: dict[str, Tally], study: str | None) -> None:
    rows = rows_of(view, tallies)
    domains = [domain for domain in rows["domain"].unique(maintain_order=True) if domain != ALL]
    every = [ALL, *domains]
    of = st.segmented_control("Texts", every, default=ALL, required=True, key="of", bind="query-params")
    shown = rows.filter(pl.col("domain") == of)
    for figure in ("tau", "speedup"):
        if f"{figure}_low" in shown.columns:
            ends = shown.select(f"{figure}_low", f"{figure}_high").rows()
            shown = shown.with_columns(pl.Series(f"{figure}_95", [span(*each) for each in ends], pl.String))
    names = [name for name in COLUMNS if name in shown.columns]
    config = {name: st.column_config.Column(label, help=told) for name, (label, told, _) in COLUMNS.items()}
    config |= {name: NUMBER(label, help=told, format=how) for name, (label, told, how) in COLUMNS.items() if how}
    st.dataframe(shown.select("policy", *names), column_config=config, hide_index=True)
    download(rows, "policies", "every policy and domain")
    covered = rows.filter((pl.col("coverage") == 1.0).all().over("policy"))
    partial = [spec for spec in tallies if spec not in set(covered["policy"])]
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
    show_chart(charts.policy_chart(covered, value), covered, f"policies_{value}", told)


def span(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:.2f} to {high:.2f}"


# --- how sure, and against what


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
        part = differences_of(tallies[study], tallies[spec])
        parts.append(part.filter(pl.col("figure") == figure).with_columns(policy=pl.lit(spec)))
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


def how_far(view: View, study: str) -> None:
    """The policy between plain decoding, the best static setting and what a clairvoyant would need."""
    st.subheader("How far from possible?", anchor=False)
    told = "Replays some hundred settings on half of the texts: seconds on a small recording, minutes on a large one."
    if not st.toggle("Bound and best static setting", key="bound", bind="query-params", help=told):
        return
    with friendly():
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


def take_away(view: View, study: str, sums: Tally) -> None:
    st.subheader("Take it away", anchor=False)
    policy: Policy = policy_of(study)
    content = json.dumps(policy.to_json(), indent=1)
    left, right = st.columns([1, 2])
    name, icon = f"{policy.name}.json", ":material/download:"
    left.download_button("Policy as JSON", content, name, "application/json", icon=icon, key="json", on_click="ignore")
    left.caption("Takes the place of a name wherever a policy is asked for.")
    trace, spec = shlex.quote(str(view.recording.folder)), shlex.quote(study)
    profile = f" --profile {shlex.quote(view.profile.source.removeprefix('the profile '))}" if view.profile else ""
    right.code(
        f"python -m live.bench {trace}{profile} --drafter {view.drafter} --policy {spec}\n"
        f"python -m live.generate 'Why is the sky blue?' --policy {spec}",
        language="bash",
        wrap_lines=True,
    )
    right.caption("Predicted beside measured, and the same policy decoding live.")
    row = result_rows(sums, policy, view.setting)[-1]
    exports = {each.engine: each for each in exported_from(view.recording, view.drafter, policy, row.accepted_by_depth)}
    engine = st.segmented_control("In the words of an engine", list(exports), key="engine", bind="query-params")
    if engine:
        in_words(exports[engine])


def in_words(export: Export) -> None:
    """What to tell one engine, and what it cannot be told."""
    if export.command:
        st.code(export.command, language="bash", wrap_lines=True)
    for name, content in export.files.items():
        st.caption(name)
        st.code(json.dumps(content, indent=1), language="json")
    for lacking in export.cannot:
        st.caption(escaped(lacking))


if __name__ == "__main__":
    page()
