"""Blocks of work that shrink when memory runs out: half as much side by side, and on from where it failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from live.faults import out_of_memory
from policies.errors import UserError

Result = TypeVar("Result")


class Halving:
    """How many of something are worked on side by side.

    Recorded numbers depend on it in their last bits, so one lasts for one shard: a shard begins with the full size whatever
    happened in those before it, and is the same when it is recorded again.
    """

    def __init__(self, size: int, noun: str, cure: str, say: Callable[[str], Any] = lambda sentence: None):
        """:param noun: what is worked on, in the plural. :param cure: what helps when one alone is too much. :param say: told
        what was halved."""
        self.size, self.noun, self.cure, self.say = size, noun, cure, say

    def blocks(self, count: int, work: Callable[[int, int], Result], let_go: Callable[[], Any]) -> Iterator[Result]:
        """What ``work(start, stop)`` gives for consecutive blocks of ``count`` things.

        :param let_go: called when memory ran out, before the smaller block: drops what the failed one left behind.
        Raises UserError when memory runs out for a single thing.
        """
        start = 0
        while start < count:
            stop = min(start + self.size, count)
            try:
                result = work(start, stop)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if stop - start == 1:
                    raise too_much(self.noun, self.cure) from error
                self.size = (stop - start) // 2
                result = None  # the failed block lives as long as its error does: it is let go outside
            if result is None:
                free(let_go)
                self.say(f"memory ran out: going on with {self.size} {self.noun} at a time")
                continue
            yield result
            start = stop


def too_much(noun: str, cure: str) -> UserError:
    """What to tell when nothing is left to be halved."""
    return UserError(f"memory ran out with {noun} one at a time: {cure}")


def free(let_go: Callable[[], Any]) -> None:
    """Drop what a failed piece of work left behind, and give the GPU's memory back."""
    let_go()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
