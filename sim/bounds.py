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
    from policies.cost import Cost
    from traces.recording import Recording


@dataclass(frozen=True)
class Standing:
    """One line of the table, scored on held-out texts; the mean over domains.

    name            a policy, or an oracle
    tau             emitted tokens per cycle
    ms_per_token    predicted; None without a cost model
    coverage        share of cycles that found all they wanted in the recording; 1 for oracles
    of_plain        share of the gap between plain decoding and the bound that it closes: in ms per token under a cost model,
                    else in cycles per token
    of_static       the same for the gap between the best static setting and the bound; None where none was given
    faster          how much less time per token than the best static setting takes; None without one
    low, high       its 95% interval (paired bootstrap over texts)
    """

    name: str
    tau: float
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
    cost: Cost | None,
    static: Policy | None,
    held_out: np.ndarray,
    drafter: str | None = None,
) -> list[Standing]:
    """Plain decoding, the static setting, the policies and the oracles, scored on the ``held_out`` texts (indices)."""
    import numpy as np
    import torch

    from policies.autoregressive import Autoregressive
    from sim.oracles import FewestCycles, LeastTime, true_path
    from sim.replay import replay
    from sim.texts import over_domains, paired_interval, text_sums

    chosen, domain = torch.as_tensor(held_out), np.asarray(recording.domain_index)
    if not len(held_out) or not bool((recording.length[held_out] > 1).any()):
        raise UserError("no text of two tokens or more is left to score on: record more texts, or lower --train-share")
    path = true_path(recording, drafter, chosen)
    steps, of = path.steps.double().numpy(), domain[held_out]
    oracles = [FewestCycles()] + ([] if cost is None else [LeastTime(cost)])
    plans = [oracle.plan(path).numpy() for oracle in oracles]
    figures = [1 / over_domains(plans[0], steps, of)] + [over_domains(plan, steps, of) for plan in plans[1:]]

    contenders: list[Policy] = [Autoregressive()] + ([] if static is None else [static]) + list(policies)
    logs = [replay(recording, policy, drafter, sequences=chosen, cost=cost) for policy in contenders]
    sums = [text_sums(log, len(domain), cost) for log in logs]
    spent = [one.cycles if cost is None else one.ms for one in sums]  # what the gaps are measured in
    per_token = [over_domains(these, one.emitted, domain) for these, one in zip(spent, sums, strict=True)]
    bound = over_domains(plans[-1], steps, of)

    def closed(start: float, value: float) -> float | None:
        return (start - value) / (start - bound) if start > bound else None

    lines = []
    for policy, log, one, these, value in zip(contenders, logs, sums, spent, per_token, strict=True):
        faster = None if static is None or policy is static else 1 - value / per_token[1]
        low, high = paired_interval(these, spent[1], one.emitted, domain) if faster is not None else (None, None)
        lines.append(
            Standing(
                name=policy.spec(),
                tau=over_domains(one.emitted, one.cycles, domain),
                ms_per_token=None if cost is None else value,
                coverage=log.coverage,
                of_plain=closed(per_token[0], value),
                of_static=None if static is None else closed(per_token[1], value),
                faster=faster,
                low=low,
                high=high,
            )
        )
    fewest = Standing("[fewest cycles possible]", over_domains(steps, plans[0], of), None, 1.0, *[None] * 5)
    lines.append(fewest)
    if cost is not None:
        lines.append(Standing("[least time possible]", float("nan"), figures[1], 1.0, 1.0, 1.0, *[None] * 3))
    return lines


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
            number(None if line.tau != line.tau else line.tau),
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
    from sim.fit import write_json
    from sim.split import split_sequences
    from sim.static_search import Family, best_static
    from traces.costs import check_profile, load_profile
    from traces.recording import open_recording

    policies = [load_policy(spec) for spec in given.policy]
    static = load_policy(given.static) if given.static else None
    for policy in policies + ([static] if static else []):
        policy.check_fitted()
    recording = open_recording(given.trace)
    drafter = given.drafter or recording.drafters[0]
    cost = None
    if given.profile:
        profile = load_profile(given.profile)
        check_profile(profile, recording.manifest)
        cost = profile.cost(drafter)
    split = split_sequences(recording.sequence_ids, recording.domain_index, given.train_share, given.seed)
    if static is None and cost is not None:
        if not bool((recording.length[split.train] > 1).any()):
            raise UserError("no text is left to choose the best static setting on: raise --train-share, or give --static")
        found = best_static(Family(recording, split.train, drafter), cost)
        static = found.policy
        print(f"best static on {len(split.train)} training texts: {static.spec()}, {found.ms_per_token:.3f} ms per token there")
    lines = standings(recording, policies, cost, static, split.held_out, drafter)
    print(f"on {len(split.held_out)} held-out texts:")
    print(table(lines))
    if given.json:
        facts: dict[str, Any] = {"recording": str(recording.folder), "drafter": drafter, "profile": given.profile}
        facts |= {"train_share": given.train_share, "seed": given.seed, "static": static.to_json() if static else None}
        rows = [{k: None if v != v else v for k, v in asdict(line).items()} for line in lines]
        write_json(given.json, facts | {"standings": rows})


if __name__ == "__main__":
    run_command(main)
