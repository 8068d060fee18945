"""Other heads for the tiny pair's target, trained for a moment on its own texts: three kinds of heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.tiny_pair import TinyPair, said_texts

NAMES = ("eagle1", "medusa", "dflash")
HEADS = 4
DRAFTED = 4
"""By a block of the DFlash drafter."""
DFLASH_LAYERS = (1, 4)
_STEPS = 80


def write_tiny_heads(pair: TinyPair) -> tuple[Path, ...]:
    """Folders of the three beside the pair's; the same numbers every time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from live.dflash import DFlashHead
    from live.dflash_config import DFlashConfig
    from live.eagle1 import Eagle1Config, Eagle1Head
    from live.medusa import MedusaHeads, MedusaShape
    from live.reference.dflash_training import fill
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
    read = torch.cat([found.hidden_states[layer] for layer in DFLASH_LAYERS], -1)
    dflash = DFlashHead(
        DFlashConfig(
            hidden_size=size, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=vocabulary,
            draft_vocab_size=vocabulary, target_hidden_size=size, num_hidden_layers=2, block_size=1 + DRAFTED, mask_token_id=3,
            layer_ids=tuple(i - 1 for i in DFLASH_LAYERS), ids_name_outputs=True, windows=(None, None), causal=(False, False),
        ),
        embeddings,
        target.lm_head,
    )  # fmt: skip
    begin = torch.arange(3, texts.shape[1] - DRAFTED - 1).expand(len(texts), -1)
    behind = begin[:, :, None] + torch.arange(DRAFTED)
    row = torch.arange(len(texts))[:, None, None]
    _learn(dflash, lambda: [(fill(dflash, read, texts, begin), wanted[row, behind])])
    folders = tuple(pair.folder / name for name in NAMES)
    for head, folder in zip((eagle1, medusa, dflash), folders, strict=True):
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
