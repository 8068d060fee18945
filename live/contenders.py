"""Who takes part in a live comparison: each policy, our own plain loop, and Hugging Face's ``generate``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from live.breakdown import Breakdown, Breaker
from live.decode import Decoded, SpeculativeDecoder
from live.decoding_plain import plain_decode
from live.model import CachedModel
from policies.contract import Sampling

if TYPE_CHECKING:
    from live.pair import Pair
    from policies.contract import Policy
    from policies.cost import Cost
    from traces.recording import Recording

Contender = Callable[[int], tuple[int, int, float]]
"""Decodes one recorded prompt: (tokens after the first, target calls for them, milliseconds without prefill)."""


def contenders(
    recording: Recording, pair: Pair, policies: list[Policy], drafter: str, cost: Cost | None
) -> dict[str, Contender]:
    """Everyone by name, decoding the recording's prompts up to their recorded lengths."""

    def prompt(text: int) -> list[int]:
        return recording.prompt_tokens(text).tolist()

    def sampling(text: int) -> Sampling:
        return Sampling(**recording.sampling(text))

    def speculative(policy: Policy) -> Contender:
        decoder = decoder_of(recording, pair, policy, drafter, cost)

        def decode(text: int) -> tuple[int, int, float]:
            done = decode_text(decoder, recording, text)
            return len(done.tokens[0]) - 1, done.cycles[0], done.decode_ms

        return decode

    def plain_loop(text: int) -> tuple[int, int, float]:
        clock: list[float] = []
        target.reset(1)
        limit = int(recording.length[text])
        tokens = plain_decode(
            target,
            [prompt(text)],
            limit,
            pair.end_tokens,
            lambda *_: clock.append(time.perf_counter()),
            sampling(text),
            [int(recording.uniform_keys[text])],
        )
        return len(tokens[0]) - 1, len(tokens[0]) - 1, 1e3 * (clock[-1] - clock[0])

    @torch.inference_mode()  # as our own loops: it is worth a tenth of a small model's token
    def generate(text: int) -> tuple[int, int, float]:
        ids = torch.tensor([prompt(text)], device=pair.model.device)
        streamer = _Clock()
        pair.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=int(recording.length[text]),
            pad_token_id=0,
            streamer=streamer,
            **as_generate_takes_it(recording.sampling(text), int(recording.length[text])),
        )
        count = len(streamer.times) - 2  # the prompt comes first, then the token that prefill gives
        return count, count, 1e3 * (streamer.times[-1] - streamer.times[1])

    target = CachedModel(pair.model)
    everyone = {policy.spec(): speculative(policy) for policy in policies}
    return everyone | {"plain loop": plain_loop, "model.generate": generate}


def decoder_of(
    recording: Recording, pair: Pair, policy: Policy, drafter: str, cost: Cost | None
) -> SpeculativeDecoder:
    """A live decoder of the recording's texts under a policy."""
    limit = recording.manifest["context_limit"]
    drafts = pair.draft(drafter)
    return SpeculativeDecoder(pair.target(drafter=drafts), drafts, policy, pair.end_tokens, cost, limit)


def decode_text(
    decoder: SpeculativeDecoder, recording: Recording, text: int, on_first: Callable[[torch.Tensor], None] | None = None
) -> Decoded:
    """A recorded prompt decoded up to its recorded length, sampled as it was recorded."""
    number = torch.tensor([recording.uniform_keys[text]])
    prompt, length = recording.prompt_tokens(text).tolist(), int(recording.length[text])
    return decoder.generate([prompt], length, on_first=on_first, sampling=Sampling(**recording.sampling(text)), text=number)


def break_down(
    recording: Recording, pair: Pair, policies: list[Policy], drafter: str, cost: Cost | None, texts: list[int]
) -> dict[str, Breakdown]:
    """Where the time of each policy's cycles goes, by its spec; policies take turns text by text, prefill excluded."""
    decoders = {policy.spec(): decoder_of(recording, pair, policy, drafter, cost) for policy in policies}
    found: dict[str, Breakdown] = {}
    for turn, text in enumerate([texts[0], *texts]):  # the first turn warms up
        for name, decoder in decoders.items():
            with Breaker(decoder).watching() as breaker:
                done = decode_text(decoder, recording, text, on_first=lambda _, begin=breaker.begin: begin())
                part = breaker.end(done.cycles[0])
            if turn:
                found[name] = found[name] + part if name in found else part
    return found


def as_generate_takes_it(sampling: dict[str, Any], length: int) -> dict[str, Any]:
    """Options of ``generate``. A sampled text differs from ours (it draws other numbers), so it is held to the same length."""
    penalty = {"repetition_penalty": sampling["repetition_penalty"]}
    if sampling["temperature"] == 0:
        return {"do_sample": False} | penalty
    chosen = {name: sampling[name] for name in ("temperature", "top_k", "top_p")}
    return {"do_sample": True, "min_new_tokens": length} | chosen | penalty


class _Clock(BaseStreamer):
    """Notes when ``generate`` hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
