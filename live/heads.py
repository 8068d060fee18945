"""Draft heads for a target, from a folder or hub id: which kind it holds, and what reads which of the target's streams."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from live.dflash import DFlashHead
from live.dflash_config import DFlashConfig
from live.dflash_network import DFlashNetwork
from live.eagle1 import Eagle1Config, Eagle1Head
from live.eagle3 import Eagle3Head
from live.eagle3_config import Eagle3Config
from live.eagle_network import EagleNetwork
from live.head_files import tensor_names
from live.hub import Source, fetch_config, fetch_folder
from live.medusa import MedusaHeads, MedusaShape
from live.medusa_network import MedusaNetwork
from live.model import CachedModel, last_hidden
from policies.errors import UserError

_OPTIONS = {"eagle3": ("layers", "norm_before_residual"), "dflash": ("block_size",)}
"""What may be said of a head of a kind, over its configuration."""


class LoadedHead(NamedTuple):
    """A draft network, the boundaries of the target's layers that it reads, low to high, and how its weights are read."""

    network: EagleNetwork | MedusaNetwork | DFlashNetwork
    layers: tuple[int, ...]
    config: Eagle3Config | Eagle1Config | MedusaShape | DFlashConfig


def kind_of(folder: str, revision: str | None = None) -> str:
    """What a folder or hub id holds: "eagle3", "eagle" (EAGLE-1 and 2), "medusa", "dflash", or "lm", a language model.

    An EAGLE-1 head has the configuration of a Llama with one layer: there the names of its tensors tell.
    """
    path = fetch_config(folder, revision)
    if not path.is_file():
        return "lm"
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy the drafter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: copy the drafter again")
    told = (str(config.get("architectures")) + str(config.get("speculators_model_type"))).lower()
    if "dflash_config" in config or any(name in told for name in ("dflash", "dspark")):
        return "dflash"
    if "draft_vocab_size" in config or "eagle_config" in config or "eagle3" in told:
        return "eagle3"
    if "medusa_num_heads" in config or config.get("model_type") == "medusa":
        return "medusa"
    named = "eagle" in told or config.get("model_type") == "eagle"
    if named or config.get("num_hidden_layers") == 1:
        return "eagle" if named or _has_fc(fetch_folder(folder, revision)) else "lm"
    return "lm"


def _has_fc(folder: Path) -> bool:
    return any(name.removeprefix("model.") == "fc.weight" for name in tensor_names(folder))


def load_head(kind: str, folder: str, draft: Source, target: CachedModel) -> LoadedHead:
    """The head of a kind in a folder or hub id, for a target; says on stderr what was resolved.

    A wrong layer id or residual fails silently, as bad acceptance: hence the line (and traces/selftest.py).
    """
    path = fetch_folder(folder, draft.revision)
    if extra := sorted(set(draft.options) - {"revision", *_OPTIONS.get(kind, ())}):
        raise UserError(f"{draft.name} is a head of kind {kind}, which has no {extra[0]}: leave it out")
    if kind == "eagle3":
        return _load_eagle3(path, draft, target)
    return {"medusa": _load_medusa, "dflash": _load_dflash, "eagle": _load_eagle1}[kind](path, draft, target)


def _load_eagle3(path: Path, draft: Source, target: CachedModel) -> LoadedHead:
    config = Eagle3Config.from_file(path / "config.json")
    if (flag := draft.options.get("norm_before_residual")) is not None:
        config = replace(config, norm_before_residual=bool(flag))
    if (asked := draft.options.get("layers")) is not None:
        if not isinstance(asked, (list, tuple)) or not all(type(i) is int for i in asked) or len(asked) != config.streams:
            raise UserError(f"layers of '{draft}' must be {config.streams} whole numbers, such as layers=[2, 16, 29]")
        # a list of boundaries, whatever convention its numbers might suggest
        layers, why = tuple(asked), "as asked"
        if min(layers) < 0 or max(layers) > target.config.num_hidden_layers:
            raise UserError(f"'{draft}' names layers beyond the target's {target.config.num_hidden_layers}; name boundaries within")
    else:
        layers, why = config.boundaries(target.config.num_hidden_layers)
    if config.target_hidden_size != target.config.hidden_size:
        raise _other_target(draft, config.target_hidden_size, target)
    embeddings = target.model.get_input_embeddings().weight.detach()
    head = Eagle3Head.from_pretrained(path, embeddings, target.dtype, config)
    name = Path(draft.name).name
    residual = "normed" if config.norm_before_residual else "un-normed"
    listed = ", ".join(map(str, layers))
    _say(f"{name}: EAGLE-3 head, {config.layout} layout; reads what enters layers {listed} ({why}); {residual} residual", config)
    return LoadedHead(EagleNetwork(head, name), layers, head.config)


