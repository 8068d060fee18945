"""Training of draft heads: batches of documents, the loop, snapshots to resume from. What a head learns, its own file says."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from live.reference.checkpoint import load_state, mixed_precision, replace_folder, save_state
from live.reference.optim import Optimiser, schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from live.reference.corpus import Documents


@dataclass(frozen=True)
class Recipe:
    """How a head is trained; a step sees about `batch_tokens` tokens of documents cut at `length`.

    step_decay   weight of each further loss over the one before
    own_share    share of the tokens that the target wrote itself
    """

    tokens: int = 2_000_000
    batch_tokens: int = 4096
    length: int = 256
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


def batches(sources: list[tuple[float, dict[str, Documents]]], recipe: Recipe, first: int) -> Iterator[Batch]:
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


class Score(NamedTuple):
    """Per test step or head: loss in nats; how often the best draft is the target's argmax; how often the ten best hold it."""

    loss: list[Tensor]
    top1: list[float]
    top10: list[float]


def agreement(logits: Tensor, best: Tensor) -> tuple[float, float]:
    """How often the best draft, and one of the ten best, is the target's: from logits [M, V] and its tokens int64 [M]."""
    hit = logits.detach().topk(10, dim=-1).indices == best[:, None]
    return float(hit[:, 0].float().mean()), float(hit.any(-1).float().mean())


def train(
    name: str,
    head: torch.nn.Module,
    recipe: Recipe,
    sources: list[tuple[float, dict[str, Documents]]],
    out: Path,
    resume: bool,
    score: Callable[[Batch, bool], Score],
    parts: int,
    snapshot_every: float = 240.0,
) -> Path:
    """Train to the end of the recipe; snapshots land in `out`/`name`, the state to resume from beside it.

    :param head: writes itself as a checkpoint by ``save_pretrained(folder)``.
    :param score: of a batch: ``parts`` losses, and, where it is asked to count, how often drafts are right.
    """
    device = next(head.parameters()).device
    folder, state_path = out / name, out / f"{name}.state.pt"
    optimiser = Optimiser(head, recipe.muon_lr, recipe.adam_lr)
    step, spent, history = 0, 0.0, []
    state = load_state(state_path) if resume else None
    if state is not None:
        head.load_state_dict(state["head"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, history = state["step"], state["seconds"], state["history"]
    stream = batches(sources, recipe, step)
    weights = torch.tensor([recipe.step_decay**i for i in range(parts)])
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
        new = folder.with_name(f"{name}.partial")
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

    with tqdm(total=recipe.steps, initial=step, desc=f"train {name}", unit="step", smoothing=0.05) as bar:
        while step < recipe.steps:
            for _ in range(2):
                batch = Batch(*(part.to(device) for part in next(stream)))
                with mixed_precision(device):
                    found = score(batch, step % 10 == 9)
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
