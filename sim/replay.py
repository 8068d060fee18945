"""Replay: the decoding loop with a recorded drafter and verifier, all sequences in lockstep as one batch."""

from __future__ import annotations

if __name__ == "__main__":  # the command: it stands in sim.contest, and begins here so that --help need not load torch
    import runpy

    runpy.run_module("sim.contest", run_name="__main__")

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import zip_longest

import torch
from torch import Tensor

from policies.contract import Policy, State
from policies.cost import Cost
from policies.drafting import Drafter
from policies.errors import UserError
from policies.loop import Step, emitted, gather_rows, run_cycle
from policies.order import NONE
from sim.looked_up import replayed_drafter
from sim.parts import cut, in_threads
from sim.recorded import RecordedText, RecordedVerifier
from sim.streaming import blocks, let_go
from traces.recording import Recording


@dataclass(frozen=True)
class CycleLog:
    """One row per replayed cycle, in (sequence, cycle) order; int64 tensors [C] unless said otherwise.

    sequence        index of the sequence in the recording
    position        place of the root among the generated tokens
    context_length  tokens before the root
    kept            drafted nodes sent to verification (the root comes on top)
    accepted        kept nodes on the true path
    emitted         tokens that count: accepted + 1, less what lies behind the end of the text
    widths          int64 [C, L] frontier width of each draft forward, the root's first; 0 = none
    looked_up       levels that were answered without a draft forward
    catch_up        tokens that the draft has to catch up on before it can draft; 0 where it does not draft
    drafted         nodes in the draft tree, root not counted
    missing         expansions that the policy wanted and the recording does not hold
    kept_tokens     int64 [C, V] tokens of the kept nodes, root first, -1 padding (only when asked for)
    kept_parents    int64 [C, V] their parents' places in the list (only when asked for)
    path            int64 [C, A] places of the accepted nodes in the list (only when asked for)
    """

    sequence: Tensor
    position: Tensor
    context_length: Tensor
    kept: Tensor
    accepted: Tensor
    emitted: Tensor
    widths: Tensor
    looked_up: Tensor
    catch_up: Tensor
    drafted: Tensor
    missing: Tensor
    kept_tokens: Tensor | None = None
    kept_parents: Tensor | None = None
    path: Tensor | None = None

    @property
    def levels(self) -> Tensor:
        """Draft forwards of each cycle, the catch-up among them."""
        return (self.widths > 0).sum(1)

    @property
    def coverage(self) -> float:
        """Share of cycles that found every expansion they wanted in the recording."""
        return float((self.missing == 0).double().mean()) if len(self.missing) else 1.0

    @classmethod
    def joined(cls, logs: list[CycleLog]) -> CycleLog:
        """One log of different texts that were replayed apart."""
        if len(logs) == 1:
            return logs[0]
        names = [field.name for field in fields(cls) if getattr(logs[0], field.name) is not None]
        columns = {name: _stacked([getattr(log, name) for log in logs], name) for name in names}
        order = torch.argsort(columns["sequence"], stable=True)
        return cls(**{name: column[order] for name, column in columns.items()})


def replay(
    recording: Recording,
    policy: Policy,
    drafter: str | None = None,
    *,
    sequences: Tensor | None = None,
    cost: Cost | None = None,
    batch: int = 1,
    keep_trees: bool = False,
) -> CycleLog:
    """Run ``policy`` over the recorded sequences and log every cycle.

    :param drafter: name of a recorded drafter (by default the first), a training-free one, ``suffix(depth=8)``, or both.
    :param sequences: indices int64 of the sequences to replay; all by default. Order matters to policies that learn
        across requests.
    :param cost: what the policy may know about time.
    :param batch: requests that decode together as one group; group g holds the g-th ``batch`` of the sequences. What a
        policy learns across requests is learned from one group after the other if it is batch-wide, else one by one.
    :param keep_trees: log the kept nodes and accepted paths as well.
    """
    options = {"sequences": sequences, "cost": cost, "batch": batch, "keep_trees": keep_trees}
    return CycleLog.joined(list(replay_blocks(recording, policy, drafter, **options)))


def replay_blocks(
    recording: Recording,
    policy: Policy,
    drafter: str | None = None,
    *,
    sequences: Tensor | None = None,
    cost: Cost | None = None,
    batch: int = 1,
    keep_trees: bool = False,
) -> Iterator[CycleLog]:
    """:func:`replay` block by block, so that ``recording.memory`` bounds what is held of the recording (`sim.streaming`)."""
    policy.check_fitted()
    text = RecordedText(recording)
    sequences = replayable(text, sequences)
    group = torch.arange(len(sequences)) // batch
    world = replayed_drafter(recording, drafter, text)
    state: State | None = None

    def start() -> ReplayRun:
        return ReplayRun(recording, text, copy.copy(world), policy, cost)  # a drafter remembers the roots of its cycle

    def side_by_side(part: Tensor) -> _Log:
        log, run = _Log(keep_trees), start()
        with torch.inference_mode():
            run.start(sequences[part], group=group[part])
            log.follow(run)
        return log

    def in_request_order(places: Tensor) -> _Log:
        nonlocal state  # what one request (or one batch, for a policy that decides for batches) taught, the next one knows
        log, run = _Log(keep_trees), start()
        with torch.inference_mode():
            for together in sequences[places].split(batch if policy.batch_wide else 1):
                run.start(together, state=state)
                log.follow(run)
                state = run.state
        return log

    parted = blocks(recording, policy, sequences, batch, drafter)
    for block in parted:
        if policy.scope == "stream":
            log = in_request_order(block)
        else:
            parts = [block[part] for part in cut(policy, text.length[sequences[block]], batch)]
            log = _Log.joined(in_threads(side_by_side, parts))
        if len(parted) > 1:
            let_go(recording)
        yield log.table()


