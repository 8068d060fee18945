"""Requests that join and leave a batch say what they say alone, cycle by cycle what replay says, and none gets lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from live.batcher import Batcher, Request
from live.decode import SpeculativeDecoder
from live.pair import Pair, encode_prompt
from policies.chain import Chain
from policies.contract import Expansion, Sampling
from policies.errors import UserError
from policies.registry import all_policies, load_policy
from sim.replay import replay
from sim.schedule import steps_of
from tests.policies.cases import SETTINGS
from tests.policies.synthetic import Priced
from tests.tiny_pair import DOMAINS
from traces.recording import open_recording

TREE = "eagle3(total_tokens=9, depth=3, top_k=4)"
SAMPLED = Sampling(0.9, top_k=60, top_p=0.95, repetition_penalty=1.1, seed=4)


def decoder(pair: Pair, name: str, spec: str) -> SpeculativeDecoder:
    limit = pair.context_limit
    return SpeculativeDecoder(pair.target(), pair.draft(name), load_policy(spec), pair.end_tokens, Priced(), context_limit=limit)


def alone(run: SpeculativeDecoder, request: Request) -> list[int]:
    number = torch.tensor([request.text])
    return run.generate([request.prompt], request.max_new_tokens, sampling=request.sampling, text=number).tokens[0]


@pytest.fixture(scope="module")
def prompts(pair64: Pair) -> list[list[int]]:
    """Of 3 to 200 tokens."""
    texts = [text for texts in DOMAINS.values() for text in texts]
    said = [encode_prompt(pair64.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [*said, said[0][:3], (said[1] * 20)[:200]]


def submitted(batcher: Batcher, prompts: list[list[int]], count: int) -> list[Request]:
    """Requests of 1 to 34 new tokens, every other one sampled."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 35, (count,), generator=draw).tolist()
    return [
        batcher.submit(prompts[index % len(prompts)], length, SAMPLED if index % 2 else Sampling())
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", ["eagle3", "draft", "racer", "prompt_lookup+eagle3", "racer(shortest=4)+draft"])
def test_requests_join_and_leave(pair64, prompts, name):
    """Greedy and sampled side by side; told once and in order; submitted while others decode."""
    batcher, told, most = Batcher(decoder(pair64, name, TREE), batch=4), {}, 0
    requests = submitted(batcher, prompts, 9)
    for request, tokens in batcher.stream():
        told.setdefault(request.number, []).extend(tokens)
        most = max(most, len(batcher.in_flight))
        if request.number == 8 and len(requests) == 9:
            requests += submitted(batcher, prompts, 3)
    plain = decoder(pair64, "draft", "autoregressive")
    for request in requests:
        assert request.tokens == told[request.number] == alone(plain, request), request
        assert request.finish == ("end" if request.tokens[-1] in pair64.end_tokens else "length") and request.error is None
    assert len(requests) == 12 and most == 4 and not batcher.waiting and not batcher.in_flight


@pytest.mark.long
@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_two_hundred_requests(pair64, prompts, name):
    batcher = Batcher(decoder(pair64, name, TREE), batch=8)
    requests = submitted(batcher, prompts, 200)
    batcher.run()
    plain = decoder(pair64, "draft", "autoregressive")
    assert [request.tokens for request in requests] == [alone(plain, request) for request in requests]
    assert {request.finish for request in requests} == {"end", "length"}
    assert len({tuple(request.tokens) for request in requests}) > 100  # had they been mixed up, it would show


JOINED = pytest.mark.parametrize(
    "spec",
    ["eagle3(total_tokens=16, depth=5, top_k=8)", "gammatune", "ucbspec(arms=(1, 2, 4))", "hf_confidence(threshold=0.05, few=2)"],
)


@pytest.mark.parametrize("name", ["eagle3", "draft", "suffix", "suffix+eagle3"])
@JOINED
def test_joining_replays(pair64, tiny_recording: Path, name, spec):
    """Row by row: each text's cycles are those of its replay alone, at the steps that the simulator's schedule says."""
    joins_as_it_replays(pair64, tiny_recording, name, spec)


def joins_as_it_replays(pair64: Pair, folder: Path, name: str, spec: str) -> None:
    recording, batch = open_recording(folder), 3
    log = replay(recording, load_policy(spec), name)
    assert log.coverage == 1.0
    seen, steps = {}, {}

    def note(step) -> None:
        steps[len(steps)] = None
        for place, row in enumerate(step.row.tolist()):
            done = step.done
            widths = [width for width in done.draft.widths[place].tolist() if width]
            counts = int(done.kept.count[place]), int(done.walk.accepted[place]), int(step.gained[place])
            seen.setdefault(row, []).append((len(steps) - 1, int(step.cycle.position[place]), *counts, widths))

    batcher = Batcher(decoder(pair64, name, spec), batch, on_step=note)
    for sequence, length in enumerate(recording.length.tolist()):
        batcher.submit(recording.prompt_tokens(sequence).tolist(), length)
    batcher.run()
    columns = (steps_of(log.sequence, batch), log.position, log.kept, log.accepted, log.emitted)
    widths = [[width for width in row if width] for row in log.widths.tolist()]
    replayed = list(zip(*(column.tolist() for column in columns), widths, strict=True))
    assert [cycle for row in sorted(seen) for cycle in seen[row]] == replayed
    assert len(set(log.sequence.tolist())) == len(seen) > batch


class Crowd(Chain):
    """Batch-wide: everybody drafts as many tokens as there are rows in the group."""

    batch_wide = True

    def expand(self, tree, cycle, state):
        together = (cycle.group[:, None] == cycle.group[None]).sum(1)
        return Expansion(tree.frontier(1).masked_fill((together <= tree.levels)[:, None], -1), 1) if tree.levels < 4 else None


def test_batch_wide_policies_decide_over_the_rows_in_flight(pair64, tiny_recording: Path):
    """In fixed groups, which admit nobody, live decoding is what replay says; when requests join, the group is whoever is there."""
    recording, seen, crowds = open_recording(tiny_recording), {}, []

    def note(step) -> None:
        crowds.append(len(step.row))
        for place, row in enumerate(step.row.tolist()):
            counts = int(step.done.kept.count[place]), int(step.done.walk.accepted[place])
            seen.setdefault(row, []).append((int(step.cycle.position[place]), *counts))

    def decoded(joining: bool) -> list[list[int]]:
        seen.clear(), crowds.clear()
        run = SpeculativeDecoder(pair64.target(), pair64.networks["draft"], Crowd(), pair64.end_tokens)
        batcher = Batcher(run, 3, joining, on_step=note)
        requests = [
            batcher.submit(recording.prompt_tokens(sequence).tolist(), length)
            for sequence, length in enumerate(recording.length.tolist())
        ]
        batcher.run()
        return [request.tokens for request in requests]

    fixed = decoded(joining=False)
    log = replay(recording, Crowd(), "draft", batch=3)
    replayed = list(zip(log.position.tolist(), log.kept.tolist(), log.accepted.tolist(), strict=True))
    assert log.coverage == 1.0 and [cycle for row in sorted(seen) for cycle in seen[row]] == replayed
    assert len({cycle[1] for row in seen.values() for cycle in row}) > 1
    groups = len(crowds)
    assert decoded(joining=True) == fixed and len(crowds) <= groups


def test_a_request_that_is_stopped_makes_room(pair64, prompts):
    batcher = Batcher(decoder(pair64, "eagle3", TREE), batch=2)
    first, second, third, fourth = (batcher.submit(prompt, 30) for prompt in prompts[:4])
    batcher.stop(fourth)
    for request, _ in batcher.stream():
        if request is first and len(first.tokens) > 4:
            batcher.stop(first)
    plain = decoder(pair64, "draft", "autoregressive")
    whole = alone(plain, first)
    assert first.finish == "stopped" and first.tokens == whole[: len(first.tokens)] and 4 < len(first.tokens) < len(whole)
    assert second.tokens == alone(plain, second) and third.tokens == alone(plain, third)
    assert fourth.finish == "stopped" and not fourth.tokens
    batcher.stop(second)  # too late
    assert second.finish in ("end", "length")


def test_what_cannot_be_queued(pair64, prompts):
    batcher = Batcher(decoder(pair64, "draft", "chain(k=2)"))
    fine = batcher.submit(prompts[0], 4)
    for prompt, limit, named in (([], 4, "prompt 1 is empty"), ([5] * 256, 4, "shorten it"), (prompts[0], 0, "1 or more")):
        with pytest.raises(UserError, match=named):
            batcher.submit(prompt, limit)
    batcher.run()
    assert len(fine.tokens) == 4
    with pytest.raises(UserError, match="1 request or more"):
        Batcher(batcher.decoder, batch=0)


@pytest.fixture(scope="module")
def told(pair64, prompts) -> list[list[int]]:
    """What five prompts say alone, every other one sampled."""
    batcher = Batcher(decoder(pair64, "draft", "autoregressive"), batch=1)
    requests = [batcher.submit(prompt, 14, SAMPLED if index % 2 else Sampling()) for index, prompt in enumerate(prompts[:5])]
    batcher.run()
    assert [alone(batcher.decoder, request) for request in requests] == [request.tokens for request in requests]
    return [request.tokens for request in requests]


@pytest.mark.parametrize("name", all_policies())
def test_batched_text_is_the_text_whatever_the_policy(pair64, prompts, told, name):
    for place, spec in enumerate(SETTINGS.get(name, [name])[:2]):
        batcher = Batcher(decoder(pair64, ("eagle3", "draft")[place], spec), batch=3)
        requests = [batcher.submit(prompt, 14, SAMPLED if index % 2 else Sampling()) for index, prompt in enumerate(prompts[:5])]
        batcher.run()
        assert [request.tokens for request in requests] == told, spec
