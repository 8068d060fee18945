"""A world without networks: hash-seeded draft distributions with many ties, and a truth to verify against.

The distribution behind a node is a function of (row key, place in the text, token): deterministic, the same in every
batch, and computable one node at a time by the brute-force builders (`children_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from policies.contract import Cycle, Policy, State
from policies.order import NONE
from policies.tree import Children, DraftTree
from policies.verification import Kept, Walk, walk

VOCABULARY = 24


def mix(*parts: np.ndarray | int) -> np.ndarray:
    """A 64-bit hash (splitmix64) of whole numbers, elementwise."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for part in parts:
            value = np.asarray(part, dtype=np.int64).astype(np.uint64)
            state = (state ^ value) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


@dataclass(frozen=True)
class Language:
    """Which distributions the draft proposes.

    steps    log-probabilities are -quantum times a whole number below this; few steps make many ties
    holes    one node in this many cannot be expanded (as in a recording that lacks it); 0 = none
    narrow   one node in this many has only three children (a small draft vocabulary); 0 = none
    """

    seed: int = 0
    steps: int = 6
    quantum: float = 0.25
    holes: int = 0
    narrow: int = 0

    def distribution(self, key: np.ndarray, place: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64 [..., V], log-probabilities float32 [..., V]) most probable first, -1 and -inf where cut."""
        vocabulary = np.arange(VOCABULARY)
        node = mix(self.seed, key, place, token)
        draws = mix(node.astype(np.int64)[..., None], vocabulary)
        steps = (draws % np.uint64(self.steps)).astype(np.int64)
        shuffled = (draws >> np.uint64(8)).astype(np.int64)
        tokens = np.lexsort((shuffled, steps), axis=-1)  # most probable first, then by hash
        lead = (mix(node.astype(np.int64), 3) % np.uint64(10)).astype(np.int64)  # some are surer of their first child
        lead = np.where(self.steps > 1, lead, 0)[..., None] * (vocabulary > 0)
        logprob = -self.quantum * (np.take_along_axis(steps, tokens, -1) + lead).astype(np.float32)
        cut = self._one_in(self.narrow, node, 1)[..., None] & (np.arange(VOCABULARY) >= 3)
        return np.where(cut, NONE, tokens), np.where(cut, -np.inf, logprob).astype(np.float32)

    def is_hole(self, key: np.ndarray, place: np.ndarray, token: np.ndarray) -> np.ndarray:
        return self._one_in(self.holes, mix(self.seed, key, place, token), 2)

    @staticmethod
    def _one_in(count: int, node: np.ndarray, salt: int) -> np.ndarray:
        if count == 0:
            return np.zeros(node.shape, dtype=bool)
        return mix(node.astype(np.int64), salt) % np.uint64(count) == 0

    def children_of(self, key: int, place: int, token: int, branching: int) -> list[tuple[int, np.float32]]:
        """(token, log-probability) of one node's children; empty where it cannot be expanded."""
        if self.is_hole(np.int64(key), np.int64(place), np.int64(token)):
            return []
        tokens, logprobs = self.distribution(np.int64(key), np.int64(place), np.int64(token))
        return [(int(t), p) for t, p in zip(tokens[:branching], logprobs[:branching], strict=True) if t >= 0]

    def truth(self, key: int, length: int, surprise: int = 5, salt: int = 0) -> list[int]:
        """A text that the draft guesses fairly well: mostly its first choices, one token in ``surprise`` any other."""
        return self.truths((key,), length, surprise, salt)[0]

    def truths(self, keys: Sequence[int], length: int, surprise: int = 5, salt: int = 0) -> list[list[int]]:
        """The texts of several keys."""
        return [list(text) for text in _truths(self, tuple(keys), length, surprise, salt)]


@lru_cache(maxsize=1024)
def _truths(language: Language, keys: tuple[int, ...], length: int, surprise: int, salt: int) -> tuple[tuple[int, ...], ...]:
    """Every policy meets the same texts."""
    key, places = np.array(keys, dtype=np.int64)[:, None], np.arange(1, length)
    behind, _ = language.distribution(key[:, :, None], places[:, None] - 1, np.arange(VOCABULARY))
    draws, firsts = mix(language.seed, key, places, salt, 77).tolist(), mix(key, salt) % np.uint64(VOCABULARY)
    texts = []
    for first, choices, own in zip(firsts[:, 0].tolist(), behind.tolist(), draws, strict=True):
        text = [first]
        for tokens, draw in zip(choices, own, strict=True):
            offered = [token for token in tokens[text[-1]] if token >= 0]
            rank = draw % 2 if draw % surprise else draw % len(offered)
            text.append(offered[rank % len(offered)])
        texts.append(tuple(text))
    return tuple(texts)


