"""What may fail while decoding, and its sentences: a draft that crashes, memory that runs out, a prompt that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from policies.children import Children, Only
from policies.contract import Cycle
from policies.drafting import Drafter, chain_found
from policies.errors import UserError
from policies.tree import DraftTree

Result = TypeVar("Result")


class DraftFailed(Exception):
    """The draft network crashed. The target has not been touched in this cycle."""


def drafting(call: Callable[[], Result]) -> Result:
    """What a draft network answers. Raises DraftFailed for its crashes; what a user can mend, and want of memory, pass."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DraftFailed(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}") from error


class GuardedDrafter:
    """A drafter whose crashes are told apart from everybody else's."""

    def __init__(self, drafter: Drafter):
        self.drafter, self.deepest = drafter, drafter.deepest

    def root(self, cycle: Cycle) -> Tensor:
        return drafting(lambda: self.drafter.root(cycle))

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        return drafting(lambda: self.drafter.expand(tree, nodes, branching))

    def chain_found(self) -> Iterator[Only] | None:
        """What a rule behind it has looked up; see `policies.lookup.drafter`."""
        return drafting(lambda: chain_found(self.drafter))


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU's allocator had no memory left."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    told = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in told for word in words)
    )


def no_memory_for(tokens: int) -> str:
    """The sentence for a single text of so many tokens that found no memory."""
    return (
        f"memory ran out with a single text of {tokens} tokens in flight: "
        "shorten the prompt, lower the token limit, or use a smaller dtype"
    )


@contextmanager
def naming_lack_of_memory(tokens: int) -> Iterator[None]:
    """Around the decoding of a single prompt of so many tokens: lack of memory becomes a UserError that names the cure."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UserError(no_memory_for(tokens)) from error


MODELS = "the context of the models"


def holder_of(limit: int, own: tuple[int, str]) -> str:
    """Whose size a limit of the context is, in words; ``own`` are a target's limit and its name (it may be a sliding window)."""
    return own[1] if limit == own[0] else MODELS


def check_prompt(name: str, tokens: int, limit: int, context_limit: int, holder: str = MODELS) -> None:
    """Raise a UserError unless a prompt of so many tokens can be decoded up to ``limit`` new ones.

    :param holder: what ``context_limit`` is the size of, in words.
    """
    if not tokens:
        raise UserError(f"{name} is empty: give at least one token")
    if limit < 1:
        raise UserError(f"the token limit must be 1 or more, not {limit}")
    if tokens >= context_limit:
        raise UserError(f"{name} has {tokens} tokens, but {holder} holds {context_limit}: shorten it")
