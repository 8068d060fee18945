"""A target and its drafters, loaded together: what the recorder, the profiler and the live commands start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from live.faults import holder_of
from live.heads import kind_of, load_head
from live.hub import parse_source, resolve
from live.identity import check_same_tokenizer, config_hash, tokenizer_hash, weights_hash
from live.lm_network import LanguageModelNetwork
from live.loading import load_model, load_target, load_tokenizer
from live.looking_up_first import Drafts, RuleFirst
from live.model import CachedModel, check_supported
from live.network import DraftNetwork
from policies.errors import UserError
from policies.lookup.name import DrafterName, read_name
from policies.lookup.rule import load_rule

REFERENCE_DRAFTS = ("reference/eagle3", "reference/draft")
SHIPPED_DRAFTS = (*REFERENCE_DRAFTS, "reference/medusa", "reference/dflash")
"""All that are shipped; the first two are loaded where none is named."""


@dataclass
class Pair:
    """A target with its drafters on one device.

    model        the target as Hugging Face has it
    tokenizer    shared by target and drafters
    networks     the drafters, by the name they have in recordings
    captured     hidden states that the drafters need (indices as in ``hidden_states``)
    description  what a manifest says of the models: ids, hashes, dtype, sizes
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    networks: dict[str, DraftNetwork]
    captured: tuple[int, ...]
    description: dict[str, Any]

    def target(self, rows: int = 1, drafter: Drafts | None = None) -> CachedModel:
        """The target with a cache of its own, for a ``drafter``; for any when none is named."""
        return CachedModel(self.model, rows, layers_to_capture=self.captured_for(drafter))

    def captured_for(self, drafter: Drafts | None) -> tuple[int, ...]:
        """The layers to capture for a drafter: none for one that reads no features."""
        return self.captured if drafter is None or getattr(drafter, "needs_features", False) else ()

    def plain(self, rows: int = 1) -> CachedModel:
        """The target as plain decoding uses it: nothing is captured."""
        return CachedModel(self.model, rows)

    def draft(self, name: str) -> Drafts:
        """What drafts under a name: a network of this pair, a training-free rule with its parameters, or a rule before a network.

        :raises UserError: when there is no such rule or network, or the rule's corpus is of another tokenizer.
        """
        if name in self.networks:
            return self.networks[name]
        asked = read_name(name, self.networks)
        rule = load_rule(asked.rule or name)
        if rule.frozen is not None:
            rule.frozen.check_tokenizer(self.description["target"]["tokenizer_sha256"], "the target")
        if asked.network is None:
            return rule
        if asked.network not in self.networks:
            known = ", ".join(self.networks) or "none"
            raise UserError(f"drafter '{name}' names no network of the pair behind its '+': write one that is loaded ({known})")
        return RuleFirst(rule, self.networks[asked.network])

    @property
    def end_tokens(self) -> list[int]:
        """Token ids that end a sequence, from the generation config."""
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def context_limit(self) -> int:
        """Tokens that fit in the context of the target and of every drafter."""
        return self.description["context_limit"]

    @property
    def context_holder(self) -> str:
        """What :attr:`context_limit` is the size of, in words: it may be a sliding window, far below what the model can read."""
        return holder_of(self.context_limit, check_supported(self.model))


