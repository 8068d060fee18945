"""The DFlash drafter: some layers that fill a block of masked places in one pass, over what the target knows of the text.

Chen et al. 2026, "DFlash" (https://arxiv.org/abs/2602.06036). The target's features of place i, from several layers side by side,
become one stream by ``fc`` and a norm, and every layer of the drafter makes keys and values of it: they depend on the text alone,
so committed places keep theirs. A block begins with the root's token, at the place behind the features, and goes on with masks;
its places see all that is committed and, unless a layer is causal, each other. What leaves the layers at the place of a mask gives
that place's token by the target's own output layer.

A place does not know what was drafted at the others: all nodes of a depth have the same children, and no tree is deeper than a
block (see live/depth_rankings.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live.dflash_config import DFlashConfig
from live.eagle3 import Mlp, RMSNorm, projected, register_embeddings
from live.few_rows import quicken
from live.head_files import check_tensors, checked_map, read_tensors, renamed, same_table, split_fused
from live.rotary import Rotary
from policies.errors import UserError

_WHAT = "a DFlash drafter"
_RENAMED = (
    (r"^model\.", ""),
    (r"^encoder\.fc\.", "fc."),
    (r"^encoder\.output_norm_enc\.", "hidden_norm."),
    (r"^midlayer\.", "layers.0."),
    (r"^embed_tokens\.weight$", "embed_tokens"),
)
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^verifier_(norm|lm_head)\.weight$|^t2d$")
"""A table that follows from the configuration, copies of the target's, and a map that follows from the other one."""


class _Attention(nn.Module):
    def __init__(self, config: DFlashConfig):
        super().__init__()
        width, bias, size = config.hidden_size, config.attention_bias, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)


