"""The tensors of an EAGLE-3 checkpoint, whatever its layout, under the official names.

Layouts name the one decoder layer ``midlayer``, ``midlayer.0`` or ``layers.0``; some fuse q, k and v, or gate and up; NVIDIA's
training code has names of its own. Here they become one, and what is left over is an error that names it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from live.eagle3_config import Eagle3Config
from live.hub import weight_files
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


_NAMED = 12
"""Tensors that a message names, at most."""


class Sized(Protocol):
    """What the sizes of fused matrices follow from."""

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


def read_tensors(folder: Path, kind: str = "an EAGLE-3 head", prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, or of its pickled ones (read as data only), on the CPU.

    :param kind: of head, for messages.   :param prefix: of the names that are wanted; only those are read.
    :raises UserError: when there are none, or a file is damaged or holds more than tensors.
    """
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    if not files:
        raise UserError(f"no weights (*.safetensors or pytorch_model*.bin) in {folder}: give the folder of {kind}")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as held:
                    part = {name: held.get_tensor(name) for name in held.keys() if name.startswith(prefix)}
            else:
                part = torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            told = str(error).strip().splitlines()[0][:150]
            raise UserError(f"{file} holds no plain tensors, or only a part of them ({told}); fetch the head again") from None
        if not isinstance(part, dict) or not all(isinstance(tensor, Tensor) for tensor in part.values()):
            raise UserError(f"{file} is no table of tensors: give the weights of {kind}")
        found |= {name: tensor for name, tensor in part.items() if name.startswith(prefix)}
    return found


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's weight files, without reading the tensors; none of a damaged file."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for file in weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as part:
                    names |= set(part.keys())
            else:
                names |= set(torch.load(file, map_location="meta", weights_only=True))
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError):
            continue  # whoever loads it says what is wrong
    return names


def official_tensors(found: dict[str, Tensor], config: Eagle3Config) -> dict[str, Tensor]:
    """``found`` under the official names, q, k, v, gate and up apart, the vocabulary's maps as int64 and bool.

    :raises UserError: when there is more than one layer, or the maps contradict the sizes.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if _IGNORED.search(name):
            continue
        for pattern, official in _RENAMED:
            name = re.sub(pattern, official, name)
        named[name] = tensor
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


def split_fused(named: dict[str, Tensor], layer: str, config: Sized) -> None:
    """In place: q, k and v, gate and up of the layer with that prefix, apart where they were one."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for kind in ("weight", "bias"):
        _split(named, f"{layer}self_attn.qkv_proj.{kind}", ("q", "k", "v"), (heads * size, groups * size, groups * size))
        _split(named, f"{layer}mlp.gate_up_proj.{kind}", ("gate", "up"), (config.intermediate_size,) * 2)


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, kind: str = "an EAGLE-3 head") -> None:
    """:raises UserError: naming every tensor that is missing, unexpected or of another shape."""
    wrong = [f"missing {name}" for name in expected if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name].shape)} where {list(tensor.shape)} is expected"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise UserError(f"{what} is not {kind} that this loader knows: {'; '.join(wrong[:_NAMED])}{more}")


def _split(named: dict[str, Tensor], fused: str, parts: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    if fused in named:
        whole = named.pop(fused)
        if whole.shape[0] != sum(sizes):
            raise UserError(f"{fused} has {whole.shape[0]} rows where {sum(sizes)} are expected: it contradicts config.json")
        stem, _, kind = fused.rpartition(".")
        for part, piece in zip(parts, whole.split(sizes), strict=True):
            named[f"{stem.rpartition('.')[0]}.{part}_proj.{kind}"] = piece.contiguous()


def _vocabulary(named: dict[str, Tensor], config: Eagle3Config) -> dict[str, Tensor]:
    """d2t int64 [Vd] and t2d bool [V]; ModelOpt leaves t2d out, and where the vocabularies are one both may stand or not."""
    d2t, t2d = named.pop("d2t", None), named.pop("t2d", None)
    if config.draft_vocab_size == config.vocab_size:
        if d2t is not None and not d2t.is_meta and bool(d2t.any()):
            raise UserError("d2t renames tokens though draft and target vocabulary have one size: it contradicts config.json")
        return {}
    if d2t is None:
        return {} if t2d is None else {"t2d": t2d.bool()}
    d2t = d2t.to(torch.int64)
    if t2d is None and not d2t.is_meta:
        target = d2t + torch.arange(len(d2t))
        if int(target.min()) < 0 or int(target.max()) >= config.vocab_size:
            raise UserError(f"d2t points outside the target's vocabulary of {config.vocab_size} tokens; the head is damaged")
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, target, True)
    return {"d2t": d2t} if t2d is None else {"d2t": d2t, "t2d": t2d.bool()}
