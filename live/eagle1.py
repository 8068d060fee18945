"""The draft head of EAGLE-1 and EAGLE-2: one decoder layer over token and feature, without caches.

Li et al. 2024, "EAGLE" (https://arxiv.org/abs/2401.15077), section 4.1; EAGLE-2 (https://arxiv.org/abs/2406.16858) has the same
head and another tree. Cell i consumes the target's last hidden state f_i in R^H (behind the final norm, what the target's output
layer reads) and the embedding of token t_{i+1}, ``fc`` makes one stream of both, and a Llama layer without a norm in front of its
attention turns it into an estimate of f_{i+1}. The target's own output layer reads t_{i+2} off it: neither a norm nor a vocabulary
belongs to the head. Used like :class:`live.eagle3.Eagle3Head`, which says how.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live.eagle3 import Eagle3Head, Mlp, RMSNorm, projected, register_embeddings
from live.few_rows import quicken
from live.head_files import Unknown, check_tensors, read_config, read_tensors, renamed, rotary_of, same_table, sizes_of, split_fused
from live.rotary import Rotary

_WHAT = "an EAGLE-1 head"
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""A table that follows from the configuration."""


@dataclass(frozen=True)
class Eagle1Config:
    """Shape of a head; the names of the official config.json, a Llama's with one layer (vLLM's script puts it in ``model``).

    bias   whether ``fc`` has a bias; :meth:`Eagle1Head.from_tensors` goes by what is there
    qkv_bias   the same of the attention's matrices (heads for Qwen2)
    own_output   the checkpoint brings an output layer, which official ones do not
    own_embeddings   its token embeddings are others than the target's, of which official ones bring a copy
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    rope_scaling: dict[str, Any] | None = None
    bias: bool = True
    qkv_bias: bool = False
    own_output: bool = False
    own_embeddings: bool = False

    @classmethod
    def from_file(cls, path: Path) -> Eagle1Config:
        """:raises UserError: when the file describes no such head, or a variant that this loader does not know, by name."""
        return read_config(path, _WHAT, cls._parsed)

    @classmethod
    def _parsed(cls, found: dict[str, Any]) -> Eagle1Config:
        found = found.get("model") or found
        if "transformer_layer_config" in found:
            raise Unknown("it is an EAGLE-1 head in speculators' layout, which this loader does not know")
        if found.get("num_hidden_layers", 1) != 1:
            raise Unknown(f"it has {found['num_hidden_layers']} layers, this loader knows heads of one")
        known = sizes_of(found) | rotary_of(found)
        return cls(**{field.name: known[field.name] for field in fields(cls) if field.name in known})


class _Attention(nn.Module):
    def __init__(self, config: Eagle1Config):
        super().__init__()
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=False)


class _Layer(nn.Module):
    def __init__(self, config: Eagle1Config):
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = Mlp(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Eagle1Head(nn.Module):
    """The head; parameters bear the official names, embeddings and output layer are the target's and not saved."""

    embed_tokens: Tensor  # [V, H], the target's, or the head's own
    d2t = None
    """The draft's vocabulary is the target's."""

    def __init__(self, config: Eagle1Config, embed_tokens: Tensor, output_layer: nn.Module):
        """:param embed_tokens: the target's [V, H].   :param output_layer: the target's, from [..., H] to logits [..., V]."""
        super().__init__()
        register_embeddings(self, config, embed_tokens)
        self.config = config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.hidden_size = config.head_dim, config.hidden_size
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([_Layer(config)])
        if config.own_output:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._targets = (output_layer,)  # in a tuple, so that it is no part of the head
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, embed_tokens: Tensor, output_layer: nn.Module, dtype: torch.dtype = torch.float32
    ) -> Eagle1Head:
        """Load an official checkpoint onto the device of ``embed_tokens`` [V, H], in ``dtype``.

        :raises UserError: naming every tensor that is missing, unexpected or of another shape.
        """
        folder = Path(folder)
        config = Eagle1Config.from_file(folder / "config.json")
        return cls.from_tensors(config, read_tensors(folder, _WHAT), embed_tokens, output_layer, dtype, str(folder))

    @classmethod
    def from_tensors(
        cls,
        config: Eagle1Config,
        tensors: dict[str, Tensor],
        embed_tokens: Tensor,
        output_layer: nn.Module,
        dtype: torch.dtype = torch.float32,
        what: str = "the checkpoint",
    ) -> Eagle1Head:
        """The head of these tensors; see :meth:`from_pretrained`. ``what``: its name in messages."""
        named = renamed(tensors, ((r"^model\.", ""),), _IGNORED)
        split_fused(named, "layers.0.", config)
        table = named.pop("embed_tokens.weight", None)
        if table is not None and not same_table(table, embed_tokens, dtype):
            named["embed_tokens"] = table
        biased = {"bias": "fc.bias" in named, "qkv_bias": "layers.0.self_attn.q_proj.bias" in named}
        own = {"own_output": "lm_head.weight" in named, "own_embeddings": "embed_tokens" in named}
        config = replace(config, **biased, **own)
        with torch.device("meta"):  # shapes only: the tensors that are there take their places
            head = cls(config, embed_tokens, output_layer)
        check_tensors(named, head.state_dict(), what, _WHAT)
        head.load_state_dict(named, assign=True)
        return quicken(head.to(embed_tokens.device, dtype).eval().requires_grad_(False))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors (weights in ``dtype``) into ``folder``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.to(dtype).detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if "embed_tokens" in tensors:
            tensors["embed_tokens.weight"] = tensors.pop("embed_tokens")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        told = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        official = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps(official | told, indent=2) + "\n", encoding="utf-8")

    def fuse(self, features: Tensor) -> Tensor:
        """The target's last hidden states [..., H]: what a cell consumes as they are."""
        return features

    def project(self, hidden: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`finish` adds to [B, T, H], rotated queries [B, T, heads, d], rotated keys and values [B, T, kv heads, d].

        hidden [B, T, H]; tokens int64 [B, T]; positions int64 [B, T].
        """
        attention = self.layers[0].self_attn
        stream = self.fc(torch.cat([F.embedding(tokens, self.embed_tokens), hidden], dim=-1))
        query, key, value = projected(attention, stream, self.head_dim)
        return (stream, *self.rotary.turn(positions, query, key), value)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The cells' output [B, T, H], an estimate of the target's last hidden state, which a child cell consumes.

        residual [B, T, H], from :meth:`project`; attended [B, T, heads * d].
        """
        layer = self.layers[0]
        hidden = residual + layer.self_attn.o_proj(attended)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the target's vocabulary from what :meth:`finish` gives, [B, T, H] -> [B, T, V]."""
        output_layer = self.lm_head if self.config.own_output else self._targets[0]
        return output_layer(hidden).to(hidden.device)  # a target on several devices has its own on the last


EagleHead = Eagle3Head | Eagle1Head
"""Either head: networks use them alike."""