def load_pair(
    target: str,
    drafts: list[str] | None,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> Pair:
    """Load a target and drafters; "reference" and "reference/NAME" are the shipped ones.

    :param target: a folder or hub id, with its options behind it where it has any (live/hub.py).
    :param drafts: the same; an empty list means the shipped drafters for the shipped target, None that no network drafts (a
        training-free drafter needs the target alone). A drafter's revision is its own; an EAGLE-3 head takes ``layers``, the
        boundaries to capture, and ``norm_before_residual``, a DFlash drafter ``block_size``, over their configurations'.
    :param revision: of the target.   :param device_map: "auto" spreads the target over several GPUs (needs accelerate).
    Raises UserError when something is missing or does not fit together.
    """
    source = parse_source(target, revision=revision)
    if drafts is None:
        drafts = []
    elif not drafts:
        if source.name != "reference":
            raise UserError("name at least one drafter with --draft (a folder or hub id of a draft head or a draft model)")
        drafts = list(REFERENCE_DRAFTS)
    for draft in drafts:
        if (asked := asked_of(draft)).rule is not None:
            rest, name = "leave it out here", asked
            if asked.network is not None:  # recordings call a network by the last part of its name
                rest = f"give {asked.network} alone"
                name = asked._replace(network=Path(parse_source(asked.network).name).name)
            raise UserError(
                f"'{asked.rule}' is training-free and has no model to load: {rest}, and name it as --drafter {name} where a "
                "recording is replayed"
            )
    model, tokenizer = load_target(source.name, dtype, device, source.revision, trust_remote_code, device_map)
    cached = CachedModel(model)
    networks: dict[str, DraftNetwork] = {}
    captured: tuple[int, ...] = ()
    about: list[dict[str, Any]] = []
    limit = cached.context_limit
    for draft in map(parse_source, drafts):
        folder = resolve("reference", draft.name.split("/")[1]) if draft.name in SHIPPED_DRAFTS else resolve(draft.name)
        name = Path(draft.name).name
        if name in networks:
            raise UserError(f"two drafters are named '{name}': give their folders different names")
        if (kind := kind_of(folder, draft.revision)) != "lm":
            networks[name], layers, config = load_head(kind, folder, draft, cached)
            captured, networks[name].features = place_in(captured, layers, cached.config.hidden_size)
            about.append({"name": name, "kind": kind, "id": str(draft), "captured_layers": list(layers)})
            about[-1]["config_sha256"] = config_hash(config)
            if (levels := networks[name].deepest) is not None:
                about[-1]["levels"] = levels
            if (block := getattr(config, "block_size", None)) is not None:
                about[-1]["block_size"] = block
        else:
            if extra := sorted(set(draft.options) - {"revision"}):
                raise UserError(f"{draft.name} is a language model, which has no {extra[0]}: leave it out")
            check_same_tokenizer(tokenizer, load_tokenizer(folder, draft.revision, trust_remote_code))
            own = load_model(folder, dtype, cached.device, draft.revision, trust_remote_code, part="draft")
            draft_model = CachedModel(own)
            limit = min(limit, draft_model.context_limit)
            networks[name] = LanguageModelNetwork(draft_model, name, model.get_input_embeddings().weight.shape[0])
            about.append({"name": name, "kind": "lm", "id": str(draft)})
        about[-1]["weights_sha256"] = weights_hash(folder, draft.revision)
    description = {
        "target": {
            "id": str(source),
            "architecture": type(model).__name__,
            "weights_sha256": weights_hash(resolve(source.name), source.revision),
            "tokenizer_sha256": tokenizer_hash(tokenizer),
            "vocabulary": model.config.get_text_config().vocab_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "drafters": about,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(cached.device),
        "context_limit": limit,
    }
    return Pair(model, tokenizer, networks, captured, description)


def place_in(captured: tuple[int, ...], layers: tuple[int, ...], size: int) -> tuple[tuple[int, ...], slice]:
    """Boundaries to capture for one head more, and where its own stand among the captured numbers, ``size`` for each boundary."""
    for first in range(len(captured) - len(layers) + 1):
        if captured[first : first + len(layers)] == layers:
            break
    else:
        captured, first = captured + layers, len(captured)
    return captured, slice(first * size, (first + len(layers)) * size)


def asked_of(draft: str) -> DrafterName:
    """What is asked for where a model may be named: its source, a training-free rule, or both; a folder comes first."""
    return DrafterName(None, draft) if Path(draft).exists() else read_name(draft)


def device_name(device: str | torch.device) -> str:
    """What the manifest calls the device: "cpu (2 threads)" or the GPU's name."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], chat_template: bool = True
) -> list[int]:
    """Token ids of a conversation, with the tokenizer's chat template when it has one, and the cue to answer.

    :param chat_template: False feeds the bare contents, one below the other.
    Raises UserError when the template refuses the messages (some take no system message).
    """
    if tokenizer.chat_template and chat_template:
        try:
            ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
        except TemplateError as error:
            raise UserError(
                f"the tokenizer's chat template refuses a prompt ({error}): change the prompt, or use --no-chat-template"
            ) from error
        return list(ids["input_ids"])
    return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
