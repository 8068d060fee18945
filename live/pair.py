"""A target and its drafters, loaded together: what the recorder, the profiler and the live commands start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from live.eagle3 import Eagle3Head, captured_layers
from live.eagle_network import EagleNetwork
from live.lm_network import LanguageModelNetwork
from live.loading import (
    check_same_tokenizer,
    load_model,
    load_target,
    load_tokenizer,
    resolve,
    tokenizer_hash,
    weights_hash,
)
from live.model import CachedModel
from live.network import DraftNetwork
from policies.errors import UserError

REFERENCE_DRAFTS = ("reference/eagle3", "reference/draft")


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

    def target(self, rows: int = 1) -> CachedModel:
        """The target with a cache of its own."""
        return CachedModel(self.model, rows, layers_to_capture=self.captured)

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


def load_pair(target: str, drafts: list[str], dtype: str = "float32", device: str = "cpu", **hub: Any) -> Pair:
    """Load a target and drafters; "reference" and "reference/NAME" are the shipped ones.

    :param drafts: folders or hub ids; an empty list means the shipped drafters for the shipped target.
    :param hub: revision and trust_remote_code, passed on.
    Raises UserError when something is missing or does not fit together.
    """
    if not drafts:
        if target != "reference":
            raise UserError("name at least one drafter with --draft (a folder or hub id of an EAGLE-3 head or a draft model)")
        drafts = list(REFERENCE_DRAFTS)
    model, tokenizer = load_target(target, dtype, device, **hub)
    networks: dict[str, DraftNetwork] = {}
    captured: tuple[int, ...] = ()
    about = []
    limit = CachedModel(model).context_limit
    for draft in drafts:
        folder = resolve("reference", draft.split("/")[1]) if draft in REFERENCE_DRAFTS else resolve(draft)
        name = Path(draft).name
        if name in networks:
            raise UserError(f"two drafters are named '{name}': give their folders different names")
        if is_eagle3(folder):
            layers = captured_layers(model.config.get_text_config().num_hidden_layers)
            if captured not in ((), layers):
                raise UserError("the EAGLE-3 heads want different target layers: record them in separate runs")
            captured = layers
            head = Eagle3Head.from_pretrained(folder, model.get_input_embeddings().weight.detach(), dtype=model.dtype)
            networks[name] = EagleNetwork(head.to(device).eval().requires_grad_(False), name)
            about.append({"name": name, "kind": "eagle3", "id": draft, "captured_layers": list(layers)})
        else:
            check_same_tokenizer(tokenizer, load_tokenizer(folder))
            draft_model = CachedModel(load_model(folder, dtype, device, **hub))
            limit = min(limit, draft_model.context_limit)
            networks[name] = LanguageModelNetwork(draft_model, name)
            about.append({"name": name, "kind": "lm", "id": draft})
        about[-1]["weights_sha256"] = weights_hash(folder)
    description = {
        "target": {
            "id": target,
            "architecture": type(model).__name__,
            "weights_sha256": weights_hash(resolve(target)),
            "tokenizer_sha256": tokenizer_hash(tokenizer),
            "vocabulary": model.config.get_text_config().vocab_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "drafters": about,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "context_limit": limit,
    }
    return Pair(model, tokenizer, networks, captured, description)


def is_eagle3(folder: str) -> bool:
    """Whether a model folder holds an EAGLE-3 head (by its configuration)."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy the drafter again") from None
    return "draft_vocab_size" in config or any("Eagle3" in name for name in config.get("architectures") or ())


def device_name(device: str) -> str:
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
