"""Prediction against measurement: ``python -m sim.validate BENCH.json`` reads what ``live.bench --json`` measured.

The texts that were decoded live are replayed and priced. Accepted lengths must agree text by text (cycles for the same
tokens); times agree as well as the profile does. The interval of a measured time is its smallest to its largest round, so bench
with ``--rounds 3`` or more; the ranking (Kendall's tau) is taken over the pairs of policies whose intervals are disjoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from sim.options import add_outputs

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from policies.contract import Policy
    from sim.tally import Tally
    from traces.costs import Profile
    from traces.recording import Recording

ERROR_BAR, RANKING_BAR, SETTINGS_BAR = 0.05, 0.9, 12
"""Median absolute error of ms per token, and Kendall's tau, that a prediction should reach; over so many settings that the profile
was not built with."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m sim.validate", description=__doc__.split("\n")[0])
    parse.add_argument("bench", metavar="BENCH", type=Path, help="the JSON file that live.bench wrote")
    parse.add_argument("--trace", help="the recording, where it has moved since")
    parse.add_argument("--profile", help="price by this one instead of by the bench's (or where that has moved since)")
    parse.add_argument("--decided-by", metavar="FILE", help="the profile that the bench was given, where it has moved since")
    add_outputs(parse)
    return parse


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    from sim.outputs import check_writable, write_results

    check_writable(args.json, args.parquet)
    bench = read_bench(args.bench)
    from sim.finding import text_digest
    from sim.opening import about, open_profile, open_sound

    if not (args.trace or Path(bench["recording"]).exists()):
        raise UserError(f"there is no {bench['recording']}, on which the bench was made: say with --trace where it has moved")
    recording, drafter = open_sound(args.trace or bench["recording"], bench["drafter"])
    if bench["digests"].get("texts") not in (None, text_digest(recording)):
        raise UserError(f"{recording.folder} holds other texts than those that were benched: give that recording with --trace")
    deciding = profile_of(bench, "profile", args.decided_by, "--decided-by", recording, drafter)
    if args.profile:
        profile = open_profile(args.profile, recording, drafter)
    else:
        profile = profile_of(bench, "in_turns", None, "--profile", recording, drafter) or deciding
    rows, points = validate(recording, drafter, profile, bench, deciding)
    content = {"command": shlex.join(["python", "-m", "sim.validate", *given]), "about": about(recording, profile, drafter)}
    content |= {"summary": summarise(rows), "rows": rows, "points": points}
    write_results(args, content, points)
    print("\n".join(render(rows, content["summary"])))


def read_bench(path: Path) -> dict[str, Any]:
    """What live.bench wrote.

    :raises UserError: when it is missing or something else.
    """
    try:
        bench = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file that live.bench --json wrote") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): write it again with live.bench --json") from None
    if not isinstance(bench, dict) or not {"recording", "drafter", "predicted", "measured"} <= bench.keys():
        raise UserError(f"{path} is not a bench: give a file that live.bench --json wrote")
    return {"profile": None, "in_turns": None, "digests": {}} | bench


def profile_of(
    bench: dict[str, Any], part: str, moved: str | None, option: str, recording: Recording, drafter: str
) -> Profile | None:
    """The profile that the bench was given ("profile") or took in turns with decoding ("in_turns"); None without one.

    :param moved: where it lies now, as ``option`` says.
    :raises UserError: when it is missing, or another one (benches of earlier versions do not tell).
    """
    from sim.opening import open_profile

    path = moved or bench[part]
    if path is None:
        return None
    if not Path(path).exists():
        raise UserError(f"there is no {path}, with which the bench was made: say with {option} where it has moved")
    profile, digest = open_profile(path, recording, drafter), bench["digests"].get(part)
    if digest not in (None, profile.digest):
        raise UserError(f"{path} is not the profile that the bench was made with: give that one with {option}, or bench again")
    return profile


