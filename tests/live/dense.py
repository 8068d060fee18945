"""The EAGLE-3 head and causal LMs computed from scratch: no cache, no tree, every cell in every pass."""

from __future__ import annotations

import torch
from torch import Tensor

from live.eagle3 import Eagle3Head


def head_cells(head: Eagle3Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Outputs [B, n, H] of cells 0 .. n-1 under full causal attention, from hidden [B, n, H] and tokens [B, n]."""
    count = tokens.shape[1]
    positions = torch.arange(count).expand_as(tokens)
    residual, query, key, value = head.project(hidden, tokens, positions)
    shared = head.num_heads // head.num_kv_heads
    key, value = (part.repeat_interleave(shared, dim=2) for part in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / head.head_dim**0.5
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    weight = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    return head.finish(residual, torch.einsum("bhqk,bkhd->bqhd", weight, value).flatten(2))


@torch.no_grad()
def head_logprob(head: Eagle3Head, features: Tensor, text: Tensor, path: list[int]) -> Tensor:
    """log q [Vd] behind a drafted ``path``. ``text`` int64 [c + 1] ends with the root, ``features`` are [c, F]."""
    hidden = head.fuse(features)[None]
    tokens = text[None, 1:]
    outputs = head_cells(head, hidden, tokens)
    for token in path:  # a drafted token's cell consumes the output of the cell before it
        hidden = torch.cat([hidden, outputs[:, -1:]], dim=1)
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
        outputs = head_cells(head, hidden, tokens)
    return torch.log_softmax(head.logits(outputs[:, -1:]), dim=-1)[0, 0]


@torch.no_grad()
def model_logprob(model, text: Tensor, path: list[int]) -> Tensor:
    """log p [V] of a Hugging Face model behind ``text`` and ``path``, from a fresh causal pass."""
    whole = torch.cat([text, torch.tensor(path, dtype=torch.int64)])[None]
    return torch.log_softmax(model(input_ids=whole).logits[0, -1], dim=-1)
