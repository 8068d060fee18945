"""A look at the numbers: does this model, with this cache and mask, give in a tree what it gives in plain text?

Class and configuration say much, not all: a family may keep a mask of its own, or count positions by cache slots. Three
drafted tokens behind a short text show it, in any architecture, at the cost of a few small forwards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from live.model import CachedModel
from policies.errors import UserError

_SHARE = 0.25
"""Of the difference that a wrong parent makes: rounding stays far below it in every dtype, a wrong mask does not."""


@torch.no_grad()
def check_trees(model: PreTrainedModel) -> None:
    """Run x and y behind a text and z behind x, as a tree and as plain texts.

    :raises UserError: when that fails, or when they differ by more than rounding can explain.
    """
    cure = "use a decoder such as Llama, Qwen3, Mistral, Gemma, GPT-NeoX or GPT-2"
    try:
        difference, scale = tree_error(model)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # whatever a family's own code may raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"{type(model).__name__} cannot run a tree with a cache, a mask and positions ({told}); {cure}") from error
    if difference > scale:
        raise UserError(
            f"{type(model).__name__} gives other numbers in a tree than in plain text (logits differ by {difference:.2g}), "
            f"so it does not follow an attention mask and positions; {cure}"
        )


def tree_error(model: PreTrainedModel) -> tuple[float, float]:
    """By how much logits in a tree differ from plain text, and how much rounding may explain."""
    cached = CachedModel(model, capacity=8)
    text, x, y, z = [1, 2, 3, 4], 5, 6, 7
    cached.prefill(_row(cached, text), logits="none")
    sees = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], dtype=torch.bool, device=cached.device)
    positions = _row(cached, [4, 4, 5])
    found = cached.forward_tree(_row(cached, [x, y, z]), None, positions, sees).logits[0].double()

    def plain(*tokens: int) -> Tensor:
        return model(input_ids=_row(cached, [*text, *tokens]), use_cache=False).logits[0, -1].to(cached.device).double()

    right = plain(x, z)
    wrong_parent = (plain(y, z) - right).abs().max()
    difference = torch.maximum((found[1] - plain(y)).abs().max(), (found[2] - right).abs().max())
    return float(difference), float(_SHARE * wrong_parent + 1e-3 * right.abs().max())


def _row(cached: CachedModel, tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device=cached.device)
