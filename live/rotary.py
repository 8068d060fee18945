"""Rotary position embeddings of draft heads, with the scalings that Hugging Face knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Rotate-half embedding of heads of ``size`` numbers, in float32 for half precisions.

    :param base: theta.   :param scaling: as in Hugging Face's ``rope_parameters``, or None.
    :param limit: positions that the head was trained for, which some scalings look at.
    """

    def __init__(self, size: int, base: float, scaling: Mapping[str, Any] | None = None, limit: int = 2048):
        self.size, self.base, self.scaling, self.limit = size, base, scaling, limit
        self._made: tuple[Tensor, Tensor, float] | None = None

    def turn(self, positions: Tensor, *heads: Tensor) -> list[Tensor]:
        """Heads [B, T, n, d], each turned by the angles of its places' positions int64 [B, T]."""
        frequencies, signs, scale = self._frequencies(_wide(heads[0]))
        angle = (positions[..., None] * frequencies)[:, :, None]
        cos, sin = angle.cos(), angle.sin() * signs
        if scale != 1:
            cos, sin = scale * cos, scale * sin
        return [self._turned(one, cos, sin) for one in heads]

    def _turned(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(low cos - high sin, high cos + low sin); the signs are in ``sin``."""
        work = _wide(heads)
        return torch.addcmul(work * cos, work.roll(self.size // 2, -1), sin).to(heads.dtype)

    def _frequencies(self, work: Tensor) -> tuple[Tensor, Tensor, float]:
        """Frequencies [d] (each twice) in the dtype of ``work``, signs of the sines [d], and what both are scaled by; made once."""
        if self._made is None or (self._made[0].dtype, self._made[0].device) != (work.dtype, work.device):
            half = self.size // 2
            if self.scaling is None:
                own = self.base ** -(torch.arange(half, device=work.device, dtype=work.dtype) / half), 1.0
            else:
                own = self.scaled()
            signs = torch.ones(self.size, device=work.device, dtype=work.dtype)
            signs[:half] = -1
            self._made = own[0].to(work.device, work.dtype).repeat(2), signs, own[1]
        return self._made

    def scaled(self) -> tuple[Tensor, float]:
        """Frequencies float32 [d/2] and attention factor of a scaled rotary embedding, by Hugging Face's own formulas."""
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        like = LlamaConfig(
            hidden_size=self.size,
            num_attention_heads=1,
            head_dim=self.size,
            max_position_embeddings=self.limit,
            rope_parameters={**self.scaling, "rope_theta": self.base},
        )
        return ROPE_INIT_FUNCTIONS[self.scaling["rope_type"]](like, torch.device("cpu"))


def _wide(x: Tensor) -> Tensor:
    """Half precisions as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
