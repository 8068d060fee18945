"""The words behind token ids, for reading a recording on screen; without a tokenizer at hand, the ids themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


class Vocabulary:
    """Token id -> text. ``known`` is False where no tokenizer was found: then a token reads as its number."""

    def __init__(self, tokenizer: Any = None):
        """:param tokenizer: a ``tokenizers.Tokenizer``, or None."""
        self._tokenizer = tokenizer
        self._piece = cache(self._look_up)

    @property
    def known(self) -> bool:
        return self._tokenizer is not None

    def piece(self, token: int) -> str:
        """The token's text, blanks and line breaks as they are; "" for -1."""
        return self._piece(int(token))

    def label(self, token: int) -> str:
        """The token's text with its blanks and line breaks made visible."""
        return self.piece(token).translate(VISIBLE)

    def text(self, tokens: Iterable[int]) -> str:
        """The tokens' texts, joined."""
        tokens = [int(token) for token in tokens if token >= 0]
        if self._tokenizer is None:
            return " ".join(map(self.piece, tokens))
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _look_up(self, token: int) -> str:
        if token < 0:
            return ""
        if self._tokenizer is None:
            return f"#{token}"
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return f"#{token}"
        if "▁" in piece:  # SentencePiece writes blanks so, and its decoder drops a leading one
            return piece.replace("▁", " ")
        return self._tokenizer.decode([token], skip_special_tokens=False) or piece


def find_vocabulary(manifest: Mapping[str, Any], shipped: Path) -> Vocabulary:
    """The vocabulary of a recording's target: the shipped one, a folder's, or one in the local model cache.

    Nothing is fetched from anywhere, and a tokenizer whose vocabulary has another size is not used.

    :param shipped: folder of the target that manifests call "reference".
    """
    target = manifest.get("target", {})
    path = _tokenizer_file(str(target.get("id", "")), shipped)
    if path is None:
        return Vocabulary()
    with suppress(Exception):  # of whatever kind: a page with numbers is better than none
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.get_vocab_size() <= target.get("vocabulary", 0):  # models pad their vocabulary, never cut it
            return Vocabulary(tokenizer)
    return Vocabulary()


def _tokenizer_file(target: str, shipped: Path) -> Path | None:
    folder = shipped if target == "reference" else Path(target).expanduser()
    if target and (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    with suppress(Exception):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(target, "tokenizer.json")
        return Path(found) if isinstance(found, str) else None
    return None
