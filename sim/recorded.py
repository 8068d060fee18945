"""The recorded drafter and verifier: a recording in place of the two networks."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from policies.children import Children, ChildTable, StoredChildren
from policies.contract import Cycle, Sampling
from policies.cost import Cost
from policies.order import NONE
from policies.tree import DraftTree
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
        self.token = tensor(recording.token)
        self.logprob = tensor(recording.logprob)
        self.entropy = tensor(recording.entropy)
        self.context_length = tensor(recording.context_length).to(torch.int64)
        self.offset = tensor(recording.offset)
        self.length = tensor(recording.length)
        self.top_tokens = tensor(recording.top_tokens)
        self.top_logprobs = tensor(recording.top_logprobs)
        self.limit = _limits(recording, self)
        """Token limit int64 [S] that decoding was told, the first token included: no text's own end can be read off it."""
        self.sampling = _sampling(recording)
        """Its fields are tensors [S]."""
        ends = torch.tensor(recording.manifest.get("end_tokens", []), dtype=torch.int64)
        last = self.token[self.offset[1:] - 1]
        self.ended = (tensor(recording.finish) == FINISHES.index("eos")) | torch.isin(last, ends)
        """bool [S]: nothing can follow the last recorded token; else the recorder just stopped there."""

    def at(self, cycle: Cycle) -> Tensor:
        """Flat position int64 [B] of each row's root."""
        return self.offset[cycle.sequence] + cycle.position

    def cycle(
        self, sequence: Tensor, position: Tensor, number: Tensor, group: Tensor, context_limit: int, cost: Cost | None = None
    ) -> Cycle:
        """What a policy may know of cycles that start at ``position`` int64 [B] of the texts ``sequence`` int64 [B].

        :param number: int64 [B] cycles before. :param group: int64 [B] who decodes together. :param cost: what time costs.
        """
        at = self.offset[sequence] + position
        return Cycle(
            active=torch.ones_like(sequence, dtype=torch.bool),
            sequence=sequence,
            number=number,
            position=position,
            context_length=self.context_length[at],
            room=self.limit[sequence] - 1 - position,
            reach=context_limit - 1 - self.context_length[at],
            root_told=lambda: (self.entropy[at], self.logprob[at]),
            group=group,
            sampling=self.sampling.by_row(sequence),
            cost=cost,
        )


def _limits(recording: Recording, text: RecordedText) -> Tensor:
    """The recorder's limit, or less where the context is full; texts of a recording that names none end at their own."""
    limit, context = recording.manifest.get("max_new_tokens"), recording.manifest["context_limit"]
    if limit is None:
        return text.length
    fits = context - text.context_length[text.offset[:-1]] + 1  # the last token need not be run
    return fits.clamp(max=limit).maximum(text.length)


def _sampling(recording: Recording) -> Sampling:
    """How each sequence was sampled, as tensors [S]."""
    kinds, place = np.unique(recording.temperature, return_inverse=True)
    first = [int(np.flatnonzero(place == kind)[0]) for kind in range(len(kinds))]
    entries = [recording.sampling(sequence) for sequence in first]
    dtypes = {name: torch.int64 if name in ("top_k", "seed") else torch.float64 for name in vars(Sampling())}
    columns = {name: torch.tensor([entry[name] for entry in entries], dtype=dtype) for name, dtype in dtypes.items()}
    return Sampling(**{name: column[torch.from_numpy(place)] for name, column in columns.items()})


