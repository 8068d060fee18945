"""One draft per position for a family of policies: those that only stop after fewer levels, or verify fewer nodes.

Drafts at a position depend on the committed prefix alone, so every tree that any cycle of any member can meet is a part of the
deepest member's at that position, drafted once. How many nodes each member would accept there follows from where the true path
stands in it (`sim.standing`), and a member's cycles are found by jumping from position to position.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from policies.contract import Cycle, Policy
from policies.cost import Cost
from policies.drafting import Drafter
from policies.errors import UserError
from sim.looked_up import replayed_drafter
from sim.parts import in_threads
from sim.recorded import RecordedText
from sim.replay import CycleLog, replayable
from sim.standing import standing
from sim.streaming import blocks, let_go
from traces.recording import Recording

POSITIONS = 1024
"""Trees drafted side by side by one thread."""


def are_family(policies: list[Policy]) -> bool:
    """Whether one draft serves them all: one stateless class, and only the ``levels`` and the ``budget`` that it names differ."""
    kind = type(policies[0])
    size = [vars(kind).get(name) for name in ("levels", "budget")]
    plain = kind.scope == "cycle" and not kind.batch_wide and kind.observe is Policy.observe and None not in size

    def others(policy: Policy) -> dict:
        return {name: value for name, value in dataclasses.asdict(policy).items() if name not in size}

    return plain and all(type(policy) is kind and others(policy) == others(policies[0]) for policy in policies)


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
    found = [outlook.logs() for outlook in outlooks(recording, policies, drafter, sequences=sequences, cost=cost)]
    return [CycleLog.joined(list(own)) for own in zip(*found, strict=True)]


def outlooks(
    recording: Recording,
    policies: list[Policy],
    drafter: str | None = None,
    *,
    sequences: Tensor | None = None,
    cost: Cost | None = None,
) -> Iterator[Outlook]:
    """The same block by block (`sim.streaming`), before any member's cycles are looked up."""
    if not are_family(policies):
        raise UserError("these policies do not draft the same trees: replay them one by one")
    text = RecordedText(recording)
    sequences = replayable(text, sequences)
    world = replayed_drafter(recording, drafter, text)
    limit = recording.manifest["context_limit"]
    parted = blocks(recording, policies[0], sequences, 1, drafter)
    for block in parted:
        texts = sequences[block].unique()
        room = text.length[texts] - 1  # cycles start before a text's last counted token
        sequence = texts.repeat_interleave(room)
        start = torch.zeros_like(text.length).index_copy(0, texts, room.cumsum(0) - room)
        position = torch.arange(len(sequence)) - start[sequence]
        work = []
        for here in torch.arange(len(sequence)).split(POSITIONS):
            alone = torch.arange(len(here))
            cycle = text.cycle(sequence[here], position[here], torch.zeros_like(here), alone, limit, cost)
            work.append((copy.copy(world), cycle))
        seen = _Seen.side_by_side(in_threads(lambda part: _look(policies, *part, text), work))
        if len(parted) > 1:
            let_go(recording)
        yield Outlook(policies, text, seen, sequences[block], sequence, position, start)


@dataclass(frozen=True)
class _Seen:
    """What a cycle at each of P positions would be, for F policies of D different depths.

    accepted int16 [F, P], kept int16 [F, P], widths int16 [P, L], looked_up int16 [P], drafted int32 [D, P], missing int32
    [D, P]: see CycleLog; widths and looked_up of the deepest. A row's levels are all looked up, or none is.
    """

    accepted: Tensor
    kept: Tensor
    widths: Tensor
    looked_up: Tensor
    drafted: Tensor
    missing: Tensor

    @classmethod
    def side_by_side(cls, parts: list[_Seen]) -> _Seen:
        levels = max(part.widths.shape[1] for part in parts)
        widths = [torch.nn.functional.pad(part.widths, (0, levels - part.widths.shape[1])) for part in parts]
        others = {
            name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("accepted", "kept", "drafted", "missing")
        }
        return cls(widths=torch.cat(widths), looked_up=torch.cat([part.looked_up for part in parts]), **others)


def _levels(policy: Policy) -> int:
    return getattr(policy, type(policy).levels)


def _depths(policies: list[Policy]) -> list[int]:
    return sorted({_levels(policy) for policy in policies})


