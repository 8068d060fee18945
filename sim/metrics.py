"""Result rows: what a replay says about a policy, per domain and over all domains.

tau, the acceptance length, is emitted tokens over cycles: a ratio of sums per domain, and the mean over domains overall.
The first token of a text, which prefill gives, is not counted, nor is anything behind the end of the text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from policies.contract import Policy
from sim.setting import Setting
from sim.tally import FIGURES, Tally
from sim.trial import run_trial
from traces.costs import CostModel
from traces.recording import Recording

ALL = "mean"
"""The row over all domains."""


@dataclass(frozen=True)
class ResultRow:
    """One policy on one domain (or "mean": the mean over the domains of each figure).

    tau               emitted tokens per cycle
    kept              kept nodes per cycle; the root is verified on top
    levels            draft forwards per cycle, the catch-up among them
    coverage          share of cycles whose every expansion the recording holds
    accepted_by_depth share of cycles that accept at least d nodes, d = 1, 2, ...
    ms_per_token      predicted milliseconds that a request waits per token, prefill excluded; None without a cost model
    speedup           plain decoding's predicted time per token over this one's; None without a cost model
    parameters        the policy's whole configuration
    verified          tokens that the target sees per cycle: kept and root
    tokens_per_second predicted, of the machine: all requests of a batch together; None without a cost model
    batch             requests side by side
    temperature       of the texts; None when they differ
    schedule          who decodes together in a batch (see sim.setting)
    """

    policy: str
    domain: str
    drafter: str
    texts: float
    cycles: float
    emitted: float
    tau: float
    kept: float
    levels: float
    coverage: float
    accepted_by_depth: tuple[float, ...]
    ms_per_token: float | None
    speedup: float | None
    parameters: dict[str, Any]
    verified: float = 0.0
    tokens_per_second: float | None = None
    batch: int = 1
    temperature: float | None = None
    schedule: str = Setting.schedule

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def replay_rows(
    recording: Recording,
    policy: Policy,
    drafter: str | None = None,
    cost: CostModel | None = None,
    sequences: Tensor | None = None,
    prices: CostModel | None = None,
) -> list[ResultRow]:
    """Replay a policy on a recording, one request at a time, price it where a cost model is given, and sum up.

    :param sequences: indices int64 of the sequences to replay; all by default.
    :param prices: price by this one, while policies go on deciding by ``cost``.
    """
    setting = Setting(drafter or recording.drafters[0])
    return result_rows(run_trial(recording, policy, setting, cost, sequences, prices), policy, setting)


def result_rows(sums: Tally, policy: Policy, setting: Setting) -> list[ResultRow]:
    """Rows per domain, then the mean over domains."""
    by_domain = {figure: sums.by_domain(figure) for figure in sums.figures}
    rows = []
    for index in sums.present():
        mine, domain = sums.domain == index, sums.domains[index]
        figures = {figure: by_domain.get(figure, {}).get(domain) for figure in FIGURES}
        cycles = sums.sums["cycles"][mine].sum()
        rows.append(
            ResultRow(
                policy=policy.spec(),
                domain=domain,
                drafter=setting.drafter,
                texts=int(mine.sum()),
                cycles=int(cycles),
                emitted=float(sums.sums["emitted"][mine].sum()),
                accepted_by_depth=tuple((sums.reached[mine].sum(0) / cycles).tolist()),
                parameters=policy.to_json(),
                batch=setting.batch,
                temperature=setting.temperature,
                schedule=setting.schedule,
                **figures,
            )
        )
    return [*rows, mean_row(rows)]


def mean_row(rows: list[ResultRow]) -> ResultRow:
    """The mean over domains of every figure; counts are sums."""

    def mean(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return None if any(value is None for value in values) else sum(values) / len(values)

    depths = zip(*(row.accepted_by_depth for row in rows), strict=True)
    return replace(
        rows[0],
        domain=ALL,
        texts=sum(row.texts for row in rows),
        cycles=sum(row.cycles for row in rows),
        emitted=sum(row.emitted for row in rows),
        accepted_by_depth=tuple(sum(shares) / len(rows) for shares in depths),
        **{name: mean(name) for name in FIGURES},
    )
