"""Whatever fails in a batch, the texts that go on are the target's own, whole, and told once."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from live.batcher import Batcher, Request
from live.decode import SpeculativeDecoder
from live.pair import Pair, encode_prompt
from policies.contract import Sampling
from policies.errors import UserError
from policies.registry import load_policy
from tests.tiny_pair import DOMAINS

TREE = "eagle3(total_tokens=9, depth=3, top_k=4)"
LIMIT = 16
SAMPLED = Sampling(0.9, seed=4)


@pytest.fixture(scope="module")
def prompts(pair64: Pair) -> list[list[int]]:
    texts = [text for texts in DOMAINS.values() for text in texts]
    return [encode_prompt(pair64.tokenizer, [{"role": "user", "content": text}]) for text in texts]


@pytest.fixture(scope="module")
def told(pair64, prompts) -> list[list[int]]:
    """Each text alone; every other one is sampled."""
    run = decoder(pair64, "draft", "autoregressive")
    numbers = torch.arange(len(prompts))
    return [
        run.generate([prompt], LIMIT, sampling=setting(index), text=numbers[index, None]).tokens[0]
        for index, prompt in enumerate(prompts)
    ]


def setting(index: int) -> Sampling:
    return SAMPLED if index % 2 else Sampling()


def decoder(pair: Pair, name: str = "eagle3", spec: str = TREE) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target(), pair.networks[name], load_policy(spec), pair.end_tokens)


def submitted(batcher: Batcher, prompts: list[list[int]]) -> list[Request]:
    return [batcher.submit(prompt, LIMIT, setting(index)) for index, prompt in enumerate(prompts)]


class Small:
    """A target whose memory holds so many rows at a time, ``beside`` included."""

    def __init__(self, run: SpeculativeDecoder, monkeypatch: pytest.MonkeyPatch, rows: int):
        self.run, self.rows, self.calls, self.full_at = run, rows, 0, None
        real = type(run.target).run

        def limited(target, tokens, *rest):
            self.calls += 1
            if len(tokens) > self.rows or self.calls == self.full_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return real(target, tokens, *rest)

        monkeypatch.setattr(type(run.target), "run", limited)


def heard_of(batcher: Batcher) -> dict[int, list[int]]:
    heard = defaultdict(list)
    for request, tokens in batcher.stream():
        heard[request.number] += tokens
    return heard


def test_too_little_memory_makes_the_batch_smaller(pair64, prompts, told, monkeypatch):
    run, said = decoder(pair64), []
    Small(run, monkeypatch, rows=2)
    batcher = Batcher(run, 6, say=said.append)
    requests = submitted(batcher, prompts)
    heard = heard_of(batcher)
    assert [request.tokens for request in requests] == told == [heard[number] for number in range(len(told))]
    assert said == ["memory ran out: going on with a batch of 3", "memory ran out: going on with a batch of 1"]
    assert batcher.batch == 1


@pytest.mark.parametrize("spec", [TREE, "gammatune", "hf_heuristic", "hf_confidence"])
@pytest.mark.parametrize("when", [4, 9, 14])
def test_what_was_in_flight_goes_on_from_where_it_stood(pair64, prompts, told, monkeypatch, spec, when):
    """Memory that runs out in the middle: nothing is told twice, and no cycle is done twice but the one that failed."""
    whole = Batcher(decoder(pair64, "draft", spec), 4)
    requests = submitted(whole, prompts)
    whole.run()
    cycles = sum(request.cycles for request in requests)
    run, said = decoder(pair64, "draft", spec), []
    memory = Small(run, monkeypatch, rows=100)
    memory.full_at = when
    batcher = Batcher(run, 4, say=said.append)
    requests = submitted(batcher, prompts)
    heard = heard_of(batcher)
    assert [request.tokens for request in requests] == told == [heard[number] for number in range(len(told))]
    assert len(said) == 1 and "going on with a batch of" in said[0]
    if load_policy(spec).scope != "stream":  # whose state depends on who decoded when
        assert sum(request.cycles for request in requests) == cycles


def test_a_request_that_finds_no_memory_alone_fails_by_name(pair64, prompts, told, monkeypatch):
    run = decoder(pair64)
    real = type(run.target).run

    def too_long(target, tokens, *rest):
        if tokens.shape[1] >= 60:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return real(target, tokens, *rest)

    monkeypatch.setattr(type(run.target), "run", too_long)
    batcher = Batcher(run, 3)
    requests = submitted(batcher, prompts)
    long = batcher.submit((prompts[0] * 9)[:70], LIMIT)
    batcher.run()
    assert [request.tokens for request in requests] == told
    assert long.finish == "failed" and "memory ran out with a single text of 70 tokens" in long.error and not long.tokens


@pytest.mark.parametrize("name", ["eagle3", "draft"])
@pytest.mark.parametrize(("method", "when"), [("grow", 5), ("open", 3), ("advance", 2), ("advance", 4), ("join", 1)])
def test_a_crashing_draft_does_not_harm_the_texts(pair64, prompts, told, monkeypatch, name, method, when):
    run, said, used = decoder(pair64, name), [], [0]
    network = type(run.drafter.network)
    real = getattr(network, method)

    def failing(*args, **options):
        used[0] += 1
        if used[0] == when:
            raise RuntimeError("the head lost its way\nhere")
        return real(*args, **options)

    monkeypatch.setattr(network, method, failing)
    batcher = Batcher(run, 3, say=said.append)
    requests = submitted(batcher, prompts)
    heard = heard_of(batcher)
    assert [request.tokens for request in requests] == told == [heard[number] for number in range(len(told))]
    assert batcher.crashes == ["RuntimeError: the head lost its way"] and len(said) == 1 and batcher.plain > 0
    again, plain = submitted(batcher, prompts), batcher.plain
    batcher.run()  # the batch had run empty: everybody drafts anew
    assert [request.tokens for request in again][::2] == told[::2] and batcher.plain == plain
    assert sum(request.cycles for request in again) < sum(len(request.tokens) - 1 for request in again)


@pytest.mark.parametrize("when", [1, 2, 4])
def test_nan_logits_fail_their_request_only(pair64, prompts, told, monkeypatch, when):
    """At the ``when``-th forward of the target the numbers of its last row are NaN."""
    run, used = decoder(pair64), [0]
    real = type(run.target).run

    def poisoned(target, *args):
        logits, used[0] = real(target, *args), used[0] + 1
        if used[0] == when and target.layers_to_capture:
            logits[-1] = torch.nan
        return logits

    monkeypatch.setattr(type(run.target), "run", poisoned)
    batcher = Batcher(run, 2)
    requests = submitted(batcher, prompts)
    heard = heard_of(batcher)
    failed = [request for request in requests if request.finish == "failed"]
    assert len(failed) == 1 and f"prompt {failed[0].number} are not numbers (NaN)" in failed[0].error
    for request, text in zip(requests, told, strict=True):
        whole = request.tokens == text
        assert heard[request.number] == request.tokens == text[: len(request.tokens)] and whole == (request not in failed)


def test_an_interrupt_keeps_what_was_generated_and_the_next_step_goes_on(pair64, prompts, told, monkeypatch):
    run, used = decoder(pair64), [0]
    real = type(run.target).run

    def interrupted(target, *args):
        used[0] += 1
        if used[0] in (5, 6, 11):
            raise KeyboardInterrupt
        return real(target, *args)

    monkeypatch.setattr(type(run.target), "run", interrupted)
    batcher, heard, interrupts = Batcher(run, 4), defaultdict(list), 0
    requests = submitted(batcher, prompts)
    while batcher.waiting or batcher.in_flight:
        try:
            for request, tokens in batcher.step():
                heard[request.number] += tokens
        except KeyboardInterrupt:
            interrupts += 1
            assert not batcher.in_flight
            assert all(request.tokens == text[: len(request.tokens)] for request, text in zip(requests, told, strict=True))
    assert interrupts == 3
    assert [request.tokens for request in requests] == told == [heard[number] for number in range(len(told))]


def test_a_users_own_mistake_is_nobodys_crash(pair64, prompts, monkeypatch):
    run = decoder(pair64)

    def refusing(*_):
        raise UserError("take another policy")

    monkeypatch.setattr(run.drafter.network, "grow", refusing)
    batcher = Batcher(run, 2)
    submitted(batcher, prompts)
    with pytest.raises(UserError, match="take another policy"):
        batcher.run()
