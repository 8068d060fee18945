"""Sampled text is distributed as the target says, whatever drafts: chi-square over 60,000 texts per kind of policy.

The target is a table of next-token logits over a small vocabulary, so that the probability of every text is known exactly,
by Hugging Face's own processors; decoder, drafting loop, verifier and sampler are the real ones.
"""

from __future__ import annotations

from itertools import product

import pytest
import scipy.stats
import torch

import live.sampling
from live.decode import SpeculativeDecoder
from live.distribution import ranked
from live.model import Output
from live.sampling import Processed
from live.streams import Streams
from policies.contract import Sampling
from policies.registry import load_policy
from tests.live.processors import by_hugging_face

VOCABULARY, LENGTH, PROMPT = 6, 4, 2
TEXTS, ROWS = 60_000, 10_000
KINDS = {"chain": "chain(k=3)", "static tree": "static", "dynamic tree": "eagle3(total_tokens=8, depth=3, top_k=3)"}
SETTINGS = [Sampling(1.0), Sampling(1.3, top_k=5, top_p=0.93, repetition_penalty=1.5, seed=11)]


def table(seed: int) -> torch.Tensor:
    """Logits float64 [V, V]: what follows each token."""
    return 1.5 * torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TableTarget:
    """Stands for a target with a cache: what follows depends on the last token only."""

    context_limit, limit_name, device, streams = 64, "its context", torch.device("cpu"), Streams(None, ())

    def reset(self, rows):
        pass

    def prefill(self, tokens, counts=None, logits="last"):
        return Output(table(0)[tokens.gather(1, (counts - 1)[:, None])], None)

    def forward_tree(self, tokens, prefix, positions, ancestors):
        return Output(table(0)[tokens], None)

    def commit(self, slots, counts):
        pass

    def gather_rows(self, rows):
        pass


class TableDraft:
    """A draft that agrees with the target in part."""

    name, kind, needs_features, deepest = "table", "lm", False, None
    logits = table(0) + 0.5 * table(1)

    def reset(self, rows):
        pass

    def advance(self, tokens, features, counts, everywhere=False):
        return tokens.gather(1, (counts - 1)[:, None])

    def open(self, source, context_length, width):
        return ranked(self.logits[source[:, 0]], width)

    def grow(self, parent, token, width):
        return ranked(self.logits[token.clamp(min=0)], width)

    def gather_rows(self, rows):
        pass


def sampled(spec: str, sampling: Sampling) -> torch.Tensor:
    """How often each text of LENGTH tokens came out, int64 [V ** LENGTH], and that drafts were accepted."""
    run = SpeculativeDecoder(TableTarget(), TableDraft(), load_policy(spec))
    place = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
    counts, cycles = torch.zeros(VOCABULARY**LENGTH, dtype=torch.int64), 0
    for start in range(0, TEXTS, ROWS):
        done = run.generate([[PROMPT]] * ROWS, LENGTH, sampling=sampling, text=torch.arange(start, start + ROWS))
        counts += torch.bincount((torch.tensor(done.tokens) * place).sum(1), minlength=len(counts))
        cycles += sum(done.cycles)
    assert cycles < 0.8 * TEXTS * (LENGTH - 1)
    return counts


def probabilities(sampling: Sampling) -> torch.Tensor:
    """The exact probability of each text, float64 [V ** LENGTH]."""
    texts = torch.tensor(list(product(range(VOCABULARY), repeat=LENGTH)))
    whole = torch.nn.functional.pad(texts, (1, 0), value=PROMPT)
    share = torch.ones(len(texts), dtype=torch.float64)
    for place in range(LENGTH):
        before = whole[:, : place + 1]
        share = share * by_hugging_face(table(0)[before[:, -1]], before, sampling).gather(1, texts[:, place, None])[:, 0]
    return share


def p_value(counts: torch.Tensor, share: torch.Tensor) -> float:
    """Of Pearson's chi-square test; texts that are expected fewer than 5 times count as one."""
    assert int(counts[share == 0].sum()) == 0, "a text came out that cannot"
    expected = share * counts.sum()
    rare = expected < 5
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = float(((seen - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    return float(scipy.stats.chi2.sf(statistic, len(wanted) - 1))


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_distributed_as_the_target_says(kind, sampling):
    counts = sampled(KINDS[kind], sampling)
    assert int(counts.sum()) == TEXTS and p_value(counts, probabilities(sampling)) > 1e-3


def one_number_for_all(monkeypatch) -> None:
    """Every position of a text draws the same number."""
    real = live.sampling.uniform
    monkeypatch.setattr(live.sampling, "uniform", lambda seed, text, position: real(seed, text, torch.zeros_like(position)))


def unprocessed(monkeypatch) -> None:
    """The processors are forgotten."""
    monkeypatch.setattr(
        live.sampling,
        "process",
        lambda logits, sampling, seen: Processed(torch.softmax(logits, -1), torch.zeros_like(logits[..., 0])),
    )


def no_end_of_the_step(monkeypatch) -> None:
    """The draft's favourite is taken a little too often."""
    real = live.sampling.inverse_cdf
    monkeypatch.setattr(live.sampling, "inverse_cdf", lambda weight, u: real(weight, 0.97 * u))


@pytest.mark.parametrize("bug", [one_number_for_all, unprocessed, no_end_of_the_step])
def test_the_test_would_notice(monkeypatch, bug):
    bug(monkeypatch)
    counts, share = sampled(KINDS["chain"], SETTINGS[1]), probabilities(SETTINGS[1])
    counts[share == 0] = 0
    assert p_value(counts, share) < 1e-9