class RecordedDrafter:
    """Answers from the draft forest."""

    def __init__(self, recording: Recording, name: str | None, text: RecordedText):
        """:param name: of the recorded drafter; None is the recording's first. Raises UserError when there is none such."""
        name = recording.drafters[0] if name is None else name
        forest = recording.forest(name)
        self.text = text
        self.root_row = tensor(forest.root)
        self.table = ChildTable(tensor(forest.child_token), tensor(forest.child_logprob), tensor(forest.entropy))
        self.child_row = tensor(forest.child_row).reshape(-1)
        self.deepest = recording.deepest(name)

    def root(self, cycle: Cycle) -> Tensor:
        at = self.text.at(cycle)
        self._root = self.root_row[at]
        return self.text.token[at].to(torch.int64)

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children | StoredChildren:
        row = self._row(tree, nodes)
        none = (nodes < 0) | (row < 0)
        gaps = bool(none.any())
        known = row.clamp(min=0) if gaps else row
        logprob = self.table.logprob.index_select(0, known.reshape(-1)).view(*row.shape, -1)[:, :, :branching]
        missing = None
        if gaps:
            row, missing = row.masked_fill(none, NONE), none & (nodes >= 0)
            logprob = logprob.masked_fill(none[:, :, None], -torch.inf)
        children = StoredChildren(self.table, row, logprob, missing)
        fewer = (logprob[:, :, -1] == -torch.inf) & ~none  # children come most probable first
        return children.read() if bool(fewer.any()) else children

    def _row(self, tree: DraftTree, nodes: Tensor) -> Tensor:
        """The recorded expansions int64 [B, W] of the nodes, -1 = not recorded."""
        if tree.levels == 0:
            return self._root[:, None].expand_as(nodes)
        handle = tree.at("handle", nodes).clamp(0, len(self.child_row) - 1)  # where there is no node, it means nothing
        row = self.child_row.index_select(0, handle.view(-1)).view(handle.shape).to(torch.int64)
        return torch.where(nodes == 0, self._root[:, None], row)


class ListeningDrafter:
    """A recorded drafter that remembers how unsure it was behind each node, whatever the policy asked to see."""

    def __init__(self, drafter: RecordedDrafter):
        self.drafter, self.deepest = drafter, drafter.deepest
        self.heard: list[tuple[Tensor, Tensor]] = []

    def root(self, cycle: Cycle) -> Tensor:
        self.heard = []
        return self.drafter.root(cycle)

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children | StoredChildren:
        children = self.drafter.expand(tree, nodes, branching)
        self.heard.append((nodes, children.entropy))
        return children

    def entropy(self, tree: DraftTree) -> Tensor:
        """Of the draft's distribution behind each node, float32 [B, N] nats; NaN where the recording was not asked or had none."""
        found = torch.full((tree.rows, tree.width + 1), torch.nan)
        for nodes, value in self.heard:
            found.scatter_(1, nodes.masked_fill((nodes < 0) | (value < 0), tree.width), value)
        return found[:, : tree.width]


class RecordedVerifier:
    """Chooses the recorded tokens. Off the true path its choice is never looked at."""

    def __init__(self, text: RecordedText):
        self.text = text

    def accept(self, cycle: Cycle, kept: Kept) -> Walk:
        behind = self.text.at(cycle)[:, None] + torch.arange(1, int(kept.depth.max()) + 2)
        end = self.text.offset[cycle.sequence + 1][:, None]
        text = self.text.token[behind.clamp(max=len(self.text.token) - 1)].to(torch.int64).masked_fill(behind >= end, NONE)
        return walk(kept, text.gather(1, kept.depth.clamp(min=0)))

    def target_top(self, cycle: Cycle, kept: Kept, walk: Walk) -> tuple[Tensor, Tensor]:
        depth = torch.arange(walk.path.shape[1] + 1)
        end = self.text.offset[cycle.sequence + 1][:, None]
        behind = self.text.at(cycle)[:, None] + depth + 1
        known = (depth <= walk.accepted[:, None]) & (behind < end)
        row = behind.masked_fill(~known, 0)
        tokens = self.text.top_tokens[row].to(torch.int64).masked_fill(~known[:, :, None], NONE)
        return tokens, self.text.top_logprobs[row].masked_fill(~known[:, :, None], -torch.inf)
