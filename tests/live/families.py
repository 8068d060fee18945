"""A whole random pair of each supported architecture on disk: what the tests and benchmarks/architectures.py record."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from live.eagle3 import Eagle3Config, Eagle3Head
from tests.live.tiny import build
from tests.tiny_pair import train_tokenizer

POLICIES = ("chain(k=4)", "eagle3(total_tokens=12, depth=4, top_k=4)")
QUICK = ("gemma2", "mixtral")
SLOW = ("llama", "qwen3", "mistral", "gemma3_text", "gpt_neox", "gpt2", "qwen3_moe")
OWN = {
    "gpt2": {"n_layer": 6, "n_inner": 48},
    "mistral": {"sliding_window": 100},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}
"""Windows of 100 tokens cover these texts; with the context of 128 tokens they set the limit."""


def write_pair(family: str, folder: Path) -> tuple[str, str, str]:
    """A random target, an EAGLE-3 head trained on nothing, and the target with noise on its weights as draft."""
    tokenizer = train_tokenizer()
    size = {"vocab_size": len(tokenizer), "num_hidden_layers": 6} | OWN.get(family, {})
    target = build(family, torch.float32, **size)
    draft = copy.deepcopy(target)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                weight.add_(0.03 * torch.randn_like(weight) * weight.std())
    torch.manual_seed(3)
    embeddings = target.get_input_embeddings().weight
    head = Eagle3Head(Eagle3Config(32, 48, 4, 2, 8, len(tokenizer), len(tokenizer), 32), embeddings)
    for weight in (parameter for parameter in head.parameters() if parameter.ndim == 2):
        torch.nn.init.normal_(weight, std=0.3)
    paths = tuple(str(folder / name) for name in ("target", "eagle3", "draft"))
    head.save_pretrained(paths[1], torch.float32)
    for model, path in ((target, paths[0]), (draft, paths[2])):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths
