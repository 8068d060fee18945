"""Train a DFlash drafter for a target that stays as it is (Chen et al. 2026, https://arxiv.org/abs/2602.06036, section 4).

Blocks begin at places of a text and learn what the target says behind each of the places that follow, those nearest the most; all
blocks of a text share the keys and values of its features, each up to its own beginning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from live.dflash import DFlashHead
from live.dflash_config import DFlashConfig
from live.eagle3_config import captured_layers
from live.reference.checkpoint import prepare_device
from live.reference.eagle3_training import read_target
from live.reference.head_training import Batch, Recipe, Score, agreement, batches, train
from live.reference.tokenizer import SPECIAL_TOKENS, SYSTEM

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM

    from live.reference.corpus import Documents


@dataclass(frozen=True)
class DFlashRecipe(Recipe):
    """Layers, places of a block with the root's, and blocks of a batch, evenly spread over its texts."""

    tokens: int = 1_500_000
    batch_tokens: int = 2560
    muon_lr: float = 0.02
    layers: int = 2
    block: int = 8
    blocks: int = 400
    step_decay: float = math.exp(-1 / 4)  # the paper's decay for blocks of eight


def new_head(target: LlamaForCausalLM, recipe: DFlashRecipe, example: Tensor) -> DFlashHead:
    """A drafter that reads the layers that the EAGLE-3 head reads; its own add nothing yet, its norm is the target's, and its fc
    evens out the features' sizes."""
    torch.manual_seed(recipe.seed)
    shape, layers = target.config, captured_layers(target.config.num_hidden_layers)
    head = DFlashHead(
        DFlashConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            draft_vocab_size=shape.vocab_size,
            target_hidden_size=shape.hidden_size,
            num_hidden_layers=recipe.layers,
            block_size=recipe.block,
            mask_token_id=SPECIAL_TOKENS.index(SYSTEM),  # no training text holds it
            layer_ids=tuple(i - 1 for i in layers),
            ids_name_outputs=True,
            windows=(None,) * recipe.layers,
            causal=(False,) * recipe.layers,
            rms_norm_eps=shape.rms_norm_eps,
        ),
        target.get_input_embeddings().weight,
        target.lm_head,
    )
    features, _ = read_target(target, example)
    with torch.no_grad():
        for weight in (p for p in head.parameters() if p.ndim == 2):
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        sizes = features.unflatten(-1, (len(layers), -1)).square().mean((0, 1, 3)).sqrt()
        head.fc.weight.unflatten(1, (len(layers), -1)).div_(sizes[None, :, None])
        for layer in head.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head.norm.weight.copy_(target.model.norm.weight)
    return head.to(target.device)


def fill(head: DFlashHead, features: Tensor, tokens: Tensor, begin: Tensor) -> Tensor:
    """Logits [B, n, D, V] of blocks that begin at places ``begin`` int64 [B, n] of texts int64 [B, T] with features [B, T, F].

    For drafters without windows, whose layers are not causal.
    """
    size = head.config.block_size
    rows, count = begin.shape
    places = torch.arange(tokens.shape[1], device=tokens.device)
    fused, hidden = head.fuse(features), head.block(tokens.gather(1, begin).flatten())
    positions = begin.flatten()[:, None] + torch.arange(size, device=tokens.device)
    shared = head.config.num_attention_heads // head.num_kv_heads
    behind = (places >= begin[:, :, None]).repeat_interleave(size, 1)[:, None]  # a block sees the text before its root
    for layer in range(head.config.num_hidden_layers):
        far_key, far_value = _heads_first(head.remembered(layer, fused, places.expand_as(tokens)), shared)  # [B, heads, T, d]
        query, *near = head.project(layer, hidden, positions)  # [B n, S, heads, d]
        near_key, near_value = _heads_first(near, shared)
        query = query.transpose(1, 2) * head.head_dim**-0.5  # [B n, heads, S, d]
        over_text = query.unflatten(0, (rows, count)).transpose(1, 2).flatten(2, 3)  # [B, heads, n S, d]
        far = (over_text @ far_key.mT).masked_fill(behind, -torch.inf)
        far = far.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)  # [B n, heads, S, T]
        weight = torch.cat([far, query @ near_key.mT], -1).float().softmax(-1).to(query.dtype)
        seen = weight[..., : len(places)].unflatten(0, (rows, count)).transpose(1, 2).flatten(2, 3) @ far_value
        seen = seen.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
        attended = seen + weight[..., len(places) :] @ near_value
        hidden = head.finish(layer, hidden, attended.transpose(1, 2).flatten(2))
    return head.logits(hidden).unflatten(0, (rows, count))


def _heads_first(parts: tuple[Tensor, ...] | list[Tensor], shared: int) -> tuple[Tensor, ...]:
    """Keys and values [B, T, kv heads, d] as [B, heads, T, d]."""
    return tuple(part.transpose(1, 2).repeat_interleave(shared, dim=1) for part in parts)


def score(head: DFlashHead, target: LlamaForCausalLM, batch: Batch, blocks: int, count: bool = False) -> Score:
    """Soft-label cross-entropy of each place of a block against the target, over blocks of which every place drafts a response's
    token."""
    drafted = head.config.deepest
    features, final = read_target(target, batch.tokens)
    whole = batch.scored.unfold(1, drafted, 1)[:, 1:].all(-1)  # [B, T - D], by the block's beginning
    each = max(1, min(blocks // len(whole), int(whole.sum(1).max())))
    order = torch.where(whole, whole.cumsum(1), whole.shape[1] + 1).sort(dim=1)  # those that may begin a block, in order
    found = whole.sum(1, keepdim=True)
    chosen = (torch.arange(each, device=whole.device) * (found - 1).clamp(min=0) // max(each - 1, 1)).clamp(min=0)
    begin, real = order.indices.gather(1, chosen), (found > 0).expand(-1, each)
    logits = fill(head, features, batch.tokens, begin)[real].float()  # [M, D, V]
    row = torch.arange(len(begin), device=begin.device)[:, None].expand_as(begin)[real]
    behind = begin[real][:, None] + torch.arange(drafted, device=begin.device)
    with torch.no_grad():
        teacher = target.lm_head(final[row[:, None], behind]).float()
    losses, right = [], []
    for place in range(drafted):
        losses.append(F.cross_entropy(logits[:, place], teacher[:, place].softmax(-1)))
        if count:
            right.append(agreement(logits[:, place], teacher[:, place].argmax(-1)))
    return Score(losses, [top1 for top1, _ in right], [top10 for _, top10 in right])


def train_dflash(
    target: LlamaForCausalLM,
    recipe: DFlashRecipe,
    sources: list[tuple[float, dict[str, Documents]]],
    out: Path,
    resume: bool,
    snapshot_every: float = 240.0,
) -> Path:
    """Train to the end of the recipe; snapshots land in `out`/dflash, the state to resume from beside it."""
    device = prepare_device()
    target = target.to(device).eval().requires_grad_(False)
    head = new_head(target, recipe, next(batches(sources, recipe, 0)).tokens.to(device))

    def scored(batch: Batch, count: bool) -> Score:
        return score(head, target, batch, recipe.blocks, count)

    return train("dflash", head, recipe, sources, out, resume, scored, head.config.deepest, snapshot_every)