def replayable(text: RecordedText, sequences: Tensor | None) -> Tensor:
    """Of the given texts (indices int64; None: all) those with a cycle: the others are done with the first token, by prefill.

    :raises UserError: when there is none.
    """
    chosen = torch.arange(len(text.length)) if sequences is None else sequences
    chosen = chosen[text.length[chosen] > 1]
    if not len(chosen):
        raise UserError("nothing to replay: the recording has no sequence of two tokens or more")
    return chosen


class ReplayRun:
    """Recorded texts decoded side by side, cycle by cycle; the mirror image of ``live.decode.SpeculativeDecoder``."""

    def __init__(self, recording: Recording, text: RecordedText, drafter: Drafter, policy: Policy, cost: Cost | None = None):
        self.text, self.drafter, self.verifier = text, drafter, RecordedVerifier(text)
        self.policy, self.cost, self.context_limit = policy, cost, recording.manifest["context_limit"]

    def start(self, sequence: Tensor, group: Tensor | None = None, state: State | None = None) -> None:
        """Begin at the first tokens of the given sequences, int64 [B]; ``state`` goes on from earlier requests."""
        self.sequence, self.row = sequence, torch.arange(len(sequence))
        self.group = torch.zeros_like(sequence) if group is None else group
        self.position, self.number = torch.zeros_like(sequence), torch.zeros_like(sequence)
        self.pending = torch.zeros_like(sequence)  # committed tokens the draft has not seen; prefill showed it the root
        self.state = self.policy.init(len(sequence), sequence) if state is None else state

    def step(self) -> Step | None:
        """One cycle of every row that still decodes; None when none does. Rows leave when their text has ended."""
        if not len(self.sequence):
            return None
        text, sequence = self.text, self.sequence
        cycle = text.cycle(sequence, self.position, self.number, self.group, self.context_limit, self.cost)
        done = run_cycle(self.policy, self.drafter, self.verifier, cycle, self.state)
        left = text.length[sequence] - 1 - self.position  # where the text ends is not the policy's to know
        gained = emitted(done.walk, left)
        drafted = done.draft.widths.sum(1) > 0
        self.caught_up = torch.where(drafted, self.pending, 0)
        self.pending = torch.where(drafted, 0, self.pending) + done.walk.accepted + 1
        step = Step(cycle, done, gained, self.row)
        self.state = done.state
        self.position, self.number = self.position + gained, self.number + 1
        keep = ((gained < left) & (done.walk.bonus >= 0)).nonzero()[:, 0]
        if len(keep) < len(sequence):
            self.state = gather_rows(done.state, keep, len(sequence), self.policy.scope)
            for name in ("sequence", "row", "group", "position", "number", "pending"):
                setattr(self, name, getattr(self, name)[keep])
        return step


class _Log:
    """Collects the steps of a run into a :class:`CycleLog`."""

    def __init__(self, keep_trees: bool):
        self.keep_trees = keep_trees
        self.entries: list[dict[str, Tensor]] = []

    @classmethod
    def joined(cls, logs: list[_Log]) -> _Log:
        """One log of texts that were replayed in parts, step by step."""
        whole = cls(logs[0].keep_trees)
        whole.entries = [entry for step in zip_longest(*(log.entries for log in logs)) for entry in step if entry]
        return whole

    def follow(self, run: ReplayRun) -> None:
        while (step := run.step()) is not None:
            self.entries.append(self._entry(step, run.caught_up, run.text.ended))

    def _entry(self, step: Step, caught_up: Tensor, ended: Tensor) -> dict[str, Tensor]:
        cycle, done = step.cycle, step.done
        too_deep = (done.walk.bonus < 0) & ~ended[cycle.sequence]  # the walk went beyond the recorded truth
        entry = {
            "sequence": cycle.sequence,
            "position": cycle.position,
            "context_length": cycle.context_length,
            "kept": done.kept.count,
            "accepted": done.walk.accepted,
            "emitted": step.gained,
            "widths": done.draft.widths,
            "looked_up": done.draft.looked_up,
            "catch_up": caught_up,
            "drafted": done.draft.tree.size - 1,
            "missing": done.draft.missing + too_deep,
        }
        if self.keep_trees:
            entry |= {"kept_tokens": done.kept.token, "kept_parents": done.kept.parent, "path": done.walk.path}
        return entry

    def table(self) -> CycleLog:
        columns = {name: _stacked([entry[name] for entry in self.entries], name) for name in self.entries[0]}
        order = torch.argsort(columns["sequence"], stable=True)
        return CycleLog(**{name: column[order] for name, column in columns.items()})


def _stacked(parts: list[Tensor], name: str) -> Tensor:
    """Pieces of a log's column, one below the other; the narrower ones padded."""
    if parts[0].dim() == 2:
        width, fill = max(part.shape[1] for part in parts), 0 if name == "widths" else NONE
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
    return torch.cat(parts)