@torch.inference_mode()
def _look(policies: list[Policy], drafter: Drafter, cycle: Cycle, text: RecordedText) -> _Seen:
    found = standing(max(policies, key=_levels), drafter, cycle, text)
    nothing = torch.zeros(len(cycle.sequence), dtype=torch.int32)
    accepted, kept = [], []
    for policy in policies:
        level = min(_levels(policy), found.levels)  # where all rows stopped before, nothing comes behind
        verified = getattr(policy, type(policy).budget) - 1
        accepted.append((found.rank[:, :level, level - 1] < verified).sum(1) if level else nothing)
        kept.append(found.ranked[:, level - 1].clamp(max=verified) if level else nothing)
    levels = [min(depth, found.levels) for depth in _depths(policies)]
    return _Seen(
        torch.stack(accepted).to(torch.int16),
        torch.stack(kept).to(torch.int16),
        found.widths.to(torch.int16),
        found.looked_up.to(torch.int16),
        torch.stack([found.drafted[:, level - 1] if level else nothing for level in levels]),
        torch.stack([found.missing[:, level - 1].int() if level else nothing for level in levels]),
    )


class _Acts(NamedTuple):
    """What one policy would do at each of P positions; columns as in :class:`_Seen`, each [P], widths [P, L]."""

    accepted: Tensor
    kept: Tensor
    widths: Tensor
    looked_up: Tensor
    drafted: Tensor
    missing: Tensor


@dataclass(frozen=True)
class Outlook:
    """A block of texts seen by all members of a family.

    sequences int64 [n] texts, in request order; sequence, position int64 [P]: where each looked at position is; start int64 [S]:
    place of each text's first one
    """

    policies: list[Policy]
    text: RecordedText
    seen: _Seen
    sequences: Tensor
    sequence: Tensor
    position: Tensor
    start: Tensor

    def logs(self) -> Iterator[CycleLog]:
        """Each member's cycles, in the order of the policies."""
        return (self.log(member) for member in range(len(self.policies)))

    def log(self, member: int) -> CycleLog:
        """One member's cycles."""
        seen, levels = self.seen, _levels(self.policies[member])
        depth = _depths(self.policies).index(levels)
        drafting = seen.widths[:, :levels], seen.looked_up.clamp(max=levels)
        return self._cycles(_Acts(seen.accepted[member], seen.kept[member], *drafting, seen.drafted[depth], seen.missing[depth]))

    def mixed(self, member: Tensor) -> CycleLog:
        """The cycles of a policy that does at each position what one member would do there; which one: int64 [P]."""
        levels = torch.tensor([_levels(policy) for policy in self.policies])[member]
        depth = torch.searchsorted(torch.tensor(_depths(self.policies)), levels)
        widths = self.seen.widths.masked_fill(torch.arange(self.seen.widths.shape[1]) >= levels[:, None], 0)

        def of(columns: Tensor, which: Tensor) -> Tensor:
            return columns.gather(0, which[None])[0]

        seen = self.seen
        drafting = widths, seen.looked_up.minimum(levels.to(seen.looked_up.dtype))
        return self._cycles(
            _Acts(of(seen.accepted, member), of(seen.kept, member), *drafting, of(seen.drafted, depth), of(seen.missing, depth))
        )

    def _cycles(self, acts: _Acts) -> CycleLog:
        """From each text's first position on, jump behind what the cycle there emits."""
        text, widths, accepted = self.text, acts.widths, acts.accepted
        at = text.offset[self.sequence] + self.position
        drafts = widths[:, 0] > 0 if widths.shape[1] else torch.zeros_like(at, dtype=torch.bool)
        behind = text.offset[self.sequence + 1] - 1 - at  # recorded tokens behind the root
        room = text.length[self.sequence] - 1 - self.position
        place, pending = self.start[self.sequences], torch.zeros_like(self.sequences)
        visited, emitted, catch_up = [], [], []
        while len(place):
            taken, drafting = accepted[place].to(torch.int64), drafts[place]
            bonus, left = taken < behind[place], room[place]
            gained = (taken + bonus).minimum(left)
            visited.append(place)
            emitted.append(gained)
            catch_up.append(torch.where(drafting, pending, 0))
            pending = torch.where(drafting, 0, pending) + taken + 1
            on = (gained < left) & bonus
            place, pending = (place + gained)[on], pending[on]
        cycle = torch.cat(visited)
        order = torch.argsort(self.sequence[cycle], stable=True)
        cycle = cycle[order]
        sequence, taken, widths = self.sequence[cycle], accepted[cycle].to(torch.int64), widths[cycle].to(torch.int64)
        too_deep = (taken >= behind[cycle]) & ~text.ended[sequence]
        return CycleLog(
            sequence=sequence,
            position=self.position[cycle],
            context_length=text.context_length[at[cycle]],
            kept=acts.kept[cycle].to(torch.int64),
            accepted=taken,
            emitted=torch.cat(emitted)[order],
            widths=widths[:, : int((widths > 0).any(0).sum())],
            looked_up=acts.looked_up[cycle].to(torch.int64),
            catch_up=torch.cat(catch_up)[order],
            drafted=acts.drafted[cycle].to(torch.int64),
            missing=acts.missing[cycle].to(torch.int64) + too_deep,
        )
