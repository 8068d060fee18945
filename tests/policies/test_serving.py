"""Every serving policy against its rule, written batch by batch in plain Python; and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from policies.drafting import draft
from policies.errors import UserError
from policies.loop import run_cycle
from policies.registry import load_policy
from tests.policies import brute
from tests.policies.cases import COSTLY
from tests.policies.row_by_row import Drafted
from tests.policies.serving_by_hand import ServingReference, check, step_ms
from tests.policies.synthetic import Language, Priced, SyntheticDrafter, SyntheticVerifier, cycle_at
from tests.policies.test_online_learners import Estimator


class Table(ServingReference):
    def __init__(self):
        self.rates, self.off = [], False

    def lengths(self, batch):
        table = [(1, 3), (2, 5), (4, 2)]
        length = next((tokens for size, tokens in table if len(batch) <= size), 0)
        return [0 if self.off else length] * len(batch)

    def learn(self, batch):
        drafted = sum(len(request.logprob) for request in batch)
        if drafted:
            self.rates.append(sum(request.accepted for request in batch) / drafted)
            if len(self.rates) >= 4 and sum(self.rates[-4:]) / 4 < 0.35:
                self.off = True


def test_tensorrt_llm():
    policy = load_policy("tensorrt_llm(schedule=((1, 3), (2, 5), (4, 2)), window=4, threshold=0.35)")
    assert check(policy, Table) >= 4


class Tetris(ServingReference):
    def lengths(self, batch):
        return [5 if len(batch) >= 2 else 2] * len(batch)

    def cut(self, batch):
        slots = [(-sum(r.logprob[: k + 1]), r.key, k, r) for r in batch for k in range(len(r.logprob))]
        for *_, request in sorted(slots, key=lambda slot: slot[:3])[: 2 * len(batch)]:
            request.kept += 1


def test_tetris():
    assert check(load_policy("tetris(k=2, extra=3)"), Tetris) >= 5


class Ema(ServingReference):
    """One slot per range of batch sizes."""

    def __init__(self):
        self.slots = [{"lengths": [1, 3, 5], "down": -0.25, "now": 3}, {"lengths": [0, 2], "down": 0.1, "now": 2}]
        for slot in self.slots:
            slot |= {"average": slot["now"] - 1.0, "count": 0}

    def lengths(self, batch):
        return [self.slots[len(batch) >= 2]["now"]] * len(batch)

    def learn(self, batch):
        slot = self.slots[len(batch) >= 2]
        if slot["now"]:
            slot["average"] = 0.6 * slot["average"] + 0.4 * sum(request.accepted for request in batch) / len(batch)
        slot["count"] += 1
        if slot["count"] <= 3 or (slot["count"] - 3) % 2:
            return
        lengths, place = slot["lengths"], slot["lengths"].index(slot["now"])
        if slot["now"] == 0:
            slot["now"] = lengths[1]
            return
        before = place
        while place and slot["average"] <= (lengths[place - 1] - 0.5 if lengths[place - 1] else 0.5) + slot["down"]:
            place -= 1
        if place == before:
            while place < len(lengths) - 1 and slot["average"] > lengths[place] - 0.5:
                place += 1
        slot["now"] = lengths[place]


def test_sglang_ema():
    tiers = "((1, (1, 3, 5), -0.25), (2, (0, 2), 0.1))"
    policy = load_policy(f"sglang_ema(tiers={tiers}, start=3, warm_up=3, interval=2, smoothing=0.4)")
    assert check(policy, Ema) >= 4


def test_sglang_ema_tries_again_after_a_pause():
    """A tier that began at 0 starts its first probe from that probe's own neutral average."""
    policy = load_policy("sglang_ema(tiers=((1, (0, 2), 0.0),), start=0)")
    assert policy._moved(0, 0, -1.0) == (2, 1.0) and policy._moved(0, 0, 0.3) == (2, 0.3)
    assert policy._moved(0, 2, 0.5) == (0, 0.5) and policy._moved(0, 2, 0.6) == (2, 0.6)
    idle = load_policy("sglang_ema(tiers=((1, (0,), 0.0),), start=0)")
    assert idle._moved(0, 0, -1.0) == (0, -1.0)


