"""The league as Markdown, from what its JSON holds."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.heterospec import markdown

HEADER = ["policy", "form", "tau", "kept", "ms/token", "less time than best static", "of the gap closed", "than same budget"]
HEADER += ["deciding, ms/cycle", "coverage"]


def render(content: dict[str, Any]) -> str:
    """The whole page: per temperature the table, the times by domain, and what the reader must know."""
    facts = content["about"]
    parts = ["# League", f"Recording `{facts['recording']}`; made by `{content['command']}`. {_machine(facts)}"]
    for group in content["groups"]:
        parts += _group(group)
    return "\n\n".join(parts + [f"Note: {line}." for line in content["says"]]) + "\n"


def _machine(facts: dict[str, Any]) -> str:
    profile = facts["profile"]
    return f"Times are {'analytic' if profile['kind'] == 'analytic' else 'predicted from measurements'}: {profile['machine']}."


def _group(group: dict[str, Any]) -> list[str]:
    setting, lines = group["setting"], group["lines"]
    ranked = sorted((line for line in lines if is_ranked(line)), key=lambda line: mean(line)["ms_per_token"])
    beside = [line for line in lines if not is_ranked(line)]
    title = f"## Temperature {setting['temperature']:g}, drafter {setting['drafter']}"
    title += f", batch {setting['batch']}" if setting["batch"] > 1 else ""
    trained, static = group["trained_on"], group["best_static"]
    least = group["least_ms_per_token"]
    bounds = f"no policy can exceed tau {group['most_tau']:.2f}"
    bounds += "" if least is None else f" or take less than {least:.3f} ms per token"
    about = (
        f"Scored on {group['texts']} texts; fitted, and the best static setting chosen, on {trained['texts']} texts of "
        f"`{trained['recording']}`. Best static: {static['policy']}. Inside this recording {bounds}. Intervals are 95%, paired "
        "bootstrap over texts. The gap is that between best static and the bound on time. Same budget: the static tree that "
        "verifies as many nodes per cycle."
    )
    found = [title, about, markdown(HEADER, [_row(line) for line in ranked])]
    domains = [row["domain"] for row in lines[0]["rows"][:-1]]
    shares = [[line["policy"], *(percent(line["faster_by_domain"][domain]) for domain in domains)] for line in ranked]
    found += ["Less time than best static, by domain:", markdown(["policy", *domains], shares)]
    if beside:
        found.append("Not ranked: bounds, and policies of which the recording lacks something.")
        found.append(markdown(HEADER, [_row(line) for line in beside]))
    return found + _footnotes(lines, group["failed"], setting["temperature"])


def is_ranked(line: dict[str, Any]) -> bool:
    """Whether the line is a policy's or a control's, and the recording held all that it wanted."""
    return line["form"] != "bound" and mean(line)["coverage"] == 1.0


def mean(line: dict[str, Any]) -> dict[str, Any]:
    """The row over all domains."""
    return line["rows"][-1]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _saved(found: dict[str, Any] | None) -> str:
    if not found:
        return "-"
    return percent(found["value"]) + ("" if found["low"] is None else f" [{found['low']:+.1%}, {found['high']:+.1%}]")


def _row(line: dict[str, Any]) -> list[str]:
    row, deciding = mean(line), line.get("decision_ms", math.nan)
    ms = f"{row['ms_per_token']:.3f}"
    if row["ms_per_token_low"] is not None:
        ms += f" [{row['ms_per_token_low']:.3f}, {row['ms_per_token_high']:.3f}]"
    return [
        line["policy"],
        line["form"],
        f"{row['tau']:.2f}",
        f"{row['kept']:.1f}",
        ms,
        _saved(line["faster"]),
        "-" if line["of_static"] is None else f"{line['of_static']:.1%}",
        _saved(line["than_budget"]),
        "-" if math.isnan(deciding) else f"{deciding:.2f}",
        f"{row['coverage']:.1%}",
    ]


def _footnotes(lines: list[dict[str, Any]], failed: dict[str, str], temperature: float) -> list[str]:
    """How to get the published forms of those that ran capped or lack something, and who did not run at all."""
    notes = []
    for line in lines:
        if exact := _exact(line, temperature):
            notes.append(f"- {line['policy']}: in full it needs `python -m traces.record --fill TRACE --policy '{exact}'`.")
    notes += [f"- {name} did not run: {reason}" for name, reason in failed.items()]
    return ["\n".join(dict.fromkeys(notes))] if notes else []


def _exact(line: dict[str, Any], temperature: float) -> str:
    """How to write the form that the recording does not cover; a fit lies in DIR, the folder of --out. Empty: it covers all."""
    wanted = line["published"] or (line["policy"] if mean(line)["coverage"] < 1 else "")
    if line["form"] != "fitted" or not wanted:
        return "" if line["form"] == "bound" else wanted
    name = line["policy"].partition("(")[0]
    return f"DIR/temperature-{temperature:g}/fitted/{name}.json{line['published'].removeprefix(name)}"
