"""What may fail while decoding, and what then goes on: a draft that crashes, logits that are not numbers, memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from policies.contract import Cycle
from policies.drafting import Drafter
from policies.errors import UserError
from policies.tree import Children, DraftTree

if TYPE_CHECKING:
    from live.decode import Decoded, SpeculativeDecoder

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
        self.drafter = drafter

    def root(self, cycle: Cycle) -> Tensor:
        return drafting(lambda: self.drafter.root(cycle))

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        return drafting(lambda: self.drafter.expand(tree, nodes, branching))


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU's allocator had no memory left."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    told = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in told for word in words)
    )


def decode_within_memory(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    batch: int,
    say: Callable[[str], None],
) -> list[Decoded]:
    """Decode prompts ``batch`` at a time; where memory runs out the batch is halved and its prompts begin anew.

    :param max_new_tokens: limit of each prompt.   :param say: told what was halved.
    :raises UserError: when memory runs out for a single prompt.
    """
    done: list[Decoded] = []
    start = 0
    while start < len(prompts):
        part = slice(start, start + batch)
        numbers = torch.arange(len(prompts), device=decoder.target.device)[part]  # a text's numbers do not depend on its batch
        try:
            done.append(decoder.generate(prompts[part], max_new_tokens[part], text=numbers))
        except Exception as error:
            if not out_of_memory(error):
                raise
            if batch == 1:
                raise UserError(
                    f"memory ran out with a single prompt of {len(prompts[start])} tokens: "
                    "shorten it, lower the token limit, or use a smaller dtype"
                ) from error
            batch = min(batch, len(prompts) - start) // 2 or 1
            decoder.target.reset(0)  # lets the large cache go
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            say(f"memory ran out: going on with a batch of {batch}")
            continue
        start += batch
    return done