class Goodput(ServingReference):
    def __init__(self):
        self.rate, self.idle = 0.8, 0

    def lengths(self, batch):
        rows, context = len(batch), max(request.context for request in batch)
        worth = [(1 - self.rate ** (k + 1)) / (1 - self.rate) / step_ms(rows, context, k, k + 1) for k in range(7)]
        return [max(worth.index(max(worth)), 1 if self.idle >= 2 else 0)] * rows

    def learn(self, batch):
        tested = sum(request.tested for request in batch)
        self.idle = 0 if tested else self.idle + 1
        if tested:
            self.rate = 0.6 * self.rate + 0.4 * sum(request.accepted for request in batch) / tested


def test_smartspec():
    assert check(load_policy("smartspec(most=6, start=0.8, smoothing=0.4, probe=2)"), Goodput) >= 4


class Throughput(ServingReference):
    def __init__(self, margin=0.0):
        self.now, self.steps, self.windows, self.margin = 3, 0, [[] for _ in range(4)], margin

    def expected(self):
        rates = []
        for window in self.windows:
            if window:
                rates.append(sum(window) / len(window))
            elif len(rates) == 1:
                rates.append(rates[0])
            else:
                fall = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if rates[0] else 0
                rates.append(min(rates[-1], rates[-1] * fall))
        return [1 + sum(rates[:k]) for k in range(1, 5)]

    def lengths(self, batch):
        rows, context = len(batch), max(request.context for request in batch)
        warm = all(len(self.windows[k]) == 3 for k in range(self.now))
        if self.steps and self.steps % 2 == 0 and warm:
            score = {k: self.expected()[k - 1] / step_ms(rows, context, k, k + 1) for k in (1, 2, 3, 4)}
            candidates = (1, 3) if rows < 2 else (1, 2, 4)
            best = max(candidates, key=lambda k: (score[k], -k))
            if self.now not in candidates or score[best] > score[self.now] * (1 + self.margin):
                if best < self.now:
                    self.windows[best:] = [[] for _ in self.windows[best:]]
                self.now = best
        return [self.now] * rows

    def learn(self, batch):
        for k in range(self.now):
            share = sum(request.accepted > k for request in batch) / len(batch)
            self.windows[k] = [*self.windows[k], share][-3:]
        self.steps += 1


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_sglang_throughput(margin):
    tiers = "((1, (1, 3)), (2, (1, 2, 4)))"
    policy = load_policy(f"sglang_throughput(tiers={tiers}, window=3, interval=2, margin={margin})")
    assert check(policy, lambda: Throughput(margin)) >= 3


class Utility(ServingReference):
    """Each request on its own: test phases of two cycles a length, set phases of four."""

    def __init__(self):
        self.of = {}

    def lengths(self, batch):
        for request in batch:
            self.of.setdefault(request.key, {"now": 1, "left": 2, "test": True, "seen": {}})
        return [self.of[request.key]["now"] for request in batch]

    def learn(self, batch):
        context = max(request.context for request in batch)
        for request in batch:
            own = self.of[request.key]
            k = own["now"]
            if own["test"]:
                cost = step_ms(len(batch), context, k, k + 1) / step_ms(len(batch), context, 0, 1)
                own["seen"].setdefault(k, []).append((request.accepted + 1, cost))
            own["left"] -= 1
            if own["left"]:
                continue
            if own["test"] and k < 3:
                own |= {"now": k + 1, "left": 2}
            elif own["test"]:
                worth = {length: sum(t for t, _ in seen) / sum(c for _, c in seen) for length, seen in own["seen"].items()}
                best = max(worth, key=lambda length: (worth[length], -length))
                own |= {"now": best if worth[best] >= 1 else 0, "left": 4, "test": False}
            else:
                own |= {"now": 1, "left": 2, "test": True, "seen": {}}


def test_cascade():
    assert check(load_policy("cascade(most=3, samples=2, hold=4)"), Utility) >= 4


class Cut(ServingReference):
    """Takes the likeliest slots of the batch, as many as ``counts`` finds worth most."""

    drafted = 4

    def lengths(self, batch):
        return [self.drafted] * len(batch)

    def scores(self, request):
        return request.survival()

    def counts(self, slots):
        return [math.ceil(share * slots) for share in (0.25, 0.5, 0.75, 1.0)]

    def cut(self, batch):
        slots = [(-score, r.key, k, r) for r in batch for k, score in enumerate(self.scores(r))]
        slots.sort(key=lambda slot: (np.float32(slot[0]), *slot[1:3]))
        rows, context = len(batch), max(request.context for request in batch)

        def worth(count):
            expected = rows - sum(slot[0] for slot in slots[:count])
            return expected / step_ms(rows, context, self.drafted, (rows + count) / rows)

        for *_, request in slots[: max(self.counts(len(slots)), key=worth)]:
            request.kept += 1


