"""Where the entrants of a league stand: replayed on the same held-out texts, priced, and measured against controls and bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decisions import decision_times
from benchmarks.entrants import Entrant, Training, shorter
from policies.autoregressive import Autoregressive
from policies.contract import Policy
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.hedgespec import HedgeSpec
from sim.bootstrap import Estimate, Resamples
from sim.contest import add_intervals
from sim.finding import digest_of, manifest_digest
from sim.hedge_bound import knowing
from sim.metrics import result_rows
from sim.oracles import FewestCycles, LeastTime, bound
from sim.setting import Setting
from sim.static_search import TOP_KS, best_static, fixed_trees, same_budget
from sim.sweepstore import SweepStore
from sim.tally import Tally
from sim.trial import Trials, run_trial
from traces.costs import CostModel, Profile
from traces.recording import Recording

BUDGET_DEPTHS = (4, 6, 8)
"""Depths among which the static tree of the same budget is chosen."""


@dataclass(frozen=True)
class Group:
    """The texts of one temperature that are scored, and what may be learned from.

    texts  indices int64 into the recording's sequences
    """

    recording: Recording
    texts: np.ndarray
    setting: Setting
    profile: Profile
    training: Training

    def cost(self, policy: Policy) -> CostModel:
        """The machine, with the loop's overhead under this policy where it was measured."""
        return self.profile.cost(self.setting.drafter, policy.name)

    @cached_property
    def trained(self) -> Trials:
        """Trials on the training texts."""
        there = replace(self.setting, temperature=None)
        cost = self.profile.cost(self.setting.drafter)
        return Trials(self.training.recording, there, cost, torch.as_tensor(self.training.texts))

    @property
    def whole_cost(self) -> CostModel:
        return self.profile.cost(self.setting.drafter).behind(self.setting.context_offset)


