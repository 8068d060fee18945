"""Targets with drafters and prompts, for benchmarks.lossless: a loaded pair, or tiny random models of each family."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from live.batcher import Batcher
from live.decode import SpeculativeDecoder
from live.distribution import log_probabilities
from live.lm_network import LanguageModelNetwork
from live.model import CachedModel
from live.network import DraftNetwork
from live.pair import encode_prompt, load_pair
from live.sampling import inverse_cdf, measured, process
from policies.autoregressive import Autoregressive
from policies.contract import Sampling
from policies.lookup.rule import Rule, load_rule
from policies.philox import uniform
from traces.prompts import load_prompts, sample_specs

RULE = "suffix"
"""The training-free drafter that every subject has."""


@dataclass
class Subject:
    """A target, what drafts for it, and prompts (token ids)."""

    name: str
    model: PreTrainedModel
    captured: tuple[int, ...]
    networks: dict[str, DraftNetwork | Rule]
    prompts: list[list[int]]
    ends: list[int]
    context_limit: int

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def target(self) -> CachedModel:
        """The target with a cache of its own."""
        return CachedModel(self.model, layers_to_capture=self.captured)

    def reference(self, sampling: Sampling, limit: int) -> list[list[int]]:
        """What the texts should be: at temperature 0 what ``model.generate`` says, else our plain loop, each text alone."""
        if sampling.temperature == 0:
            return [self._generated(prompt, limit) for prompt in self.prompts]
        plain = SpeculativeDecoder(self.target(), load_rule(RULE), Autoregressive(), self.ends, context_limit=self.context_limit)
        batcher = Batcher(plain, 1)
        requests = [batcher.submit(prompt, limit, sampling) for prompt in self.prompts]
        batcher.run()
        return [request.tokens for request in requests]

    def _generated(self, prompt: list[int], limit: int) -> list[int]:
        ids = torch.tensor([prompt], device=self.model.device)
        settings = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": 0, "eos_token_id": self.ends or None}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def margin(self, number: int, before: list[int], sampling: Sampling) -> float:
        """How unsure the target was of the token behind ``before`` in a text: the gap (nats) of its two best tokens, or how far
        the uniform number lay from choosing another one."""
        ids = torch.tensor([self.prompts[number] + before], device=self.model.device)
        logits = self.model(input_ids=ids).logits[:, -1]
        if sampling.temperature == 0:
            best, second = log_probabilities(logits)[0].topk(2).values.tolist()
            return best - second
        processed = process(logits, sampling)
        place = [torch.tensor([value], device=logits.device) for value in (int(sampling.seed), number, len(before))]
        u = uniform(*place)
        return float(measured(processed, u, inverse_cdf(processed.weight, u))[1])


def loaded(target: str, drafts: list[str], dtype: str, device: str, prompts: Sequence[str] | None, per_domain: int) -> Subject:
    """A pair from folders or hub ids, with prompts of each domain; see :func:`live.pair.load_pair` and its errors."""
    pair = load_pair(target, drafts, dtype, device)
    texts = [encode_prompt(pair.tokenizer, prompt.messages) for prompt in load_prompts(prompts or sample_specs(), limit=per_domain)]
    networks = pair.networks | {RULE: load_rule(RULE)}
    return Subject(target, pair.model, pair.captured, networks, texts, pair.end_tokens, pair.context_limit)


def tiny_subjects() -> Iterator[Subject]:
    """A random model of each family in float64, drafted for by itself with noise on its weights; prompts of random tokens."""
    from tests.live.tiny import FAMILIES, build

    for family in FAMILIES:
        model = build(family, torch.float64)
        draft = copy.deepcopy(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in draft.parameters():
                if weight.dim() > 1:
                    weight.add_(0.05 * torch.randn_like(weight) * weight.std())
        draw = torch.Generator().manual_seed(2)
        prompts = [torch.randint(0, 90, (length,), generator=draw).tolist() for length in (4, 11, 7, 19)]
        limit = CachedModel(model).context_limit
        networks = {"draft": LanguageModelNetwork(CachedModel(draft)), RULE: load_rule(RULE)}
        yield Subject(f"tiny {family}", model, (), networks, prompts, [], limit)