def test_d_cut():
    assert check(load_policy("d_cut(k=4)"), Cut) >= 4


class Adaptive(Cut):
    """With the estimate of `test_online_learners`, learned from all requests of the batch."""

    def __init__(self, warm_up):
        self.estimate = Estimator(warm_up)

    def scores(self, request):
        return [self.estimate.survival(Drafted(request.logprob[: k + 1])) for k in range(len(request.logprob))]

    def counts(self, slots):
        return range(slots + 1)

    def cut(self, batch):
        if self.estimate.cycles < self.estimate.warm_up:
            return ServingReference.cut(self, batch)
        return super().cut(batch)

    def learn(self, batch):
        cycles = self.estimate.cycles
        for request in batch:
            self.estimate.cycles = 1  # remember only
            self.estimate.learn(Drafted(request.logprob), request.kept, request.accepted, request.tested > request.accepted)
        self.estimate.cycles = cycles
        self.estimate.learn(Drafted(), 0, 0, False)


@pytest.mark.parametrize("given, warm_up", [("", 0), (", warm_up=1", 4)])
def test_adaptive_verification(given, warm_up):
    """By default it cuts from the first cycle on."""
    assert check(load_policy(f"adaptive_verification(refit=4, most=4{given})"), lambda: Adaptive(warm_up)) >= 4


@pytest.mark.parametrize("rows", [1, 3])
def test_evict(rows):
    policy, language = load_policy("evict(total_tokens=40, depth=3, top_k=4)"), Language(6, steps=30)
    cycle = replace(cycle_at(list(range(12)), [0] * 12), group=torch.arange(12) // rows, cost=Priced())
    got = draft(policy, SyntheticDrafter(language, [language.truth(key, 3) for key in range(12)]), cycle, {})
    counts = set()
    for row in range(12):
        nodes, kept = brute.eagle3(language.truth(row, 3)[0], partial(children, language, row), 40, 3, 4)
        order = brute.by_total_order(brute.drafted(kept))
        worth = [(1 + sum(math.exp(node.score) for node in order[:n])) / (10 + 0.5 * (n + 1) * rows) for n in range(len(order) + 1)]
        most = worth.index(max(worth))
        assert sorted(got.kept[row].nonzero()[:, 0].tolist()) == sorted([0, *(node.index for node in order[:most])])
        counts.add(most)
    assert len(counts) >= 3


def children(language, key, depth, token, branching):
    return language.children_of(key, depth, token, branching)


@pytest.mark.parametrize("name", sorted(COSTLY))
def test_without_a_cost_model(name):
    policy = load_policy(name)
    language = Language(1)
    texts = [language.truth(key, 8) for key in range(2)]
    drafter, verifier = SyntheticDrafter(language, texts), SyntheticVerifier(texts)
    cycle = cycle_at([0, 1], [0, 0])
    with pytest.raises(UserError, match=f"'{name}' weighs time against tokens and needs a cost model: pass --profile"):
        run_cycle(policy, drafter, verifier, cycle, policy.init(2, cycle.sequence))


@pytest.mark.parametrize(
    "spec, told",
    [
        ("tensorrt_llm(schedule=((4, 4), (2, 2)))", "batches ascending"),
        ("tensorrt_llm(schedule=(4, 2))", "pairs"),
        ("tensorrt_llm(threshold=2.0)", "threshold must lie between"),
        ("tetris(k=0)", "k must be 1 or more"),
        ("sglang_ema(tiers=((1, (3, 1), 0.0),))", "ascending lengths"),
        ("sglang_ema(smoothing=1.5)", "smoothing must lie between"),
        ("sglang_throughput(tiers=((1, (0, 1)),))", "lengths of 1 or more"),
        ("sglang_throughput(start=9)", "start must lie between"),
        ("smartspec(start=2)", "start must lie between"),
        ("smartspec(probe=0)", "probe must be 1 or more"),
        ("cascade(hold=0)", "hold must be 1 or more"),
        ("d_cut(shares=(1.5,))", "shares must lie between"),
        ("adaptive_verification(ridge=0)", "'adaptive_verification': ridge must be above 0"),
        ("evict(depth=0)", "'evict': depth must be 1 or more"),
    ],
)
def test_bad_parameters(spec, told):
    with pytest.raises(UserError) as error:
        load_policy(spec)
    assert told in str(error.value)
