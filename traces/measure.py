"""Stopwatch measurements of the live classes, at one context length at a time.

The boundaries are those of the two protocols that replay swaps out: everything inside ``Drafter.expand`` is the draft's
(catch-up for the root, a draft level otherwise), everything inside ``Verifier.accept`` the target's (its cache commit
apart); what a cycle takes beyond them is overhead of loop and policy (`traces.overhead`). So the parts add up to the
cycle. Texts are real ones: zeros and repeated tokens can be faster than what people decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from live.border import fetched, sent
from live.decoding_plain import plain_decode
from live.drafter import LiveDrafter
from live.model import CachedModel
from live.network import DraftNetwork
from live.verifier import LiveVerifier, sees_ancestors
from policies.contract import Cycle
from policies.tree import DraftTree
from policies.verification import Kept

TREE_DEPTH = 8
"""Depth of the trees to verify, where they have enough nodes for it (EAGLE-3's published depth)."""
TRUE_DEPTH = 3
"""Depth to which those trees follow the target's own text, so that the walk accepts and the commit moves something."""
LEVELS_TIMED = 3
IN_A_ROW = 3
"""Verifications of one shape that are timed one after the other."""
CATCH_UP_BRANCHING = 10
RAGGED = 8
"""Rows of a batch differ in length by up to this minus one token, as rows that decode together do."""


class Stopwatch:
    """Milliseconds spent inside wrapped calls, by name; waits for the device around each."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ms: dict[str, float] = {}

    def now(self) -> float:
        """A reading in milliseconds, with all work on the device done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def time(self, call: Callable, *args: Any) -> tuple[Any, float]:
        """Result and milliseconds of a call."""
        started = self.now()
        result = call(*args)
        return result, self.now() - started

    def wrap(self, name: str, call: Callable) -> Callable:
        """``call``, with its time added to ``ms[name]``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            result, spent = self.time(partial(call, *args, **kwargs))
            self.ms[name] = self.ms.get(name, 0.0) + spent
            return result

        return timed

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        taken, self.ms = self.ms, {}
        return taken


def lengths_of(rows: int, context: int) -> Tensor:
    """Context lengths int64 [R] of rows that decode together: ``context`` or a little less."""
    return context - torch.arange(rows) % RAGGED


def about(context_length: Tensor) -> Cycle:
    """A cycle of which only the context lengths matter."""
    nothing = torch.zeros_like(context_length)
    zero = nothing.float()
    room = torch.full_like(nothing, 1 << 20)
    return Cycle(nothing == 0, nothing, nothing, nothing, context_length, room, room, lambda: (zero, zero), nothing)


class TargetStage:
    """The target behind a text of some length; every measurement leaves it as it was.

    :param text: int64 [R, L] tokens on the host, longer than any context asked for.
    """

    def __init__(self, target: CachedModel, text: Tensor, end_tokens: list[int]):
        self.target, self.text = target, text
        self.watch = Stopwatch(target.device)
        self._commit = target.commit
        target.commit = self.watch.wrap("commit", self._commit)
        self.verifier = LiveVerifier(target, torch.tensor(end_tokens, dtype=torch.int64))

    def settle(self, context: int) -> None:
        """Go behind ``context`` tokens and look up how the target itself goes on from there."""
        rows = self.text.shape[0]
        self.context = lengths_of(rows, context)
        self.target.reset(rows)
        self.target.prefill(self.text[:, : int(self.context.max())], self.context, logits="none")
        self.root = self.text.gather(1, self.context[:, None])[:, 0]
        step, spine = self.root, []
        for _ in range(TRUE_DEPTH):
            step = fetched(self.target.prefill(step[:, None], logits="last").logits[:, 0].argmax(-1))
            spine.append(step)
        self.spine = torch.stack(spine, dim=1)
        self._rewind(torch.full_like(self.context, TRUE_DEPTH))

    def verify(self, tokens: int) -> list[float]:
        """ms of verifying a tree of ``tokens`` nodes, the root among them, without the commit: some times in a row, as a decoding
        does it, behind a first one that pays for what the shape before left in memory and caches."""
        kept, cycle = self._tree(tokens), about(self.context)
        spent = []
        for _ in range(1 + IN_A_ROW):
            self.watch.take()
            outcome, total = self.watch.time(self.verifier.accept, cycle, kept)
            self._rewind(outcome.accepted + 1)
            spent.append(total - self.watch.take()["commit"])
        return spent[1:]

    def pass_by(self) -> None:
        """A pass whose weights push what the draft had in the processor's caches out of them, as one does before every catch-up."""
        outcome = self.verifier.accept(about(self.context), self._tree(1))
        self._rewind(outcome.accepted + 1)

    def commit(self, tokens: int) -> float:
        """ms of moving ``tokens`` cache entries that lie scattered in the tree (the root stays in its place)."""
        kept = self._tree(2 * tokens)
        self.target.forward_tree(kept.token, None, self.context[:, None] + kept.depth, sees_ancestors(kept))
        slots = 2 * torch.arange(tokens).expand(len(self.context), -1)
        counts = torch.full_like(self.context, tokens)
        _, spent = self.watch.time(self._commit, slots, counts)
        self._rewind(counts)
        return spent

    def _rewind(self, counts: Tensor) -> None:
        """Give the last committed tokens back, int64 [R]."""
        self.target.cache.extend([-count for count in counts.tolist()])

    def _tree(self, tokens: int) -> Kept:
        """A tree of ``tokens`` nodes, level by level; its middle branch begins with the target's own continuation."""
        levels = min(TREE_DEPTH, tokens - 1)
        parent, depth, true_place, above = [-1], [0], [0], [0]
        for level in range(1, levels + 1):
            size = (tokens - 1) // levels + (level <= (tokens - 1) % levels)
            own = list(range(len(parent), len(parent) + size))
            middle = size // 2
            parent += [true_place[-1] if place == middle else above[place % len(above)] for place in range(size)]
            depth += [level] * size
            true_place.append(own[middle])
            above = own
        rows = len(self.context)
        places = self.context[:, None] + 1 + torch.arange(tokens)
        token = self.text.gather(1, places)  # wrong continuations are real text, too
        token[:, 0] = self.root
        for level, place in enumerate(true_place[1 : TRUE_DEPTH + 1]):
            token[:, place] = self.spine[:, level]

        def per_row(values: list[int]) -> Tensor:
            return torch.tensor(values).expand(rows, -1)

        count = torch.full((rows,), tokens - 1)
        return Kept(per_row(list(range(tokens))), token, per_row(parent), per_row(depth), count)


class DraftStage:
    """A drafter behind a text of some length, driven through :class:`LiveDrafter`.

    :param text: int64 [R, L] on the host.
    :param features: the target's captured hidden states [R, L, F] of the text on its device, or None.
    :param device: the draft's.
    """

    def __init__(self, network: DraftNetwork, text: Tensor, features: Tensor | None, device: torch.device):
        self.network, self.text, self.features = network, text, features
        self.watch = Stopwatch(device)
        self.drafter = LiveDrafter(network)

    def settle(self, context: int) -> None:
        """Go behind ``context`` tokens; each catch-up goes on from there."""
        self.context = lengths_of(self.text.shape[0], context)
        longest = int(self.context.max())
        features = None if self.features is None else self.features[:, :longest]
        self.root = self.text.gather(1, self.context[:, None])[:, 0]
        self.drafter.prefill(self.text[:, :longest], self.context, features, self.root)

    def level(self, width: int) -> list[float]:
        """ms of some successive draft forwards over ``width`` nodes each, with ``width`` children (a chain for 1)."""
        spent = []
        below = LEVELS_TIMED if self.drafter.deepest is None else min(LEVELS_TIMED, self.drafter.deepest - 1)
        if not below:
            return [0.0]  # the root's children come with the catch-up, and there are no others
        tree = self._start(width)
        for _ in range(below):
            nodes = tree.frontier(width)
            children, ms = self.watch.time(self.drafter.expand, tree, nodes, width)
            tree.append(nodes, children)
            spent.append(ms)
        return spent

    def catch_up(self, tokens: int) -> float:
        """ms of the pass over ``tokens`` newly committed tokens that also gives the root's children."""
        if tokens:
            places = self.context[:, None] + torch.arange(tokens)
            features = None
            if self.features is not None:
                index = sent(places, self.features.device)[:, :, None].expand(-1, -1, self.features.shape[2])
                features = self.features.gather(1, index)
            counts = torch.full_like(self.context, tokens)
            self.drafter.commit(self.text.gather(1, places + 1), features, counts)
            self.context = self.context + tokens
            self.root = self.text.gather(1, self.context[:, None])[:, 0]
        tree = DraftTree(self.drafter.root(about(self.context)))
        return self.watch.time(self.drafter.expand, tree, tree.root_nodes(), CATCH_UP_BRANCHING)[1]

    def _start(self, branching: int) -> DraftTree:
        tree = DraftTree(self.drafter.root(about(self.context)))
        tree.append(tree.root_nodes(), self.drafter.expand(tree, tree.root_nodes(), branching))
        return tree


def prompts_of(text: Tensor, context: int) -> list[list[int]]:
    """The first ``context`` tokens of each row of ``text`` int64 [R, L], or a few less, as prompts."""
    counts = lengths_of(len(text), context)
    return [row[:count].tolist() for row, count in zip(text, counts, strict=True)]


def plain_steps(model: CachedModel, text: Tensor, context: int, steps: int = 8) -> list[float]:
    """ms of single steps of the plain decoding loop behind ``context`` tokens of ``text`` int64 [R, L]; the first, which pays for
    what the prefill left in memory and caches, is not counted."""
    watch = Stopwatch(model.device)
    stamps: list[float] = []

    def stamp(prompt: int, token: int) -> None:
        if prompt == 0:
            stamps.append(watch.now())

    plain_decode(model, prompts_of(text, context), steps + 2, (), stamp)
    return [later - sooner for sooner, later in zip(stamps[1:], stamps[2:], strict=False)]
