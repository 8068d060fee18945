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


def decision(draft: Draft, row: int, state: State) -> Decision:
    tree, size = draft.tree, int(draft.tree.size[row])
    assert not bool(tree.exists[row, size:].any()), "rows are packed"
    columns = (tree.token, tree.parent, tree.depth, tree.rank, bits(tree.logprob), bits(tree.score))
    widths = draft.widths[row].tolist()
    while widths and widths[-1] == 0:
        widths.pop()
    lasting = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # not the scratch of the cycle
    carried = {name: value[row] for name, value in lasting.items() if value.shape[:1] == (tree.rows,)}
    return Decision(
        nodes=tuple(zip(*(column[row, :size].tolist() for column in columns), strict=True)),
        expanded=tuple(tree.expanded[row, :size].tolist()),
        kept=tuple(draft.kept[row].nonzero()[:, 0].tolist()),
        widths=tuple(widths),
        state=tuple(
            (name, _without_padding(bits(value).reshape(-1).tolist())) for name, value in sorted(carried.items())
        ),
    )


def _without_padding(values: list) -> tuple:
    """A state that has a value per node (a static tree's places) is as wide as the widest row of the batch."""
    while values and values[-1] == -1:
        values.pop()
    return tuple(values)


def decide(policy: Policy, drafter: Drafter, cycle: Cycle) -> list[Decision]:
    """One cycle's decisions, row by row."""
    cycle = priced(policy, cycle)
    state = fresh(policy, cycle)
    drafted = draft(policy, drafter, cycle, state)
    own = state if policy.scope in ("cycle", "sequence") else {}  # else the rows share it
    return [decision(drafted, row, own) for row in range(drafted.tree.rows)]


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
        state = done.state
        for row, sequence in enumerate(sequences):
            if active[row]:
                accepted, bonus = int(done.walk.accepted[row]), int(done.walk.bonus[row])
                steps[sequence].append(Step(position[row], decision(done.draft, row, state), accepted, bonus))
                position[row] = min(position[row] + accepted + 1, lengths[sequence] - 1)
