"""The report's main section: policies at true cost, measured beside predicted, and whether the bars are met.

Bars: EAGLE-3 at least 0.6 x tau times plain decoding at batch 1; goodput at least 5% faster than the best static setting, and
faster than HeteroSpec; what is not a network at most 10% of a cycle; every prediction within 5%.
"""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

from benchmarks.gpu.tables import Jobs, markdown

DRAWS = 2000
"""Resamples of a bootstrap interval."""


def contest_section(jobs: Jobs) -> list[str]:
    failed = jobs.get("fitted", {}).get("failed", {})
    parts = [f"- not fitted, and so not in the contest: {name}: {why}" for name, why in failed.items()]
    for name, job in jobs.items():
        if "measured" in job:
            parts += [f"### {name.capitalize()}", live_table(job), *bars(job)]
    if "breakdown" in jobs:
        parts += ["### A cycle's time", breakdown_table(jobs["breakdown"]["per_cycle_ms"])]
    if "random" in jobs:
        rows = [[row["model"], row["tokens"], row["ms"], row["spread_ms"]] for row in jobs["random"]["rows"]]
        told = f"Embedded weights against random ones, behind {jobs['random']['context']} tokens of context, ms of a forward"
        parts += ["### What zero activations save", f"{told}\n\n{markdown(['weights', 'tokens', 'ms', 'spread'], rows)}"]
    return parts


def per_token(job: dict[str, Any], contender: str, groups: list[int] | None = None) -> float:
    """Milliseconds per token of all requests together: the mean over rounds of each group, then the ratio of sums."""
    from statistics import fmean

    mine = [entry for entry in job["measured"] if entry["contender"] == contender]
    chosen = sorted({entry["group"] for entry in mine}) if groups is None else groups
    by_group = {group: [entry for entry in mine if entry["group"] == group] for group in set(chosen)}
    spent = sum(fmean(entry["ms"] for entry in by_group[group]) for group in chosen)
    return spent / sum(by_group[group][0]["tokens"] for group in chosen)


def ratio(job: dict[str, Any], slower: str, faster: str) -> tuple[float, float, float]:
    """How many times faster ``faster`` is than ``slower``, and a 95% interval, paired over groups."""
    groups = sorted({entry["group"] for entry in job["measured"]})
    draw = random.Random(0)
    resampled = sorted(
        per_token(job, slower, some) / per_token(job, faster, some)
        for some in ([draw.choice(groups) for _ in groups] for _ in range(DRAWS if len(groups) > 1 else 1))
    )
    low, high = resampled[int(0.025 * len(resampled))], resampled[int(0.975 * (len(resampled) - 1))]
    return per_token(job, slower) / per_token(job, faster), low, high


def tau_of(job: dict[str, Any], contender: str) -> float:
    mine = {entry["group"]: entry for entry in job["measured"] if entry["contender"] == contender}.values()  # each text once
    return sum(entry["tokens"] for entry in mine) / sum(entry["cycles"] for entry in mine)


def live_table(job: dict[str, Any]) -> str:
    names = sorted({entry["contender"] for entry in job["measured"]}, key=lambda name: per_token(job, name))
    rows = []
    for name in names:
        told = job["predicted"].get(name, {})
        measured, predicted = per_token(job, name), told.get("ms_per_token")
        speed, low, high = ratio(job, "plain", name)
        off = None if predicted is None else f"{predicted / measured - 1:+.1%}"
        row = [name, tau_of(job, name), told.get("tau"), measured, predicted, off, f"{speed:.2f}x [{low:.2f}, {high:.2f}]"]
        rows.append([*row, told.get("kept"), told.get("levels"), told.get("coverage")])
    header = ["policy", "tau", "tau, replayed", "ms per token", "predicted", "off by", "times plain", "kept", "levels", "coverage"]
    count = len({entry["group"] for entry in job["measured"]})
    decoded = job.get("decoded", "held-out texts")
    how = f"{count} groups of {job['batch']}, {decoded}, {job['rounds']} whole rounds; prefill excluded; groups resampled"
    if "capacity" in job:
        how += f"; caches of {job['capacity']} slots, as in the profile"
    if job.get("absent"):
        how += f"; without {', '.join(job['absent'])}, which nobody fitted"
    return f"{how}\n\n{markdown(header, rows)}"


def bars(job: dict[str, Any]) -> list[str]:
    """One line per bar that this job can tell about."""
    present = {entry["contender"] for entry in job["measured"]}
    lines = []

    def line(met: bool, told: str) -> None:
        lines.append(f"- {'met' if met else 'NOT MET'}: {told}")

    if "eagle3" in present and job["batch"] == 1:
        speed, tau = ratio(job, "plain", "eagle3")[0], tau_of(job, "eagle3")
        line(speed >= 0.6 * tau, f"EAGLE-3 {speed:.2f}x plain decoding, 0.6 x tau is {0.6 * tau:.2f}")
    for rival, least in (("best static", 1.05), ("heterospec", 1.0)):
        if {"goodput", rival} <= present:
            faster, low, high = ratio(job, rival, "goodput")
            line(faster >= least, f"goodput {faster:.3f} [{low:.3f}, {high:.3f}] times as fast as {rival}, {least:g} is asked for")
    for name, told in job["predicted"].items():
        off = told["ms_per_token"] / per_token(job, name) - 1
        line(abs(off) <= 0.05, f"prediction of {name} off by {off:+.1%}, 5% is allowed")
    return ["\n".join(lines)] if lines else []


def breakdown_table(found: dict[str, dict[str, float]]) -> str:
    parts = [part for part in next(iter(found.values())) if part not in ("cycles", "overhead")]
    rows = [
        [name, *(one[part] for part in parts), sum(one[p] for p in parts), f"{one['overhead']:.1%}"] for name, one in found.items()
    ]
    mean_overhead = mean(one["overhead"] for one in found.values())
    told = f"On average {mean_overhead:.1%} of a cycle is neither network; 10% is the bar. Every border waits for the device."
    return f"{markdown(['ms a cycle', *parts, 'whole cycle', 'overhead'], rows)}\n\n{told}"
