"""The tensors of an EAGLE-3 checkpoint, whatever its layout, under the official names.

Layouts name the one decoder layer ``midlayer``, ``midlayer.0`` or ``layers.0``; some fuse q, k and v, or gate and up; NVIDIA's
training code has names of its own. Here they become one, and what is left over is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from live.eagle3_config import Eagle3Config
from live.head_files import checked_map, renamed, split_fused
from policies.errors import UserError

_RENAMED = (
    (r"^(eagle_module|model)\.", ""),
    (r"^midlayer\.0\.", "midlayer."),
    (r"^layers\.0\.", "midlayer."),
    (r"^hidden_norm\.", "midlayer.hidden_norm."),
    (r"^input_embeds_norm\.", "midlayer.input_layernorm."),
    (r"^eagle_lm_head\.", "lm_head."),
    (r"^draft_id_to_target_id$", "d2t"),
    (r"^embed_tokens\.weight$", "embed_tokens"),
)
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^verifier_(norm|lm_head)\.weight$")
"""Known tensors that nothing depends on: a table that follows from the configuration, copies of the target's."""


def official_tensors(found: dict[str, Tensor], config: Eagle3Config) -> dict[str, Tensor]:
    """``found`` under the official names, q, k, v, gate and up apart, the vocabulary's maps as int64 and bool.

    :raises UserError: when there is more than one layer, or the maps contradict the sizes.
    """
    named = renamed(found, _RENAMED, _IGNORED)
    if more := [name for name in named if re.match(r"(midlayer|layers)\.\d+\.", name)]:
        raise UserError(f"the head has more than one decoder layer ({more[0]}), which this loader does not know; use one with one")
    split_fused(named, "midlayer.", config)
    return named | _vocabulary(named, config)


def variant(config: Eagle3Config, names: Iterable[str]) -> Eagle3Config:
    """``config`` with what only the tensors tell: biases, norms and embeddings that are there belong to the head."""
    names = set(names)
    return replace(
        config,
        attention_bias=config.attention_bias or "midlayer.self_attn.q_proj.bias" in names,
        bias="fc.bias" in names,
        qk_norm="midlayer.self_attn.q_norm.weight" in names,
        norm_before_fc=config.norm_before_fc or "input_norm.weight" in names,
        fc_norm=config.fc_norm or "fc_norm.0.weight" in names,
        own_embeddings="embed_tokens" in names,
    )


def _vocabulary(named: dict[str, Tensor], config: Eagle3Config) -> dict[str, Tensor]:
    """d2t int64 [Vd] and t2d bool [V]; ModelOpt leaves t2d out, and where the vocabularies are one both may stand or not."""
    d2t, t2d = named.pop("d2t", None), named.pop("t2d", None)
    if d2t is not None and not d2t.is_meta:
        d2t = checked_map(d2t, config.draft_vocab_size, config.vocab_size)
    if config.draft_vocab_size == config.vocab_size:
        return {}
    if d2t is None:
        return {} if t2d is None else {"t2d": t2d.bool()}
    if t2d is None and not d2t.is_meta:
        target = d2t + torch.arange(len(d2t), device=d2t.device)
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool, device=d2t.device).index_fill(0, target, True)
    return {"d2t": d2t} if t2d is None else {"d2t": d2t, "t2d": t2d.bool()}
