"""Other heads for the tiny pair's target, trained for a moment on its own texts: an EAGLE-1 head and four Medusa heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.tiny_pair import TinyPair, said_texts

NAMES = ("eagle1", "medusa")
HEADS = 4
_STEPS = 80


def write_tiny_heads(pair: TinyPair) -> tuple[Path, ...]:
    """Folders "eagle1" and "medusa" beside the pair's; the same numbers every time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from live.eagle1 import Eagle1Config, Eagle1Head
    from live.medusa import MedusaHeads, MedusaShape
    from tests.live.dense import head_cells

    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval().requires_grad_(False)
    texts = torch.nn.utils.rnn.pad_sequence(
        [text[:60] for text in said_texts(target, AutoTokenizer.from_pretrained(pair.target))], batch_first=True
    )
    found = target(input_ids=texts, output_hidden_states=True)
    last, wanted = found.hidden_states[-1], torch.log_softmax(found.logits, dim=-1)
    embeddings = target.get_input_embeddings().weight
    vocabulary, size = embeddings.shape
    torch.manual_seed(3)
    eagle1 = Eagle1Head(Eagle1Config(size, 64, 4, 2, 8, vocabulary), embeddings, target.lm_head)
    _learn(eagle1, lambda: [(eagle1.logits(head_cells(eagle1, last[:, :-1], texts[:, 1:])), wanted[:, 1:])])
    medusa = MedusaHeads(MedusaShape(HEADS, 1, size, True, vocabulary, 0, False), target.lm_head)
    _learn(medusa, lambda: [(medusa.logits(k, last[:, : -1 - k]), wanted[:, 1 + k :]) for k in range(HEADS)])
    folders = tuple(pair.folder / name for name in NAMES)
    for head, folder in zip((eagle1, medusa), folders, strict=True):
        head.save_pretrained(folder, torch.float32)
    return folders


def _learn(head: nn.Module, pairs: Callable[[], list[tuple[Tensor, Tensor]]]) -> None:
    """Some steps towards log-probabilities, from logits."""
    step = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(_STEPS):
        parts = []
        for logits, truth in pairs():
            said = torch.log_softmax(logits, dim=-1)
            parts.append((truth.exp() * (truth - said)).sum(-1).mean())
        step.zero_grad()
        sum(parts).backward()
        step.step()
