"""One replay for a family of policies that draft the same tree and differ only in what they verify of it.

Drafts at a position depend on the committed prefix alone, so every tree that any cycle of any member can meet is drafted
once, at every recorded position. How many nodes each member would accept there follows from which nodes of the true path
it keeps, and its cycles are found by jumping from position to position.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from policies.contract import Cycle, Policy
from policies.cost import Cost
from policies.drafting import Drafter, draft
from policies.errors import UserError
from policies.verification import pack
from sim.looked_up import replayed_drafter
from sim.parts import in_threads
from sim.recorded import RecordedText, RecordedVerifier
from sim.replay import CycleLog
from traces.recording import Recording

POSITIONS = 1024
"""Trees drafted side by side by one thread."""


class Outlook(NamedTuple):
    """What a cycle at each of P positions would be, for F members.

    accepted int16 [F, P], kept int16 [F, P], widths int64 [P, L], drafted int64 [P], missing int64 [P]: see CycleLog
    """

    accepted: Tensor
    kept: Tensor
    widths: Tensor
    drafted: Tensor
    missing: Tensor


def are_family(policies: list[Policy]) -> bool:
    """Whether they draft the same trees: one stateless class, and no parameter differs but those that only select."""
    first = policies[0]
    selecting = first.selecting
    plain = first.scope == "cycle" and not first.batch_wide and type(first).observe is Policy.observe

    def drafting(policy: Policy) -> dict:
        return {name: value for name, value in dataclasses.asdict(policy).items() if name not in selecting}

    return plain and all(type(other) is type(first) and drafting(other) == drafting(first) for other in policies)


def families(policies: Sequence[Policy]) -> list[list[Policy]]:
    """The policies parted into families, in the order of their first members; one that is no one's relative stands alone."""
    found: list[list[Policy]] = []
    for policy in policies:
        home = next((family for family in found if are_family([family[0], policy])), None)
        if home is None:
            found.append([policy])
        else:
            home.append(policy)
    return found


def replay_family(
    recording: Recording,
    policies: list[Policy],
    drafter: str | None = None,
    *,
    sequences: Tensor | None = None,
    cost: Cost | None = None,
) -> list[CycleLog]:
    """What :func:`sim.replay.replay` gives for each of the policies, from one draft per position.

    Parameters are those of ``replay``. Raises UserError unless the policies are a family (:func:`are_family`).
    """
    if not are_family(policies):
        raise UserError("these policies do not draft the same trees: replay them one by one")
    text = RecordedText(recording)
    if sequences is None:
        sequences = torch.arange(len(text.length))
    sequences = sequences[text.length[sequences] > 1]
    if not len(sequences):
        raise UserError("nothing to replay: the recording has no sequence of two tokens or more")
    texts = sequences.unique()
    room = text.length[texts] - 1  # cycles start before a text's last counted token
    start = torch.zeros_like(text.length)
    start[texts] = room.cumsum(0) - room
    sequence = texts.repeat_interleave(room)
    position = torch.arange(len(sequence)) - start[sequence]
    world = replayed_drafter(recording, drafter, text)
    limit = recording.manifest["context_limit"]
    work = []
    for here in torch.arange(len(sequence)).split(POSITIONS):
        cycle = text.cycle(sequence[here], position[here], torch.zeros_like(here), torch.arange(len(here)), limit, cost)
        work.append((copy.copy(world), cycle))
    outlooks = in_threads(lambda part: _outlook(policies, *part, text), work)
    ahead = _side_by_side(outlooks)
    return [_cycles(text, ahead, member, sequences, start, sequence, position) for member in range(len(policies))]


@torch.inference_mode()
def _outlook(policies: list[Policy], drafter: Drafter, cycle: Cycle, text: RecordedText) -> Outlook:
    first = policies[0]
    state = first.begin(cycle, first.init(len(cycle.sequence), cycle.sequence))
    drafted = draft(first, drafter, cycle, state)
    tree = drafted.tree
    kept = [policy.select(tree, cycle, state) & tree.exists for policy in policies]
    for chosen in kept:
        chosen[:, 0] = True
    anything = kept[0].clone()
    for chosen in kept[1:]:
        anything |= chosen
    packed = pack(tree, anything, f"policy '{first.name}'")
    walk = RecordedVerifier(text).accept(cycle, packed)
    node = packed.node.gather(1, walk.path.clamp(min=0))
    on_path = walk.path >= 0
    accepted = [(chosen.gather(1, node) & on_path).sum(1) for chosen in kept]  # closed sets: a prefix of the path
    return Outlook(
        torch.stack(accepted).to(torch.int16),
        torch.stack([chosen.sum(1) - 1 for chosen in kept]).to(torch.int16),
        drafted.widths,
        tree.size - 1,
        drafted.missing,
    )


def _side_by_side(outlooks: list[Outlook]) -> Outlook:
    levels = max(part.widths.shape[1] for part in outlooks)
    widths = [torch.nn.functional.pad(part.widths, (0, levels - part.widths.shape[1])) for part in outlooks]
    return Outlook(
        torch.cat([part.accepted for part in outlooks], dim=1),
        torch.cat([part.kept for part in outlooks], dim=1),
        torch.cat(widths),
        torch.cat([part.drafted for part in outlooks]),
        torch.cat([part.missing for part in outlooks]),
    )


def _cycles(
    text: RecordedText, ahead: Outlook, member: int, sequences: Tensor, start: Tensor, sequence: Tensor, position: Tensor
) -> CycleLog:
    """One member's cycles: from each text's first position on, jump behind what the cycle there emits."""
    accepted = ahead.accepted[member].to(torch.int64)
    at = text.offset[sequence] + position
    bonus = at + accepted + 1 < text.offset[sequence + 1]
    room = text.length[sequence] - 1 - position
    emitted = (accepted + bonus).minimum(room)
    goes_on = (emitted < room) & bonus
    drafts = ahead.widths.sum(1) > 0
    place, pending = start[sequences], torch.zeros_like(sequences)
    visited, catch_up = [], []
    while len(place):
        visited.append(place)
        catch_up.append(torch.where(drafts[place], pending, 0))
        pending = torch.where(drafts[place], 0, pending) + accepted[place] + 1
        on = goes_on[place]
        place, pending = (place + emitted[place])[on], pending[on]
    cycle = torch.cat(visited)
    order = torch.argsort(sequence[cycle], stable=True)
    cycle = cycle[order]
    widths = ahead.widths[cycle]
    too_deep = ~bonus & ~text.ended[sequence]
    return CycleLog(
        sequence=sequence[cycle],
        position=position[cycle],
        context_length=text.context_length[at[cycle]],
        kept=ahead.kept[member][cycle].to(torch.int64),
        accepted=accepted[cycle],
        emitted=emitted[cycle],
        widths=widths[:, : int((widths > 0).any(0).sum())],
        catch_up=torch.cat(catch_up)[order],
        drafted=ahead.drafted[cycle],
        missing=(ahead.missing + too_deep)[cycle],
    )
