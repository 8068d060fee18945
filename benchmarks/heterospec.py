"""HeteroSpec, fairly: `python -m benchmarks.heterospec TRACE [--profile P] --out report.md`.

Is the direction of the paper's claims (arXiv 2505.13254, tables 1 to 3) found on a recording, and does it hold against fair
controls? HeteroSpec is fitted on a training part of the texts; everything is scored on the others. Figures are totals over
the held-out texts of a domain, as in the paper; intervals are paired bootstraps over texts.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from policies.contract import Policy
    from policies.heterospec import HeteroSpec
    from sim.tally import Tally
    from sim.trial import Trials
    from traces.costs import CostModel
    from traces.recording import Recording

PAPER = "The paper, mean over 20 cells against EAGLE-3: tau +4.1%, target calls -3.6%, verified tokens -10.4%, speed +4.7%."


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="python -m benchmarks.heterospec", description=__doc__.splitlines()[0])
    about.add_argument("trace", metavar="TRACE", help="a recording's folder, covering EAGLE-3 at top-k 10 to depth 14")
    about.add_argument("--profile", metavar="FILE", help="what time costs; without it no milliseconds and no best static")
    about.add_argument("--out", type=Path, metavar="FILE", help="write the report there (default: print it)")
    about.add_argument("--policy", default="heterospec", help="HeteroSpec with other parameters (default: heterospec)")
    about.add_argument("--drafter", help="the recorded drafter; the recording's first by default")
    about.add_argument("--temperature", type=float, metavar="T", help="only the texts sampled at it (default: all)")
    about.add_argument("--train-share", type=float, default=0.5, help="share of every domain's texts to fit on (default 0.5)")
    about.add_argument("--seed", type=int, default=0, help="which texts those are")
    return about


def figures(sums: Tally, domain: int | None = None) -> dict[str, float]:
    """tau, calls, verified tokens and ms per token; of one domain, or tau and ms as means and the others as sums."""
    mine = [True] * len(sums.domain) if domain is None else sums.domain == domain

    def figure(name: str) -> float:
        if name not in sums.figures:
            return math.nan
        return sums.mean(name) if domain is None else sums.by_domain(name)[sums.domains[domain]]

    total = {name: float(column[mine].sum()) for name, column in sums.sums.items()}
    return {
        "tau": figure("tau"),
        "calls": total["cycles"],
        "verified": total["verified"],
        "levels": total["levels"] / total["cycles"],
        "ms": figure("ms_per_token"),
        "uncovered": total["cycles"] - total["covered"],
    }


def changes(theirs: dict[str, float], ours: dict[str, float]) -> list[str]:
    """tau, calls, verified tokens and ms per token against a baseline, in per cent."""
    ratios = [ours[name] / theirs[name] for name in ("tau", "calls", "verified", "ms")]
    return ["-" if math.isnan(ratio) else f"{ratio - 1:+.1%}" for ratio in ratios]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def comparison(trials: Trials, baseline: Policy, contenders: list[tuple[str, Policy]]) -> str:
    """One row per policy, over all domains, against the baseline."""
    start = figures(trials.tally(baseline))
    rows = []
    for name, policy in [("EAGLE-3", baseline), *contenders]:
        found = figures(trials.tally(policy))
        ms = "-" if math.isnan(found["ms"]) else f"{found['ms']:.3f}"
        absolute = [f"{found['tau']:.2f}", f"{found['calls']:.0f}", f"{found['verified']:.0f}", f"{found['levels']:.1f}", ms]
        lacking = "" if not found["uncovered"] else f" ({found['uncovered']:.0f} cycles not covered by the recording)"
        rows.append([name + lacking, *absolute, *changes(start, found)])
    header = ["policy", "tau", "calls", "verified tokens", "levels per cycle", "ms/token", "tau", "calls", "verified", "ms"]
    return markdown(header, rows)


def per_domain(trials: Trials, baseline: Policy, fitted: Policy) -> str:
    base, ours = trials.tallies([baseline, fitted])
    rows = []
    for domain in [*base.present(), None]:
        start, found = figures(base, domain), figures(ours, domain)
        name = "all" if domain is None else base.domains[domain]
        rows.append([name, f"{start['tau']:.2f}", f"{found['tau']:.2f}", *changes(start, found)])
    return markdown(["domain", "EAGLE-3 tau", "HeteroSpec tau", "tau", "calls", "verified", "ms"], rows)


def verdict(trials: Trials, fitted: Policy, others: list[tuple[str, Policy]]) -> str:
    """Time (or calls, without a profile) against each control, with 95% intervals."""
    from sim.bootstrap import Resamples

    ours = trials.tally(fitted)
    draws = Resamples(ours)
    what, figure = ("time", "ms_per_token") if trials.cost else ("target calls", "cycles_per_token")
    lines = []
    for name, policy in others:
        saved = draws.saving(ours, trials.tally(policy), figure)
        told = f"- against {name}: {-saved.value:+.1%} {what} per token"
        if saved.low is None:
            lines.append(f"{told}: no interval, since a domain has a single text")
            continue
        sure = "better" if saved.low > 0 else "worse" if saved.high < 0 else "no sure difference"
        lines.append(f"{told} ({-saved.high:+.1%} .. {-saved.low:+.1%}): {sure}")
    return "\n".join(lines)


def report(
    recording: Recording,
    policy: HeteroSpec,
    drafter: str,
    cost: CostModel | None,
    train_share: float,
    seed: int,
    temperature: float | None = None,
) -> str:
    """The whole report, as Markdown; of the texts of one temperature, where one is given."""
    import numpy as np
    import torch

    from policies.eagle3 import Eagle3
    from sim.fit import fit
    from sim.samples import build_samples
    from sim.setting import Setting
    from sim.split import split_texts
    from sim.static_search import best_static, fixed_trees, same_budget
    from sim.trial import Trials, texts_at

    texts = np.arange(len(recording.length)) if temperature is None else texts_at(recording, temperature).numpy()
    fitted: Any
    fitted, how, _ = fit(recording, policy, train_share=train_share, seed=seed, drafter=drafter, texts=texts)
    loose, _, _ = fit(recording, replace(policy, samples="all"), train_share=train_share, seed=seed, drafter=drafter, texts=texts)
    split = split_texts(recording, texts, train_share, seed)
    learned = int(policy.used(build_samples(recording, policy, drafter, split.train)).sum())
    if not len(split.held_out):
        raise UserError("no text is left to score on: record more texts, or lower --train-share")
    scored, training = (Trials(recording, Setting(drafter), cost, torch.as_tensor(part)) for part in (split.held_out, split.train))
    base = Eagle3(fitted.total_tokens, fitted.depth, fitted.top_k)
    half = math.ceil(fitted.depth / 2)
    spent = training.tally(fitted).sums
    kept = float(spent["kept"].sum() / spent["cycles"].sum())
    deepest = min(fitted.depth + max(fitted.extra_levels()), 14)
    controls = [
        (f"same-budget static, {(same := same_budget(training, kept, (6, 8, deepest))).spec()}", same),
        (f"always as deep, {(deep := Eagle3(fitted.total_tokens, deepest, fitted.top_k)).spec()}", deep),
    ]
    if cost is not None:
        found = best_static(training, fixed_trees(training)).policy
        controls.append((f"best static, {found.spec()}", found))
    ablation = [
        ("+ DED (deeper)", replace(fitted, prune=False)),
        ("+ TNP (pruned)", replace(fitted, extend=False)),
        ("+ both: HeteroSpec", fitted),
    ]
    sweep = [(f"alpha = {alpha}", replace(fitted, alpha=alpha)) for alpha in range(max(half - 1, 0), half + 2)]
    edges = ", ".join(f"{edge:.2f}" for edge in fitted.thresholds_)
    at = "" if temperature is None else f" at temperature {temperature:g}"
    page = [
        "# HeteroSpec against EAGLE-3 and fair controls",
        f"Fitted on {learned} cycles (samples={policy.samples}) among the {how['positions']} positions of {len(split.train)} "
        f"texts{at}, scored on {len(split.held_out)} others; drafter `{drafter}`. Strata end at {edges or 'none'} nats. Changes "
        f"are against EAGLE-3 at {fitted.total_tokens} tokens, depth {fitted.depth}, top-k {fitted.top_k}. {PAPER}",
        "## By domain",
        per_domain(scored, base, fitted),
        "## Ablation (the paper's table 2)",
        comparison(scored, base, ablation),
        "## alpha (the paper's table 3)",
        comparison(scored, base, sweep),
        "## What the strata are fitted on (the paper's: accepted)",
        comparison(scored, base, [(f"samples={fitted.samples}", fitted), ("samples=all", loose)]),
        "## Controls",
        comparison(scored, base, [("HeteroSpec", fitted), *controls]),
        "## Verdict",
        verdict(scored, fitted, [("EAGLE-3 defaults", base), *controls]),
    ]
    return "\n\n".join(page) + "\n"


def main() -> None:
    given = parser().parse_args()
    from policies.heterospec import HeteroSpec
    from policies.registry import load_policy
    from sim.finding import profile_for
    from sim.outputs import check_writable, write_text
    from traces.recording import open_recording

    check_writable(given.out)
    policy = load_policy(given.policy)
    if not isinstance(policy, HeteroSpec):
        raise UserError(f"this report is about heterospec, not {policy.name}: give --policy 'heterospec(...)'")
    recording = open_recording(given.trace)
    drafter = given.drafter or recording.drafters[0]
    cost = profile_for(given.profile, recording, drafter).cost(drafter) if given.profile else None
    text = report(recording, policy, drafter, cost, given.train_share, given.seed, given.temperature)
    text += f"\nMade by `{shlex.join(['python', '-m', 'benchmarks.heterospec', *sys.argv[1:]])}`.\n"
    if given.out:
        write_text(given.out, text)
        print(f"written to {given.out}")
    else:
        print(text, end="")


if __name__ == "__main__":
    run_command(main)
