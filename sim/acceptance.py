"""What draft nodes tell about acceptance: curves, ranks and terminal confidence: ``python -m sim.curves TRACE``.

Entropy-acceptance curves against five measures of certainty, each with its AUC (how well it tells accepted from rejected,
whatever the threshold) and its reliability; Sequoia's vector (arXiv 2402.12374: with what probability child b is the right
one), by depth; and HeteroSpec's terminal confidence rank (arXiv 2505.13254, section 3): where, among the nodes sent to
verification, the last accepted one stood.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from sim.options import add_outputs

if TYPE_CHECKING:  # polars and torch are imported when there is work to do, not for --help
    import polars as pl

    from policies.contract import Policy
    from traces.recording import Recording

MEASURES = {
    "draft_entropy": ("entropy of the draft (nats)", -1),
    "target_entropy": ("entropy of the target (nats)", -1),
    "path_entropy": ("meta-path entropy (nats)", -1),
    "top1_logprob": ("log-probability of the first choice", 1),
    "path_score": ("path log-probability", 1),
}
"""Title, and the direction in which certainty grows."""
SHOWN_DEPTHS = (0, 1, 2, 4, 8)
"""Printed; the files hold all."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m sim.curves", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", help="a recording's folder")
    parse.add_argument("--drafter", help="recorded drafter (default: the first)")
    parse.add_argument("--x", choices=tuple(MEASURES), default="draft_entropy", help="the curve to print (default draft_entropy)")
    parse.add_argument("--by", choices=("depth", "domain", "temperature"), help="one curve per depth, domain or temperature")
    parse.add_argument("--outcome", choices=("top1", "topk"), default="top1", help="accepted: the first choice, or any of top K")
    parse.add_argument("--bins", type=int, default=10, help="bins of equal count (default 10)")
    parse.add_argument("--policy", default="eagle3", help="whose verified nodes the terminal rank is counted among")
    add_outputs(parse)
    return parse


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    if args.bins < 1:
        raise UserError(f"--bins must be 1 or more, not {args.bins}")
    from policies.registry import load_policy
    from sim.curves import curve, samples
    from sim.opening import about, open_sound
    from sim.outputs import check_writable, write_results

    check_writable(args.json, args.parquet)
    recording, drafter = open_sound(args.trace, args.drafter)
    policy = load_policy(args.policy)
    policy.check_fitted()
    table = samples(recording, drafter)
    if table.is_empty():
        raise UserError(f"{args.trace} holds no draft node whose next token counts: record longer texts")
    drawn = curve(table, args.x, args.by, args.bins, args.outcome).to_dicts()
    every = {x: curve(table, x, args.by, args.bins, args.outcome).to_dicts() for x in MEASURES}
    content = {
        "command": shlex.join(["python", "-m", "sim.curves", *given]),
        "about": about(recording, None, drafter),
        "drafter": drafter,
        "outcome": args.outcome,
        "samples": table.height,
        "certainty": certainty(table, args.outcome),
        "curves": every,
        "rank_by_depth": rank_by_depth(recording, drafter),
        "terminal_rank": terminal_ranks(recording, policy, drafter),
    }
    write_results(args, content, [{"measure": x, **row} for x, rows in every.items() for row in rows])
    print("\n".join(render(content, drawn, args)))


def certainty(table: pl.DataFrame, outcome: str = "top1") -> list[dict[str, Any]]:
    """Per measure: AUC, and for the first choice's probability its calibration error and Brier score (see sim.calibration)."""
    import numpy as np

    from sim.calibration import area_under_curve, calibration

    rows = []
    hit = table[outcome].to_numpy()
    for measure, (_, sign) in MEASURES.items():
        values = table[measure].to_numpy().astype(np.float64)
        row: dict[str, Any] = {"measure": measure, "auc": area_under_curve(sign * values, hit)}
        if measure == "top1_logprob" and outcome == "top1":
            found = calibration(np.exp(values), hit)
            row |= {"calibration_error": found.ece, "brier": found.brier}
        rows.append(row)
    return rows