class _Layer(nn.Module):
    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DFlashHead(nn.Module):
    """The drafter; parameters bear the authors' names, embeddings and output layer are the target's and not saved."""

    embed_tokens: Tensor  # [V, H], the target's, or its own
    d2t: Tensor | None  # int64 [Vd], target id minus draft id; None: the vocabularies are one

    def __init__(self, config: DFlashConfig, embed_tokens: Tensor, output_layer: nn.Module | None):
        """:param embed_tokens: the target's [V, H].   :param output_layer: the target's, from [..., H] to logits [..., V]."""
        super().__init__()
        register_embeddings(self, config, embed_tokens)
        self.config = config
        self.num_kv_heads, self.head_dim, self.hidden_size = config.num_key_value_heads, config.head_dim, config.hidden_size
        self.fc = nn.Linear(len(config.layer_ids) * config.target_hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.own_output:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.mask_embedding:
            self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        mapped = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64) if mapped else None)
        self._targets = (output_layer,)  # in a tuple, so that it is no part of the drafter
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        embed_tokens: Tensor,
        output_layer: nn.Module | None,
        dtype: torch.dtype = torch.float32,
        config: DFlashConfig | None = None,
    ) -> DFlashHead:
        """Load a checkpoint onto the device of ``embed_tokens`` [V, H], the target's, in ``dtype``.

        :param config: other than the one in the folder.
        :param output_layer: the target's; None where it has none.
        :raises UserError: naming every tensor that is missing, unexpected or of another shape, or what does not fit the target.
        """
        folder = Path(folder)
        config = DFlashConfig.from_file(folder / "config.json") if config is None else config
        named = renamed(read_tensors(folder, _WHAT), _RENAMED, _IGNORED)
        for layer in range(config.num_hidden_layers):
            split_fused(named, f"layers.{layer}.", config)
        config = _variant(config, named, embed_tokens, dtype)
        if config.draft_vocab_size != config.vocab_size and not config.own_output:
            raise UserError(
                f"{folder} drafts {config.draft_vocab_size} of {config.vocab_size} tokens and has no output layer for them: fetch "
                "the drafter again"
            )
        if not (config.own_output or output_layer is not None):
            raise UserError(f"{folder} has no output layer of its own, and the target none that drafts: give another target")
        if config.mask_token_id >= len(embed_tokens) and not config.mask_embedding:
            raise UserError(
                f"{folder} masks with token {config.mask_token_id}, beyond the target's {len(embed_tokens)} embeddings: give the "
                "target that this drafter was trained for"
            )
        with torch.device("meta"):  # shapes only: the tensors that are there take their places
            head = cls(config, embed_tokens, output_layer)
        check_tensors(named, head.state_dict(), str(folder), _WHAT)
        head.load_state_dict(named, assign=True)
        return quicken(head.to(embed_tokens.device, dtype).eval().requires_grad_(False))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors as the authors do (weights in ``dtype``) into ``folder``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor if name == "d2t" else tensor.to(dtype) for name, tensor in self.state_dict().items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if "embed_tokens" in tensors:
            tensors["embed_tokens.weight"] = tensors.pop("embed_tokens")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n", encoding="utf-8")

    def fuse(self, features: Tensor) -> Tensor:
        """What the layers make keys and values of [..., H], from the target's features [..., F]."""
        return self.hidden_norm(self.fc(features))

    def remembered(self, layer: int, fused: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's rotated keys and its values [B, T, kv heads, d] of committed places at int64 [B, T], from :meth:`fuse`."""
        attention = self.layers[layer].self_attn
        key, value = (part(fused).unflatten(-1, (-1, self.head_dim)) for part in (attention.k_proj, attention.v_proj))
        return self.rotary.turn(positions, attention.k_norm(key))[0], value

    def block(self, root: Tensor) -> Tensor:
        """Embeddings [B, S, H] of blocks that begin with the tokens ``root`` int64 [B]."""
        own = F.embedding(root, self.embed_tokens)[:, None]
        if self.config.mask_embedding:
            mask = self.mask_embedding
        else:
            mask = self.embed_tokens[self.config.mask_token_id]
        block = torch.cat([own, mask.expand(len(root), self.config.block_size - 1, -1)], dim=1)
        return block if self.config.input_embedding_scale == 1 else block * self.config.input_embedding_scale

    def project(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's rotated queries [B, S, heads, d], rotated keys and values [B, S, kv heads, d] of blocks [B, S, H]."""
        attention = self.layers[layer].self_attn
        query, key, value = projected(attention, self.layers[layer].input_layernorm(hidden), self.head_dim)
        return (*self.rotary.turn(positions, attention.q_norm(query), attention.k_norm(key)), value)

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """What leaves a layer [B, S, H], from what entered it and what its heads attended to [B, S, heads * d]."""
        one = self.layers[layer]
        hidden = hidden + one.self_attn.o_proj(attended)
        return hidden + one.mlp(one.post_attention_layernorm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [B, D, Vd] of the D drafted places, the nearest first, from what leaves the last layer [B, S, H]."""
        config = self.config
        hidden = self.norm(hidden if config.from_anchor else hidden[:, 1:])
        scores = (self.lm_head if config.own_output else self._targets[0])(hidden).to(hidden.device)
        if config.output_multiplier != 1:
            scores = scores * config.output_multiplier
        if config.final_logit_softcapping:
            scores = torch.tanh(scores / config.final_logit_softcapping) * config.final_logit_softcapping
        return scores


def _variant(config: DFlashConfig, named: dict[str, Tensor], embed_tokens: Tensor, dtype: torch.dtype) -> DFlashConfig:
    """``config`` with what only the tensors tell, and in place the tensors without what is the target's again.

    :raises UserError: when ``d2t`` points outside the target's vocabulary, or contradicts the sizes.
    """
    if "embed_tokens" in named and same_table(named["embed_tokens"], embed_tokens, dtype):
        del named["embed_tokens"]
    if (d2t := named.pop("d2t", None)) is not None:
        if (d2t := checked_map(d2t, config.draft_vocab_size, config.vocab_size)) is not None:
            named["d2t"] = d2t
    return replace(
        config,
        own_embeddings="embed_tokens" in named,
        own_output="lm_head.weight" in named,
        mask_embedding="mask_embedding" in named,
        attention_bias="layers.0.self_attn.q_proj.bias" in named,
    )