@dataclass
class Placed:
    """The table of one group.

    lines    one per entrant, control or bound: a name, a form, rows of figures (`sim.metrics`) and shares (see :func:`place`)
    failed   what did not run, and why
    """

    group: Group
    lines: list[dict[str, Any]]
    policies: list[Policy]
    least: float | None
    failed: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    def add_decision_times(self, texts: int, rounds: int) -> None:
        """Measure what each policy's own code takes per cycle, all in this process, one by one and in turns."""
        group, threads = self.group, torch.get_num_threads()
        chosen = group.texts[:: max(len(group.texts) // texts, 1)][:texts].tolist()
        cost = group.profile.cost(group.setting.drafter)
        torch.set_num_threads(1)
        try:
            times = decision_times(group.recording, self.policies, group.setting.drafter, cost, chosen, rounds)
        finally:
            torch.set_num_threads(threads)
        for line, found in zip(self.lines, times, strict=False):
            line["decision_ms"] = found.ms
            line["decision_ms_quartiles"] = [found.low, found.high]

    def to_json(self) -> dict[str, Any]:
        setting, training = self.group.setting, self.group.training
        return {
            "setting": setting.to_json(),
            "texts": len(self.group.texts),
            "trained_on": {"recording": str(training.recording.folder), "texts": len(training.texts)},
            **self.facts,
            "least_ms_per_token": self.least,
            "lines": self.lines,
            "failed": self.failed,
        }


def place(
    group: Group,
    entrants: list[Entrant],
    folder: Path,
    failed: dict[str, str],
    resamples: int,
    seed: int,
    on_policy: Callable[[str, int], Any] = lambda name, of: None,
) -> Placed:
    """Replay everyone on the group's texts and compare.

    A line has, besides the rows of `sim.metrics` with their intervals:

    of_static, of_plain  share of the gap between the best static setting (plain decoding) and the clairvoyant bound that it
                         closes; None where the bound is not known (several requests that decode together)
    faster               how much less time per token it takes than the best static setting, with its interval
    than_budget          the same against the static tree that verifies as many nodes (shaped on the training texts), and its name

    :param folder: finished replays are kept there.
    :param failed: entrants that cannot run here are put there, with the reason.
    """
    store = SweepStore.open(folder, _identity(group))
    static = best_static(group.trained, fixed_trees(group.trained))
    everyone = [Entrant(Autoregressive(), "control"), Entrant(static.policy, "best static")]
    controls = [one.policy for one in everyone]
    everyone += [one for one in entrants if one.policy not in controls]
    tallies: list[tuple[Entrant, Tally]] = []
    for entrant in everyone:
        on_policy(entrant.policy.spec(), len(everyone))
        try:
            tallies += _covered(group, entrant, store)
        except UserError as error:
            failed[entrant.policy.spec()] = str(error)
    budgets = _budgets(group, tallies, store)
    draws = Resamples(tallies[0][1], resamples, seed)
    least = _least(group)
    lines = [_line(group, one, sums, tallies, budgets.get(one.policy), draws, least) for one, sums in tallies]
    policies = [one.policy for one, _ in tallies]
    facts = {"best_static": {"policy": static.policy.spec(), "ms_per_token_in_training": static.ms_per_token}}
    hedges = [policy for policy in policies if type(policy) is HedgeSpec]
    lines += [_line(group, *_bound(group, hedge), tallies, None, draws, least) for hedge in hedges]
    fewest = bound(group.recording, FewestCycles(), group.setting.drafter, torch.as_tensor(group.texts))
    return Placed(group, lines, policies, least, failed, facts | {"most_tau": fewest.mean("tau")})


def _identity(group: Group) -> dict[str, Any]:
    facts = {"recording": manifest_digest(group.recording), "texts": group.texts.tolist(), "setting": group.setting.to_json()}
    return facts | {"profile": digest_of(group.profile)}


def _run(group: Group, policy: Policy, store: SweepStore) -> Tally:
    known = store.get(policy)
    if known is None:
        known = run_trial(group.recording, policy, group.setting, group.cost(policy), torch.as_tensor(group.texts))
        store.add(policy, known)
    return known


def _covered(group: Group, entrant: Entrant, store: SweepStore) -> list[tuple[Entrant, Tally]]:
    """The entrant, and the longest form of it that the recording covers where it does not cover this one."""
    found = [(entrant, _run(group, entrant.policy, store))]
    if found[0][1].coverage < 1 and (cut := shorter(entrant.policy)) is not None:
        found.append((Entrant(cut, "capped"), _run(group, cut, store)))
    return found


def _budgets(group: Group, tallies: list[tuple[Entrant, Tally]], store: SweepStore) -> dict[Policy, tuple[Policy, Tally]]:
    """Of each policy that drafts: the static tree that verifies as many nodes, shaped on the training texts, and its replay."""
    kept = {one.policy: float(sums.sums["kept"].sum() / sums.sums["cycles"].sum()) for one, sums in tallies}
    kept = {policy: nodes for policy, nodes in kept.items() if nodes > 0}
    sizes = sorted({max(round(nodes) + 1, 1) for nodes in kept.values()})
    group.trained.tallies([Eagle3(n, depth, k) for depth in BUDGET_DEPTHS for k in TOP_KS for n in sizes])  # shares drafting
    same = {policy: same_budget(group.trained, nodes, BUDGET_DEPTHS) for policy, nodes in kept.items()}
    return {policy: (tree, _run(group, tree, store)) for policy, tree in same.items()}


def _least(group: Group) -> float | None:
    """ms per token that no policy can beat, the mean over domains; known for requests that decode alone, serially."""
    if group.setting.batch > 1 or group.setting.execution != "serial":
        return None
    texts = torch.as_tensor(group.texts)
    return bound(group.recording, LeastTime(group.whole_cost), group.setting.drafter, texts).mean("ms_per_token")


def _bound(group: Group, hedge: HedgeSpec) -> tuple[Entrant, Tally]:
    """HedgeSpec with every arm known: what its live form is restricted from."""
    policy = knowing(hedge, group.recording, group.setting.drafter, group.texts)
    sums = run_trial(group.recording, policy, group.setting, group.cost(hedge), torch.as_tensor(group.texts))
    return Entrant(policy, "bound"), sums


def _line(
    group: Group,
    entrant: Entrant,
    sums: Tally,
    tallies: list[tuple[Entrant, Tally]],
    budget: tuple[Policy, Tally] | None,
    draws: Resamples,
    least: float | None,
) -> dict[str, Any]:
    plain, static = tallies[0][1], tallies[1][1]
    rows = [row.to_json() for row in result_rows(sums, entrant.policy, group.setting)]
    add_intervals(rows, sums, draws)
    value = sums.mean("ms_per_token")

    def closed(start: Tally) -> float | None:
        gap = None if least is None else start.mean("ms_per_token") - least
        return (start.mean("ms_per_token") - value) / gap if gap else None

    def saved(other: Tally) -> dict[str, float | None]:
        found: Estimate = draws.saving(sums, other, "ms_per_token")
        return {"value": found.value, "low": found.low, "high": found.high}

    by_domain = {name: 1 - ms / static.by_domain("ms_per_token")[name] for name, ms in sums.by_domain("ms_per_token").items()}
    return {
        "policy": entrant.policy.spec(),
        "form": entrant.form,
        "published": entrant.policy.published,
        "rows": rows,
        "cycles_per_token": sums.mean("cycles_per_token"),
        "of_plain": closed(plain),
        "of_static": closed(static),
        "faster": None if sums is static else saved(static),
        "faster_by_domain": by_domain,
        "than_budget": budget and saved(budget[1]) | {"policy": budget[0].spec()},
    }
