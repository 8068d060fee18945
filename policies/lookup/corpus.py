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
        digests = [prompt_digest(prompt) for prompt in prompts]
        if seen := sum(digest in self.answered for digest in digests):
            raise UserError(
                f"the corpus {self.path} was made from answers to {seen} of the recording's {len(digests)} prompts, which would be "
                "looked up instead of drafted: make it from other texts (traces.slice takes a recording apart)"
            )


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
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(parts, temporary, {"corpus": json.dumps(header)})  # one key: the library writes several in any order
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the corpus {path} ({error}): name another file") from error
    return about


def read_corpus(path: str | Path) -> Corpus:
    """Open what :func:`write_corpus` wrote.

    :raises UserError: when there is no such file, or it is no corpus, damaged, or of a newer version.
    """
    if not Path(path).is_file():
        raise UserError(f"the corpus {path} does not exist: check its name, or {MAKE_IT}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("corpus", "{}"))
            parts = {name: file.get_tensor(name) for name in _PARTS} if header.get("format") == FORMAT else None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no corpus ({error}): {MAKE_IT}") from None
    if parts is None:
        raise UserError(f"{path} is no corpus: {MAKE_IT}")
    if header["version"] > VERSION:
        raise UserError(f"the corpus {path} is of version {header['version']}, newer than {VERSION}: upgrade specreplay")
    about = {name: header[name] for name in ("tokenizer_sha256", "sources")}
    if _checksum(parts, about) != header["sha256"]:
        raise UserError(f"the corpus {path} is damaged (its checksum differs): {MAKE_IT}")
    index = indexed(parts["token"], parts["length"], parts["order"])
    answered = frozenset(digest.tobytes() for digest in parts["answered"].numpy())
    return Corpus(str(path), index, len(parts["length"]), about | {"sha256": header["sha256"]}, answered)


def _checksum(parts: dict[str, Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in _PARTS:
        digest.update(f"{name} {tuple(parts[name].shape)}\n".encode())
        digest.update(parts[name].numpy().tobytes())
    return digest.hexdigest()
