"""Train the EAGLE-3 head with training-time test: from the second step on it is fed its own outputs, as when drafting.

Cell i consumes (hidden, token t_{i+1}) at rotary position i and predicts t_{i+2}. In step 0 its hidden is the target's
fused feature f_i; in step s it is the step s-1 output of cell i-1. Step s of cell i attends to the step-0 keys of cells
up to i-s and, for j = 1..s, to the step-j key of cell i-s+j: exactly what a drafted node at depth s sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from live.eagle3 import Eagle3Config, Eagle3Head, captured_layers
from live.reference.checkpoint import prepare_device
from live.reference.head_training import Batch, Recipe, Score, batches, train

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM

    from live.reference.corpus import Documents


@dataclass(frozen=True)
class HeadRecipe(Recipe):
    """The head's shape besides its training."""

    intermediate: int = 1024
    draft_vocab: int = 4096
    test_steps: int = 5


def draft_ids(documents: list[dict[str, Documents]], size: int, vocab: int) -> Tensor:
    """The `size` target ids most frequent in responses, ascending, int64 [size]."""
    counts = np.zeros(vocab)
    for source in documents:
        for domain in source.values():
            domain_counts = np.zeros(vocab)
            for row in range(len(domain)):
                part = domain.tokens[domain.responses[row] : domain.starts[row + 1]]
                domain_counts += np.bincount(part, minlength=vocab)
            counts += domain_counts / domain_counts.sum()
    order = np.argsort(-counts, kind="stable")[:size]
    return torch.from_numpy(np.sort(order))


@torch.no_grad()
def read_target(target: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Captured features [B, T, 3 Ht] and the final normed hidden [B, T, Ht]."""
    found = target.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    layers = captured_layers(target.config.num_hidden_layers)
    return torch.cat([found.hidden_states[layer] for layer in layers], dim=-1), found.last_hidden_state


def unroll(head: Eagle3Head, features: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
    """Outputs [B, n, H] of every test step, n = T - 1 cells; in step s only cells from s on mean anything.

    features [B, T, 3 Ht]; tokens int64 [B, T].
    """
    hidden, after = head.fuse(features[:, :-1]), tokens[:, 1:]
    rows, cells = after.shape
    places = torch.arange(cells, device=tokens.device)
    positions = places.expand(rows, cells)
    groups = head.num_heads // head.num_kv_heads
    outputs: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for step in range(steps):
        if step:
            hidden = F.pad(outputs[-1], (0, 0, 1, 0))[:, :-1]
        residual, query, key, value = head.project(hidden, after, positions)
        query = query.transpose(1, 2)  # [B, heads, n, d]
        keys.append(key.transpose(1, 2).repeat_interleave(groups, dim=1))
        values.append(value.transpose(1, 2).repeat_interleave(groups, dim=1))
        hide = places[None, :] > (places - step).clamp(min=0)[:, None]  # cells before `step` keep one key: no NaN
        scores = [(query @ keys[0].transpose(2, 3)).masked_fill(hide, -torch.inf)]
        near = [F.pad(values[j], (0, 0, step - j, 0))[:, :, :cells] for j in range(1, step + 1)]
        for j in range(1, step + 1):
            moved = F.pad(keys[j], (0, 0, step - j, 0))[:, :, :cells]
            scores.append((query * moved).sum(-1, keepdim=True))
        weight = (torch.cat(scores, dim=-1).float() * head.head_dim**-0.5).softmax(-1).to(query.dtype)
        attended = weight[..., :cells] @ values[0]
        for j, moved in enumerate(near):
            attended = attended + weight[..., cells + j, None] * moved
        outputs.append(head.finish(residual, attended.transpose(1, 2).flatten(2)))
    return outputs


def score(head: Eagle3Head, target: LlamaForCausalLM, batch: Batch, steps: int, count: bool = False) -> Score:
    """Soft-label cross-entropy of each test step against the target, renormalised on the draft vocabulary.

    Counted are cells that predict a response token and whose target argmax can be drafted (for the loss).
    """
    features, final = read_target(target, batch.tokens)
    outputs = unroll(head, features, batch.tokens, steps)
    ids = head.d2t + torch.arange(len(head.d2t), device=head.d2t.device)
    cells = batch.tokens.shape[1] - 2  # the last cell predicts what the window does not hold
    losses, top1, top10 = [], [], []
    aimed = batch.scored[:, 2:]
    with torch.no_grad():
        teacher = target.lm_head(final[:, 1:-1][aimed]).float()  # [M, V]
        best = teacher.argmax(-1)
        soft = teacher[:, ids].softmax(-1)
        weight = head.t2d[best].float()
    where = torch.arange(cells, device=aimed.device).expand_as(aimed)[aimed]
    for step, output in enumerate(outputs):
        logits = head.logits(output[:, :-1][aimed]).float()
        valid = weight * (where >= step)
        losses.append((F.cross_entropy(logits, soft, reduction="none") * valid).sum() / valid.sum().clamp(min=1))
        if count:
            seen = (where >= step).float()
            ranked = ids[logits.detach().topk(10, dim=-1).indices] == best[:, None]
            top1.append(float((ranked[:, 0] * seen).sum() / seen.sum()))
            top10.append(float((ranked.any(-1) * seen).sum() / seen.sum()))
    return Score(losses, top1, top10)


def new_head(target: LlamaForCausalLM, recipe: HeadRecipe, ids: Tensor, example: Tensor) -> Eagle3Head:
    """A head whose vocabulary projection and norm start as the target's, and whose fc evens out the features' sizes."""
    torch.manual_seed(recipe.seed)
    shape, embeddings = target.config, target.get_input_embeddings().weight
    head = Eagle3Head(
        Eagle3Config(
            hidden_size=shape.hidden_size,
            intermediate_size=recipe.intermediate,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            draft_vocab_size=len(ids),
            target_hidden_size=shape.hidden_size,
            rms_norm_eps=shape.rms_norm_eps,
        ),
        embeddings,
    )
    features, _ = read_target(target, example)
    with torch.no_grad():
        for weight in (p for p in head.parameters() if p.ndim == 2):
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        sizes = features.unflatten(-1, (3, -1)).square().mean((0, 1, 3)).sqrt()
        head.fc.weight.unflatten(1, (3, -1)).div_(sizes[None, :, None])
        head.midlayer.self_attn.o_proj.weight.zero_()
        head.midlayer.mlp.down_proj.weight.zero_()
        head.lm_head.weight.copy_(target.lm_head.weight[ids])
        head.norm.weight.copy_(target.model.norm.weight)
        head.d2t.copy_(ids - torch.arange(len(ids)))
        head.t2d[ids] = True
    return head


def train_head(
    target: LlamaForCausalLM,
    recipe: HeadRecipe,
    sources: list[tuple[float, dict[str, Documents]]],
    out: Path,
    resume: bool,
    snapshot_every: float = 240.0,
) -> Path:
    """Train to the end of the recipe; snapshots land in `out`/eagle3, the state to resume from beside it."""
    device = prepare_device()
    target = target.to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        target.set_attn_implementation("eager")  # faster than the fused kernel at these lengths
    ids = draft_ids([documents for _, documents in sources], recipe.draft_vocab, target.config.vocab_size)
    head = new_head(target, recipe, ids, next(batches(sources, recipe, 0)).tokens.to(device)).to(device)

    def scored(batch: Batch, count: bool) -> Score:
        return score(head, target, batch, recipe.test_steps, count)

    return train("eagle3", head, recipe, sources, out, resume, scored, recipe.test_steps, snapshot_every)