def rank_by_depth(recording: Recording, drafter: str) -> list[dict[str, Any]]:
    """Sequoia's vector by depth: with what share the child of each rank is the target's token, given that its parent was.

    One row per depth of the child (1 = a child of the root), and one over all depths (depth None): count of parents and the
    shares of ranks 0 .. K-1. Every recorded position counts, whether a policy would begin a cycle there or not.
    """
    import numpy as np

    from sim.curves import counted_nodes

    _, depth, hit, _, _ = counted_nodes(recording, drafter)
    rows = []
    for level in [None, *np.unique(depth).tolist()]:
        mine = hit if level is None else hit[depth == level]
        shares = mine.mean(axis=0).tolist() if len(mine) else []
        rows.append({"depth": None if level is None else level + 1, "count": len(mine), "shares": shares})
    return rows


def terminal_ranks(recording: Recording, policy: Policy, drafter: str) -> dict[str, Any]:
    """HeteroSpec's terminal confidence rank over a policy's cycles: see :func:`sim.walkthrough.terminal_rank`.

    counts  cycles by rank 0, 1, ...;  nothing: cycles that accepted no node;  kept: largest number of nodes verified;
    top_quarter  share of the accepting cycles whose rank lies in the first quarter of the nodes of that cycle
    """
    import torch

    from sim.looked_up import replayed_drafter
    from sim.recorded import RecordedText
    from sim.replay import ReplayRun
    from sim.walkthrough import terminal_rank

    text = RecordedText(recording)
    run = ReplayRun(recording, text, replayed_drafter(recording, drafter, text), policy)
    sequences = torch.arange(len(text.length))
    ranks, kept, nothing = [], [], 0
    with torch.inference_mode():
        run.start(sequences[text.length > 1])
        while (step := run.step()) is not None:
            place = terminal_rank(step)
            accepted = place > 0
            nothing += int((~accepted).sum())
            ranks.append(place[accepted] - 1)
            kept.append(step.done.kept.count[accepted])
    rank = torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)
    count = torch.cat(kept) if kept else rank
    early = float((rank < count / 4).double().mean()) if len(rank) else None
    largest = int(count.max()) if len(count) else 0
    counts = torch.bincount(rank).tolist()
    return {"policy": policy.spec(), "counts": counts, "nothing": nothing, "kept": largest, "top_quarter": early}


def render(content: dict[str, Any], drawn: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """The tables, as lines of text."""
    from sim.table import number, text_table

    title = MEASURES[args.x][0]
    lines = [f"{content['about']['recording']}: drafter {content['drafter']}, {content['samples']:,} nodes of the true path", ""]
    by = [args.by] if args.by else []
    table = [
        [*(str(row[name]) for name in by), f"{row['x']:.3f}", f"{row['count']:,}", f"{row['acceptance']:.1%}"]
        + [f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"]
        for row in drawn
        if args.by != "depth" or row["depth"] in SHOWN_DEPTHS
    ]
    lines.append(text_table([*by, title, "samples", "accepted", "95% interval"], table))
    told = [[row["measure"], number(row["auc"], 3), number(row.get("calibration_error"), 3), number(row.get("brier"), 3)]
            for row in content["certainty"]]  # fmt: skip
    lines += ["", text_table(["what tells accepted from rejected", "AUC", "calibration\nerror", "Brier\nscore"], told)]
    ranks = content["rank_by_depth"]
    wide = min(max(len(row["shares"]) for row in ranks), 6)
    lines += ["", text_table(
        ["right child, by depth", "parents", *(f"rank {rank}" for rank in range(wide))],
        [["all" if row["depth"] is None else str(row["depth"]), f"{row['count']:,}", *(f"{s:.1%}" for s in row["shares"][:wide])]
         for row in ranks[:10]],
    )]  # fmt: skip
    last = content["terminal_rank"]
    if last["counts"]:
        lines += ["", f"terminal confidence rank of {last['policy']}, share of the {sum(last['counts']):,} cycles that accept:"]
        lines += _histogram(last["counts"], last["kept"])
        lines.append(f"in the first quarter of the verified nodes: {last['top_quarter']:.1%}")
        lines.append(f"cycles that accept none: {last['nothing']:,}")
    return lines


def _histogram(counts: list[int], kept: int) -> list[str]:
    """Bars over twelve bins of rank or fewer."""
    width = max(1, -(-kept // 12))
    bins = [sum(counts[start : start + width]) for start in range(0, len(counts), width)]
    total = sum(counts)
    names = [f"{i * width}" if width == 1 else f"{i * width}-{i * width + width - 1}" for i in range(len(bins))]
    shares = [count / total for count in bins]
    return [f"  {name:>7}  {share:6.1%}  {'#' * round(50 * share)}" for name, share in zip(names, shares, strict=True)]


if __name__ == "__main__":
    run_command(main)
