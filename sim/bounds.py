"""How far from possible: `python -m sim.bounds TRACE --profile P --policy goodput.json` prints bounds and gaps closed.

Clairvoyant oracles (`sim.oracles`) say what no policy can beat inside the recording; policies are placed between plain
decoding, the best static setting and the bound. The static setting is chosen on a training part of the texts; everything is
scored on the others, so a fitted policy must have been fitted with the same --train-share and --seed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:  # torch is imported when there is work to do, not for --help
    import numpy as np

    from policies.contract import Policy
    from sim.split import Split
    from traces.costs import CostModel
    from traces.recording import Recording


@dataclass(frozen=True)
class Standing:
    """One line of the table, scored on held-out texts; the mean over domains.

    name            a policy, or an oracle
    tau             emitted tokens per cycle; None for the bound on time, which has no cycles of its own
    ms_per_token    predicted; None without a cost model
    coverage        share of cycles that found all they wanted in the recording; 1 for oracles
    of_plain        share of the gap between plain decoding and the bound that it closes: in ms per token under a cost model,
                    else in cycles per token
    of_static       the same for the gap between the best static setting and the bound; None where none was given
    faster          how much less time per token than the best static setting takes; None without one
    low, high       its 95% interval (paired bootstrap over texts)
    """

    name: str
    tau: float | None
    ms_per_token: float | None
    coverage: float
    of_plain: float | None
    of_static: float | None
    faster: float | None
    low: float | None
    high: float | None


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="python -m sim.bounds", description=__doc__.splitlines()[0])
    about.add_argument("trace", metavar="TRACE", help="a recording's folder")
    about.add_argument("--profile", metavar="FILE", help="what time costs (from traces.profile); without it only cycles count")
    about.add_argument("--policy", action="append", default=[], help="a policy to place; may be repeated")
    about.add_argument("--static", metavar="POLICY", help="the best static setting, if known (default: search for it)")
    about.add_argument("--drafter", help="the recorded drafter; the recording's first by default")
    about.add_argument("--train-share", type=float, default=0.5, help="share of every domain's texts to choose on (default 0.5)")
    about.add_argument("--seed", type=int, default=0, help="which texts those are")
    about.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    return about


def standings(
    recording: Recording,
    policies: list[Policy],
    cost: CostModel | None,
    static: Policy | None,
    held_out: np.ndarray,
    drafter: str | None = None,
) -> list[Standing]:
    """Plain decoding, the static setting, the policies and the oracles, scored on the ``held_out`` texts (indices)."""
    import torch

    from policies.autoregressive import Autoregressive
    from sim.bootstrap import Resamples
    from sim.oracles import FewestCycles, LeastTime, Oracle, bound
    from sim.setting import Setting
    from sim.trial import run_trials

    if not len(held_out) or not bool((recording.length[held_out] > 1).any()):
        raise UserError("no text of two tokens or more is left to score on: record more texts, or lower --train-share")
    chosen, setting = torch.as_tensor(held_out), Setting(drafter or recording.drafters[0])
    oracles: list[Oracle] = [FewestCycles()] + ([] if cost is None else [LeastTime(cost)])
    bounds = [bound(recording, oracle, setting.drafter, chosen) for oracle in oracles]
    contenders: list[Policy] = [Autoregressive()] + ([] if static is None else [static]) + list(policies)
    tallies = run_trials(recording, contenders, setting, cost, chosen)
    spent = "cycles_per_token" if cost is None else "ms_per_token"  # what the gaps are measured in
    plain, least, draws = tallies[0].mean(spent), bounds[-1].mean(spent), Resamples(tallies[0])

    def closed(start: float, value: float) -> float | None:
        return (start - value) / (start - least) if start > least else None

    lines = []
    for policy, sums in zip(contenders, tallies, strict=True):
        value = sums.mean(spent)
        saved = None if static is None or policy is static else draws.saving(sums, tallies[1], spent)
        lines.append(
            Standing(
                name=policy.spec(),
                tau=sums.mean("tau"),
                ms_per_token=None if cost is None else value,
                coverage=sums.coverage,
                of_plain=closed(plain, value),
                of_static=None if static is None else closed(tallies[1].mean(spent), value),
                faster=saved and saved.value,
                low=saved and saved.low,
                high=saved and saved.high,
            )
        )
    lines.append(Standing("[fewest cycles possible]", bounds[0].mean("tau"), None, 1.0, *[None] * 5))
    if cost is not None:
        lines.append(Standing("[least time possible]", None, least, 1.0, 1.0, 1.0, *[None] * 3))
    return lines


@dataclass(frozen=True)
class Placing:
    """Where policies stand.

    lines   see :func:`standings`
    static  the best static setting; None where there is no cost model to choose it by, and none was given
    chosen  predicted ms per token of the static setting on the texts that it was searched on; None where it was given
    split   those texts, and the ones that the lines are scored on
    """

    lines: list[Standing]
    static: Policy | None
    chosen: float | None
    split: Split


def place(
    recording: Recording,
    policies: list[Policy],
    cost: CostModel | None,
    drafter: str,
    *,
    static: Policy | None = None,
    texts: np.ndarray | None = None,
    train_share: float = 0.5,
    seed: int = 0,
) -> Placing:
    """Search the best static setting on a training part of the texts, and score everything on the others.

    :param static: the best static setting, if known.   :param texts: indices int64; all by default.
    :raises UserError: when one of the parts holds nothing to decode, or the recording covers no static setting.
    """
    import torch

    from sim.setting import Setting
    from sim.split import split_texts
    from sim.static_search import best_static, fixed_trees
    from sim.trial import Trials

    split, chosen = split_texts(recording, texts, train_share, seed), None
    if static is None and cost is not None:
        if not bool((recording.length[split.train] > 1).any()):
            raise UserError("no text is left to choose the best static setting on: raise --train-share, or give --static")
        trials = Trials(recording, Setting(drafter), cost, torch.as_tensor(split.train))
        found = best_static(trials, fixed_trees(trials))
        static, chosen = found.policy, found.ms_per_token
    return Placing(standings(recording, policies, cost, static, split.held_out, drafter), static, chosen, split)


def table(lines: list[Standing]) -> str:
    """The standings as text."""
    from sim.table import number, text_table

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    header = ["policy", "tau", "ms/token", "coverage", "gap closed\nfrom plain", "gap closed\nfrom static"]
    header += ["less time\nthan static", "95% interval"]
    rows = [
        [
            line.name,
            number(line.tau),
            number(line.ms_per_token, 3),
            f"{line.coverage:.0%}",
            share(line.of_plain),
            share(line.of_static),
            share(line.faster),
            "-" if line.low is None else f"{line.low:+.1%} .. {line.high:+.1%}",
        ]
        for line in lines
    ]
    return text_table(header, rows)


def main() -> None:
    given = parser().parse_args()
    from policies.registry import load_policy
    from sim.finding import profile_for
    from sim.outputs import check_writable, write_json
    from traces.recording import open_recording

    check_writable(given.json)
    policies = [load_policy(spec) for spec in given.policy]
    static = load_policy(given.static) if given.static else None
    for policy in policies + ([static] if static else []):
        policy.check_fitted()
    recording = open_recording(given.trace)
    drafter = given.drafter or recording.drafters[0]
    cost = profile_for(given.profile, recording, drafter).cost(drafter) if given.profile else None
    placed = place(recording, policies, cost, drafter, static=static, train_share=given.train_share, seed=given.seed)
    if placed.chosen is not None:
        where = f"{len(placed.split.train)} training texts"
        print(f"best static on {where}: {placed.static.spec()}, {placed.chosen:.3f} ms per token there")
    print(f"on {len(placed.split.held_out)} held-out texts:")
    print(table(placed.lines))
    if given.json:
        facts: dict[str, Any] = {"recording": str(recording.folder), "drafter": drafter, "profile": given.profile}
        facts |= {"train_share": given.train_share, "seed": given.seed, "static": placed.static and placed.static.to_json()}
        write_json(given.json, facts | {"standings": [asdict(line) for line in placed.lines]})


if __name__ == "__main__":
    run_command(main)
