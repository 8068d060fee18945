"""Train Medusa heads for a target that stays as it is (Cai et al. 2024, section 3.1: "Medusa-1").

Head k of place i learns what the target says two places and k behind it. The heads share the target's output layer, so only their
residual blocks are trained and shipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from live.medusa import MedusaHeads, MedusaShape
from live.reference.checkpoint import prepare_device
from live.reference.head_training import Batch, Recipe, Score, agreement, train

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM

    from live.reference.corpus import Documents


@dataclass(frozen=True)
class MedusaRecipe(Recipe):
    """How many heads of how many blocks, and places of a batch that each learns from."""

    tokens: int = 1_500_000
    muon_lr: float = 0.04
    heads: int = 4
    blocks: int = 2
    places: int = 1024


def new_heads(target: LlamaForCausalLM, recipe: MedusaRecipe) -> MedusaHeads:
    """Heads that begin as the target's output layer itself: blocks that add nothing."""
    torch.manual_seed(recipe.seed)
    size, vocabulary = target.config.hidden_size, target.config.vocab_size
    heads = MedusaHeads(MedusaShape(recipe.heads, recipe.blocks, size, True, vocabulary, 0, False), target.lm_head)
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    return heads.to(target.device)


def score(heads: MedusaHeads, target: LlamaForCausalLM, batch: Batch, places: int, count: bool = False) -> Score:
    """Soft-label cross-entropy of each head against the target, at ``places`` of the batch's places, evenly spread, that draft a
    response's token."""
    with torch.no_grad():
        hidden = target.model(input_ids=batch.tokens, use_cache=False).last_hidden_state  # [B, T, H]
    losses, right = [], []
    for head in range(heads.shape.heads):
        behind = 1 + head  # the hidden state there gives the token that the head drafts
        where = batch.scored[:, behind + 1 :].nonzero()
        where = where[torch.linspace(0, len(where) - 1, min(places, len(where)), device=where.device).long()]
        row, place = where.unbind(1)
        with torch.no_grad():
            teacher = target.lm_head(hidden[row, place + behind]).float()
        logits = heads.logits(head, hidden[row, place]).float()
        losses.append(F.cross_entropy(logits, teacher.softmax(-1)))
        if count:
            right.append(agreement(logits, teacher.argmax(-1)))
    return Score(losses, [top1 for top1, _ in right], [top10 for _, top10 in right])


def train_medusa(
    target: LlamaForCausalLM,
    recipe: MedusaRecipe,
    sources: list[tuple[float, dict[str, Documents]]],
    out: Path,
    resume: bool,
    snapshot_every: float = 240.0,
) -> Path:
    """Train to the end of the recipe; snapshots land in `out`/medusa, the state to resume from beside it."""
    device = prepare_device()
    target = target.to(device).eval().requires_grad_(False)
    heads = new_heads(target, recipe)

    def scored(batch: Batch, count: bool) -> Score:
        return score(heads, target, batch, recipe.places, count)

    return train("medusa", heads, recipe, sources, out, resume, scored, recipe.heads, snapshot_every)
