"""Train the EAGLE-3 head with training-time test: from the second step on it is fed its own outputs, as when drafting.

Cell i consumes (hidden, token t_{i+1}) at rotary position i and predicts t_{i+2}. In step 0 its hidden is the target's
fused feature f_i; in step s it is the step s-1 output of cell i-1. Step s of cell i attends to the step-0 keys of cells
up to i-s and, for j = 1..s, to the step-j key of cell i-s+j: exactly what a drafted node at depth s sees.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from live.eagle3 import Eagle3Config, Eagle3Head, captured_layers
from live.reference.checkpoint import load_state, mixed_precision, prepare_device, replace_folder, save_state
from live.reference.optim import Optimiser, schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM

    from live.reference.corpus import Documents


@dataclass(frozen=True)
class HeadRecipe:
    """The head's shape and training; a step sees about `batch_tokens` tokens of documents cut at `length`."""

    intermediate: int = 1024
    draft_vocab: int = 4096
    tokens: int = 2_000_000
    batch_tokens: int = 4096
    length: int = 256
    test_steps: int = 5
    step_decay: float = 0.8
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    decay: float = 0.9
    own_share: float = 0.75
    seed: int = 4

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch_tokens


class Batch(NamedTuple):
    """Documents side by side: tokens int64 [B, T], zero-padded; scored bool [B, T], the response tokens."""

    tokens: Tensor
    scored: Tensor


def batches(sources: list[tuple[float, dict[str, Documents]]], recipe: HeadRecipe, first: int) -> Iterator[Batch]:
    """Endless batches from (share, documents by domain) sources, every domain equally often, by seed and step."""
    step = first
    while True:
        rng = np.random.default_rng([recipe.seed, step])
        rows, size = [], 0
        while size < recipe.batch_tokens:
            share = np.array([share for share, _ in sources])
            documents = sources[rng.choice(len(sources), p=share / share.sum())][1]
            source = documents[list(documents)[rng.integers(len(documents))]]
            index = rng.integers(len(source))
            begin, answer = int(source.starts[index]), int(source.responses[index])
            end = min(int(source.starts[index + 1]), begin + recipe.length)
            if end - answer < 8:
                continue
            rows.append((source.tokens[begin:end], answer - begin))
            size += end - begin
        rows.sort(key=lambda row: len(row[0]))
        for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):  # two pieces of similar lengths: little padding
            tokens = np.zeros((len(part), max(len(t) for t, _ in part)), dtype=np.int64)
            scored = np.zeros(tokens.shape, dtype=bool)
            for at, (text, answer) in enumerate(part):
                tokens[at, : len(text)] = text
                scored[at, answer : len(text)] = True
            yield Batch(torch.from_numpy(tokens), torch.from_numpy(scored))
        step += 1


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
        query, key, value = head.project(hidden, after, positions)
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
        outputs.append(head.finish(hidden, attended.transpose(1, 2).flatten(2)))
    return outputs


class Score(NamedTuple):
    """Per test step: loss in nats; how often the best draft is the target's argmax; how often the ten best hold it."""

    loss: list[Tensor]
    top1: list[float]
    top10: list[float]


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
    folder, state_path = out / "eagle3", out / "eagle3.state.pt"
    target = target.to(device).eval().requires_grad_(False)
    if device.type == "cpu":
        target.set_attn_implementation("eager")  # faster than the fused kernel at these lengths
    ids = draft_ids([documents for _, documents in sources], recipe.draft_vocab, target.config.vocab_size)
    head = new_head(target, recipe, ids, next(batches(sources, recipe, 0)).tokens.to(device)).to(device)
    optimiser = Optimiser(head, recipe.muon_lr, recipe.adam_lr)
    step, spent, history = 0, 0.0, []
    state = load_state(state_path) if resume else None
    if state is not None:
        head.load_state_dict(state["head"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, history = state["step"], state["seconds"], state["history"]
    stream = batches(sources, recipe, step)
    weights = torch.tensor([recipe.step_decay**i for i in range(recipe.test_steps)])
    weights = (weights / weights.sum()).tolist()
    began, saved, window = time.monotonic() - spent, time.monotonic(), []

    def snapshot() -> None:
        seconds = time.monotonic() - began
        save_state(
            state_path,
            {
                "head": head.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "seconds": seconds,
                "history": history,
            },
        )
        new = folder.with_name("eagle3.partial")
        head.save_pretrained(new)
        record = {
            "recipe": asdict(recipe),
            "steps": step,
            "tokens": step * recipe.batch_tokens,
            "seconds": round(seconds),
            "parameters": sum(p.numel() for p in head.parameters()),
            "device": str(device),
            "torch": torch.__version__,
            "history": history,
        }
        (new / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        replace_folder(new, folder)

    with tqdm(total=recipe.steps, initial=step, desc="train eagle3", unit="step", smoothing=0.05) as bar:
        while step < recipe.steps:
            for _ in range(2):
                batch = Batch(*(part.to(device) for part in next(stream)))
                with mixed_precision(device):
                    found = score(head, target, batch, recipe.test_steps, count=step % 10 == 9)
                    loss = sum(w * part for w, part in zip(weights, found.loss, strict=True)) / 2
                loss.backward()
                window.append([float(part.detach()) for part in found.loss])
            optimiser.step(schedule(step, recipe.steps, warmup=15, decay=recipe.decay))
            step += 1
            bar.update()
            if step % 10 == 0 or step == recipe.steps:
                means = [round(sum(part) / len(window), 3) for part in zip(*window, strict=True)]
                window.clear()
                history.append([step, *means])
                bar.set_postfix(nats=f"{means[0]:.2f}..{means[-1]:.2f}", top1=" ".join(f"{100 * v:.0f}" for v in found.top1))
            if time.monotonic() - saved > snapshot_every or step == recipe.steps:
                snapshot()
                saved = time.monotonic()
    return folder
