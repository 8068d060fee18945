"""A recording larger than memory is replayed block by block: as many texts at a time as fit into what it may hold of the recording.

The recording's arrays are mapped from files. What a block has read is given back to the system before the next one begins, so that
the process holds one block of them, however many there are. Texts do not know of each other; a state that outlives its text
goes on from block to block in request order, and serving batches are never split: results are the same to the bit.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from policies.contract import Policy
from sim.looked_up import asked_of
from traces.recording import Recording

TEXT = ("token", "logprob", "entropy", "context_length", "top_tokens", "top_logprobs")
FOREST = ("root", "child_token", "child_logprob", "child_row", "entropy")


def blocks(recording: Recording, policy: Policy, sequences: Tensor, batch: int = 1, drafter: str | None = None) -> list[Tensor]:
    """Places int64 [n] in the list of ``sequences`` int64, block by block, in order; each at least one serving batch.

    A policy whose state is the whole batch's (scope "batch") sees all rows at once: one block.
    """
    places = torch.arange(len(sequences))
    if policy.scope == "batch":
        return [places]
    offset = torch.from_numpy(recording.offset.copy())
    size = (offset[1:] - offset[:-1])[sequences].double() * bytes_per_position(recording, drafter)
    groups = torch.zeros(-(-len(sequences) // batch), dtype=torch.float64).index_add_(0, places // batch, size)
    block, held, of_group = 0, 0.0, []
    for group in groups.tolist():
        if held and held + group > recording.memory:
            block, held = block + 1, 0.0
        held += group
        of_group.append(block)
    first = torch.tensor(of_group, dtype=torch.int64)[places // batch]
    return list(places.split(torch.bincount(first).tolist()))


def bytes_per_position(recording: Recording, drafter: str | None = None) -> float:
    """What a replay with one drafter (by default the first; none for a training-free one) reads per position."""
    columns = [getattr(recording, name) for name in TEXT]
    if (network := asked_of(recording, drafter).network) is not None:
        forest = recording.forest(network)
        columns += [getattr(forest, column) for column in FOREST]
    return sum(column.nbytes for column in columns) / max(len(recording.token), 1)


def let_go(recording: Recording) -> None:
    """Give back what was read of the recording's files; whoever reads on, reads them again."""
    for array in recording.arrays.values():
        if isinstance(array.base, mmap.mmap):
            array.base.madvise(mmap.MADV_DONTNEED)
