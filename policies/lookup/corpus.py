"""A frozen corpus: earlier texts that a training-free drafter may look into beside its own; read once, never growing.

One safetensors file (``python -m live.corpus`` writes it): the texts' token ids, their lengths, the order of the index, and a
checksum per prompt that the texts answer, so that nothing is scored on texts that were looked up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from policies.errors import UserError
from policies.lookup.index import Index, indexed

FORMAT = "specreplay-corpus"
VERSION = 1
MAKE_IT = "make one with python -m live.corpus"
TELLING = 4
"""Tokens that a text must share with a prompt to be taken for its continuation: a begin token is everybody's."""
_PARTS = ("token", "length", "order", "answered")


@dataclass(frozen=True)
class Corpus:
    """What is in the file.

    path       where it was read
    index      its texts, sorted
    texts      how many they are
    about      tokenizer_sha256, sources (what it was made from), sha256 of all its content
    answered   sha256 digests of the prompts (token ids) that texts in it answer
    """

    path: str
    index: Index
    texts: int
    about: dict[str, Any]
    answered: frozenset[bytes]
    _elsewhere: dict[torch.device, Index] = field(default_factory=dict, compare=False)

    def on(self, device: torch.device) -> Index:
        """The index on a device, moved there once."""
        if device not in self._elsewhere:
            self._elsewhere[device] = self.index.to(device)
        return self._elsewhere[device]

    def facts(self) -> dict[str, Any]:
        """What a result is worth remembering with."""
        return {"path": self.path, "texts": self.texts, "tokens": len(self.index.token), **self.about}

    def check_tokenizer(self, sha256: str | None, whose: str) -> None:
        """:raises UserError: when the target's tokenizer is another one. :param whose: "the recording" or "the target"."""
        if sha256 is None:
            raise UserError(f"{whose} does not say which tokenizer its tokens are of, so it takes no corpus: record it again")
        if sha256 != self.about["tokenizer_sha256"]:
            raise UserError(
                f"the corpus {self.path} is of another tokenizer (sha256 {self.about['tokenizer_sha256'][:12]}) than {whose} "
                f"({sha256[:12]}): make it anew with python -m live.corpus --target and the same target"
            )

    def check_unseen(self, prompts: Iterable[Sequence[int]]) -> None:
        """:raises UserError: when the corpus holds answers to any of these prompts (token ids), which no score may come from."""
        prompts = {tuple(map(int, prompt)) for prompt in prompts}
        if seen := sum(prompt_digest(prompt) in self.answered or self._goes_on_from(prompt) for prompt in prompts):
            raise UserError(
                f"the corpus {self.path} was made from answers to {seen} of the recording's {len(prompts)} prompts, which would be "
                "looked up instead of drafted: make it from other texts (traces.slice takes a recording apart by domain)"
            )

    def _goes_on_from(self, prompt: Sequence[int]) -> bool:
        """Whether a text begins with all of a prompt: a later turn of a conversation holds the answers to those before."""
        token, wanted = self.index.token, torch.tensor(prompt, dtype=torch.int32)
        place = (self.index.before == 0).nonzero()[:, 0]
        place = place[self.index.after[place] >= len(prompt)] if len(prompt) >= TELLING else place[:0]
        for some in torch.arange(len(prompt)).split(16):  # few texts go on beyond the first
            place = place[(token[place[:, None] + some] == wanted[some]).all(1)]
        return len(place) > 0


def prompt_digest(prompt: Sequence[int]) -> bytes:
    """sha256 of a prompt's token ids."""
    return hashlib.sha256(np.asarray(prompt, dtype="<i4").tobytes()).digest()


def write_corpus(
    path: str | Path,
    texts: Sequence[Sequence[int]],
    tokenizer_sha256: str,
    sources: Sequence[dict[str, Any]],
    prompts: Iterable[Sequence[int]] = (),
) -> dict[str, Any]:
    """Freeze texts (token ids); the same texts give the same bytes. Returns what the file says of itself.

    :param sources: what the texts come from, in JSON types. :param prompts: those that the texts answer, where they do.
    :raises UserError: when there is no text, or the file cannot be written.
    """
    texts = [text for text in texts if len(text)]
    if not texts:
        raise UserError("a corpus needs at least one text: the sources hold none")
    token = torch.from_numpy(np.concatenate([np.asarray(text, dtype=np.int32) for text in texts]))
    length = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    digests = sorted({prompt_digest(prompt) for prompt in prompts})
    answered = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32).copy())
    parts = {"token": token, "length": length, "order": indexed(token, length).order, "answered": answered}
    about = {"tokenizer_sha256": tokenizer_sha256, "sources": list(sources)}
    about["sha256"] = _checksum(parts, about)
    header = {"format": FORMAT, "version": VERSION, **about}
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        save_file(parts, temporary, {"corpus": json.dumps(header)})  # one key: the library writes several in any order
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the corpus {path} ({error}): name another file") from error
    return about


def read_corpus(path: str | Path) -> Corpus:
    """Open what :func:`write_corpus` wrote; a file that has not changed is read once.

    :raises UserError: when there is no such file, or it is no corpus, damaged, or of a newer version.
    """
    try:
        about = os.stat(path)
    except OSError:
        about = None
    if about is None or not Path(path).is_file():
        raise UserError(f"the corpus {path} does not exist: check its name, or {MAKE_IT}")
    return _read(str(path), about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=4)
def _read(path: str, changed: int, size: int) -> Corpus:
    """The corpus of a file that was last ``changed`` then."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("corpus", "{}"))
            _check_header(header, path)
            parts = {name: file.get_tensor(name) for name in _PARTS}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no corpus ({error}): {MAKE_IT}") from None
    about = {name: header[name] for name in ("tokenizer_sha256", "sources")}
    if not _sound(parts) or _checksum(parts, about) != header["sha256"]:
        raise UserError(f"the corpus {path} is damaged (its checksum differs): {MAKE_IT}")
    index = indexed(parts["token"], parts["length"], parts["order"])
    answered = frozenset(digest.tobytes() for digest in parts["answered"].numpy())
    return Corpus(path, index, len(parts["length"]), about | {"sha256": header["sha256"]}, answered)


def _check_header(header: Any, path: str) -> None:
    """:raises UserError: when it is not that of a corpus which this version reads."""
    known = isinstance(header, dict) and header.get("format") == FORMAT and isinstance(header.get("version"), int)
    if known and header["version"] > VERSION:
        raise UserError(f"the corpus {path} is of version {header['version']}, newer than {VERSION}: upgrade specreplay")
    if not known or not {"sha256", "tokenizer_sha256", "sources"} <= header.keys():
        raise UserError(f"{path} is no corpus: {MAKE_IT}")


def _sound(parts: dict[str, Tensor]) -> bool:
    """Whether the tensors are those of texts: what is looked up in them stays inside."""
    token, length, order, answered = (parts[name] for name in _PARTS)
    shapes = token.dim() == length.dim() == order.dim() == 1 and answered.dim() == 2 and answered.shape[1] == 32
    kinds = [token.dtype, length.dtype, order.dtype, answered.dtype] == [torch.int32, torch.int64, torch.int32, torch.uint8]
    if not shapes or not kinds or not len(length) or not len(token) == len(order) == int(length.sum()):
        return False
    return int(length.min()) > 0 and bool((order.sort().values == torch.arange(len(order))).all())


def _checksum(parts: dict[str, Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in _PARTS:
        digest.update(f"{name} {tuple(parts[name].shape)}\n".encode())
        digest.update(parts[name].numpy().tobytes())
    return digest.hexdigest()
