"""Medusa heads: further output layers on the target's last hidden state, one for each of the next few places.

Cai et al. 2024, "Medusa" (https://arxiv.org/abs/2401.10774), section 3.1. Behind place i the target's last hidden state h_i (behind
the final norm) gives token t_{i+1} by the target's own output layer, and head k = 0, 1, ... gives t_{i+2+k}: some residual
blocks x + silu(W x), then a matrix over the vocabulary. A head knows the place, not what was drafted before it: all nodes of a
depth have the same children, and no tree is deeper than there are heads.

Layouts: the authors' ``medusa_lm_head.pt`` (``0.0.linear.weight``: head, block), the same inside a model's own files behind
``medusa_head.`` (their version 1.0, whose target lies in the same folder), and vLLM's names (``blocks.0.layers.0.weight``,
``lm_heads.0.weight``, with ``token_map`` where the vocabulary is shortened). Under vLLM's
``original_lm_head`` the heads share one matrix: the one that is there, or, which vLLM does not read, the target's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live.few_rows import quicken
from live.head_files import check_tensors, read_config, read_tensors, tensor_names
from policies.errors import UserError

_WHAT = "a set of Medusa heads"
_INSIDE = ("medusa_head.", "medusa_heads.")
_RENAMED = (
    (r"^(medusa_heads?\.)+", ""),
    (r"^(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2."),
    (r"^(\d+)\.\d+\.weight$", r"lm_heads.\1.weight"),
)


@dataclass(frozen=True)
class MedusaShape:
    """How many heads of how many residual blocks there are, and whose matrices they end in.

    By the tensors alone: in the authors' files the configuration counts other heads than there are.

    vocabulary   rows of the matrices; fewer than the target has tokens where a map belongs to them
    own          matrices in the file: one for each head, one for all, or none, and the target's is used
    """

    heads: int
    blocks: int
    hidden_size: int
    biased: bool
    vocabulary: int
    own: int
    mapped: bool

    @classmethod
    def of(cls, tensors: dict[str, Tensor], target_vocabulary: int) -> MedusaShape:
        """:raises UserError: when there are no heads."""
        places = [re.match(r"blocks\.(\d+)\.layers\.(\d+)\.weight$", name) for name, tensor in tensors.items() if tensor.dim() == 2]
        pairs = {(int(found[1]), int(found[2])) for found in places if found}
        if not pairs:
            raise UserError(f"the weights hold no residual blocks: give the folder of {_WHAT}")
        own = [tensor for name, tensor in tensors.items() if re.match(r"lm_heads\.\d+\.weight$", name) and tensor.dim() == 2]
        return cls(
            heads=1 + max(head for head, _ in pairs),
            blocks=1 + max(block for _, block in pairs),
            hidden_size=tensors[f"blocks.{min(pairs)[0]}.layers.{min(pairs)[1]}.weight"].shape[-1],
            biased=any(re.match(r"blocks\.\d+\.layers\.\d+\.bias$", name) for name in tensors),
            vocabulary=len(own[0]) if own else target_vocabulary,
            own=len(own),
            mapped="token_map" in tensors,
        )


class MedusaHeads(nn.Module):
    """The heads of one target."""

    token_map: Tensor | None  # int64 [V'], the target's token for each row of the matrices; None: the row's own number

    def __init__(self, shape: MedusaShape, output_layer: nn.Module | None):
        """:param output_layer: the target's, from [..., H] to logits [..., V]; for heads that have none of their own."""
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(size, size, bias=shape.biased) for _ in range(shape.blocks))})
            for _ in range(shape.heads)
        )
        if shape.own:
            self.lm_heads = nn.ModuleList(nn.Linear(size, shape.vocabulary, bias=False) for _ in range(shape.own))
        self.register_buffer("token_map", torch.zeros(shape.vocabulary, dtype=torch.int64) if shape.mapped else None)
        self._targets = (output_layer,)  # in a tuple, so that it is no part of the heads

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        embed_tokens: Tensor,
        output_layer: nn.Module | None,
        dtype: torch.dtype = torch.float32,
    ) -> MedusaHeads:
        """Load heads in either layout onto the device of ``embed_tokens`` [V, H], the target's, in ``dtype``.

        :param output_layer: the target's; None where there is none that could be used.
        :raises UserError: naming every tensor that is missing, unexpected or of another shape, or what does not fit the target.
        """
        folder, (vocabulary, hidden_size) = Path(folder), embed_tokens.shape
        told = read_config(folder / "config.json", _WHAT, dict)
        merged = any(name.startswith(_INSIDE) for name in tensor_names(folder))
        tensors = _named(read_tensors(folder, _WHAT, _INSIDE if merged else ""))
        shared = bool(told.get("original_lm_head"))
        if shared:
            _keep_one(tensors)
        if "token_map" in tensors:
            _shorten(tensors, folder, vocabulary)
        shape = MedusaShape.of(tensors, vocabulary)
        if shape.hidden_size != hidden_size:
            raise UserError(
                f"{folder} reads hidden states of {shape.hidden_size} numbers, the target's have {hidden_size}: give the target "
                "that these heads were trained for"
            )
        if told.get("logit_scale") not in (None, 1, 1.0):
            raise UserError(f"{folder} scales its logits (logit_scale), which this loader does not know; use heads without it")
        if not (shape.mapped or shape.vocabulary == vocabulary):
            raise UserError(
                f"{folder} knows {shape.vocabulary} tokens, the target {vocabulary}, and no token_map says which: give the target "
                "that these heads were trained for"
            )
        if not shape.own and output_layer is None:
            raise UserError(f"{folder} has no matrices of its own, and the target's output layer gives no logits as they are")
        with torch.device("meta"):  # shapes only: the tensors that are there take their places
            heads = cls(shape, output_layer)
        check_tensors(tensors, heads.state_dict(), str(folder), _WHAT)
        if not shared and shape.own != shape.heads:
            raise UserError(f"{folder} has {shape.heads} heads and {shape.own} matrices for them; fetch the heads again")
        heads.load_state_dict(tensors, assign=True)
        return quicken(heads.to(embed_tokens.device, dtype).eval().requires_grad_(False))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors under vLLM's names (weights in ``dtype``) into ``folder``."""
        from safetensors.torch import save_file

        folder, shape = Path(folder), self.shape
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor if name == "token_map" else tensor.to(dtype) for name, tensor in self.state_dict().items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        told: dict[str, Any] = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": shape.hidden_size,
            "num_heads": shape.heads,
            "num_hidden_layers": shape.blocks,
            "medusa_fc_bias": shape.biased,
            "original_lm_head": shape.own < shape.heads,
        }
        (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def logits(self, head: int, hidden: Tensor) -> Tensor:
        """Scores [..., V'] of one head, 0 the nearest, from the target's last hidden states [..., H]."""
        for layer in self.blocks[head]["layers"]:
            hidden = hidden + F.silu(layer(hidden))
        if not self.shape.own:
            return self._targets[0](hidden).to(hidden.device)  # a target on several devices has its own on the last
        return self.lm_heads[head if self.shape.own > 1 else 0](hidden)


def _keep_one(tensors: dict[str, Tensor]) -> None:
    """In place: of the matrices, the one that all heads share (as vLLM reads such files)."""
    whole = tensors.pop("lm_head.weight", None)
    first = tensors.get("lm_heads.0.weight", whole)
    for name in [name for name in tensors if name.startswith("lm_heads.")]:
        del tensors[name]
    if first is not None:
        tensors["lm_heads.0.weight"] = first


def _shorten(tensors: dict[str, Tensor], folder: Path, vocabulary: int) -> None:
    """In place: of matrices over the whole vocabulary, the rows that ``token_map`` names (as vLLM reads such files).

    :raises UserError: when it is no list of the target's ``vocabulary`` tokens.
    """
    kept = tensors["token_map"] = tensors["token_map"].to(torch.int64)
    if kept.dim() != 1 or not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= vocabulary:
        raise UserError(f"{folder}: token_map is empty or points outside the target's vocabulary of {vocabulary} tokens")
    for name in [name for name in tensors if name.startswith("lm_heads.")]:
        if tensors[name].dim() == 2 and vocabulary == len(tensors[name]) > len(kept):
            tensors[name] = tensors[name][kept]


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either layout by vLLM's names."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, other in _RENAMED:
            name = re.sub(pattern, other, name)
        named[name] = tensor
    return named
