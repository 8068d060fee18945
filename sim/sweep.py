"""A whole grid of settings of one policy: ``python -m sim.sweep TRACE --policy eagle3 --grid depth=2:12 top_k=4,8 --out DIR``.

Every point is replayed and priced; what is finished is kept in DIR, so that the same command goes on where it was stopped.
Printed are the Pareto front (tau against verified tokens) and the best setting, with intervals; DIR/results.parquet holds all.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from policies.plural import counted
from sim.gridpoints import parse_grid, points_of
from sim.options import add_outputs, add_schedule, add_setting, add_statistics, opened

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    from policies.contract import Policy
    from sim.tally import Tally


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m sim.sweep", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", help="a recording's folder")
    parse.add_argument("--policy", required=True, help="whose settings to sweep; what the grid does not name stays as given")
    parse.add_argument("--grid", nargs="+", required=True, metavar="P=VALUES", help="e.g. depth=2:12 top_k=4,8,10")
    parse.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, and what is finished; may exist")
    parse.add_argument("--allow-misses", action="store_true", help="run points that the recording does not cover, too")
    parse.add_argument("--jobs", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    parse.add_argument("--backend", choices=("local", "dask"), default="local", help="dask: on a running cluster")
    parse.add_argument("--scheduler", metavar="ADDRESS", help="of the Dask cluster, e.g. tcp://host:8786")
    add_setting(parse)
    add_schedule(parse)
    add_statistics(parse)
    add_outputs(parse)
    return parse


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    if args.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, not {args.jobs}")
    if (args.backend == "dask") != bool(args.scheduler):
        raise UserError("--backend dask and --scheduler ADDRESS belong together: give both or neither")
    grid = parse_grid(args.grid)
    from sim.outputs import check_writable, write_json, write_parquet, write_results

    check_writable(args.json, args.parquet)
    recording, setting, profile = opened(args, args.trace)
    points = points_of(args.policy, grid)
    setting = setting.scheduled(points, args.schedule)
    from tqdm import tqdm

    from sim.farm import Job, run_points
    from sim.opening import about, says
    from sim.sweepstore import RESULTS, SweepStore

    facts = about(recording, profile, setting.drafter)
    profile_path = args.profile and str(Path(args.profile).absolute())
    job = Job(str(Path(args.trace).absolute()), profile_path, setting, recording.memory)
    store = SweepStore.open(args.out, {"about": facts, "setting": setting.to_json()})
    ahead = [policy for policy in points if store.get(policy) is None]
    with tqdm(total=len(points), initial=len(points) - len(ahead), desc="sweeping", unit="setting", disable=None) as bar:
        for policy in (policy for policy in points if store.get(policy) is not None):
            check_covered(policy, store.get(policy), args)
        for policy, sums in run_points(job, ahead, args.jobs, args.scheduler):
            check_covered(policy, sums, args)
            store.add(policy, sums)
            bar.update()
            bar.set_postfix_str(policy.spec())
    points = points[::-1]
    rows, summary = summarise(points, [store.get(policy) for policy in points], setting, args.resamples, args.seed)
    write_parquet(args.out / RESULTS, rows)
    content = {"command": shlex.join(["python", "-m", "sim.sweep", *given]), "about": facts, "setting": setting.to_json()}
    content |= {"bootstrap": {"resamples": args.resamples, "seed": args.seed}, "grid": grid, "summary": summary}
    write_json(args.out / "sweep.json", content)
    write_results(args, content | {"rows": rows}, rows)
    lines = [*render(rows, summary, facts, len(points)), *says(facts, setting)]
    print("\n".join([*lines, f"all rows: {args.out / RESULTS}"]))


def check_covered(policy: Policy, sums: Tally, args: argparse.Namespace) -> None:
    """Refuse a point that wants nodes which were not recorded, unless misses are allowed."""
    if sums.coverage < 1 and not args.allow_misses:
        raise UserError(
            f"{policy.spec()} leaves the recording's envelope (only {sums.coverage:.1%} of its cycles are covered): narrow the "
            f"grid, draft what is missing with python -m traces.record --fill {args.trace} --policy ..., or say --allow-misses"
        )


def summarise(
    points: list[Policy], tallies: list[Tally], setting: Any, resamples: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Result rows of all points (a mean and its domains each), and the front and the best setting.

    Only covered points can be on the front or best. ``as_good`` counts the settings whose difference to the best has an
    interval that holds 0; ``chosen`` is the share of draws in which the best is the best.
    """
    import numpy as np

    from sim.bootstrap import Resamples
    from sim.contest import add_intervals
    from sim.metrics import result_rows

    draws = Resamples(tallies[0], resamples, seed)
    rows, means = [], []
    for policy, sums in zip(points, tallies, strict=True):
        own = [row.to_json() for row in result_rows(sums, policy, setting)]
        add_intervals(own, sums, draws)
        for row in own:
            rows.append({f"parameter_{n}" if n in row else n: v for n, v in policy.parameters().items()} | row)
        means.append(rows[-1])
    covered = [i for i, sums in enumerate(tallies) if sums.coverage == 1.0]
    front = pareto([(means[i]["verified"], means[i]["tau"]) for i in covered])
    for row in rows:
        row["on_front"] = False
    for place in front:
        means[covered[place]]["on_front"] = True
    summary: dict[str, Any] = {"front": [means[covered[place]]["policy"] for place in front], "best": None}
    if covered:
        figure = "ms_per_token" if "ms_per_token" in tallies[0].figures else "tau"
        sign = -1 if figure == "ms_per_token" else 1
        best = max(covered, key=lambda i: sign * means[i][figure])
        apart = [draws.difference(tallies[i], tallies[best], figure) for i in covered if i != best]
        holds_zero = [d.estimate.low is not None and d.estimate.low <= 0 <= d.estimate.high for d in apart]
        every = [draws.draws(tallies[i], figure) for i in covered]
        chosen = None
        if every[0] is not None:
            chosen = float((np.argmax(sign * np.array(every), axis=0) == covered.index(best)).mean())
        summary |= {"best": means[best]["policy"], "figure": figure, "as_good": sum(holds_zero), "chosen": chosen}
    return rows, summary


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats: at most as much of the first, at least as much of the second, in the order
    of the first. Of equals the first stays."""
    front, best = [], -float("inf")
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[place][1] > best:
            front.append(place)
            best = points[place][1]
    return front


def render(rows: list[dict[str, Any]], summary: dict[str, Any], facts: dict[str, Any], count: int) -> list[str]:
    """The front, the best setting, and points that are not covered."""
    from sim.bootstrap import Estimate
    from sim.contest import DIGITS, TITLES, with_interval
    from sim.table import number, text_table

    means = {row["policy"]: row for row in rows if row["domain"] == "mean"}
    figures = [figure for figure in ("tau", "ms_per_token", "speedup") if next(iter(means.values()))[figure] is not None]

    def line(row: dict[str, Any]) -> list[str]:
        cells = [with_interval(Estimate(row[f], row[f"{f}_low"], row[f"{f}_high"]), DIGITS[f]) for f in figures]
        return [row["policy"], number(row["verified"], 1), number(row["levels"], 1), *cells, f"{row['coverage']:.2%}"]

    columns = ["verified\nper cycle", "draft levels\nper cycle", *(f"{TITLES[f]}\n[95% interval]" for f in figures), "coverage"]
    shown = [means[policy] for policy in summary["front"]]
    lines = [f"{facts['recording']}: {counted(count, 'setting')}"]
    if shown:
        lines += ["", text_table(["Pareto front,\ntau against verified", *columns], [line(row) for row in shown])]
    if summary["best"]:
        best = [line(means[summary["best"]])]
        lines += ["", text_table([f"best by {TITLES[summary['figure']]}", *columns], best)]
        if summary["chosen"] is not None:
            others = f"{summary['as_good']} others differ by no more than chance"
            lines += ["", f"best in {summary['chosen']:.0%} of the bootstrap draws; {others}"]
    missed = [row for row in means.values() if row["coverage"] < 1]
    if missed:
        worst = min(missed, key=lambda row: row["coverage"])
        many = f"{counted(len(missed), 'setting')} {'is' if len(missed) == 1 else 'are'} not covered"
        told = f"{many} (least: {worst['policy']}, {worst['coverage']:.1%}) and not ranked"
        lines += ["", f"\033[31m{told}\033[0m" if sys.stdout.isatty() else told]
    return lines


if __name__ == "__main__":
    run_command(main, "What is finished is kept: the same command goes on from there.")
