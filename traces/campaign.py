"""A profiling campaign: every shape warmed up before any is timed, then shuffled rounds over all of them.

Rounds, not one shape after the other: a machine that slows down for a while then slows a round of everything. What is kept of a
shape is its mean, because the parts of a cycle are added up and means add up while medians do not: on a machine that is now quick,
now slow, from one millisecond to the next, a step's median is well below what a text of many steps takes for each.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from live.model import CachedModel
from live.pair import Pair
from policies.errors import UserError
from policies.lookup.rule import load_rule
from traces.measure import DraftStage, TargetStage, plain_steps
from traces.overhead import FINDS, FINDS_NOTHING, POLICIES, SEEN, overheads

MIN_ROUNDS = 3
LOOPS_EVERY = 3
"""Rounds. The policies' loops take most of a round's time, and a small part of a cycle's: behind the first :data:`MIN_ROUNDS`
they are measured in every third."""
CAP = 3.0
"""Medians. A time beyond counts as so many: one hiccup of the machine must not make a shape's mean."""
_DIGITS = 5  # of a millisecond: beyond the clock
_ROOM = 64  # tokens that the short decodings may generate

Key = tuple[str, str, tuple[int, ...]]
"""Table, drafter or policy ("" where there is one table for all), place on the table's axes."""
Measured = Iterable[tuple[Key, float]]
Group = tuple[Callable[[], None] | None, list[Callable[[], Measured]]]
"""How to get behind a text, and what is measured there; None for the policies' loops, which go there themselves."""


@dataclass(frozen=True)
class Shapes:
    """Grid points, each axis in increasing order.

    tokens    verified tokens, the root among them
    widths    frontier nodes of a draft forward
    contexts  tokens before the root
    batches   requests side by side
    catch_up  committed tokens that the draft catches up on; 0 = the root's children alone
    commit    cache entries moved
    """

    tokens: tuple[int, ...]
    widths: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    catch_up: tuple[int, ...] = (0, 1, 2, 4, 9)
    commit: tuple[int, ...] = (1, 2, 4, 9)

    @property
    def text_length(self) -> int:
        """Tokens of text that the measurements look at."""
        return max(self.contexts) + max(max(self.tokens), 2 * max(self.commit), sum(self.catch_up)) + 2


