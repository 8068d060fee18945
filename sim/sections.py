"""Sections of a report: what each command's JSON shows as tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import polars as pl

from policies.errors import UserError
from sim.bootstrap import Estimate
from sim.charts import PALETTE, acceptance_chart, policy_chart
from sim.contest import DIGITS, TITLES, with_interval
from sim.table import number


@dataclass(frozen=True)
class Table:
    """Cells as text; ``missed`` are places of rows that the recording does not cover."""

    title: str
    header: list[str]
    rows: list[list[str]]
    missed: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """One result: what it says in words, tables and charts, and how it was made."""

    title: str
    command: str
    facts: Table
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Any] = field(default_factory=list)


def section_of(content: dict[str, Any]) -> Section:
    """The section of one command's JSON.

    :raises UserError: when the command is none that a report shows, or the file lacks its rows.
    """
    makers = {"replay": _replay, "sweep": _sweep, "curves": _curves, "compare": _compare, "validate": _validate}
    name = content["command"].split()[2].removeprefix("sim.")
    if name not in makers:
        raise UserError(f"a report shows no results of sim.{name}: it takes those of {', '.join(f'sim.{m}' for m in makers)}")
    try:
        return makers[name](content)
    except KeyError as error:
        raise UserError(f"the result of `{content['command']}` lacks {error}: write it again with --json") from None


def facts_of(content: dict[str, Any]) -> Table:
    """Recording, models, profile and setting, with hashes."""
    rows = []
    abouts = content["about"] if isinstance(content["about"], list) else [content["about"]]
    for about in abouts:
        rows.append(["recording", f"{about['recording']} ({about['texts']} texts{'' if about['complete'] else ', incomplete'})"])
        rows.append(["sha256 of its manifest", about["manifest_sha256"]])
        for role, model in [("target", about["target"]), *(("drafter", drafter) for drafter in about["drafters"])]:
            digest = model.get("weights_sha256")
            rows.append([role, str(model.get("id", "?")) + (f", weights {digest}" if digest else "")])
        if profile := about.get("profile"):
            rows.append(["profile", f"{profile['source']}: {profile['kind']}, {profile['machine']}"])
    settings = content.get("settings") or [content["setting"]] if "setting" in content or "settings" in content else []
    for setting in settings:
        rows.append(["setting", ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None)])
    if "bootstrap" in content:
        rows.append(["bootstrap", ", ".join(f"{name} {value}" for name, value in content["bootstrap"].items())])
    return Table("Configuration", ["what", "value"], rows)


def _interval(row: dict[str, Any], figure: str) -> str:
    if row[figure] is None:
        return "-"
    return with_interval(Estimate(row[figure], row[f"{figure}_low"], row[f"{figure}_high"]), DIGITS[figure])


def _results(title: str, rows: list[dict[str, Any]]) -> Table:
    figures = [figure for figure in TITLES if rows[0][figure] is not None]
    header = ["policy", *(TITLES[figure] for figure in figures), "verified per cycle", "draft levels per cycle", "coverage"]
    cells = [
        [row["policy"], *(_interval(row, figure) for figure in figures), number(row["verified"], 1), number(row["levels"], 1)]
        + [f"{row['coverage']:.2%}"]
        for row in rows
    ]
    return Table(title, header, cells, [i for i, row in enumerate(rows) if row["coverage"] < 1])


def _replay(content: dict[str, Any]) -> Section:
    rows, result = content["rows"], content["contest"]
    means = [row for row in rows if row["domain"] == "mean"]
    domains = list(dict.fromkeys(row["domain"] for row in rows if row["domain"] != "mean"))
    by = {(row["policy"], row["domain"]): row for row in rows}
    tables = [_results("Means over domains [95% interval]", means)]
    value = "ms_per_token" if means[0]["ms_per_token"] is not None else "tau"
    for figure in dict.fromkeys(("tau", value)):
        cells = [[row["policy"], *(_interval(by[row["policy"], domain], figure) for domain in domains)] for row in means]
        tables.append(Table(f"{TITLES[figure]} by domain", ["policy", *domains], cells))
    best = f"Best by {TITLES[result['figure']]}: {result['winner']}." if result["winner"] else "No policy is covered."
    charts = [policy_chart(pl.DataFrame(rows, infer_schema_length=None), figure) for figure in dict.fromkeys(("tau", value))]
    return Section("Who wins", content["command"], facts_of(content), [best], tables, charts)


def _sweep(content: dict[str, Any]) -> Section:
    summary, rows = content["summary"], content["rows"]
    means = {row["policy"]: row for row in rows if row["domain"] == "mean"}
    front = [means[policy] for policy in summary["front"]]
    tables = [_results("Pareto front: tau against verified tokens", front)] if front else []
    lines = [f"{len(means)} settings."]
    if summary["best"]:
        tables.append(_results(f"Best by {TITLES[summary['figure']]}", [means[summary["best"]]]))
        if summary["chosen"] is not None:
            lines.append(f"The best is best in {summary['chosen']:.0%} of the draws; {summary['as_good']} others are as good.")
    table = pl.DataFrame(list(means.values()), infer_schema_length=None)
    colour = alt.Color("on_front:N", scale=alt.Scale(range=["#999999", PALETTE[0]]), title="on the front")
    chart = alt.Chart(table).mark_point(filled=True, size=50)
    x = alt.X("verified:Q", title="verified tokens per cycle")
    y = alt.Y("tau:Q", title="tau", scale=alt.Scale(zero=False))
    charts = [chart.encode(x, y, color=colour, shape="on_front:N").properties(width=600, height=360)]
    return Section("A sweep", content["command"], facts_of(content), lines, tables, charts)


def _curves(content: dict[str, Any]) -> Section:
    tables = [
        Table(
            "What tells accepted from rejected",
            ["measure", "AUC", "calibration error", "Brier score"],
            [
                [row["measure"], *(number(row.get(name), 3) for name in ("auc", "calibration_error", "brier"))]
                for row in content["certainty"]
            ],
        ),
        Table(
            "Share of parents whose child of this rank is right, by depth",
            ["depth", "parents", *(f"rank {rank}" for rank in range(len(content["rank_by_depth"][0]["shares"])))],
            [
                ["all" if row["depth"] is None else str(row["depth"]), str(row["count"]), *(f"{s:.1%}" for s in row["shares"])]
                for row in content["rank_by_depth"]
            ],
        ),
    ]
    by = next((name for name in ("depth", "domain", "temperature") if name in content["curves"]["draft_entropy"][0]), None)
    charts = [
        acceptance_chart(pl.DataFrame(content["curves"][measure]), measure, content["outcome"], by).properties(width=600)
        for measure in ("draft_entropy", "target_entropy", "top1_logprob")
    ]
    last = content["terminal_rank"]
    ranks = pl.DataFrame({"rank": range(len(last["counts"])), "cycles": last["counts"]})
    x = alt.X("rank:O", title="terminal confidence rank", axis=alt.Axis(labelOverlap=True))
    charts.append(alt.Chart(ranks).mark_bar(color=PALETTE[0]).encode(x, y="cycles:Q").properties(width=600, height=240))
    lines = [f"{content['samples']:,} draft nodes of the true path, drafter {content['drafter']}."]
    return Section("Entropy and acceptance", content["command"], facts_of(content), lines, tables, charts)


def _compare(content: dict[str, Any]) -> Section:
    rows, tables = content["rows"], []
    for figure in (figure for figure in ("tau", "ms_per_token", "speedup") if f"{figure}_first" in rows[0]):
        cells = [
            [row["policy"], row["domain"], *(number(row[f"{figure}_{side}"]) for side in ("first", "second"))]
            + [with_interval(Estimate(row[f"{figure}_difference"], row[f"{figure}_low"], row[f"{figure}_high"]))]
            for row in rows
        ]
        tables.append(Table(TITLES[figure], ["policy", "domain", "first", "second", "second less first [95% interval]"], cells))
    lines = [f"{content['pairs']} texts paired by prompt; {content['same_text']:.0%} of them are the same in both."]
    return Section("Two recordings", content["command"], facts_of(content), lines, tables)


def _validate(content: dict[str, Any]) -> Section:
    summary, rows = content["summary"], content["rows"]
    timed = "error" in summary
    lines = ["Accepted lengths are equal." if summary["lengths_equal"] else "Accepted lengths are NOT equal."]
    if timed:
        error = summary["error"]
        lines.append(f"ms per token: median absolute error {error['median_absolute']:.1%}, bias {error['bias']:+.1%}.")
    header = ["policy", "tau measured", "tau expected", "ms/token measured", *(["ms/token expected", "error"] if timed else [])]
    cells = [
        [row["policy"], *(number(row[name]) for name in ("tau", "expected_tau", "ms_per_token"))]
        + ([number(row["expected_ms_per_token"]), f"{row['error']:+.1%}"] if timed else [])
        for row in rows
    ]
    charts = []
    if timed:
        points = pl.DataFrame(content["points"], infer_schema_length=None).select("policy", "ms", "expected_ms")
        most = float(max(points["ms"].max(), points["expected_ms"].max()))
        line = alt.Chart(pl.DataFrame({"ms": [0.0, most], "expected_ms": [0.0, most]})).mark_line(color="#999999")
        x, y = alt.X("expected_ms:Q", title="expected ms per text"), alt.Y("ms:Q", title="measured ms per text")
        colour = alt.Color("policy:N", legend=alt.Legend(labelLimit=400))
        dots = alt.Chart(points).mark_point(filled=True).encode(x, y, color=colour)
        charts.append((line.encode(x, y) + dots).properties(width=480, height=360))
    table = Table("Prediction and measurement", header, cells)
    return Section("Prediction against measurement", content["command"], facts_of(content), lines, [table], charts)
