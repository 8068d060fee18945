"""Speculative decoding inside Hugging Face's own ``generate``, through its hook for callables.

    model.generate(**inputs, custom_generate=live.speculate(draft="org/head", policy="eagle3"), max_new_tokens=128)

https://huggingface.co/docs/transformers/generation_strategies#custom-generation-methods: ``generate`` prepares inputs, logits
processors and stopping criteria, then calls us with the model in place of its own sampling loop.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from live.decode import LiveStep, SpeculativeDecoder
from live.hub import parse_source, resolve
from live.identity import check_same_tokenizer
from live.lm_network import LanguageModelNetwork
from live.loading import load_model, load_tokenizer
from live.model import CachedModel
from live.network import DraftNetwork
from live.pair import REFERENCE_DRAFTS, is_eagle3, load_eagle3
from policies.contract import Policy, Sampling
from policies.errors import UserError
from policies.registry import load_policy

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

_ORDER = (RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "cache_position"}
"""What ``generate`` itself prepares for its own loop, and ours does without or makes itself."""


def speculate(
    draft: str,
    policy: str | Policy,
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: list[str] | None = None,
    streamer: BaseStreamer | None = None,
) -> Callable:
    """What ``model.generate(custom_generate=...)`` takes; keep it, since the draft is loaded once per model.

    :param draft: folder or hub id of an EAGLE-3 head or a draft LM, with its options as in live/hub.py; "reference/eagle3" and
        "reference/draft" are the shipped ones.
    :param policy: name, name with parameters, JSON file, FILE.py:CLASS, or the object.
    :param seed: of sampled texts; drawn from torch's generator by default, so that ``torch.manual_seed`` rules.
    :param tokenizer: the target's. A draft LM's must be the same (default: the one that lies beside the model).
    :param stop_strings: end a text behind one of these (needs ``tokenizer``). ``generate`` drops the tokenizer that its own
        ``stop_strings`` need before it calls a callable; ``stopping_criteria`` reach us.
    :param streamer: for versions of ``generate`` from which we cannot take it.
    :raises UserError: when called, for whatever would change the text or is not covered, by name.
    """
    policy = load_policy(policy) if isinstance(policy, str) else policy
    policy.check_fitted()
    if stop_strings and tokenizer is None:
        raise UserError("stop_strings need the tokenizer: pass tokenizer=... to live.speculate as well")
    drafts: dict[int, tuple[PreTrainedModel, CachedModel, DraftNetwork, int]] = {}

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        told = streamer or model_kwargs.pop("streamer", None) or _streamer_of_caller()
        model_kwargs.pop("synced_gpus", None)
        _refuse(generation_config, model_kwargs)
        sampling = sampling_of(logits_processor, generation_config, seed)
        prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
        if told is not None and len(prompts) > 1:
            raise UserError("a streamer follows one text: stream with one prompt at a time")
        if id(model) not in drafts:
            drafts[id(model)] = model, *attach(model, draft, tokenizer)
        _, target, network, limit = drafts[id(model)]
        ends = generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        decoder = SpeculativeDecoder(target, network, policy, ends, context_limit=limit)
        criteria = [one for one in stopping_criteria if not isinstance(one, (EosTokenCriteria, MaxLengthCriteria))]
        if stop_strings:
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
        texts = _Texts(decoder, input_ids, criteria, told)
        done = decoder.generate(
            prompts,
            max(generation_config.max_length - input_ids.shape[1], 1),
            on_first=texts.first,
            on_step=texts.step,
            sampling=sampling,
        )
        if done.failed:
            raise UserError(next(iter(done.failed.values())))
        if done.draft_error:
            warnings.warn(f"the draft crashed ({done.draft_error}); {done.plain} cycles were decoded plainly", stacklevel=2)
        return texts.finish(generation_config)

    return custom_generate


class _Texts:
    """Collects the texts as they come, streams them, and ends those that a stopping criterion ends."""

    def __init__(self, decoder: SpeculativeDecoder, input_ids: Tensor, criteria: list, streamer: BaseStreamer | None):
        self.decoder, self.input_ids, self.criteria, self.streamer = decoder, input_ids, criteria, streamer
        self.new: list[list[int]] = [[] for _ in input_ids]
        self.stopped = [False] * len(input_ids)

    def first(self, tokens: Tensor) -> None:
        for row, token in enumerate(tokens.tolist()):
            self._put(row, [token])

    def step(self, step: LiveStep) -> None:
        for row, tokens, count in zip(step.row.tolist(), step.tokens.tolist(), step.gained.tolist(), strict=True):
            self._put(row, tokens[:count])

    def _put(self, row: int, tokens: list[int]) -> None:
        for token in tokens:  # a criterion may end the text inside a cycle
            if self.stopped[row]:
                return
            self.new[row].append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self.criteria:
                text = torch.cat([self.input_ids[row], self.input_ids.new_tensor(self.new[row])])[None]
                if any(bool(torch.as_tensor(criterion(text, None)).all()) for criterion in self.criteria):
                    self.stopped[row] = True
                    self.decoder.end(row)

    def finish(self, config: GenerationConfig) -> Tensor | GenerateDecoderOnlyOutput:
        """Sequences int64 [R, prompt + longest text], shorter texts filled up with the padding token."""
        if self.streamer is not None:
            self.streamer.end()
        longest, pad = max(map(len, self.new)), config.pad_token_id
        if pad is None:
            ends = config.eos_token_id
            pad = ends[0] if isinstance(ends, list) else ends or 0
        rows = [text + [pad] * (longest - len(text)) for text in self.new]
        sequences = torch.cat([self.input_ids, self.input_ids.new_tensor(rows)], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences


def sampling_of(processors: LogitsProcessorList, config: GenerationConfig, seed: int | None) -> Sampling:
    """Our settings for what ``generate`` prepared.

    :raises UserError: for a processor that we do not apply, or for one that comes in another order than Hugging Face's.
    """
    kinds = [type(one) for one in processors]
    for kind in kinds:
        if kind not in _ORDER:
            known = ", ".join(one.__name__ for one in _ORDER)
            raise UserError(f"speculative decoding does not apply {kind.__name__}: leave it out, or use one of {known}")
    if kinds != [kind for kind in _ORDER if kind in kinds]:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise UserError(f"the logits processors come twice or in an unusual order ({names}): set them as options of generate")
    by_kind = dict(zip(kinds, processors, strict=True))

    def setting(kind: type, name: str, default: float) -> float:
        return getattr(by_kind[kind], name) if kind in by_kind else default

    penalty = float(setting(RepetitionPenaltyLogitsProcessor, "penalty", 1.0))
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    top_p = float(setting(TopPLogitsWarper, "top_p", 1.0))
    top_k = int(setting(TopKLogitsWarper, "top_k", 0))
    return Sampling(float(setting(TemperatureLogitsWarper, "temperature", 1.0)), top_k, top_p, penalty, seed)


def unpadded(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding on the left. Raises UserError when the mask hides anything else."""
    if mask is None:
        return input_ids.tolist()
    shown = mask.bool()
    if shown.shape != input_ids.shape or bool((shown[:, :-1] & ~shown[:, 1:]).any()) or not bool(shown[:, -1].all()):
        raise UserError("the attention mask must hide padding on the left only: set padding_side='left' in the tokenizer")
    return [row[own].tolist() for row, own in zip(input_ids, shown, strict=True)]


