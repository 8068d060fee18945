"""The recorded drafter and verifier: a recording in place of the two networks."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from policies.contract import Cycle, Sampling
from policies.order import NONE
from policies.tree import Children, DraftTree
from policies.verification import Kept, Walk, walk
from traces.recording import Recording
from traces.schema import FINISHES


def tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array's own memory (recordings are memory-mapped and never written)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class RecordedText:
    """The true continuation of every recorded sequence, as flat tensors over all positions."""

    def __init__(self, recording: Recording):
        self.token = tensor(recording.token).to(torch.int64)
        self.logprob = tensor(recording.logprob)
        self.entropy = tensor(recording.entropy)
        self.context_length = tensor(recording.context_length).to(torch.int64)
        self.offset = tensor(recording.offset)
        self.length = tensor(recording.length)
        self.top_tokens = tensor(recording.top_tokens)
        self.top_logprobs = tensor(recording.top_logprobs)
        self.sampling = _sampling(recording)
        """Its fields are tensors [S]."""
        ends = torch.tensor(recording.manifest.get("end_tokens", []), dtype=torch.int64)
        last = self.token[self.offset[1:] - 1]
        self.ended = (tensor(recording.finish) == FINISHES.index("eos")) | torch.isin(last, ends)
        """bool [S]: nothing can follow the last recorded token; else the recorder just stopped there."""

    def at(self, cycle: Cycle) -> Tensor:
        """Flat position int64 [B] of each row's root."""
        return self.offset[cycle.sequence] + cycle.position


def _sampling(recording: Recording) -> Sampling:
    """How each sequence was sampled, as tensors [S]."""
    entries = [recording.sampling(sequence) for sequence in range(len(recording.length))]
    kinds = {name: torch.int64 if name in ("top_k", "seed") else torch.float64 for name in vars(Sampling())}
    return Sampling(**{name: torch.tensor([entry[name] for entry in entries], dtype=kind) for name, kind in kinds.items()})


class RecordedDrafter:
    """Answers from the draft forest. A child's handle is its place in the table of children: row * K + rank."""

    def __init__(self, recording: Recording, name: str | None, text: RecordedText):
        """:param name: of the recorded drafter; None is the recording's first. Raises UserError when there is none such."""
        forest = recording.forest(recording.drafters[0] if name is None else name)
        self.text = text
        self.root_row = tensor(forest.root)
        self.child_token = tensor(forest.child_token)
        self.child_logprob = tensor(forest.child_logprob)
        self.child_row = tensor(forest.child_row).reshape(-1)
        self.entropy = tensor(forest.entropy)

    def root(self, cycle: Cycle) -> Tensor:
        at = self.text.at(cycle)
        self._root = self.root_row[at]
        return self.text.token[at]

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        handle = tree.handle.gather(1, nodes.clamp(min=0))
        row = self.child_row[handle.clamp(min=0)].to(torch.int64)
        row = torch.where(nodes == 0, self._root[:, None], row)
        unknown = row < 0
        missing = (nodes >= 0) & unknown
        nothing = (nodes < 0) | unknown
        row = row.masked_fill(unknown, 0)
        fanout = self.child_token.shape[1]
        width = min(branching, fanout)
        token = self.child_token[row, :width].to(torch.int64)
        logprob = self.child_logprob[row, :width]
        entropy = self.entropy[row]
        if bool(nothing.any()):
            token = token.masked_fill(nothing[:, :, None], NONE)
            logprob = logprob.masked_fill(nothing[:, :, None], -torch.inf)
            entropy = entropy.masked_fill(nothing, -1.0)
        child = row[:, :, None] * fanout + torch.arange(width)
        return Children(token, logprob, entropy, child, missing)


class RecordedVerifier:
    """Chooses the recorded tokens. Off the true path its choice is never looked at."""

    def __init__(self, text: RecordedText):
        self.text = text

    def accept(self, cycle: Cycle, kept: Kept) -> Walk:
        behind = self.text.at(cycle)[:, None] + kept.depth.clamp(min=0) + 1
        end = self.text.offset[cycle.sequence + 1][:, None]
        choice = self.text.token[behind.clamp(max=self.text.token.shape[0] - 1)]
        return walk(kept, choice.masked_fill(behind >= end, NONE))

    def target_top(self, cycle: Cycle, kept: Kept, walk: Walk) -> tuple[Tensor, Tensor]:
        depth = torch.arange(walk.path.shape[1] + 1)
        end = self.text.offset[cycle.sequence + 1][:, None]
        behind = self.text.at(cycle)[:, None] + depth + 1
        known = (depth <= walk.accepted[:, None]) & (behind < end)
        row = behind.masked_fill(~known, 0)
        tokens = self.text.top_tokens[row].to(torch.int64).masked_fill(~known[:, :, None], NONE)
        return tokens, self.text.top_logprobs[row].masked_fill(~known[:, :, None], -torch.inf)
