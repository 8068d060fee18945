"""Who wins, by how much, how sure: ``python -m sim.replay TRACE --policy A --policy B``.

Replays every policy on the same texts, prices it where a profile is given, and compares by a paired bootstrap over texts. A
policy that wants draft nodes which were not recorded (coverage below 100%) is shown, but takes no part in the ranking.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from policies.errors import run_command
from sim.options import add_outputs, add_schedule, add_setting, add_statistics, cost_of, opened

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from policies.contract import Policy
    from sim.bootstrap import Estimate, Resamples
    from sim.tally import Tally

BETTER = {"ms_per_token": "lower", "tau": "higher"}
TITLES = {"tau": "tau", "ms_per_token": "ms/token", "speedup": "speedup", "tokens_per_second": "tokens/s"}
FEW = 10
"""Texts per domain below which a percentile interval is visibly too narrow."""
DIGITS = {"tau": 2, "ms_per_token": 2, "speedup": 2, "tokens_per_second": 1}


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m sim.replay", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", help="a recording's folder")
    parse.add_argument("--policy", action="append", required=True, help="name, name(...), JSON or file.py:Class; repeat it")
    add_setting(parse)
    add_schedule(parse)
    add_statistics(parse)
    add_outputs(parse)
    return parse


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    from sim.outputs import check_writable, write_results

    check_writable(args.json, args.parquet)
    recording, setting, profile = opened(args, args.trace)
    from tqdm import tqdm

    from sim.bootstrap import Resamples
    from sim.metrics import result_rows
    from sim.opening import about, open_policies, says
    from sim.trial import run_trial

    policies, tallies, rows = open_policies(args.policy), [], []
    setting = setting.scheduled(policies, args.schedule)
    with tqdm(policies, desc="replaying", unit="policy", file=sys.stderr, disable=None) as bar:
        for policy in bar:
            bar.set_postfix_str(policy.spec())
            tallies.append(run_trial(recording, policy, setting, cost_of(profile, setting)))
            rows.append([row.to_json() for row in result_rows(tallies[-1], policy, setting)])
    resamples = Resamples(tallies[0], args.resamples, args.seed)
    for policy_rows, sums in zip(rows, tallies, strict=True):
        add_intervals(policy_rows, sums, resamples)
    result = contest(policies, tallies, resamples)
    facts = about(recording, profile, setting.drafter)
    flat = [row for policy_rows in rows for row in policy_rows]
    content = {"command": shlex.join(["python", "-m", "sim.replay", *given]), "about": facts, "setting": setting.to_json()}
    content |= {"bootstrap": {"resamples": args.resamples, "seed": args.seed}, "rows": flat, "contest": result}
    write_results(args, content, flat)
    print("\n".join([*render(content), *says(facts, setting)]))


def add_intervals(rows: list[dict[str, Any]], sums: Tally, resamples: Resamples) -> None:
    """Put ``FIGURE_low`` and ``FIGURE_high`` into rows of one policy: one per domain, and their mean last."""
    for row, domain in zip(rows, [*sums.present(), None], strict=True):
        for figure in TITLES:
            found = resamples.estimate(sums, figure, domain) if figure in sums.figures else None
            row[f"{figure}_low"] = found and found.low
            row[f"{figure}_high"] = found and found.high


def contest(policies: list[Policy], tallies: list[Tally], resamples: Resamples) -> dict[str, Any]:
    """The winner and how far each other policy is behind, overall and per domain, as plain JSON types.

    Ranked by ms per token where times are predicted, else by tau. ``ahead`` is the share of draws in which the winner is
    better. The winner was chosen on the same texts, which flatters it a little when several are close.
    """
    figure = "ms_per_token" if "ms_per_token" in tallies[0].figures else "tau"
    sign = 1 if BETTER[figure] == "higher" else -1
    ranked = [i for i, sums in enumerate(tallies) if sums.coverage == 1.0]
    result: dict[str, Any] = {"figure": figure, "winner": None, "differences": []}
    result["not_ranked"] = [policy.spec() for i, policy in enumerate(policies) if i not in ranked]
    if not ranked:
        return result
    best = max(ranked, key=lambda i: sign * tallies[i].mean(figure))
    result["winner"] = policies[best].spec()
    for index in ranked:
        for domain in [None, *tallies[index].present()] if index != best else []:
            apart = resamples.difference(tallies[index], tallies[best], figure, domain)
            behind = apart.share if sign < 0 or apart.share is None else 1 - apart.share
            result["differences"].append(
                {
                    "policy": policies[index].spec(),
                    "domain": "mean" if domain is None else tallies[index].domains[domain],
                    "difference": apart.estimate.value,
                    "low": apart.estimate.low,
                    "high": apart.estimate.high,
                    "ahead": behind,
                }
            )
    return result


def render(content: dict[str, Any]) -> list[str]:
    """The tables, as lines of text."""
    from sim.bootstrap import Estimate
    from sim.table import number, text_table

    rows, facts, setting = content["rows"], content["about"], content["setting"]
    means = [row for row in rows if row["domain"] == "mean"]
    figures = [figure for figure in TITLES if means[0][figure] is not None]
    if setting["batch"] == 1 and "tokens_per_second" in figures:
        figures.remove("tokens_per_second")
    header = ["policy", *(f"{TITLES[figure]}\n[95% interval]" for figure in figures), "verified\nper cycle", "coverage"]
    table = []
    for row in means:
        cells = [with_interval(Estimate(row[f], row[f"{f}_low"], row[f"{f}_high"]), DIGITS[f]) for f in figures]
        table.append([row["policy"], *cells, number(row["verified"], 1), f"{row['coverage']:.2%}"])
    lines = [f"{facts['recording']}: {means[0]['texts']} texts, {describe(setting)}", "", text_table(header, table)]
    for figure in (f for f in ("tau", "ms_per_token") if f in figures):
        domains = [row["domain"] for row in rows if row["policy"] == means[0]["policy"]][:-1]
        by = {(row["policy"], row["domain"]): row[figure] for row in rows}
        table = [[row["policy"], *(number(by[row["policy"], domain]) for domain in domains)] for row in means]
        lines += ["", text_table([f"{TITLES[figure]} by domain", *domains], table)]
    fewest = min(row["texts"] for row in rows)
    return [*lines, "", *_verdict(content["contest"], content["bootstrap"]["resamples"], means[0]["texts"], fewest)]


def describe(setting: dict[str, Any]) -> str:
    """A setting in words: what differs from one request at a time, decoded serially."""
    words = [f"drafter {setting['drafter']}"]
    if setting["temperature"] is not None:
        words.append(f"temperature {setting['temperature']:g}")
    if setting["batch"] > 1:
        words.append(f"batch {setting['batch']} (pays for the {'largest row' if setting['ragged'] == 'max' else 'sum of tokens'})")
    if setting["context_offset"]:
        words.append(f"behind {setting['context_offset']} more tokens")
    if setting["execution"] != "serial":
        words.append(setting["execution"])
    return ", ".join(words)


def with_interval(found: Estimate, digits: int = 2) -> str:
    """``3.80 [3.61, 3.99]``; without brackets where there is no interval."""
    text = f"{found.value:.{digits}f}"
    return text if found.low is None else f"{text} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _verdict(result: dict[str, Any], resamples: int, texts: int, fewest: int) -> list[str]:
    from sim.bootstrap import Estimate
    from sim.table import text_table

    title = TITLES[result["figure"]]
    if result["winner"] is None:
        return ["no policy is ranked: the recording covers none of them (traces.record --fill drafts what is missing)"]
    lines = [f"best by {title}: {result['winner']}"]
    overall = [d for d in result["differences"] if d["domain"] == "mean"]
    if overall:
        table = [
            [
                one["policy"],
                with_interval(Estimate(one["difference"], one["low"], one["high"]), 3),
                "-" if one["ahead"] is None else f"{one['ahead']:.1%}",
            ]
            for one in overall
        ]
        lines += ["", text_table(["against it", f"{title}, difference\n[95% interval]", "draws it\nwins"], table)]
    how = "Paired bootstrap" if overall else "Bootstrap"
    lines += ["", f"Means over domains. {how} over {texts} texts, {resamples} draws."]
    if fewest < 2:
        lines.append("No intervals: a domain holds a single text; record more prompts.")
    elif fewest < FEW:
        lines.append(f"A domain holds only {fewest} texts: the intervals are too narrow; record {FEW} per domain or more.")
    if result["not_ranked"]:
        lines.append(f"not ranked, as the recording lacks nodes they want: {', '.join(result['not_ranked'])}")
    return lines


if __name__ == "__main__":
    run_command(main)
