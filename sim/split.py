"""Split a recording's texts into a training and a held-out part: seeded, stratified by domain, conversations kept whole."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from policies.errors import UserError

if TYPE_CHECKING:
    from traces.recording import Recording


class Split(NamedTuple):
    """Indices int64 of texts, ascending."""

    train: np.ndarray
    held_out: np.ndarray


def split_texts(recording: Recording, texts: np.ndarray | None = None, share: float = 0.5, seed: int = 0) -> Split:
    """:func:`split_sequences` for a recording: of the texts of one prompt, at several temperatures or turns, all lie in one part.

    :param texts: int64, indices of the texts to split; all by default.
    """
    texts = np.arange(len(recording.length)) if texts is None else texts
    ids, domains, prompts = recording.sequence_ids[texts], recording.domain_index[texts], prompt_index(recording)[texts]
    parts = split_sequences(ids, domains, share, seed, prompts)
    return Split(texts[parts.train], texts[parts.held_out])


def prompt_index(recording: Recording) -> np.ndarray:
    """Which prompt each text answers, int64 [S]: the index of the first text that answers it.

    A prompt goes by domain and id in every sampling group. A later turn of a conversation has the id ``ID/2``, ``ID/3``, ..., and
    its prompt begins with that of a turn before (which cannot be seen where prompts are hashed, ``--no-text``).
    """
    rows = recording.sequences()
    same = {(row["domain"], row["prompt_id"]): text for text, row in reversed(list(enumerate(rows)))}
    found = np.array([same[row["domain"], row["prompt_id"]] for row in rows], dtype=np.int64)
    turns: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (domain, prompt_id), text in same.items():
        talk, _, turn = prompt_id.rpartition("/")
        if turn.isdecimal():
            turns.setdefault((domain, talk), []).append((int(turn), text))
    for talk in map(sorted, turns.values()):
        for (_, earlier), (_, text) in itertools.pairwise(talk):
            if _continues(rows[text]["prompt_tokens"], rows[earlier]["prompt_tokens"]):
                both = np.isin(found, [found[earlier], found[text]])
                found[both] = found[both].min()
    return found


def _continues(prompt: list[int], earlier: list[int]) -> bool:
    return 0 < len(earlier) < len(prompt) and prompt[: len(earlier)] == earlier


def split_sequences(
    sequence_ids: np.ndarray, domain_index: np.ndarray, share: float = 0.5, seed: int = 0, together: np.ndarray | None = None
) -> Split:
    """Put about ``share`` of every domain's sequences into the training part.

    :param sequence_ids: int64 [S]. :param domain_index: int64 [S].
    :param together: int64 [S], sequences with the same number go into the same part; by default each goes by itself.
    A sequence's place depends on its id, the seed and its domain's other ids, not on the order of the shards nor on any
    library's random numbers: ids are sorted by a hash (those that go together by that of the lowest). A domain with two sequences
    or more, not all of them together, has some in both parts, unless the share is 0 or 1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the training share must lie between 0 and 1, not {share}")
    together = np.arange(len(sequence_ids)) if together is None else together
    train = np.zeros(len(sequence_ids), dtype=bool)
    for domain in np.unique(domain_index):
        members = np.flatnonzero(domain_index == domain)
        lowest: dict[int, int] = {}
        for number, sequence in zip(together[members].tolist(), sequence_ids[members].tolist(), strict=True):
            lowest[number] = min(sequence, lowest.get(number, sequence))
        shuffled = sorted(lowest, key=lambda number: hashlib.sha256(f"{seed}:{lowest[number]}".encode()).digest())
        count = round(share * len(shuffled))
        if 0 < share < 1 and len(shuffled) > 1:
            count = min(max(count, 1), len(shuffled) - 1)
        train[members] = np.isin(together[members], shuffled[:count])
    return Split(np.flatnonzero(train), np.flatnonzero(~train))
