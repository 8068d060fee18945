"""HeteroSpec, fairly: `python -m benchmarks.heterospec TRACE [--profile P] --out report.md`.

Is the direction of the paper's claims (arXiv 2505.13254, tables 1 to 3) found on a recording, and does it hold against fair
controls? HeteroSpec is fitted on a training part of the texts; everything is scored on the others. Figures are totals over
the held-out texts of a domain, as in the paper; intervals are paired bootstraps over texts.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:
    import numpy as np

    from policies.contract import Policy
    from policies.cost import Cost
    from policies.heterospec import HeteroSpec
    from sim.texts import TextSums
    from traces.recording import Recording

PAPER = "The paper, mean over 20 cells against EAGLE-3: tau +4.1%, target calls -3.6%, verified tokens -10.4%, speed +4.7%."


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="python -m benchmarks.heterospec", description=__doc__.splitlines()[0])
    about.add_argument("trace", metavar="TRACE", help="a recording's folder, covering EAGLE-3 at top-k 10 to depth 14")
    about.add_argument("--profile", metavar="FILE", help="what time costs; without it no milliseconds and no best static")
    about.add_argument("--out", type=Path, metavar="FILE", help="write the report there (default: print it)")
    about.add_argument("--policy", default="heterospec", help="HeteroSpec with other parameters (default: heterospec)")
    about.add_argument("--drafter", help="the recorded drafter; the recording's first by default")
    about.add_argument("--train-share", type=float, default=0.5, help="share of every domain's texts to fit on (default 0.5)")
    about.add_argument("--seed", type=int, default=0, help="which texts those are")
    return about


@dataclass(frozen=True)
class Bench:
    """Replays on the held-out texts, each policy once."""

    recording: Recording
    held_out: np.ndarray
    drafter: str
    cost: Cost | None
    known: dict[Policy, TextSums]

    def sums(self, policy: Policy) -> TextSums:
        import torch

        from sim.replay import replay
        from sim.texts import text_sums

        if policy not in self.known:
            chosen = torch.as_tensor(self.held_out)
            log = replay(self.recording, policy, self.drafter, sequences=chosen, cost=self.cost)
            self.known[policy] = text_sums(log, len(self.recording.length), self.cost)
        return self.known[policy]

    def figures(self, policy: Policy, domain: int | None = None) -> dict[str, float]:
        """tau, calls, verified tokens and ms per token; of one domain, or tau and ms as means and the others as sums."""
        import numpy as np

        from sim.texts import over_domains

        of, sums = np.asarray(self.recording.domain_index), self.sums(policy)
        mine = np.full(len(of), True) if domain is None else of == domain
        return {
            "tau": over_domains(sums.emitted * mine, sums.cycles * mine, of),
            "calls": float(sums.cycles[mine].sum()),
            "verified": float(sums.verified[mine].sum()),
            "levels": float(sums.levels[mine].sum() / sums.cycles[mine].sum()),
            "ms": over_domains(sums.ms * mine, sums.emitted * mine, of),
            "missing": float(sums.missing[mine].sum()),
        }


def changes(theirs: dict[str, float], ours: dict[str, float]) -> list[str]:
    """tau, calls, verified tokens and ms per token against a baseline, in per cent."""
    ratios = [ours[name] / theirs[name] for name in ("tau", "calls", "verified", "ms")]
    return ["-" if math.isnan(ratio) else f"{ratio - 1:+.1%}" for ratio in ratios]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def comparison(bench: Bench, baseline: Policy, contenders: list[tuple[str, Policy]]) -> str:
    """One row per policy, over all domains, against the baseline."""
    start = bench.figures(baseline)
    rows = []
    for name, policy in [("EAGLE-3", baseline), *contenders]:
        found = bench.figures(policy)
        ms = "-" if math.isnan(found["ms"]) else f"{found['ms']:.3f}"
        absolute = [f"{found['tau']:.2f}", f"{found['calls']:.0f}", f"{found['verified']:.0f}", f"{found['levels']:.1f}", ms]
        lacking = "" if not found["missing"] else f" ({found['missing']:.0f} expansions not recorded)"
        rows.append([name + lacking, *absolute, *changes(start, found)])
    header = ["policy", "tau", "calls", "verified tokens", "levels per cycle", "ms/token", "tau", "calls", "verified", "ms"]
    return markdown(header, rows)


def per_domain(bench: Bench, baseline: Policy, fitted: Policy) -> str:
    rows = []
    for index, domain in enumerate(bench.recording.domains):
        if bench.sums(baseline).cycles[bench.recording.domain_index == index].sum():
            start, found = bench.figures(baseline, index), bench.figures(fitted, index)
            rows.append([domain, f"{start['tau']:.2f}", f"{found['tau']:.2f}", *changes(start, found)])
    rows.append(["all", f"{bench.figures(baseline)['tau']:.2f}", f"{bench.figures(fitted)['tau']:.2f}"])
    rows[-1] += changes(bench.figures(baseline), bench.figures(fitted))
    return markdown(["domain", "EAGLE-3 tau", "HeteroSpec tau", "tau", "calls", "verified", "ms"], rows)


def verdict(bench: Bench, fitted: Policy, others: list[tuple[str, Policy]]) -> str:
    """Time (or calls, without a profile) against each control, with 95% intervals."""
    import numpy as np

    from sim.texts import over_domains, paired_interval

    domain, ours = np.asarray(bench.recording.domain_index), bench.sums(fitted)
    what = "time per token" if bench.cost else "target calls per token"

    def spent(sums: TextSums) -> np.ndarray:
        return sums.ms if bench.cost else sums.cycles

    lines = []
    for name, policy in others:
        theirs = bench.sums(policy)
        low, high = paired_interval(spent(ours), spent(theirs), ours.emitted, domain)
        a, b = (over_domains(spent(sums), sums.emitted, domain) for sums in (ours, theirs))
        sure = "better" if low > 0 else "worse" if high < 0 else "no sure difference"
        lines.append(f"- against {name}: {a / b - 1:+.1%} {what} ({-high:+.1%} .. {-low:+.1%}): {sure}")
    return "\n".join(lines)


def report(recording: Recording, policy: HeteroSpec, drafter: str, cost: Cost | None, train_share: float, seed: int) -> str:
    """The whole report, as Markdown."""
    from policies.eagle3 import Eagle3
    from sim.fit import fit
    from sim.split import split_sequences
    from sim.static_search import Family, best_static, same_budget

    fitted: Any
    fitted, how, _ = fit(recording, policy, train_share=train_share, seed=seed, drafter=drafter)
    split = split_sequences(recording.sequence_ids, recording.domain_index, train_share, seed)
    if not len(split.held_out):
        raise UserError("no text is left to score on: record more texts, or lower --train-share")
    bench = Bench(recording, split.held_out, drafter, cost, {})
    base = Eagle3(fitted.total_tokens, fitted.depth, fitted.top_k)
    half = math.ceil(fitted.depth / 2)
    training = Family(recording, split.train, drafter)
    kept = training.logs([fitted])[0].kept.double().mean()
    deepest = min(fitted.depth + max(fitted.extra_levels()), 14)
    controls = [
        (f"same-budget static, {(same := same_budget(training, float(kept), (6, 8, deepest))).spec()}", same),
        (f"always as deep, {(deep := Eagle3(fitted.total_tokens, deepest, fitted.top_k)).spec()}", deep),
    ]
    if cost is not None:
        found = best_static(training, cost).policy
        controls.append((f"best static, {found.spec()}", found))
    ablation = [
        ("+ DED (deeper)", replace(fitted, prune=False)),
        ("+ TNP (pruned)", replace(fitted, extend=False)),
        ("+ both: HeteroSpec", fitted),
    ]
    sweep = [(f"alpha = {alpha}", replace(fitted, alpha=alpha)) for alpha in range(max(half - 1, 0), half + 2)]
    edges = ", ".join(f"{edge:.2f}" for edge in fitted.thresholds_)
    parts = [
        "# HeteroSpec against EAGLE-3 and fair controls",
        f"Fitted on {how['positions']} positions of {len(split.train)} texts, scored on {len(split.held_out)} others; drafter "
        f"`{drafter}`. Strata end at {edges or 'none'} nats. Changes are against EAGLE-3 at {fitted.total_tokens} tokens, "
        f"depth {fitted.depth}, top-k {fitted.top_k}. {PAPER}",
        "## By domain",
        per_domain(bench, base, fitted),
        "## Ablation (the paper's table 2)",
        comparison(bench, base, ablation),
        "## alpha (the paper's table 3)",
        comparison(bench, base, sweep),
        "## Controls",
        comparison(bench, base, [("HeteroSpec", fitted), *controls]),
        "## Verdict",
        verdict(bench, fitted, [("EAGLE-3 defaults", base), *controls]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    given = parser().parse_args()
    from policies.heterospec import HeteroSpec
    from policies.registry import load_policy
    from traces.costs import check_profile, load_profile
    from traces.recording import open_recording

    policy = load_policy(given.policy)
    if not isinstance(policy, HeteroSpec):
        raise UserError(f"this report is about heterospec, not {policy.name}: give --policy 'heterospec(...)'")
    recording = open_recording(given.trace)
    drafter, cost = given.drafter or recording.drafters[0], None
    if given.profile:
        profile = load_profile(given.profile)
        check_profile(profile, recording.manifest)
        cost = profile.cost(drafter)
    text = report(recording, policy, drafter, cost, given.train_share, given.seed)
    if not given.out:
        print(text, end="")
        return
    try:
        given.out.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {given.out} ({error.strerror}): name a file in a folder that exists") from None
    print(f"written to {given.out}")


if __name__ == "__main__":
    run_command(main)
