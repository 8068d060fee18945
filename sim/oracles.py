"""Clairvoyant bounds: what no policy can beat inside a recording. Oracles know the truth, so they are no policies.

An oracle plans each text with its whole truth before it, by a dynamic programme over the positions (as Caffeine's simulator
sets Bélády's clairvoyant cache beside its policies). In a cycle it drafts exactly the tokens that will be accepted. What
:class:`LeastTime` still pays, for a cycle that accepts a tokens:

- a > 0: the draft's catch-up on the tokens committed since it last ran, which proposes the first token; a - 1 draft forwards
  one node wide; verification of a + 1 tokens; the commit of a + 1 tokens; the overhead of a levels;
- a = 0: plain decoding: verification and commit of the root, the overhead of no level. The draft's catch-up is put off.

Any policy that accepts a tokens drafts as many levels, at least as wide, and verifies at least as much; costs never fall when
more is asked for (`traces.grid`). So both are bounds for every policy whose accepted tokens the recording holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies.cost import Cost
from policies.order import NONE
from sim.recorded import RecordedDrafter, RecordedText
from sim.tally import Tally
from traces.recording import Recording


@dataclass(frozen=True)
class TruePath:
    """What an oracle knows of S texts.

    depth    int64 [S, T]  how many tokens behind each root the draft would propose one after the other, as far as recorded
             and as they count: never the last one, which a cycle emits as its bonus anyway. 0 where no cycle starts.
    context  int64 [S, T]  tokens before the root
    steps    int64 [S]     tokens that cycles emit: all that count but the first
    """

    depth: Tensor
    context: Tensor
    steps: Tensor


def true_path(recording: Recording, drafter: str | None = None, sequences: Tensor | None = None) -> TruePath:
    """The true path through the draft forest of one drafter (the first by default), for the given sequences (all)."""
    text = RecordedText(recording)
    forest = RecordedDrafter(recording, drafter, text)
    if sequences is None:
        sequences = torch.arange(len(text.length))
    steps = (text.length[sequences] - 1).clamp(min=0)
    place = torch.arange(int(steps.max()) if len(steps) else 0)
    inside = place < steps[:, None]
    at = (text.offset[sequences, None] + place).masked_fill(~inside, 0)
    context = text.context_length[at].masked_fill(~inside, 0)
    most = torch.minimum(steps[:, None] - place - 1, recording.manifest["context_limit"] - 1 - context)
    depth, row = torch.zeros_like(at), forest.root_row[at].to(torch.int64).masked_fill(~inside, NONE)
    while bool((row >= 0).any()):
        wanted = text.token[(at + depth + 1).clamp(max=len(text.token) - 1)]
        child = forest.table.token[row.clamp(min=0)] == wanted[..., None]
        found = child.any(-1) & (row >= 0) & (depth < most)
        below = row.clamp(min=0) * child.shape[-1] + child.to(torch.int8).argmax(-1)
        depth = depth + found
        row = forest.child_row[below].to(torch.int64).masked_fill(~found, NONE)
    return TruePath(depth, context, steps)


class Oracle:
    """A clairvoyant: :meth:`plan` says how little each text can take."""

    name = "oracle"
    unit = ""
    """What it spends least of: "cycles" or "ms", as :class:`sim.tally.Tally` calls it."""

    def plan(self, path: TruePath) -> Tensor:
        """The bound float64 [S], in ``unit``, over all cycles of each text."""
        raise NotImplementedError


def bound(recording: Recording, oracle: Oracle, drafter: str | None = None, sequences: Tensor | None = None) -> Tally:
    """What an oracle spends on the given texts (all by default), beside the tallies of policies that decoded them."""
    length = RecordedText(recording).length
    chosen = torch.arange(len(length)) if sequences is None else sequences.sort().values
    chosen = chosen[length[chosen] > 1]  # no cycle decodes the others
    path = true_path(recording, drafter, chosen)
    sums = {"emitted": path.steps.double().numpy(), oracle.unit: oracle.plan(path).numpy()}
    domain = np.asarray(recording.domain_index)[chosen.numpy()]
    return Tally(chosen.numpy(), domain, sums, np.zeros((len(chosen), 0)), list(recording.domains))


@dataclass(frozen=True)
class FewestCycles(Oracle):
    """The fewest cycles in which a text can be decoded: emitted tokens over them bound tau from above."""

    name = "fewest cycles"
    unit = "cycles"

    def plan(self, path: TruePath) -> Tensor:
        sequences, positions = path.depth.shape
        deepest = int(path.depth.max()) if path.depth.numel() else 0
        ahead = torch.zeros((sequences, positions + deepest + 1), dtype=torch.float64)  # cycles from each place to the end
        accepted = torch.arange(deepest + 1)
        for place in range(positions - 1, -1, -1):
            reached = ahead[:, place + 1 : place + deepest + 2]
            possible = accepted <= path.depth[:, place, None]
            best = reached.masked_fill(~possible, torch.inf).amin(1) + 1
            ahead[:, place] = best.masked_fill(place >= path.steps, 0.0)
        return ahead[:, 0]


@dataclass(frozen=True)
class LeastTime(Oracle):
    """The least milliseconds in which a text can be decoded under a cost model, one request at a time."""

    cost: Cost

    name = "least time"
    unit = "ms"

    def plan(self, path: TruePath) -> Tensor:
        sequences, positions = path.depth.shape
        deepest = int(path.depth.max()) if path.depth.numel() else 0
        waiting = torch.arange(positions + 1)  # tokens that the draft has to catch up on, one column each
        accepted = torch.arange(1, deepest + 1)
        # least ms from a place to the end: with any number waiting, at the next place; with a + 1 waiting, at all places
        following = torch.zeros((sequences, positions + 2), dtype=torch.float64)
        behind = torch.zeros((sequences, positions + deepest + 2, deepest + 2), dtype=torch.float64)
        for place in range(positions - 1, -1, -1):
            context = path.context[:, place, None]
            plain = self._cycle(torch.zeros_like(context), context)
            ahead = plain + following[:, 1:]
            if deepest:
                reached = behind[:, place + 1 + accepted, accepted + 1]
                drafted = self._cycle(accepted.expand(sequences, -1), context) + reached
                possible = accepted <= path.depth[:, place, None]
                best = drafted.masked_fill(~possible, torch.inf).amin(1, keepdim=True)
                ahead = torch.minimum(ahead, self.cost.catch_up_ms(waiting, context, self._one) + best)
            ahead = ahead.masked_fill((place >= path.steps)[:, None], 0.0)
            following = torch.nn.functional.pad(ahead, (0, 1))
            columns = min(deepest + 2, positions + 1)
            behind[:, place, :columns] = ahead[:, :columns]
        return following[:, 0]

    _one = torch.ones((), dtype=torch.int64)

    def _cycle(self, accepted: Tensor, context: Tensor) -> Tensor:
        """ms of a cycle that drafts and accepts ``accepted`` tokens, less the catch-up."""
        forwards = (accepted - 1).clamp(min=0)
        draft = self.cost.draft_ms(torch.ones_like(accepted), context, self._one) * forwards
        verify = self.cost.verify_ms(accepted + 1, context, self._one)
        commit = self.cost.commit_ms(accepted + 1, self._one)
        return draft + verify + commit + self.cost.overhead_ms(accepted, self._one)