class Campaign:
    """All measurements of a pair.

    :param text: int64 [rows, shapes.text_length], a row for each request of the largest batch.
    :param policies: whose loops are measured, specs by name (`traces.overhead`).
    :raises UserError: when a context does not fit into the models.
    """

    def __init__(self, pair: Pair, text: Tensor, shapes: Shapes, seed: int = 0, policies: Mapping[str, tuple[str, ...]] = POLICIES):
        if shapes.text_length + _ROOM > pair.context_limit:
            raise UserError(
                f"a context of {max(shapes.contexts)} tokens with {max(shapes.tokens)} to verify does not fit into the "
                f"models' {pair.context_limit}: give smaller --contexts or --tokens"
            )
        self.pair, self.text, self.shapes, self.policies = pair, text, shapes, policies
        self.shuffle = random.Random(seed).shuffle
        self.samples: dict[Key, list[float]] = defaultdict(list)
        self.rounds = self.rounds_of_loops = 0

    def run(self, repeats: int, seconds: float | None = None) -> int:
        """Warm up, then measure ``repeats`` rounds, or fewer when ``seconds`` run out; how many were made."""
        from tqdm import tqdm

        started = time.monotonic()
        shapes, loops = (sum(len(work) for settle, work in self._all_groups if (settle is None) == own) for own in (False, True))
        total = (repeats + 1) * shapes + (1 + sum(map(_with_loops, range(repeats)))) * loops
        with tqdm(total=total, desc="warming up", unit="shape", file=sys.stderr) as bar:
            self.warm_up(bar.update)
            bar.set_description("measuring")
            longest = 0.0  # of the rounds, which differ
            while self.rounds < repeats:
                if seconds and self.rounds >= MIN_ROUNDS and time.monotonic() - started + longest > seconds:
                    break
                begun = time.monotonic()
                self.measure(bar.update)
                longest = max(longest, time.monotonic() - begun)
            bar.total = bar.n
        return self.rounds

    def warm_up(self, tick: Callable[[], object] = lambda: None) -> None:
        """Run every shape once; ``tick`` is called after each."""
        self.measure(tick)
        self.samples.clear()
        self.rounds = self.rounds_of_loops = 0

    @torch.inference_mode()
    def measure(self, tick: Callable[[], object] = lambda: None, loops: bool | None = None) -> None:
        """One more round over all shapes, in an order drawn anew; ``tick`` is called after each.

        :param loops: decode with the policies, too (default: in the first rounds, and in every third).
        """
        loops = _with_loops(self.rounds) if loops is None else loops
        self.shuffle(self._all_groups)
        for settle, work in self._all_groups:
            if settle is None:
                if not loops:
                    continue
            else:
                settle()
            self.shuffle(work)
            for job in work:
                for key, ms in job():
                    self.samples[key].append(ms)
                tick()
        self.rounds += 1
        self.rounds_of_loops += loops

    def tables(self) -> dict[str, Any]:
        """The profile's tables: means over all samples of a shape, and their interquartile range."""
        shapes = self.shapes
        context_batch = {"context": shapes.contexts, "batch": shapes.batches}
        tables: dict[str, Any] = {
            "plain": self._table("plain", "", context_batch),
            "verify": self._table("verify", "", {"tokens": shapes.tokens, **context_batch}),
            "commit": self._table("commit", "", {"tokens": shapes.commit, "batch": shapes.batches}),
            "draft": {},
            "catch_up": {},
            "overhead": {},
            "looked_up": {},
        }
        for name in self.pair.networks:
            tables["draft"][name] = self._table("draft", name, {"width": shapes.widths, **context_batch})
            tables["catch_up"][name] = self._table("catch_up", name, {"tokens": shapes.catch_up, **context_batch})
        for kind, policy in product(("overhead", "looked_up"), self.policies):
            levels = self._levels_seen(kind, policy)
            if levels and (kind == "overhead" or levels[-1] > 1):  # one level does not tell what another takes
                tables[kind][policy] = self._table(kind, policy, {"levels": levels, "batch": shapes.batches})
        return tables

    # ---- inside ------------------------------------------------------------------------------------------------------

    @cached_property
    @torch.inference_mode()
    def _all_groups(self) -> list[Group]:
        return [group for batch in self.shapes.batches for group in self._groups(batch)]

    def _groups(self, batch: int) -> list[Group]:
        """Shapes that are measured behind the same text, together."""
        pair, shapes, text = self.pair, self.shapes, self.text[:batch]
        model = pair.target(batch)
        model.reset(batch)
        features = model.prefill(text, logits="none").captured
        target = TargetStage(model, text, pair.end_tokens)
        drafts = {name: DraftStage(network, text, features, model.device) for name, network in pair.networks.items()}
        plain = pair.plain(batch)

        def behind_target(draft: DraftStage, tokens: int) -> float:
            target.pass_by()
            return draft.catch_up(tokens)

        groups: list[Group] = []
        for context in shapes.contexts:
            place = (context, batch)

            def settle(context: int = context) -> None:
                target.settle(context)
                for stage in drafts.values():
                    stage.settle(context)

            work: list[Callable[[], Measured]] = [
                lambda place=place: [(("plain", "", place), ms) for ms in plain_steps(plain, text, place[0])]
            ]
            for count in shapes.tokens:
                work.append(lambda n=count, place=place: [(("verify", "", (n, *place)), ms) for ms in target.verify(n)])
            for name, width in product(drafts, shapes.widths):
                work.append(lambda d=name, w=width, p=place: [(("draft", d, (w, *p)), ms) for ms in drafts[d].level(w)])
            for name, count in product(drafts, shapes.catch_up):
                work.append(lambda d=name, n=count, p=place: [(("catch_up", d, (n, *p)), behind_target(drafts[d], n))])
            if context == shapes.contexts[0]:  # what a commit costs does not depend on the context
                for count in shapes.commit:
                    work.append(lambda n=count: [(("commit", "", (n, batch)), target.commit(n))])
            groups.append((settle, work))
        groups.append((None, self._loops(pair.target(batch), text, batch)))
        return groups

    def _loops(self, target: CachedModel, text: Tensor, batch: int) -> list[Callable[[], Measured]]:
        """Short decodings with the first drafter that drafts as deep as asked, and with rules: the loop's overhead, by policy and
        draft levels."""
        networks, limit = list(self.pair.networks.values()), self.pair.context_limit
        network = next((one for one in networks if one.deepest is None), networks[0])
        context = self.shapes.contexts[len(self.shapes.contexts) // 2]

        def job(policy: str, specs: tuple[str, ...]) -> Measured:
            seen = set()
            for spec in specs:
                for levels, ms in overheads(target, network, limit, text, context, spec):
                    seen.add(levels)
                    yield ("overhead", policy, (levels, batch)), ms
            if len(specs) > 1 and 0 not in seen:  # of a fixed depth: it declines to draft only where it must, and decides nothing
                for levels, ms in overheads(target, network, limit, text, context, "autoregressive"):
                    yield ("overhead", policy, (levels, batch)), ms
                    yield ("looked_up", policy, (levels, batch)), ms  # who does not draft does not look

        def looking_up(policy: str, deepest: str) -> Measured:
            for rule in rules:
                for levels, ms in overheads(target, rule, limit, text, context, deepest):
                    yield ("looked_up", policy, (levels, batch)), ms

        rules = [load_rule(rule) for rule in (FINDS, FINDS_NOTHING)]
        jobs = [lambda p=policy, s=specs: job(p, s) for policy, specs in self.policies.items()]
        return jobs + [lambda p=p, s=specs[-1]: looking_up(p, s) for p, specs in self.policies.items() if p != "autoregressive"]

    def _levels_seen(self, kind: str, policy: str) -> tuple[int, ...]:
        """Numbers of draft levels that the policy's cycles had often enough, at every batch."""
        own = {key[2]: len(values) for key, values in self.samples.items() if key[:2] == (kind, policy)}
        levels = sorted({level for level, _ in own})
        least = min(SEEN, max(own.values(), default=0))  # a single round shows each only a few times
        return tuple(n for n in levels if all(own.get((n, batch), 0) >= least for batch in self.shapes.batches))

    def _table(self, table: str, owner: str, axes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        found = [self.samples[(table, owner, place)] for place in product(*axes.values())]
        shape = [len(points) for points in axes.values()]
        return {
            **{axis: list(points) for axis, points in axes.items()},
            "ms": _nested([_mean(values) for values in found], shape),
            "spread_ms": _nested([_spread(values) for values in found], shape),
        }


def _with_loops(number: int) -> bool:
    """Whether the loops are measured in a round of this number."""
    return number < MIN_ROUNDS or number % LOOPS_EVERY == 0


def _mean(values: list[float]) -> float:
    """Of times, those beyond :data:`CAP` medians counted as that."""
    most = CAP * statistics.median(values)
    return statistics.fmean(min(value, most) for value in values)


def _spread(values: list[float]) -> float:
    """Interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _nested(values: list[float], shape: list[int]) -> list:
    """A flat list as nested ones, rounded."""
    values = [max(round(value, _DIGITS), 0.0) for value in values]
    for size in reversed(shape[1:]):
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return values
