"""The EAGLE-3 draft head: one decoder layer in the official tensor layout, without caches.

Li et al. 2025, "EAGLE-3" (https://arxiv.org/abs/2503.01840). Notation: H the head's hidden size, Ht the target's, V the
target's vocabulary, Vd the draft's. Cell i consumes a hidden h_i in R^H and the embedding of target token t_{i+1}, at
rotary position i, and predicts t_{i+2}. h_i is ``fuse`` of the target's three captured residual streams where they are
known, and otherwise the output of the cell before. The caller brings the attention (over whatever cells it keeps):

    residual, query, key, value = head.project(hidden, tokens, positions)
    output = head.finish(residual, attention(query, key, value))
    scores = head.logits(output)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live.eagle3_config import Eagle3Config, captured_layers
from live.eagle3_weights import official_tensors, variant
from live.few_rows import quicken
from live.head_files import check_tensors, read_tensors
from live.rotary import Rotary
from policies.errors import UserError

__all__ = ["Eagle3Config", "Eagle3Head", "RMSNorm", "captured_layers"]

_WHAT = "an EAGLE-3 head"


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; half precisions compute in float32, float32 and float64 in their own."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        work = x.float()
        work = work * torch.rsqrt(work.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * work.to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        double, bias = 2 * config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(double, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(double, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(double, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)


class Mlp(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _MidLayer(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Embedded(Protocol):
    """What a head's embeddings follow from."""

    hidden_size: int
    vocab_size: int
    own_embeddings: bool


def register_embeddings(head: nn.Module, config: Embedded, embed_tokens: Tensor) -> None:
    """Give a head its ``embed_tokens`` [V, H]: the target's, which are not saved with it, or room for its own.

    :raises UserError: when the target's are of another size.
    """
    own = config.own_embeddings
    if embed_tokens.shape[0] != config.vocab_size or (not own and embed_tokens.shape[1] != config.hidden_size):
        raise UserError(
            f"the head embeds {config.vocab_size} tokens in {config.hidden_size} numbers, the target's is "
            f"{list(embed_tokens.shape)}: give the target that this head was trained for"
        )
    table = torch.zeros(config.vocab_size, config.hidden_size) if own else embed_tokens.detach()
    head.register_buffer("embed_tokens", table, persistent=own)


def projected(attention: nn.Module, stream: Tensor, size: int) -> tuple[Tensor, ...]:
    """Queries [B, T, heads, d], keys and values [B, T, kv heads, d] of d = ``size`` numbers, from a stream [B, T, X]."""
    parts = attention.q_proj(stream), attention.k_proj(stream), attention.v_proj(stream)
    return tuple(part.unflatten(-1, (-1, size)) for part in parts)


class Eagle3Head(nn.Module):
    """The head; parameters bear the official names, the target's embeddings are shared and not saved."""

    embed_tokens: Tensor  # [V, H], the target's, or the head's own
    d2t: Tensor | None  # int64 [Vd], target id minus draft id; None: the two vocabularies are one
    t2d: Tensor | None  # bool [V], whether the target's token can be drafted

    def __init__(self, config: Eagle3Config, embed_tokens: Tensor):
        """:param embed_tokens: [V, H], the target's; a head with embeddings of its own takes only V from them."""
        super().__init__()
        register_embeddings(self, config, embed_tokens)
        self.config = config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.hidden_size = config.head_dim, config.hidden_size
        width, features, eps = config.target_hidden_size, config.streams * config.target_hidden_size, config.rms_norm_eps
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in range(config.streams))
        if config.norm_before_fc:
            self.input_norm = RMSNorm(features, eps)
        self.fc = nn.Linear(features, config.hidden_size, bias=config.bias)
        self.midlayer = _MidLayer(config)
        self.norm = RMSNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        mapped = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64) if mapped else None)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if mapped else None)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, embed_tokens: Tensor, dtype: torch.dtype = torch.float32, config: Eagle3Config | None = None
    ) -> Eagle3Head:
        """Load a checkpoint of any layout of :mod:`live.eagle3_config` onto the device of ``embed_tokens`` [V, H], in ``dtype``.

        :param config: instead of what the folder's config.json says.
        :raises UserError: naming every tensor that is missing, unexpected or of another shape.
        """
        folder = Path(folder)
        config = Eagle3Config.from_file(folder / "config.json") if config is None else config
        return cls.from_tensors(config, read_tensors(folder, _WHAT), embed_tokens, dtype, str(folder))

    @classmethod
    def from_tensors(
        cls,
        config: Eagle3Config,
        tensors: dict[str, Tensor],
        embed_tokens: Tensor,
        dtype: torch.dtype = torch.float32,
        what: str = "the checkpoint",
    ) -> Eagle3Head:
        """The head of these tensors under any layout's names; see :meth:`from_pretrained`. ``what``: its name in messages."""
        found = official_tensors(tensors, config)
        config = variant(config, found)
        with torch.device("meta"):  # shapes only: the tensors that are there take their places
            head = cls(config, embed_tokens)
        check_tensors(found, head.state_dict(), what, _WHAT)
        head.load_state_dict(found, assign=True)
        if head.d2t is not None and not head.d2t.is_meta:
            target_ids = head.d2t + torch.arange(len(head.d2t))
            if int(target_ids.min()) < 0 or int(target_ids.max()) >= config.vocab_size:
                raise UserError(f"{what}: d2t points outside the target's vocabulary of {config.vocab_size} tokens")
        return quicken(head.to(embed_tokens.device, dtype).eval().requires_grad_(False))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors (weights in ``dtype``; no embeddings) into ``folder``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
        }
        if "embed_tokens" in tensors:
            tensors["embed_tokens.weight"] = tensors.pop("embed_tokens")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        official = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_act": "silu",
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(official | self.config.to_json(), indent=2) + "\n", encoding="utf-8")

    def fuse(self, features: Tensor) -> Tensor:
        """The target's captured residuals, low to high, [..., n Ht] (n = 3 by default) -> hidden [..., H]."""
        if self.config.fc_norm:
            parts = features.chunk(self.config.streams, dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        return self.fc(features)

    def project(self, hidden: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`finish` adds to [B, T, H], rotated queries [B, T, heads, d], rotated keys and values [B, T, kv heads, d].

        hidden [B, T, H]; tokens int64 [B, T], target ids; positions int64 [B, T].
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        embedded, normed = layer.input_layernorm(F.embedding(tokens, self.embed_tokens)), layer.hidden_norm(hidden)
        both = torch.cat([embedded, normed], dim=-1)
        query, key, value = projected(attention, both, self.head_dim)
        if self.config.qk_norm:
            query, key = attention.q_norm(query), attention.k_norm(key)
        return (normed if self.config.norm_before_residual else hidden, *self.rotary.turn(positions, query, key), value)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The cells' output, which is also what a child cell consumes.

        residual [B, T, H], from :meth:`project`; attended [B, T, heads * d] -> [B, T, H].
        """
        hidden = residual + self.midlayer.self_attn.o_proj(attended)
        hidden = hidden + self.midlayer.mlp(self.midlayer.post_attention_layernorm(hidden))
        return self.norm(hidden) if self.config.return_hidden_post_norm else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the draft vocabulary from what :meth:`finish` gives, [B, T, H] -> [B, T, Vd]."""
        return self.lm_head(hidden if self.config.return_hidden_post_norm else self.norm(hidden))