def validate(
    recording: Recording, drafter: str, profile: Profile | None, bench: dict[str, Any], deciding: Profile | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per policy, and one point per policy and text: expected and measured cycles and milliseconds.

    :param deciding: by whose prices the policies decided, where those of ``profile`` are others (taken in turns with decoding).
    """
    from policies.registry import from_json
    from sim.setting import Setting
    from sim.trial import run_trial

    contents = {row["policy"]: row["parameters"] for row in bench["predicted"]}
    rows, points = [], []
    for spec, content in contents.items():
        if spec not in bench["measured"]:
            raise UserError(f"the bench predicts {spec} but did not measure it: run live.bench again")
        policy = from_json(content)
        prices, cost = (one.cost(drafter) if one else None for one in (profile, deciding))
        sums = run_trial(recording, policy, Setting(drafter), cost, prices=prices)
        mine = _points(spec, sums, bench["measured"][spec])
        points += mine
        rows.append(_row(spec, mine, profile is not None and _built(profile, policy)))
    return rows, points


def _built(profile: Profile, policy: Policy) -> bool:
    """Whether the profile decoded with this setting; of a profile that does not say, whether with this kind of policy."""
    settings = profile.content.get("method", {}).get("policies")
    return policy.name in profile.content["overhead"] if settings is None else policy.spec() in settings


def _points(spec: str, sums: Tally, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text by text, in the bench's order."""
    place = {int(text): index for index, text in enumerate(sums.sequence)}
    points = []
    for text in dict.fromkeys(entry["text"] for entry in entries):
        rounds = [entry for entry in entries if entry["text"] == text]
        if text not in place:
            raise UserError(f"the bench decoded text {text}, which the recording does not hold: give the bench's own with --trace")
        index = place[text]
        points.append(
            {
                "policy": spec,
                "text": text,
                "domain": rounds[0]["domain"],
                "tokens": rounds[0]["tokens"],
                "expected_tokens": int(sums.sums["emitted"][index]),
                "cycles": rounds[0]["cycles"],
                "expected_cycles": int(sums.sums["cycles"][index]),
                "rounds_ms": [entry["ms"] for entry in rounds],
                "ms": statistics.fmean(entry["ms"] for entry in rounds),
                "expected_ms": float(sums.sums["ms"][index]) if "ms" in sums.sums else None,
            }
        )
    return points


def _row(spec: str, points: list[dict[str, Any]], in_profile: bool) -> dict[str, Any]:
    count = min(len(point["rounds_ms"]) for point in points)
    rounds = [_per(points, [point["rounds_ms"][turn] for point in points], "tokens") for turn in range(count)]
    row: dict[str, Any] = {
        "policy": spec,
        "built_the_profile": in_profile,
        "texts": len(points),
        "tau": _per(points, [point["tokens"] for point in points], "cycles"),
        "expected_tau": _per(points, [point["expected_tokens"] for point in points], "expected_cycles"),
        "differing_texts": [
            point["text"]
            for point in points
            if (point["tokens"], point["cycles"]) != (point["expected_tokens"], point["expected_cycles"])
        ],
        "ms_per_token": _per(points, [point["ms"] for point in points], "tokens"),
        "ms_per_cycle": _per(points, [point["ms"] for point in points], "cycles"),
        "low": min(rounds) if count > 1 else None,
        "high": max(rounds) if count > 1 else None,
    }
    if points[0]["expected_ms"] is not None:
        expected = [point["expected_ms"] for point in points]
        row["expected_ms_per_token"] = _per(points, expected, "expected_tokens")
        row["expected_ms_per_cycle"] = _per(points, expected, "expected_cycles")
        row["error"] = row["expected_ms_per_token"] / row["ms_per_token"] - 1
        row["cycle_error"] = row["expected_ms_per_cycle"] / row["ms_per_cycle"] - 1
        row["within_spread"] = count > 1 and row["low"] <= row["expected_ms_per_token"] <= row["high"]
    return row


def _per(points: list[dict[str, Any]], values: list[float], below: str) -> float:
    """Ratio of sums per domain, then the mean over domains."""
    domains: dict[str, list[float]] = {}
    for point, value in zip(points, values, strict=True):
        sums = domains.setdefault(point["domain"], [0.0, 0.0])
        sums[0] += value
        sums[1] += point[below]
    return sum(above / under for above, under in domains.values()) / len(domains)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the policies: are accepted lengths equal, how large are the errors of ms per token and per cycle (relative, median
    absolute and mean = bias), and does the ranking agree."""
    summary: dict[str, Any] = {"policies": len(rows), "lengths_equal": not any(row["differing_texts"] for row in rows)}
    if "error" not in rows[0]:
        return summary
    unseen = [row for row in rows if not row["built_the_profile"]]
    for name in ("error", "cycle_error"):
        errors = [row[name] for row in rows]
        summary[name] = {"median_absolute": statistics.median(map(abs, errors)), "bias": statistics.mean(errors)}
    summary["within_spread"] = sum(row["within_spread"] for row in rows)
    summary["unseen"] = len(unseen)
    if unseen:
        summary["unseen_median_absolute"] = statistics.median(abs(row["error"]) for row in unseen)
    summary["kendall_tau"], summary["pairs"] = kendall(rows)
    return summary


def kendall(rows: list[dict[str, Any]]) -> tuple[float | None, int]:
    """Kendall's tau of expected against measured ms per token over the pairs whose measured intervals are disjoint (all pairs
    where nothing was repeated), and how many those are; None without a pair."""
    score = count = 0
    for place, one in enumerate(rows):
        for other in rows[:place]:
            if one["low"] is not None and one["low"] <= other["high"] and other["low"] <= one["high"]:
                continue
            measured = one["ms_per_token"] - other["ms_per_token"]
            expected = one["expected_ms_per_token"] - other["expected_ms_per_token"]
            score += (measured * expected > 0) - (measured * expected < 0)
            count += 1
    return (score / count if count else None), count


def render(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """The table and what it means."""
    from sim.table import number, text_table

    timed = "error" in rows[0]
    header = ["policy", "tau\nmeasured", "tau\nexpected", "texts that\ndiffer", "ms/token\nmeasured", "spread over\nrounds"]
    header += ["ms/token\nexpected", "error", "ms/cycle\nerror"] if timed else []
    table = []
    for row in rows:
        spread = "-" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
        cells = [row["policy"], number(row["tau"]), number(row["expected_tau"]), str(len(row["differing_texts"]))]
        cells += [number(row["ms_per_token"]), spread]
        if timed:
            cells += [number(row["expected_ms_per_token"]), f"{row['error']:+.1%}", f"{row['cycle_error']:+.1%}"]
        table.append(cells)
    lines = [text_table(header, table), ""]
    differs = "NOT equal: see the texts that differ (live.fidelity explains them)"
    lines.append(f"accepted lengths: {'equal on every text' if summary['lengths_equal'] else differs}")
    if not timed:
        return [*lines, "no times: the bench had no profile; give one with --profile"]
    for name, words in (("error", "ms per token"), ("cycle_error", "ms per cycle")):
        found = summary[name]
        lines.append(f"{words}: median absolute error {found['median_absolute']:.1%}, bias {found['bias']:+.1%}")
    lines.append(f"within the spread of the rounds: {summary['within_spread']} of {len(rows)} policies")
    if summary["unseen"]:
        lines.append(
            f"{summary['unseen']} settings that the profile did not decode with: median absolute error "
            f"{summary['unseen_median_absolute']:.1%}"
        )
    ranking = "no pair is told apart" if summary["kendall_tau"] is None else f"Kendall's tau {summary['kendall_tau']:.2f}"
    lines.append(f"ranking: {ranking} over {summary['pairs']} pairs of disjoint intervals")
    judged = summary["unseen_median_absolute"] if summary["unseen"] else summary["error"]["median_absolute"]
    good = judged <= ERROR_BAR or summary["within_spread"] == len(rows)
    bars = [f"{'reached' if good else 'MISSED'} (5% or within the spread)"]
    if summary["kendall_tau"] is None:
        bars.append("not tested (ranking 0.9: no two policies are told apart; bench more texts or rounds)")
    else:
        bars.append(f"{'reached' if summary['kendall_tau'] >= RANKING_BAR else 'MISSED'} (ranking {RANKING_BAR})")
    if summary["unseen"] < SETTINGS_BAR:
        bars.append(f"and {SETTINGS_BAR} settings are needed for a verdict (python -m benchmarks.validation)")
    return [*lines, f"bars: {', '.join(bars)}"]


if __name__ == "__main__":
    run_command(main, "")