class SyntheticDrafter:
    """The language as a drafter. ``wide`` gives more children than asked, as a recording may. Handles mean nothing."""

    deepest = None

    def __init__(self, language: Language, texts: list[list[int]], keys: list[int] | None = None, wide: bool = False):
        self.language, self.wide = language, wide
        self.keys = torch.tensor(list(range(len(texts))) if keys is None else keys)
        longest = max(len(text) for text in texts)
        self.texts = torch.tensor([text + [NONE] * (longest - len(text)) for text in texts])

    def root(self, cycle: Cycle) -> Tensor:
        self._key, self._position = self.keys[cycle.sequence], cycle.position
        return self.texts[cycle.sequence, cycle.position]

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        source = nodes.clamp(min=0)
        place = (self._position[:, None] + tree.depth.gather(1, source)).numpy()
        key = self._key[:, None].expand_as(nodes).numpy()
        token = tree.token.gather(1, source).numpy()
        tokens, logprobs = self.language.distribution(key, place, token)
        width = VOCABULARY if self.wide else min(branching, VOCABULARY)
        missing = torch.from_numpy(self.language.is_hole(key, place, token)) & (nodes >= 0)
        nothing = ((nodes < 0) | missing)[:, :, None]
        children = torch.from_numpy(tokens[..., :width].copy()).masked_fill(nothing, NONE)
        return Children(
            token=children,
            logprob=torch.from_numpy(logprobs[..., :width].copy()).masked_fill(nothing, -torch.inf),
            entropy=torch.from_numpy((mix(key, place, token) % np.uint64(100)).astype(np.float32)),
            handle=children * 1000 + 7,
            missing=missing if self.language.holes else None,
        )


class SyntheticVerifier:
    """Chooses the tokens of the given texts; behind their end nothing."""

    def __init__(self, texts: list[list[int]]):
        longest = max(len(text) for text in texts) + 1
        self.texts = torch.tensor([text + [NONE] * (longest - len(text)) for text in texts])

    def accept(self, cycle: Cycle, kept: Kept) -> Walk:
        behind = (cycle.position[:, None] + kept.depth.clamp(min=0) + 1).clamp(max=self.texts.shape[1] - 1)
        return walk(kept, self.texts[cycle.sequence].gather(1, behind))

    def target_top(self, cycle: Cycle, kept: Kept, walk: Walk) -> tuple[Tensor, Tensor]:
        places = torch.arange(walk.path.shape[1] + 1)
        behind = (cycle.position[:, None] + places + 1).clamp(max=self.texts.shape[1] - 1)
        token = self.texts[cycle.sequence].gather(1, behind).masked_fill(places > walk.accepted[:, None], NONE)
        return token[:, :, None], torch.where(token >= 0, -0.5, -torch.inf)[:, :, None]


class Priced:
    """A cost model that one can follow by hand (ms)."""

    def draft_ms(self, width, context, batch):
        return 2.0 + 0.0 * width + 0.01 * context

    def catch_up_ms(self, tokens, context, batch):
        return 3.0 + 0.0 * tokens + 0.0 * context

    def verify_ms(self, tokens, context, batch):
        return 10.0 + 0.5 * tokens * batch + 0.0 * context

    def commit_ms(self, tokens, batch):
        return 0.25 * tokens

    def overhead_ms(self, levels, batch):
        return 1.0 + 0.125 * levels


def cycle_at(
    sequence: list[int], position: list[int], reach: list[int] | int = 10**6, active: list[bool] | None = None
) -> Cycle:
    """A cycle for rows at the given places."""
    rows = torch.tensor(sequence, dtype=torch.int64)
    place = torch.tensor(position, dtype=torch.int64)
    return Cycle(
        active=torch.ones_like(rows, dtype=torch.bool) if active is None else torch.tensor(active),
        sequence=rows,
        number=torch.zeros_like(rows),
        position=place,
        context_length=place + 5,
        room=torch.full_like(rows, 10**6),
        reach=torch.tensor(reach).expand(len(sequence)).clone(),
        root_told=lambda: (0.25 * ((7 * rows + 3 * place) % 5), torch.full((len(sequence),), -0.25)),
        group=rows,  # every sequence a serving batch of its own
    )


def fresh(policy: Policy, cycle: Cycle) -> State:
    """The state of a policy's first cycle."""
    return policy.begin(cycle, policy.init(len(cycle.sequence), cycle.sequence))
