"""One draft-verify-accept cycle: the code that replay and live decoding share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from policies.contract import Cycle, Outcome, Policy, State
from policies.drafting import Draft, Drafter, draft
from policies.verification import Kept, Verifier, Walk, node_status, pack


class Cycled(NamedTuple):
    """What one cycle did: the draft, the packed kept nodes, the accepted walk and the policy's new state."""

    draft: Draft
    kept: Kept
    walk: Walk
    state: State


@dataclass(frozen=True)
class Step:
    """One cycle of the rows that still decode, recorded or live.

    cycle   what the policy was told
    done    draft, kept nodes, accepted walk
    gained  int64 [B]  tokens that count
    row     int64 [B]  which of the texts that were started each row is
    """

    cycle: Cycle
    done: Cycled
    gained: Tensor
    row: Tensor


def run_cycle(policy: Policy, drafter: Drafter, verifier: Verifier, cycle: Cycle, state: State) -> Cycled:
    """Draft, verify and accept once, for B rows at a time; recorded or real networks behind drafter and verifier."""
    state = policy.begin(cycle, state)
    drafted = draft(policy, drafter, cycle, state)
    kept = pack(drafted.tree, drafted.kept, f"policy '{policy.name}'")
    walk = verifier.accept(cycle, kept)
    if type(policy).observe is not Policy.observe:
        status = node_status(drafted.tree, kept, walk)
        ask_top = partial(verifier.target_top, cycle, kept, walk)
        outcome = Outcome(walk.accepted, walk.bonus, status, drafted.tree, ask_top)
        state = policy.observe(outcome, cycle, state)
    return Cycled(drafted, kept, walk, state)


def emitted(walk: Walk, room: Tensor) -> Tensor:
    """Tokens int64 [B] that count: accepted ones and bonus, nothing after an end of sequence or past the limit."""
    return (walk.accepted + (walk.bonus >= 0)).minimum(room)


def gather_rows(state: State, rows: Tensor, total: int, scope: str = "sequence") -> State:
    """The state of the given ``rows`` of ``total``. What outlives its rows (scope stream or batch) stays as it is."""
    if scope in ("stream", "batch"):
        return state
    return {name: value[rows] if value.shape[:1] == (total,) else value for name, value in state.items()}
