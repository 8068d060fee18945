"""What a policy decided, row by row and to the bit, whatever the batch and its padding looked like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from policies.contract import Cycle, Policy, State
from policies.drafting import Draft, Drafter, draft
from policies.loop import run_cycle
from policies.verification import Verifier
from tests.policies.cases import COSTLY
from tests.policies.synthetic import Priced, cycle_at, fresh


class Decision(NamedTuple):
    """One row's tree and what it keeps. Floats as their bits."""

    nodes: tuple[tuple[int, int, int, int, int, int], ...]
    """token, parent, depth, rank, bits of logprob, bits of score"""
    expanded: tuple[bool, ...]
    kept: tuple[int, ...]
    widths: tuple[int, ...]
    state: tuple[tuple[str, tuple], ...]


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32) if value.dtype == torch.float32 else value


def decisions(draft: Draft, state: State) -> list[Decision]:
    """What was decided in each row."""
    tree, rows = draft.tree, range(draft.tree.rows)
    size, exists = tree.size.tolist(), tree.exists.tolist()
    columns = [bits(getattr(tree, name)).tolist() for name in ("token", "parent", "depth", "rank", "logprob", "score")]
    expanded, kept, widths = tree.expanded.tolist(), draft.kept.tolist(), draft.widths.tolist()
    lasting = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # not the scratch of the cycle
    carried = {
        name: bits(value).reshape(len(rows), -1).tolist()
        for name, value in sorted(lasting.items())
        if value.shape[:1] == (len(rows),)
    }
    assert not any(any(exists[row][size[row] :]) for row in rows), "rows are packed"
    return [
        Decision(
            nodes=tuple(zip(*(column[row][: size[row]] for column in columns), strict=True)),
            expanded=tuple(expanded[row][: size[row]]),
            kept=tuple(node for node, keeps in enumerate(kept[row]) if keeps),
            widths=_without_end(widths[row], 0),
            state=tuple((name, _without_end(values[row], -1)) for name, values in carried.items()),
        )
        for row in rows
    ]


def _without_end(values: list, padding: int) -> tuple:
    """Without the padding behind them. A state that has a value per node (a static tree's places) is as wide as the widest row of
    the batch."""
    count = len(values)
    while count and values[count - 1] == padding:
        count -= 1
    return tuple(values[:count])


def decide(policy: Policy, drafter: Drafter, cycle: Cycle) -> list[Decision]:
    """One cycle's decisions, row by row."""
    cycle = priced(policy, cycle)
    state = fresh(policy, cycle)
    drafted = draft(policy, drafter, cycle, state)
    own = state if policy.scope in ("cycle", "sequence") else {}  # else the rows share it
    return decisions(drafted, own)


def priced(policy: Policy, cycle: Cycle) -> Cycle:
    """With a cost model, if the policy needs one."""
    return replace(cycle, cost=Priced()) if policy.name in COSTLY else cycle


class Step(NamedTuple):
    """A whole cycle of one row: where it started, what was decided, what came of it."""

    position: int
    decision: Decision
    accepted: int
    bonus: int


def decode(
    policy: Policy,
    drafter: Drafter,
    verifier: Verifier,
    lengths: list[int],
    sequences: list[int],
    group: Callable[[int], int] = lambda sequence: sequence,
) -> dict[int, list[Step]]:
    """Decode the sequences in lockstep to their ends; finished rows stay in the batch as inactive ones.

    :param group: the serving batch of a sequence; by default each decodes alone.
    """
    groups = torch.tensor([group(sequence) for sequence in sequences])
    state = policy.init(len(sequences), torch.tensor(sequences))
    position = [0] * len(sequences)
    steps: dict[int, list[Step]] = {sequence: [] for sequence in sequences}
    while True:
        active = [place < lengths[sequence] - 1 for sequence, place in zip(sequences, position, strict=True)]
        if not any(active):
            return steps
        numbers = torch.tensor([len(steps[sequence]) for sequence in sequences])
        cycle = replace(cycle_at(sequences, position, active=active), number=numbers, group=groups)
        cycle = priced(policy, cycle)
        done = run_cycle(policy, drafter, verifier, cycle, state)
        state, decided = done.state, decisions(done.draft, done.state)
        walked = zip(done.walk.accepted.tolist(), done.walk.bonus.tolist(), strict=True)
        for row, (sequence, (accepted, bonus)) in enumerate(zip(sequences, walked, strict=True)):
            if active[row]:
                steps[sequence].append(Step(position[row], decided[row], accepted, bonus))
                position[row] = min(position[row] + accepted + 1, lengths[sequence] - 1)
