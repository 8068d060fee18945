"""The recording itself: what it is, whether it is intact, tau at a glance, prompts and texts to read."""

from __future__ import annotations

import polars as pl
import streamlit as st

from dashboard.common import (
    choose_policy,
    chosen_row,
    escaped,
    friendly,
    nothing_drafted,
    policy_of,
    replayed,
    rows_of,
    show_chart,
    show_table,
    words,
)
from dashboard.view import View, current, says_which_texts
from sim import charts, glance
from traces.costs import machine_in_words

NUMBER = st.column_config.NumberColumn


def page() -> None:
    view = current()
    by_domain = glance.overview(view.recording)
    facts(view, by_domain)
    with friendly():
        tau(view)
    envelope(view)
    reading(view)


def facts(view: View, by_domain: pl.DataFrame) -> None:
    recording, manifest, every = view.recording, view.recording.manifest, by_domain.row(-1, named=True)
    looked_for_loops = manifest.get("loop_rule") or every["ended_by_loop"]
    megabytes = sum(entry["bytes"] for entry in manifest["shards"].values()) / 1e6
    told = {
        "texts": f"{every['texts']:,}",
        "positions": f"{every['positions']:,}",
        "ended by a loop": f"{every['ended_by_loop']:.1%}" if looked_for_loops else "not checked",
        "complete": "yes" if recording.complete else f"no: {len(recording.plans)} of {len(manifest['plan'])} shards",
        "intact": "yes",  # a damaged one was refused: see open_recording
        "size": f"{megabytes:,.1f} MB",
    }
    for column, (name, value) in zip(st.columns(len(told)), told.items(), strict=True):
        column.metric(name, value)
    drafters = ", ".join(f"{each['name']} ({each.get('kind', 'unknown kind')})" for each in manifest["drafters"])
    lines = [
        f"target **{escaped(str(manifest.get('target', {}).get('id', 'not named')))}**",
        f"drafters **{escaped(drafters)}**",
        f"recorded on **{escaped(machine_in_words(manifest))}**",
    ]
    st.markdown(" · ".join(lines))
    columns = {
        "ended_by_loop": NUMBER("ended by a loop", format="percent"),
        "ended_by_eos": NUMBER("ended by themselves", format="percent"),
        "tokens": NUMBER("tokens that count", format="localized"),
        "positions": NUMBER(format="localized"),
        "texts": NUMBER(format="localized"),
    }
    show_table(by_domain, "recording", columns)
    st.caption(
        "Texts that fall into verbatim loops flatter every policy. "
        + ("They were cut where the loop begins." if looked_for_loops else "This recording was not checked for them.")
        + " `python -m traces.inspect TRACE --verify` compares every file with its checksum."
    )


def tau(view: View) -> None:
    st.subheader("tau by domain", anchor=False)
    if nothing_drafted(view):
        return
    spec = choose_policy("Policy", "glance", "eagle3")
    table = rows_of(view, {spec: replayed(view, policy_of(spec))})
    partly = table["coverage"].min() < 1.0
    note = " The recording lacks some of what this policy wanted, so its tau may be too high or too low." if partly else ""
    show_chart(
        charts.domain_chart(table, "tau"),
        table,
        "tau_by_domain",
        f"Tokens emitted per cycle by {escaped(spec)} with the drafter {escaped(view.drafter)}; lines are 95% intervals over "
        f"texts (none where a domain has a single text).{note} {says_which_texts(view)}",
    )


def envelope(view: View) -> None:
    manifest = view.recording.manifest
    with st.expander("What the recording covers, and how it was made"):
        cover = manifest.get("envelope", {}).get("cover", [])
        if cover:
            st.markdown("Policies whose every expansion was drafted, at every position:")
            st.markdown("\n".join(f"- `{each['policy']}` {escaped(str(each.get('parameters', {})))}" for each in cover))
        kept_out = {"shards", "plan", "drafters", "target"}
        st.json({key: value for key, value in manifest.items() if key not in kept_out}, expanded=False)


@st.cache_resource(max_entries=4, show_spinner="Reading the texts")
def texts_of(key: str, _view: View) -> pl.DataFrame:
    """Prompt and answer of every text at the temperature."""
    every = _view.recording.sequences()
    rows = [every[index] for index in _view.every_text]
    return pl.DataFrame(
        {
            "text": _view.every_text,
            "domain": [row["domain"] for row in rows],
            "prompt": [row["prompt_text"] or words().text(row["prompt_tokens"]) for row in rows],
            "answer": [row["text"] or words().text(row["tokens"]) for row in rows],
            "tokens": [row["length"] for row in rows],
            "ended by": [row["finish"] for row in rows],
        }
    )


def reading(view: View) -> None:
    st.subheader("Prompts and texts", anchor=False)
    table = texts_of(view.key, view)
    domains = ["all", *dict.fromkeys(table["domain"])]
    left, right = st.columns([1, 3])
    domain = left.selectbox("Domain", domains, key="domain", bind="query-params")
    wanted = right.text_input("Containing", key="containing", bind="query-params", placeholder="words in prompt or answer")
    if domain != "all":
        table = table.filter(pl.col("domain") == domain)
    if wanted:
        found = pl.any_horizontal(pl.col("prompt", "answer").str.to_lowercase().str.contains(wanted.lower(), literal=True))
        table = table.filter(found)
    if table.is_empty():
        st.info("No text matches.")
        return
    chosen = st.dataframe(table, hide_index=True, selection_mode="single-row", on_select="rerun", key="texts", height=260)
    st.caption("Choose a row to read it whole; the Token explorer shows the same text cycle by cycle.")
    row = table.row(chosen_row("read", table["text"].cast(pl.String).to_list(), chosen.selection.rows), named=True)
    left, right = st.columns(2)
    for place, name in ((left, "prompt"), (right, "answer")):
        place.markdown(f"**{name}**")
        place.code(row[name], language=None, wrap_lines=True)
    st.page_link(
        "dashboard/explorer.py",
        label=f"Open text {row['text']} in the Token explorer",
        icon=":material/account_tree:",
        query_params={"text": f"{row['text']} · {row['domain']}"},
    )


if __name__ == "__main__":
    page()
