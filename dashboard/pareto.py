"""Pareto: a sweep's cloud and front; click a setting to open it in the lab."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import streamlit as st

from dashboard.common import allowed, friendly, from_here, show_chart, show_table
from dashboard.view import View, current
from policies.errors import UserError
from sim import charts, lab, sweeps
from sim.sweepstore import RESULTS

# No bare strings in pages: Streamlit would show them.
EMPTY = """No sweep to show yet. Replay a grid of settings and open the dashboard with what it wrote:

    python -m sim.sweep --help
    streamlit run app.py -- TRACE --sweep FOLDER"""
NUMBER = st.column_config.NumberColumn
SHORT = {"ms_per_token": "ms per token", "tokens_per_second": "tokens/s", "kept": "verified", "verified": "verified and root"}
TITLES = {"tokens_per_second": "predicted tokens per second", "verified": "tokens verified per cycle"}


def page() -> None:
    view = current()
    with friendly():
        path = choose(view)
        if path is None:
            st.info(EMPTY)
            return
        cloud(sweeps.read_sweep(path))


def choose(view: View) -> Path | None:
    folder = view.recording.folder
    places, names = (folder, folder.parent, Path.cwd()), ("*sweep*.parquet", f"*sweep*/{RESULTS}")
    beside = sorted(path for place in places for name in names for path in place.glob(name))
    folders = (path.parent if path.name == RESULTS else path for path in [*view.sweeps, *beside])
    known = list(dict.fromkeys(str(from_here(path)) for path in folders))  # each once, however it was found
    name = st.selectbox(
        "Sweep",
        known,
        0 if known else None,
        key="sweep",
        bind="query-params",
        accept_new_options=True,
        placeholder="a folder that sim.sweep wrote",
    )
    if name is None:
        return None
    return Path(name) if name in known else allowed(Path(name))


def cloud(table: pl.DataFrame) -> None:
    figures = [name for name in sweeps.COSTS if name in table.columns and table[name].null_count() < len(table)]
    names = TITLES | charts.VALUE_TITLES
    columns = st.columns(4)
    ask = {"format_func": lambda name: SHORT.get(name, name), "bind": "query-params"}
    x = columns[0].selectbox("Across", figures, figures.index("kept") if "kept" in figures else 0, key="across", **ask)
    rest = [name for name in figures if name != x]
    y = columns[1].selectbox("Up", rest, rest.index("tau") if "tau" in rest else 0, key="up", **ask)
    domains = table["domain"].unique(maintain_order=True).to_list()
    domain = columns[2].selectbox(
        "Texts", domains, domains.index("mean") if "mean" in domains else 0, key="swept", bind="query-params"
    )
    shown = table.filter(domain=domain)
    for name in ("batch", "schedule", "temperature"):
        values = sorted(shown[name].drop_nulls().unique().to_list()) if name in shown.columns else []
        if len(values) > 1:
            value = columns[3].selectbox(name, values, key=f"swept_{name}", bind="query-params")
            shown = shown.filter(pl.col(name) == value)
    covered = pl.col("coverage") == 1.0 if "coverage" in shown.columns else pl.lit(True)
    partial = int((~shown.select(covered.alias("whole"))["whole"]).sum())
    shown = sweeps.with_front(shown.filter(covered), x, y)
    shown = shown.with_columns(kind=pl.col("policy").str.split("(").list.first())

    settings = shown.sort("front", descending=True, maintain_order=True)["setting"].to_list()
    if st.session_state.get("picked") not in settings:  # picked in another sweep
        st.session_state.pop("picked", None)

    def clicked() -> None:
        if found := st.session_state["chart_pareto"].selection["setting"]:
            st.session_state["picked"] = found[0]["setting"]

    told = f"{len(shown):,} settings; the line joins those that no other beats in both respects. Click one to open it in the lab."
    if partial:
        told += f" {partial:,} are left out, since the recording lacks some of what they wanted."
    picked = st.session_state.get("picked") or st.query_params.get("picked")
    chart = charts.pareto_chart(shown, x, y, names.get(x, x), names.get(y, y), picked)
    show_chart(chart, shown, "pareto", told, on_select=clicked)
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    about = "click a point, or choose one here; those of the front come first"
    picked = left.selectbox("Setting", settings, None, key="picked", bind="query-params", placeholder=about)
    with right:
        open_in_lab(shown, picked)
    front = shown.filter("front").sort(x)
    st.subheader("The front", anchor=False)
    show_table(front.select("setting", *figures), "front", {name: NUMBER(SHORT.get(name, name), format="%.2f") for name in figures})


def open_in_lab(shown: pl.DataFrame, picked: str | None) -> None:
    row = next(shown.filter(setting=picked).iter_rows(named=True), None) if picked else None
    if row is None or "parameters" not in row:
        return
    try:
        spec = lab.spec_of(json.loads(row["parameters"]))
    except (UserError, ValueError, KeyError) as error:
        st.warning(f"This setting cannot be opened in the lab: {error}")
        return
    query = {"study": spec}
    if (batch := row.get("batch")) and batch > 1:
        query["batch"] = str(batch)
    st.page_link("dashboard/lab.py", label="Open it in the lab", icon=":material/science:", query_params=query)


if __name__ == "__main__":
    page()