def _load_eagle1(path: Path, draft: Source, target: CachedModel) -> LoadedHead:
    embeddings, name = target.model.get_input_embeddings().weight.detach(), Path(draft.name).name
    head = Eagle1Head.from_pretrained(path, embeddings, _output_layer(target), target.dtype)
    _say(f"{name}: EAGLE-1 head; reads the last hidden state", head.config)
    return LoadedHead(EagleNetwork(head, name), (last_hidden(target.model),), head.config)


def _load_medusa(path: Path, draft: Source, target: CachedModel) -> LoadedHead:
    embeddings, name = target.model.get_input_embeddings().weight.detach(), Path(draft.name).name
    usable = None if _changes_logits(target) else target.model.get_output_embeddings()
    heads = MedusaHeads.from_pretrained(path, embeddings, usable, target.dtype)
    shape = heads.shape
    whose = {0: "the target's own output layer", 1: "one matrix for all"}.get(shape.own, "a matrix of its own each")
    print(f"{name}: {shape.heads} Medusa heads; read the last hidden state, {whose}", file=sys.stderr)
    return LoadedHead(MedusaNetwork(heads, name), (last_hidden(target.model),), shape)


def _load_dflash(path: Path, draft: Source, target: CachedModel) -> LoadedHead:
    config = DFlashConfig.from_file(path / "config.json")
    if (size := draft.options.get("block_size")) is not None:
        if type(size) is not int or size < 2:
            raise UserError(f"block_size of '{draft}' must be a whole number, 2 or more: the root and what is drafted behind it")
        config = replace(config, block_size=size)
    layers = config.boundaries(target.config.num_hidden_layers)
    if config.target_hidden_size != target.config.hidden_size:
        raise _other_target(draft, config.target_hidden_size, target)
    embeddings, name = target.model.get_input_embeddings().weight.detach(), Path(draft.name).name
    # what the target does to its logits behind that layer, the drafter's own configuration says
    head = DFlashHead.from_pretrained(path, embeddings, target.model.get_output_embeddings(), target.dtype, config)
    listed = ", ".join(map(str, layers))
    what = f"DFlash drafter, {config.layout} layout, {config.deepest} tokens a block; reads what enters layers {listed}"
    _say(f"{name}: {what}", config)
    return LoadedHead(DFlashNetwork(head, name), layers, head.config)


def _other_target(draft: Source, size: int, target: CachedModel) -> UserError:
    return UserError(
        f"{draft.name} reads features of {size} numbers, the target's have {target.config.hidden_size}: "
        "give the target that this head was trained for"
    )


def _output_layer(target: CachedModel) -> nn.Module:
    """The target's output layer, which drafts too. Raises UserError where logits are not what it gives."""
    layer = target.model.get_output_embeddings()
    if layer is None or _changes_logits(target):
        raise UserError(
            f"{type(target.model).__name__} changes what its output layer gives before it becomes logits, which a head that ends "
            "in that layer cannot follow: give a drafter with an output layer of its own"
        )
    return layer


def _changes_logits(target: CachedModel) -> bool:
    """Whether the target scales or caps its logits behind the output layer (Gemma 2, Cohere, Granite, Falcon-H1)."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return any(getattr(target.config, name, None) not in (None, 1, 1.0) for name in names)


def _say(what: str, config: Any) -> None:
    scaling = f" scaled ({config.rope_scaling['rope_type']})" if config.rope_scaling else ""
    print(f"{what}; rotary base {config.rope_theta:g}{scaling}", file=sys.stderr)
