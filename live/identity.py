"""Which models and tokenizers they were, by content: what manifests keep and fidelity runs compare."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, uint8
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from live.hub import fetch_config, resolve, weight_files
from policies.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over all that decides which ids a text gets: vocabulary, merges, added tokens, normaliser, splitting.

    Two tokenizers with equal hashes give equal ids, whatever their names; padding, truncation, templates do not count.
    """
    parts = _parts(tokenizer)
    content = parts["vocabulary"] if len(parts) == 1 else [parts[name] for name in ("model", "added", "normalisation", "splitting")]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_tokenizer(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Compare by content. Tokens that only one of the two has added are no hindrance: the other never proposes them.

    :raises UserError: when a token that both know has two numbers, a number two tokens, or text is split differently.
    """
    if tokenizer_hash(target) == tokenizer_hash(draft):
        return
    raise_unless_same(target.get_vocab(), draft.get_vocab())
    ours, theirs = _parts(target), _parts(draft)
    for name in ours.keys() | theirs.keys():
        if name != "added" and ours.get(name) != theirs.get(name):
            told = "merges differ" if name == "model" else f"{name} differs"
            raise UserError(f"target and draft have different tokenizers (their {told}); choose a draft made for this target")


def raise_unless_same(ours: dict[str, int], theirs: dict[str, int]) -> None:
    """:raises UserError: when one token has two numbers, or one number two tokens."""
    here, there = ({number: token for token, number in vocabulary.items()} for vocabulary in (ours, theirs))
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        other = theirs.get(token, number)
        if other != number or there.get(number, token) != token:
            told = (
                f"{token!r} is numbered {number} and {other}"
                if other != number
                else f"number {number} is {here[number]!r} and {there[number]!r}"
            )
            raise UserError(f"target and draft have different tokenizers ({told}); choose a draft made for this target")


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer consists of, as JSON types; of one without a fast backend only the vocabulary is known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])}
    whole = json.loads(backend.to_str())
    added = sorted((token["id"], token["content"]) for token in whole.get("added_tokens", []))
    return {
        "model": whole["model"],
        "added": added,
        "normalisation": whole.get("normalizer"),
        "splitting": whole.get("pre_tokenizer"),
    }


def weights_hash(folder_or_model: str | Path | PreTrainedModel, revision: str | None = None) -> str:
    """sha256 (hex) of a model's weights.

    Of a folder or hub id: over its weight files (the same whatever dtype they are loaded as). Of a model in memory:
    over names, dtypes, shapes and bytes of its tensors (so it changes with the dtype).
    :raises UserError: when a folder has no weights.
    """
    digest = hashlib.sha256()
    if isinstance(folder_or_model, PreTrainedModel):
        for name, tensor in sorted(folder_or_model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()
    folder = fetch_config(resolve(folder_or_model), revision).parent
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no weights (*.safetensors or *.bin); copy them there")
    for file in files:
        digest.update(f"{file.name} {_file_sha256(file)}\n".encode())
    return digest.hexdigest()


def config_hash(config: DataclassInstance) -> str:
    """sha256 (hex) of how a head's weights are read: its configuration with what was asked for over it, whatever its layout.

    The same weights under another block size, window or rotary base are another drafter. Whether its embeddings are the target's
    is left out, which a precision may decide.
    """
    told = {name: value for name, value in asdict(config).items() if name not in ("layout", "own_embeddings")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    blob = file.resolve().name  # in the hub's cache, large files are named by their own sha256
    if file.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes()