def attach(
    model: PreTrainedModel, draft: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[CachedModel, DraftNetwork, int]:
    """The target with a cache, the draft network, and the context that both hold. Raises UserError when they do not fit."""
    source = parse_source(draft)
    shipped = source.name in REFERENCE_DRAFTS
    folder = resolve("reference", source.name.split("/")[1]) if shipped else resolve(source.name)
    if is_eagle3(folder, source.revision):
        network, layers = load_eagle3(folder, source, CachedModel(model))
        target = CachedModel(model, layers_to_capture=layers)
        return target, network, target.context_limit
    target = CachedModel(model)
    tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
    check_same_tokenizer(tokenizer, load_tokenizer(folder, source.revision))
    own = CachedModel(load_model(folder, model.dtype, target.device, source.revision, part="draft"))
    network = LanguageModelNetwork(own, source.name, model.get_input_embeddings().weight.shape[0])
    return target, network, min(target.context_limit, own.context_limit)


def _refuse(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    wants = {
        "num_beams": (config.num_beams or 1) > 1,
        "output_scores": config.output_scores,
        "output_logits": config.output_logits,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
    }
    asked = [name for name, wanted in wants.items() if wanted]
    asked += [name for name, value in model_kwargs.items() if name not in _PREPARED and value is not None]
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        asked.append("past_key_values")
    if asked:
        raise UserError(f"speculative decoding does not take {', '.join(asked)}: leave it out")


def _streamer_of_caller() -> BaseStreamer | None:
    """The streamer that ``generate`` was given.

    As of transformers 5.23 it hands the prompt to the streamer, then forgets it on the way to a callable
    (``_extract_generation_mode_kwargs`` makes its dictionary anew), while it still stands in its frame.
    """
    frame = sys._getframe(2)
    return frame.f_locals.get("streamer") if frame.f_code.co_name == "generate" else None
