"""Result rows: what a replay says about a policy, per domain and over all domains.

tau, the acceptance length, is emitted tokens over cycles: a ratio of sums per domain, and the mean over domains overall.
The first token of a text, which prefill gives, is not counted, nor is anything behind the end of the text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from policies.contract import Policy
from sim.pricing import plain_ms, price
from sim.recorded import RecordedText
from sim.replay import CycleLog, replay
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
    ms_per_token      predicted milliseconds per emitted token, prefill excluded; None without a cost model
    speedup           plain decoding's predicted time per token over this one's; None without a cost model
    parameters        the policy's whole configuration
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def replay_rows(
    recording: Recording,
    policy: Policy,
    drafter: str | None = None,
    cost: CostModel | None = None,
    sequences: Tensor | None = None,
) -> list[ResultRow]:
    """Replay a policy on a recording, price it where a cost model is given, and sum up.

    :param sequences: indices int64 of the sequences to replay; all by default.
    """
    drafter = drafter or recording.drafters[0]
    log = replay(recording, policy, drafter, sequences=sequences, cost=cost)
    if cost is None:
        return result_rows(recording, policy, drafter, log)
    text = RecordedText(recording)
    plain = plain_ms(text.context_length, text.offset, text.length, cost) / (text.length - 1).clamp(min=1)
    return result_rows(recording, policy, drafter, log, price(log, cost), plain)


def result_rows(
    recording: Recording,
    policy: Policy,
    drafter: str,
    log: CycleLog,
    cycle_ms: Tensor | None = None,
    plain_ms: Tensor | None = None,
) -> list[ResultRow]:
    """Rows per domain, then the mean over domains.

    :param cycle_ms: predicted float64 [C] milliseconds of each cycle.
    :param plain_ms: predicted float64 [S] milliseconds per token of plain decoding of each sequence of the recording.
    """
    domain_of = torch.from_numpy(recording.domain_index.copy())[log.sequence]
    rows = []
    for index, domain in enumerate(recording.domains):
        mine = domain_of == index
        if not bool(mine.any()):
            continue
        emitted = float(log.emitted[mine].sum())
        depths = torch.arange(1, int(log.accepted.max()) + 1)
        reached = (log.accepted[mine][:, None] >= depths).double().mean(0)
        ms = None if cycle_ms is None else float(cycle_ms[mine].sum()) / emitted
        plain = None
        if plain_ms is not None:
            plain = float((plain_ms[log.sequence[mine]] * log.emitted[mine]).sum()) / emitted
        rows.append(
            ResultRow(
                policy=policy.spec(),
                domain=domain,
                drafter=drafter,
                texts=len(log.sequence[mine].unique()),
                cycles=int(mine.sum()),
                emitted=emitted,
                tau=emitted / int(mine.sum()),
                kept=float(log.kept[mine].double().mean()),
                levels=float(log.levels[mine].double().mean()),
                coverage=float((log.missing[mine] == 0).double().mean()),
                accepted_by_depth=tuple(reached.tolist()),
                ms_per_token=ms,
                speedup=plain / ms if plain is not None and ms else None,
                parameters=policy.to_json(),
            )
        )
    return [*rows, mean_row(rows)]


def mean_row(rows: list[ResultRow]) -> ResultRow:
    """The mean over domains of every figure; counts are sums."""

    def mean(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return None if any(value is None for value in values) else sum(values) / len(values)

    by_depth = torch.tensor([row.accepted_by_depth for row in rows], dtype=torch.float64).mean(0)
    return ResultRow(
        policy=rows[0].policy,
        domain=ALL,
        drafter=rows[0].drafter,
        texts=sum(row.texts for row in rows),
        cycles=sum(row.cycles for row in rows),
        emitted=sum(row.emitted for row in rows),
        accepted_by_depth=tuple(by_depth.tolist()),
        parameters=rows[0].parameters,
        **{name: mean(name) for name in ("tau", "kept", "levels", "coverage", "ms_per_token", "speedup")},
    )
