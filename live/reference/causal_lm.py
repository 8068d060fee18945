"""Train a small Llama on the packed streams: the target, and (smaller) the draft LM."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from live.reference.checkpoint import load_state, mixed_precision, prepare_device, replace_folder, save_state
from live.reference.corpus import SECOND_MIXTURE, Documents, Stretch, packed_streams
from live.reference.optim import Optimiser, schedule

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Second:
    """A second stretch of training, after the learning rate of the first has fallen to zero.

    It warms up to `rate` times the recipe's rates and decays to zero again (Gupta et al. 2023, arXiv 2308.04014), on
    documents that the first left over, in the proportions `shares`. Measured in tokens.
    """

    tokens: int
    shares: dict[str, float]
    rate: float = 0.6
    short: float = 0.75


@dataclass(frozen=True)
class Recipe:
    """One model's shape and training: lengths in tokens, times in seconds.

    A step sees `rows` windows of `length` tokens; for the first `short` of the steps each is cut in two halves,
    which is faster on a CPU. `decay` is the last part of the steps, in which the learning rate falls to zero.
    """

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tokens: int
    rows: int = 8
    length: int = 512
    short: float = 0.7
    micro_tokens: int = 1024
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    decay: float = 0.8
    seed: int = 1
    snapshot_every: float = 300.0
    second: Second | None = None

    @property
    def first_steps(self) -> int:
        """Optimiser steps of the first stretch."""
        return self.tokens // (self.rows * self.length)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.first_steps + (self.second.tokens // (self.rows * self.length) if self.second else 0)

    def at(self, step: int) -> tuple[float, bool]:
        """The factor on the learning rates at a step, and whether its windows are short."""
        if step < self.first_steps:
            return schedule(step, self.first_steps, decay=self.decay), step < self.short * self.first_steps
        assert self.second is not None
        step, steps = step - self.first_steps, self.steps - self.first_steps
        return self.second.rate * schedule(step, steps, decay=1.0), step < self.second.short * steps

    def stretches(self, shares: dict[str, float]) -> list[Stretch]:
        """What each of the `rows` streams holds: the tokens of both stretches, and one more to predict."""
        if self.second is None:
            return [(self.steps * self.length + 1, shares)]
        first = self.first_steps * self.length
        return [(first, shares), (self.steps * self.length + 1 - first, self.second.shares)]


TARGET = Recipe(
    "target",
    hidden=256,
    layers=12,
    intermediate=704,
    heads=8,
    kv_heads=4,
    tokens=9_420_800,
    short=0.88,
    muon_lr=7e-3,
    adam_lr=1.5e-3,
    second=Second(tokens=5_324_800, shares=SECOND_MIXTURE),
)
DRAFT = Recipe("draft", hidden=128, layers=3, intermediate=352, heads=4, kv_heads=2, tokens=3_000_000, adam_lr=3e-3, seed=2)


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of the recipe's shape; output projections are zero, so that each layer starts as identity."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.hidden // recipe.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def halves(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [B, 2 T + 1] as two times [B, T + 1]; the token at the cut ends the one and begins the other."""
    middle = tokens.shape[1] // 2
    return tokens[:, : middle + 1], tokens[:, middle:]


def token_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of tokens[:, 1:] given what precedes; tokens int64 [B, T + 1]."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, record: dict[str, Any]) -> None:
    """A Hugging Face folder with bfloat16 safetensors, the tokenizer and training.json; replaces the old one whole."""
    from transformers import LlamaForCausalLM

    new = folder.with_name(folder.name + ".partial")
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict({key: value.to("cpu", torch.bfloat16) for key, value in model.state_dict().items()})
    copy.save_pretrained(new)
    tokenizer.save_pretrained(new)
    (new / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    replace_folder(new, folder)


def train(
    recipe: Recipe,
    documents: dict[str, Documents],
    shares: dict[str, float],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    resume: bool,
    compiled: bool = False,
) -> Path:
    """Train to the end of the recipe on `documents`, mixed in the proportions `shares`.

    Snapshots land in `out`/NAME, the state to resume from in `out`/NAME.state.pt. `compiled` sends the loss through
    torch.compile: a minute or two at the start, and where the window doubles, for a fifth more tokens per second.
    """
    device = prepare_device()
    folder, state_path = out / recipe.name, out / f"{recipe.name}.state.pt"
    model = build(recipe, tokenizer).to(device).train()
    optimiser = Optimiser(model, recipe.muon_lr, recipe.adam_lr, recipe.weight_decay)
    step, spent, history = 0, 0.0, []
    state = load_state(state_path) if resume else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, history = state["step"], state["seconds"], state["history"]
    loss_of = torch.compile(token_loss, dynamic=False) if compiled else token_loss
    streams, _ = packed_streams(documents, recipe.stretches(shares), recipe.rows, recipe.seed)
    began, saved, window = time.monotonic() - spent, time.monotonic(), []

    def snapshot() -> None:
        seconds = time.monotonic() - began
        record = {
            "recipe": asdict(recipe),
            "steps": step,
            "tokens": step * recipe.rows * recipe.length,
            "seconds": round(seconds),
            "parameters": model.num_parameters(),
            "device": str(device),
            "torch": torch.__version__,
            "history": history,
        }
        save_state(
            state_path,
            {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "seconds": seconds,
                "history": history,
            },
        )
        save_model(model, tokenizer, folder, record)

    with tqdm(total=recipe.steps, initial=step, desc=f"train {recipe.name}", unit="step", smoothing=0.05) as bar:
        while step < recipe.steps:
            at = step * recipe.length
            batch = torch.from_numpy(streams[:, at : at + recipe.length + 1].astype("int64")).to(device)
            total = 0.0
            rate, short = recipe.at(step)
            pieces = torch.cat(halves(batch)) if short else batch
            model.set_attn_implementation("eager" if short and device.type == "cpu" else "sdpa")
            for piece in pieces.split(max(1, recipe.micro_tokens // (pieces.shape[1] - 1))):
                with mixed_precision(device):
                    loss = loss_of(model, piece) * (len(piece) / len(pieces))
                loss.backward()
                total += float(loss.detach())
            optimiser.step(rate)
            step += 1
            window.append(total)
            bar.update()
            if step % 10 == 0 or step == recipe.steps:
                mean = sum(window) / len(window)
                window.clear()
                history.append([step, round(mean, 4)])
                bar.set_postfix(nats=f"{mean:.3f}")
            if time.monotonic() - saved > recipe.snapshot_every or step == recipe.steps or (state is None and step == 20):
                snapshot()
                saved = time.monotonic()
    return folder
