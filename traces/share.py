"""Several recorders of one recording: which of them this one is, and which shards are its own.

Shards are dealt out in turn, so that no two recorders ever write the same file. Each keeps a manifest of its own beside the
others'; whoever finds, at its end, that together they hold every planned shard writes the whole one in their place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from policies.errors import UserError


@dataclass(frozen=True)
class Share:
    """One of ``count`` recorders, ``rank`` counted from 0; ``local_rank`` is its number on its own machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def alone(self) -> bool:
        """Whether one recorder does everything."""
        return self.count == 1

    def holds(self, index: int) -> bool:
        """Whether the shard with this index is this recorder's."""
        return index % self.count == self.rank

    def device(self, asked: str) -> str:
        """The device to use where "cuda" was asked for: each recorder of a machine takes a GPU of its own."""
        return f"cuda:{self.local_rank}" if asked == "cuda" and not self.alone else asked

    def __str__(self) -> str:
        return f"{self.rank + 1}/{self.count}"


ALONE = Share()


def share_of(asked: str | None, environment: Mapping[str, str] = os.environ) -> Share:
    """The share that ``--shard I/N`` names (I counts from 1), else the one that torchrun put into the environment.

    Raises UserError when it names none.
    """
    if asked is None:
        rank, count = environment.get("RANK"), environment.get("WORLD_SIZE")
        if rank is None or count is None:
            return ALONE
        local = environment.get("LOCAL_RANK", "0")
        if not (rank.isdecimal() and count.isdecimal() and local.isdecimal() and int(rank) < int(count)):
            told = f"RANK={rank}, WORLD_SIZE={count} and LOCAL_RANK={local} in the environment"
            raise UserError(f"{told} name no share: unset them, or write --shard I/N")
        return Share(int(rank), int(count), int(local))
    told = re.fullmatch(r"(\d+)/(\d+)", asked)
    if not told or not 1 <= int(told[1]) <= int(told[2]):
        raise UserError(f"--shard {asked} names no share: write I/N, for example 1/2 and 2/2 for two recorders")
    return Share(int(told[1]) - 1, int(told[2]))
